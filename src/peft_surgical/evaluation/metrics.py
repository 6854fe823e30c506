"""Accuracy and accuracy by group, their confidence intervals, and the table of metrics by name: pure functions.

Accuracies and errors are fractions in [0, 1]; percent appears only where text is printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError

# --- predictions ---


def predict_logits(model: nn.Module, inputs: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (n, classes) on the CPU, computed in ``eval()`` without gradients; the modes are restored after.

    Args:
        model: Maps a batch of inputs to logits (n, classes), or returns them as ``.logits``.
        inputs: (n, ...) on any device; moved to the model's, batch by batch.
        batch_size: Part of the arithmetic: kernels may differ in the last bit between batch sizes, so compare logits
            bit for bit only at the same one.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            outputs = [model(batch.to(device)) for batch in inputs.split(batch_size)]
    finally:
        # Module by module: a single train() would also wake modules that their owner had put into eval.
        for module, training in modes.items():
            module.training = training
    return torch.cat([getattr(output, "logits", output).cpu() for output in outputs])


def predicted_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """The predicted classes (n,) of as many examples as there are labels, which may be none.

    Args:
        scores: Logits (n, classes), of which the first largest counts, or predicted classes (n,).
        labels: int64 (n,).

    Raises:
        DataError: If the shapes do not fit, a score is NaN, or a predicted class is no whole number.
    """
    predictions = scores.argmax(1) if scores.ndim == 2 and scores.shape[1] else scores
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise DataError(
            f"scores of shape {tuple(scores.shape)} do not fit labels of shape {tuple(labels.shape)}: "
            "pass logits (n, classes) or predictions (n,), and labels (n,)"
        )
    if scores.is_floating_point() and scores.isnan().any():
        raise DataError("the scores hold NaN: the model diverged; lower the learning rate or check the input's scale")
    if predictions.is_floating_point() and (broken := predictions[predictions != predictions.round()]).numel():
        raise DataError(f"{float(broken[0])} is no predicted class: pass logits (n, classes) or whole numbers (n,)")
    return predictions


def tolerant(logits: Tensor) -> Tensor:
    """Predicted classes (n,); -1, which is no class, where a logit is NaN.

    For choosing: a candidate that diverged has to lose to the others instead of ending the search.
    """
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


# --- metrics ---


def _correct(scores: Tensor, labels: Tensor) -> Tensor:
    predictions = predicted_classes(scores, labels)
    if not len(labels):
        raise DataError("no examples to evaluate on: check the split or the filter that made this set")
    return predictions == labels


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of correct predictions, a fraction.

    Args:
        scores: Logits (n, classes), of which the first largest counts, or predicted classes (n,).
        labels: int64 (n,).

    Raises:
        DataError: If the shapes do not fit, there are no examples, or a score is NaN.
    """
    return int(_correct(scores, labels).sum()) / len(labels)


def group_accuracies(scores: Tensor, labels: Tensor, groups: Tensor) -> dict[int, float]:
    """Accuracy within each group, a fraction, by the group's number. A group without examples is not listed.

    Args:
        scores: Logits (n, classes) or predicted classes (n,).
        labels: int64 (n,).
        groups: int64 (n,), for example label x background of Waterbirds.

    Raises:
        DataError: If the shapes do not fit, there are no examples, or a score is NaN.
    """
    correct = _correct(scores, labels)
    if groups.shape != labels.shape:
        raise DataError(
            f"groups of shape {tuple(groups.shape)} do not fit labels of shape {tuple(labels.shape)}: one each"
        )
    counts = zip(*groups.unique(return_counts=True), strict=True)
    return {int(g): int(correct[groups == g].sum()) / int(n) for g, n in counts}


