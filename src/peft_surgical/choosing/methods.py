"""The methods that the paper compares, each as one row: what is tuned, on which schedule, with which penalty.

``surgical`` methods are not rows: any target (``block1``, ``block2-3 + head``) is a method of its own, see `method_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..blocks import Anatomy, parse
from ..errors import ConfigError, TargetError
from .penalties import Penalty
from .schedules import AutoRGN, AutoSNR, Schedule, gradual_unfreezing, lp_ft


@dataclass(frozen=True)
class Method:
    """One way to adapt a network.

    Attributes:
        name: As users write it.
        target: What an adapter for it tunes.
        schedule: Anatomy and options -> its schedule.
        penalty: Options -> its penalty.
        reset_moments: Whether the optimizer's state is forgotten at every epoch.
        balanced: Whether it trains on equally many images of every class (or group).
        optimizer: The optimizer that it prescribes; None for any.
        options: Names and defaults of its own settings.
        source: Where it is from.
    """

    name: str
    target: str
    schedule: Callable[[Anatomy, dict[str, Any]], Schedule] | None = None
    penalty: Callable[[dict[str, Any]], Penalty] | None = None
    reset_moments: bool = False
    balanced: bool = False
    optimizer: str | None = None
    options: tuple[tuple[str, float], ...] = ()
    source: str = ""

    def settings(self, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """The method's options with their defaults.

        Raises:
            ConfigError: An option that it does not have.
        """
        known = dict(self.options)
        if unknown := sorted(set(given or {}) - set(known)):
            raise ConfigError(f"{self.name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        return known | (given or {})


def _norms(anatomy: Anatomy) -> frozenset[str]:
    """Affine parameters of norms with statistics, which the reference code's Auto-RGN leaves out."""
    owners = {name.rpartition(".")[0] for name in anatomy.tensors if name.endswith("running_mean")}
    return frozenset(name for name in anatomy.tensors if name.rpartition(".")[0] in owners)


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("full", "all", source="full fine-tuning"),
        Method("linear-probe", "head", source="linear probing"),
        Method(
            "gradual-first-last",
            "all",
            lambda anatomy, options: gradual_unfreezing(anatomy, "first-to-last"),
            source="paper, Sec. 3.1",
        ),
        Method(
            "gradual-last-first",
            "all",
            lambda anatomy, options: gradual_unfreezing(anatomy, "last-to-first"),
            source="Howard & Ruder 2018; paper, Sec. 3.1",
        ),
        Method(
            "l1-sp",
            "all",
            penalty=lambda options: Penalty("l1-sp", options["strength"]),
            options=(("strength", 1e-4),),
            source="Xuhong et al. 2018",
        ),
        Method(
            "l2-sp",
            "all",
            penalty=lambda options: Penalty("l2-sp", options["strength"]),
            options=(("strength", 1e-2),),
            source="Xuhong et al. 2018",
        ),
        Method(
            "lp-ft",
            "all",
            lambda anatomy, options: lp_ft(anatomy, options["share"]),
            options=(("share", 0.5),),
            source="Kumar et al. 2022",
        ),
        Method("auto-rgn", "all", lambda anatomy, options: AutoRGN(), source="paper, Sec. 4.1"),
        Method(
            "auto-rgn-reset",
            "all",
            lambda anatomy, options: AutoRGN(),
            reset_moments=True,
            source="auto-rgn with the reference code's new Adam every epoch, to measure what that does",
        ),
        Method(
            "auto-rgn-reference",
            "all",
            lambda anatomy, options: AutoRGN(left_out=_norms(anatomy)),
            reset_moments=True,
            source="the paper's reference code: a new Adam every epoch, BatchNorm left out",
        ),
        Method(
            "auto-snr",
            "all",
            lambda anatomy, options: AutoSNR(options["threshold"]),
            options=(("threshold", 0.3),),
            source="paper, Sec. 4.1",
        ),
        Method(
            "auto-snr-reference",
            "all",
            lambda anatomy, options: AutoSNR(options["threshold"], "snr-reference"),
            reset_moments=True,
            options=(("threshold", 0.5),),
            source="the paper's reference code: variance along the first axis, a new Adam every epoch",
        ),
        Method("freeze-embed", "all - stem", optimizer="sgd", source="Kumar et al. 2022b, arXiv 2211.09359"),
        Method("dfr", "head", balanced=True, source="last-layer retraining on balanced data, Kirichenko et al. 2023"),
    )
}


def method_of(name: str) -> Method:
    """The row of a method, or the surgical method that tunes a target of this text.

    Raises:
        ConfigError: It is neither.
    """
    if name in METHODS:
        return METHODS[name]
    if name == "none":
        raise ConfigError("'none' trains nothing: evaluate the base itself")
    try:
        spec = parse(name)
    except TargetError as error:
        raise ConfigError(f"{name!r} is no method ({', '.join(METHODS)}) and no target: {error}") from error
    if spec.needs_data:
        raise ConfigError(f"{name!r} is a search over methods, not one: see peft_surgical.training.search")
    return Method(name, str(spec), source="surgical fine-tuning (paper)")
