"""BatchNorms that normalise with other statistics than the running ones, for as long as a context lasts.

Two published ways to adapt without a label: TENT (Wang et al. 2021) normalises with the statistics of the test batch,
MEMO's variant for BatchNorm networks (Zhang et al. 2022, after Schneider et al. 2020) with a mixture of those and the
source's. In neither does a running statistic change: within the context a module has a subclass of its own class,
which reads its statistics elsewhere (compare `specialise`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError
from ..keys import HOLDER


class _ReadsBatch:
    """Has no running statistics, so that PyTorch takes the batch's in ``eval()``, too, and writes none."""

    running_mean = running_var = None


class _ReadsMixture:
    """Normalises with prior * source + (1 - prior) * batch; the batch's part carries no gradient, as in MEMO's code."""

    _mixing: dict[str, Any]
    running_mean = property(lambda self: self._mixing["mean"])
    running_var = property(lambda self: self._mixing["var"])

    def forward(self, input: Tensor) -> Any:
        """Mix the statistics, of which the batch's variance is the unbiased one; then the module's own forward."""
        mixing = self._mixing
        dims = [dim for dim in range(input.ndim) if dim != 1]
        with torch.no_grad():
            var, mean = torch.var_mean(input, dims)
            mixing["mean"] = torch.lerp(mean.to(mixing["source_mean"].dtype), mixing["source_mean"], mixing["prior"])
            mixing["var"] = torch.lerp(var.to(mixing["source_var"].dtype), mixing["source_var"], mixing["prior"])
        return super().forward(input)  # type: ignore[misc]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, every BatchNorm of ``model`` normalises with the statistics of its batch, in any mode.

    Running statistics stay as they are, with one exception: those that an active, trainable adapter owns
    (``norm_stats="target"`` or ``"all"``) follow the batches as in training, and are saved with the adapter. Other
    norms, among them InstanceNorm, are left alone.
    """
    norms = batchnorms(model)
    owners = [module for module in norms if is_owned(module)]
    modes = [vars(module)["training"] for module in owners]
    with _specialised([module for module in norms if not is_owned(module)], _ReadsBatch):
        try:
            for module in owners:
                module.training = True
            yield
        finally:
            for module, mode in zip(owners, modes, strict=True):
                module.training = mode


def prior_share(strength: float) -> float:
    """N / (N + 1), the weight of the source's statistics.

    Raises:
        ConfigError: If N, the ``strength``, is negative or not a finite number.
    """
    if not 0 <= strength < float("inf"):
        raise ConfigError(f"prior_strength={strength}: give 0 or more, the number of images that the source counts for")
    return strength / (strength + 1)


@contextmanager
def mixed_statistics(model: nn.Module, strength: float) -> Iterator[None]:
    """Within it, every BatchNorm normalises with N / (N + 1) of its own statistics and 1 / (N + 1) of the input's.

    Args:
        model: Its running statistics stay as they are.
        strength: N, the number of inputs that the source counts for; MEMO takes 16 for ResNet-50.

    Raises:
        ConfigError: As `prior_share`.
    """
    prior, norms = prior_share(strength), batchnorms(model)
    for module in norms:
        sources = {"source_mean": module.running_mean, "source_var": module.running_var}
        module.__dict__["_mixing"] = {"prior": prior, **sources}
    try:
        with _specialised(norms, _ReadsMixture):
            yield
    finally:
        for module in norms:
            module.__dict__.pop("_mixing", None)


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms of ``model`` that have running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def is_owned(module: nn.Module) -> bool:
    """Whether an active, trainable adapter owns the running statistics of this norm."""
    holder: Any = module._modules.get(HOLDER)
    return holder is not None and holder.statistics_move()


@contextmanager
def _specialised(modules: Sequence[Any], trait: type) -> Iterator[None]:
    classes: list[Any] = [type(module) for module in modules]
    try:
        for module, before in zip(modules, classes, strict=True):
            module.__class__ = _with(trait, before)
        yield
    finally:
        for module, before in zip(modules, classes, strict=True):
            module.__class__ = before


@functools.cache
def _with(trait: type, base: Any) -> Any:
    return type(base.__name__, (trait, base), {"__module__": base.__module__, "__doc__": base.__doc__})
