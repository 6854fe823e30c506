"""The normalisation-statistics policy: whose running means and variances move, and when.

A pretrained BatchNorm carries statistics of the source data. In ``train()`` mode it replaces them, tuned or not, which
is PEFT's best-known way to reload another model than the one that was evaluated: the frozen modules' statistics drift
and are not part of the adapter. Here a module's statistics move only while an adapter that owns (and saves) them is
active; otherwise the module normalises with the source statistics whatever mode the model is in, as the paper's
reference code does by leaving the network in ``eval()``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn

from .errors import ConfigError
from .specialise import Special, specialise

NormPolicy = Literal["frozen", "target", "all"]
"""``frozen``: no statistics move. ``target``: those of modules with a targeted tensor. ``all``: every module's."""

_MARKS = ("running_mean", "running_var")


def check_policy(policy: str) -> None:
    """Raise `ConfigError` unless ``policy`` is one of the three."""
    if policy not in get_args(NormPolicy):
        raise ConfigError(f"norm_stats={policy!r} is not a policy: choose one of {', '.join(get_args(NormPolicy))}.")


def has_statistics(module: nn.Module) -> bool:
    """Whether ``module`` keeps running statistics: BatchNorm, InstanceNorm with tracking, timm's and others' kin.

    Recognised by their buffers rather than by class, because every library brings norm classes of its own.
    """
    return any(module._buffers.get(mark) is not None for mark in _MARKS)


def statistics_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the buffers that a norm module updates in training, e.g. running_mean, num_batches_tracked."""
    if not has_statistics(module):
        return ()
    hidden = module._non_persistent_buffers_set
    return tuple(name for name, value in module._buffers.items() if value is not None and name not in hidden)


def moving_statistics(policy: NormPolicy, modules: Iterable[tuple[str, nn.Module]], targeted: set[str]) -> list[str]:
    """The full names of the statistics that an adapter with this policy owns.

    Args:
        policy: The adapter's ``norm_stats``.
        modules: ``model.named_modules()``.
        targeted: Paths of the modules of which at least one tensor (parameter or buffer) is targeted.
    """
    if policy == "frozen":
        return []
    return [
        f"{path}.{name}" if path else name
        for path, module in modules
        if policy == "all" or path in targeted
        for name in statistics_of(module)
    ]


class HoldsStatistics(Special):
    """Trait of a norm module that uses its stored statistics unless an active adapter owns them.

    The mode is derived whenever the module asks for it, so neither a later ``model.train()`` nor a switch of adapters
    can leave it wrong, and transformers' own ``add_adapter``, which keeps no tuner around, obeys it as well.
    """

    @property
    def training(self) -> bool:
        """False while the statistics are held, whatever mode was set; children (timm's act, drop) keep their own."""
        if not self.__dict__["training"]:
            return False
        surgery = self.__dict__["_modules"].get("surgery")
        return surgery is not None and surgery.statistics_move()

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode


def hold_statistics(model: nn.Module) -> None:
    """Make every norm module of ``model`` hold its statistics; see `HoldsStatistics`."""
    for module in model.modules():
        if has_statistics(module):
            specialise(module, HoldsStatistics)
