"""Arithmetic on several adapters' deltas, as in `peft.utils.merge_utils`: they are task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils import merge_utils

from .config import SurgicalConfig
from .errors import AdapterError

COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def check_combination(
    configs: dict[str, SurgicalConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination: str,
    density: float | None,
) -> None:
    """Raise `AdapterError` unless these adapters can be combined so; see `SurgicalModel.add_weighted_adapter`."""
    missing = [adapter for adapter in adapters if adapter not in configs]
    if missing or not adapters:
        raise AdapterError(f"No adapter {', '.join(missing) or 'given'}; there are {', '.join(configs)}.")
    if name in configs:
        raise AdapterError(f"An adapter {name!r} exists already: choose another name or delete it first.")
    if len(adapters) != len(weights):
        raise AdapterError(f"{len(adapters)} adapters but {len(weights)} weights: give one weight per adapter.")
    if combination not in COMBINATIONS:
        raise AdapterError(f"combination_type={combination!r}: choose one of {', '.join(COMBINATIONS)}.")
    if combination != "linear" and (density is None or not 0 <= density <= 1):
        raise AdapterError(f"combination_type={combination!r} needs a density in [0, 1], got {density}.")
    moving = [adapter for adapter in adapters if configs[adapter].norm_stats != "frozen"]
    if moving:
        raise AdapterError(
            f"{', '.join(moving)} carry statistics, which do not add up; combine frozen-policy adapters."
        )
    whole = [adapter for adapter in adapters if configs[adapter].modules_to_save]
    if whole:
        raise AdapterError(f"{', '.join(whole)} carry modules_to_save, which are no deltas and cannot be combined.")


def combine(
    tensors: list[torch.Tensor], weights: torch.Tensor, combination: str, density: float | None, sign: str
) -> torch.Tensor:
    """Combine one tensor's deltas, all of one shape, with one weight each."""
    if combination == "linear":
        return merge_utils.task_arithmetic(tensors, weights)
    if combination == "ties":
        return merge_utils.ties(tensors, weights, density, sign)
    if combination == "dare_ties":
        return merge_utils.dare_ties(tensors, weights, density, sign)
    function = merge_utils.dare_linear if combination == "dare_linear" else merge_utils.magnitude_prune
    return function(tensors, weights, density)
