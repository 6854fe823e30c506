"""The methods that the paper compares, each one row of `METHODS`: a target, a schedule and a penalty.

A schedule gives each tensor's factor of the learning rate as a pure function of progress: 0 freezes the tensor for the
step, 1 trains it at the optimizer's own rate. It holds no state, so a run that is resumed in the middle does what the
uninterrupted one does. A penalty keeps tuned weights near the pretrained ones; with live deltas the distance from the
pretrained weights is the delta itself, so L1-SP and L2-SP need no copy of the pretrained network. `pace.Pace` applies
both to an optimizer. Surgical fine-tuning has no row: any target (``block1``, ``block2-3 + head``) is a method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from ..blocks import Anatomy, parse
from ..errors import ConfigError, TargetError
from .penalties import Penalty, SelectiveDecay
from .scores import BlockScores


@dataclass(frozen=True)
class Progress:
    """Where training is: optimizer steps done, those of the whole run, and passes over the data done."""

    step: int
    total_steps: int
    epoch: int = 0

    @property
    def share(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(self.step / max(self.total_steps, 1), 1.0)


class Schedule(Protocol):
    """What `pace.Pace` and the callback run."""

    @property
    def criterion(self) -> str | None:
        """The criterion whose scores the schedule needs at the start of each epoch, or None."""

    def factors(self, progress: Progress, scores: BlockScores | None) -> Mapping[str, float]:
        """Tensor -> factor of the learning rate, in [0, 1]; tensors that are left out keep the full rate."""


@dataclass(frozen=True)
class GradualUnfreezing:
    """Blocks join one after the other, each after an equal share of the run, and stay (paper, Sec. 4.1).

    Attributes:
        blocks: The tensors of each block, in the order in which they join.
    """

    blocks: tuple[tuple[str, ...], ...]
    criterion: None = None

    def factors(self, progress: Progress, scores: BlockScores | None = None) -> dict[str, float]:
        """See `Schedule`."""
        joined = int(progress.share * len(self.blocks)) + 1
        return {name: float(i < joined) for i, block in enumerate(self.blocks) for name in block}


def gradual_unfreezing(
    anatomy: Anatomy, order: Literal["first-to-last", "last-to-first"] = "last-to-first"
) -> GradualUnfreezing:
    """Gradual unfreezing of all blocks of a network; last-to-first is Howard & Ruder 2018's."""
    if order not in ("first-to-last", "last-to-first"):
        raise ConfigError(f"order={order!r}: choose first-to-last or last-to-first")
    blocks = tuple(block.tensors for block in anatomy)
    return GradualUnfreezing(blocks if order == "first-to-last" else blocks[::-1])


@dataclass(frozen=True)
class HeadFirst:
    """LP-FT (Kumar et al. 2022): linear probing, then everything.

    Attributes:
        others: All tensors but the head's: frozen during the first ``share`` of the run.
        share: Share of the run in which only the head is trained, in (0, 1).
    """

    others: tuple[str, ...]
    share: float = 0.5
    criterion: None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share}: the head trains alone for a share of the run between 0 and 1")

    def factors(self, progress: Progress, scores: BlockScores | None = None) -> dict[str, float]:
        """See `Schedule`."""
        return dict.fromkeys(self.others, float(progress.share >= self.share))


@dataclass(frozen=True)
class Alternating:
    """Two parts of a network are trained in turn, each for an epoch.

    So knowledge-guided neural networks (KGNN) that were trained on simulations are tuned to few observations, encoder
    and decoder alternately, lest what the encoder has learned is distorted. Here these are all before the head, which
    begins, and the head; classifiers have no other decoder.

    Attributes:
        parts: The tensors of each part, in the order in which they take turns.
    """

    parts: tuple[tuple[str, ...], ...]
    criterion: None = None

    def factors(self, progress: Progress, scores: BlockScores | None = None) -> dict[str, float]:
        """See `Schedule`."""
        turn = progress.epoch % len(self.parts)
        return {name: float(i == turn) for i, part in enumerate(self.parts) for name in part}


