"""The metrics by which runs are chosen and reported, by name: `evaluation`'s, with groups where they need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from . import metrics
from .intervals import Interval, wilson_interval

Judge = Callable[[Tensor, Tensor, Tensor], float]

JUDGES: Mapping[str, Judge] = {
    "accuracy": lambda scores, labels, groups: metrics.accuracy(scores, labels),
    "worst_group_accuracy": metrics.worst_group_accuracy,
    "average_group_accuracy": metrics.average_group_accuracy,
}
"""Name -> logits (n, classes) or classes (n,), labels (n,), groups (n,) -> a fraction. A further metric is a row."""


def check_metrics(names: Sequence[str]) -> None:
    """Refuse names that are no metrics.

    Raises:
        ConfigError: Names them.
    """
    if not names or not set(names) <= set(JUDGES):
        raise ConfigError(f"metrics={list(names)}: name one or more of {', '.join(JUDGES)}; the first one selects")


def judge(names: Sequence[str], scores: Tensor, labels: Tensor, groups: Tensor | None) -> dict[str, float]:
    """Name -> value, each a fraction.

    Args:
        names: Of `JUDGES`.
        scores: Logits (n, classes) or predicted classes (n,).
        labels: int64 (n,).
        groups: int64 (n,), or None where there are none.

    Raises:
        DataError: A metric of groups without groups, or as the metrics in `evaluation`.
    """
    if groups is None:
        if needy := [name for name in names if "group" in name]:
            raise DataError(f"{needy[0]} needs the group of every image: the data has no column 'group'")
        groups = torch.zeros_like(labels)
    return {name: JUDGES[name](scores, labels, groups) for name in names}


def interval_of(name: str, scores: Tensor, labels: Tensor, groups: Tensor | None) -> tuple[Interval, int]:
    """The 95% interval of one run's metric over the images it was measured on, and how many these were.

    Accuracies have Wilson's interval; that of the worst group is of its own images, as if it had been named beforehand.
    The mean over groups has the limits of every group combined by MOVER (Zou & Donner 2008, Stat. Med. 27:1693).

    Args:
        name: Of `JUDGES`.
        scores: As for `judge`.
        labels: As for `judge`.
        groups: As for `judge`.
    """
    value = judge([name], scores, labels, groups)[name]
    if groups is None or name == "accuracy":
        return wilson_interval(round(value * len(labels)), len(labels)), len(labels)
    each = metrics.group_accuracies(scores, labels, groups)
    sizes = {group: int((groups == group).sum()) for group in each}
    limits = {group: wilson_interval(round(each[group] * sizes[group]), sizes[group]) for group in each}
    if name == "worst_group_accuracy":
        worst = min(each, key=lambda group: each[group])
        return limits[worst], sizes[worst]
    below = math.sqrt(sum((one.value - one.low) ** 2 for one in limits.values())) / len(each)
    above = math.sqrt(sum((one.high - one.value) ** 2 for one in limits.values())) / len(each)
    return Interval(value, max(0.0, value - below), min(1.0, value + above)), len(labels)


def tolerant(logits: Tensor) -> Tensor:
    """Predicted classes (n,); -1, which is no class, where a logit is NaN.

    For choosing: a candidate that diverged is to lose to the others, not to end the search.
    """
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))