def worst_group_accuracy(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Accuracy of the worst group, a fraction: what the paper reports for Waterbirds and CelebA (Sec. 4.2, Table 4).

    Arguments and errors as for `group_accuracies`.
    """
    return min(group_accuracies(scores, labels, groups).values())


def average_group_accuracy(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Mean of the accuracies of the groups, a fraction: each group weighs the same, however many examples it has.

    `accuracy` weighs them by their examples. Arguments and errors as for `group_accuracies`.
    """
    return fmean(group_accuracies(scores, labels, groups).values())


# --- metrics by name ---

JUDGES: Mapping[str, Callable[[Tensor, Tensor, Tensor], float]] = {
    "accuracy": lambda scores, labels, groups: accuracy(scores, labels),
    "worst_group_accuracy": worst_group_accuracy,
    "average_group_accuracy": average_group_accuracy,
}
"""Name -> function of logits (n, classes) or classes (n,), labels (n,), groups (n,). A further metric is a row."""


def check_metrics(names: Sequence[str]) -> None:
    """Raise `ConfigError` for names that are not in `JUDGES`, or for none."""
    if not names or not set(names) <= set(JUDGES):
        raise ConfigError(f"metrics={list(names)}: name one or more of {', '.join(JUDGES)}; the first one selects")


def groups_or_zeros(names: Sequence[str], labels: Tensor, groups: Tensor | None) -> Tensor:
    """The groups (n,), or one group for all examples where there are none and no metric of these names needs them.

    Raises:
        DataError: If a metric needs groups and there are none.
    """
    if groups is not None:
        return groups
    if needy := [name for name in names if "group" in name]:
        raise DataError(f"{needy[0]} needs the group of every image: the data has no column 'group'")
    return torch.zeros_like(labels)


def judge(names: Sequence[str], scores: Tensor, labels: Tensor, groups: Tensor | None) -> dict[str, float]:
    """Name of a metric -> its value, a fraction.

    Names are keys of `JUDGES`; groups are None where there are none; arguments otherwise as for `group_accuracies`.

    Raises:
        DataError: If a metric needs groups and there are none, or for the reasons that `group_accuracies` gives.
    """
    groups = groups_or_zeros(names, labels, groups)
    return {name: JUDGES[name](scores, labels, groups) for name in names}


# --- intervals ---


class Interval(NamedTuple):
    """An estimate between the ends of its confidence interval, all in the unit of the estimate."""

    value: float
    low: float
    high: float


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for one proportion: for the accuracy of one run on n test examples.

    Unlike the normal approximation it stays in [0, 1] and keeps its coverage near 0 and 1 (Wilson 1927).

    Raises:
        DataError: If ``correct`` is not within 0..n or n is not positive.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise DataError(f"{correct} of {n} correct is not a proportion: pass counts with 0 <= correct <= n and n > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17 and put the value outside its own interval.
    return Interval(share, 0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half)


def paired_difference(first: Tensor, second: Tensor, confidence: float = 0.95) -> Interval:
    """Accuracy of the first minus that of the second, on the same images (Newcombe 1998, Stat. Med. 17:2635).

    Args:
        first: Which images one classifies correctly, bool (n,).
        second: The same of the other.
        confidence: Coverage of the interval, in (0, 1).
    """
    one, two = (wilson_interval(int(right.sum()), len(right), confidence) for right in (first, second))
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only, other = int(first.sum()) - both, int(second.sum()) - both
    product = (both + only) * (other + neither) * (both + other) * (only + neither)
    tie = (both * neither - only * other) / math.sqrt(product) if product else 0.0
    ends = [(one.value - one.low, two.high - two.value), (one.high - one.value, two.value - two.low)]
    below, above = (math.sqrt(max(0.0, a * a - 2 * tie * a * b + b * b)) for a, b in ends)
    value = one.value - two.value
    return Interval(value, value - below, value + above)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t interval, in the unit of the values.

    Over seeds it covers the spread of draws and of training. Where the test sets of the seeds overlap, as with splits
    of one file, it understates the uncertainty about new images.

    Raises:
        DataError: If fewer than two values are given: one run has no spread, its interval is `wilson_interval`.
    """
    if len(values) < 2:
        raise DataError(
            f"{len(values)} value(s) have no spread: run more seeds, or use wilson_interval for a single run"
        )
    mean = fmean(values)
    half = _student_quantile(len(values) - 1, confidence) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def interval_of_runs(proportions: Sequence[float], n: int) -> Interval:
    """The interval of one proportion for each seed: Wilson's over the n examples of a single run, else Student's t.

    Raises:
        DataError: If there is no run, or a single one on no examples.
    """
    if not proportions:
        raise DataError("no run has an interval: pass one proportion for each seed")
    # round: a proportion of n examples times n is a whole number up to rounding.
    return mean_interval(proportions) if len(proportions) > 1 else wilson_interval(round(proportions[0] * n), n)


def interval_of(name: str, scores: Tensor, labels: Tensor, groups: Tensor | None) -> tuple[Interval, int]:
    """The 95% interval of one run's metric over the images it was measured on, and how many these were.

    Accuracies have Wilson's interval; that of the worst group is of its own images, as if it had been named beforehand.
    The mean over groups has the limits of every group combined by MOVER (Zou & Donner 2008, Stat. Med. 27:1693).
    Arguments as for `judge`.
    """
    value = judge([name], scores, labels, groups)[name]
    if groups is None or name == "accuracy":
        return wilson_interval(round(value * len(labels)), len(labels)), len(labels)
    each = group_accuracies(scores, labels, groups)
    sizes = {group: int((groups == group).sum()) for group in each}
    limits = {group: wilson_interval(round(each[group] * sizes[group]), sizes[group]) for group in each}
    if name == "worst_group_accuracy":
        worst = min(each, key=lambda group: each[group])
        return limits[worst], sizes[worst]
    below = math.sqrt(sum((one.value - one.low) ** 2 for one in limits.values())) / len(each)
    above = math.sqrt(sum((one.high - one.value) ** 2 for one in limits.values())) / len(each)
    return Interval(value, max(0.0, value - below), min(1.0, value + above)), len(labels)


def _student_quantile(freedom: int, confidence: float) -> float:
    """The t with P(|T| <= t) = confidence, for whole degrees of freedom.

    Abramowitz & Stegun 26.7.3-4, a finite series in the angle atan(t / sqrt(freedom)), bisected: the core has no scipy.
    """
    odd = freedom % 2

    def within(angle: float) -> float:
        cosine, total = math.cos(angle), 0.0
        term = cosine if odd else 1.0
        for k in range(2 + odd, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