def alternating(anatomy: Anatomy) -> Alternating:
    """The head, and all that is before it, in turns."""
    head = anatomy["head"].tensors
    return Alternating((tuple(name for name in anatomy.tensors if name not in set(head)), head))


def lp_ft(anatomy: Anatomy, share: float = 0.5) -> HeadFirst:
    """LP-FT for a network with a head."""
    head = set(anatomy["head"].tensors)
    return HeadFirst(tuple(name for name in anatomy.tensors if name not in head), share)


@dataclass(frozen=True)
class AutoRGN:
    """Auto-RGN (paper, Sec. 4.1): each tensor's rate is the base rate times its RGN over the largest RGN.

    Attributes:
        left_out: Tensors that are not trained at all; the reference code leaves out those with "bn" in their name.
    """

    left_out: frozenset[str] = frozenset()
    criterion: str = "rgn"

    def factors(self, progress: Progress, scores: BlockScores | None) -> dict[str, float]:
        """See `Schedule`."""
        assert scores is not None
        return normalised({name: 0.0 if name in self.left_out else s for name, s in scores.tensor_scores.items()})


@dataclass(frozen=True)
class AutoSNR:
    """Auto-SNR (paper, Sec. 4.1): tensors whose SNR over the largest is below a threshold are frozen for the epoch.

    Attributes:
        threshold: In [0, 1]; the paper tunes it like a learning rate, on validation data. At least 0 where SNRs are
            compared as they are.
        criterion: ``snr``, or ``snr-reference`` for what the reference code computes.
        scaled: Whether SNRs are divided by the largest, as in the paper; its reference code compares them as they are.
        left_out: Tensors that are not trained at all.
    """

    threshold: float = 0.5
    criterion: str = "snr"
    scaled: bool = True
    left_out: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.scaled and not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold}: SNRs are compared after scaling to [0, 1]")
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"threshold={self.threshold}: give a number of at least 0")

    def factors(self, progress: Progress, scores: BlockScores | None) -> dict[str, float]:
        """See `Schedule`."""
        assert scores is not None
        found = {name: score for name, score in scores.tensor_scores.items() if name not in self.left_out}
        compared = normalised(found) if self.scaled else found
        return {name: float(compared.get(name, -1.0) >= self.threshold) for name in scores.tensor_scores}


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores divided by the largest, so that they lie in [0, 1]; all 1 where every score is 0."""
    largest = max(scores.values(), default=0.0)
    return {name: score / largest if largest > 0 else 1.0 for name, score in scores.items()}


# --- methods ---


@dataclass(frozen=True)
class Method:
    """One way to adapt a network.

    Attributes:
        name: As users write it.
        target: What its adapter tunes.
        schedule: (anatomy, options) -> its schedule.
        penalty: Options -> its penalty.
        reset_moments: Whether the optimizer's state is forgotten at every epoch.
        balanced: Whether it trains on equally many images of every class.
        optimizer: Name of the optimizer that the method prescribes; None for any.
        solved: Whether it is no run of Trainer's: the head on its features, by `training.logistic.solve_head` or
            `training.private.private_head`.
        options: Names and defaults of its own settings.
    """

    name: str
    target: str
    schedule: Callable[[Anatomy, dict[str, Any]], Schedule] | None = None
    penalty: Callable[[dict[str, Any]], Penalty | SelectiveDecay] | None = None
    reset_moments: bool = False
    balanced: bool = False
    optimizer: str | None = None
    solved: bool = False
    options: tuple[tuple[str, float], ...] = ()

    def settings(self, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """The method's options with their defaults.

        Raises:
            ConfigError: An option that it does not have.
        """
        known = dict(self.options)
        if unknown := sorted(set(given or {}) - set(known)):
            raise ConfigError(f"{self.name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
        return known | (given or {})


def _named_bn(anatomy: Anatomy) -> frozenset[str]:
    # What the reference code leaves out, by the name alone: the BatchNorms of its CIFAR network.
    return frozenset(name for name in anatomy.tensors if "bn" in name)


LOGISTIC, PRIVATE_HEAD = "logistic-head", "dp-head"
METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("full", "all"),
        Method("linear-probe", "head"),
        Method(LOGISTIC, "head", solved=True),
        # Noisy gradient descent on the last layer: Wang et al. 2024, ICML.
        Method(PRIVATE_HEAD, "head", solved=True, options=(("epsilon", 8.0),)),
        Method("gradual-first-last", "all", lambda a, _: gradual_unfreezing(a, "first-to-last")),
        Method("gradual-last-first", "all", lambda a, _: gradual_unfreezing(a)),
        Method("l1-sp", "all", penalty=lambda o: Penalty("l1-sp", **o), options=(("strength", 1e-4),)),
        Method("l2-sp", "all", penalty=lambda o: Penalty("l2-sp", **o), options=(("strength", 1e-2),)),
        Method("spd", "all", penalty=lambda o: SelectiveDecay(**o), options=(("strength", 1.0),)),
        Method("lp-ft", "all", lambda a, o: lp_ft(a, **o), options=(("share", 0.5),)),
        Method("alternating", "all", lambda a, _: alternating(a)),
        Method("auto-rgn", "all", lambda a, _: AutoRGN()),
        # The paper's reference code makes a new Adam every epoch; auto-rgn-reset measures what that alone does.
        Method("auto-rgn-reset", "all", lambda a, _: AutoRGN(), reset_moments=True),
        Method("auto-rgn-reference", "all", lambda a, _: AutoRGN(_named_bn(a)), reset_moments=True),
        Method("auto-snr", "all", lambda a, o: AutoSNR(**o), options=(("threshold", 0.3),)),
        Method(
            "auto-snr-reference",
            "all",
            lambda a, o: AutoSNR(criterion="snr-reference", scaled=False, left_out=_named_bn(a), **o),
            reset_moments=True,
            options=(("threshold", 0.95),),
        ),
        # Kumar et al. 2022b, arXiv 2211.09359; last-layer retraining, Kirichenko et al. 2023.
        Method("freeze-embed", "all - stem", optimizer="sgd"),
        Method("dfr", "head", balanced=True),
    )
}


def _with_option(row: Method, number: str) -> Method:
    name = f"{row.name}@{number}"
    if len(row.options) != 1:
        having = [f"{other.name} ({other.options[0][0]})" for other in METHODS.values() if other.options]
        raise ConfigError(f"{name!r}: {row.name} has no option; those that have one are {', '.join(having)}")
    try:
        return replace(row, name=name, options=((row.options[0][0], float(number)),))
    except ValueError as error:
        raise ConfigError(
            f"{name!r}: {row.options[0][0]} is a number, such as {row.name}@{row.options[0][1]}"
        ) from error


def method_of(name: str) -> Method:
    """The row of a method, or surgical fine-tuning of the target of this name.

    ``auto-snr@0.5`` is the method auto-snr with the number as its option, for those that have one.

    Raises:
        ConfigError: The name is neither a method nor a target, or the method has no such option.
    """
    if name in METHODS:
        return METHODS[name]
    method, _, number = name.partition("@")
    if number and method in METHODS:
        return _with_option(METHODS[method], number)
    if name == "none":
        raise ConfigError("'none' trains nothing: evaluate the base itself")
    try:
        spec = parse(name)
    except TargetError as error:
        raise ConfigError(f"{name!r} is no method ({', '.join(METHODS)}) and no target: {error}") from error
    if spec.needs_data:
        raise ConfigError(f"{name!r} is a search over methods, not one: see peft_surgical.training.search")
    return Method(name, str(spec))
