"""Confidence intervals of proportions, of means over runs, and of metrics: pure functions.

Over seeds an interval is for the draws that the seeds make. Seeds that cut the same images anew share tuning and test
images, for which `mean_interval` has a correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from torch import Tensor

from ..errors import DataError
from .metrics import group_accuracies, judge


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


def mean_interval(values: Sequence[float], confidence: float = 0.95, ratio: float = 0.0) -> Interval:
    """Mean of runs with Student's t interval, in the unit of the values.

    Runs that share nothing are independent, and so are runs on one test set whose tuning images were drawn anew for
    each, as far as the images that they were drawn from, and these test images, are concerned. For other images the
    usual interval is too short where runs share some: with a correlation r of two runs the variance of the mean is not
    s^2 / k but (1 / k + r / (1 - r)) s^2 (Nadeau & Bengio 2003, Machine Learning 52:239).

    Args:
        values: One for each of the k runs.
        confidence: Coverage of the interval, in (0, 1).
        ratio: r / (1 - r). Where every seed cuts the same images anew, test images over tuning images of a run, as they
            propose; where test images are fixed, the tuning images that two runs share over those that each has alone.
            0 is without the correction.

    Raises:
        DataError: If fewer than two values are given: one run has no spread, its interval is `wilson_interval`; or the
            ratio is negative.
    """
    if not ratio >= 0:
        raise DataError(
            f"ratio={ratio}: give a number of at least 0, such as test images over tuning "
            "images; 0 is for independent runs"
        )
    if len(values) < 2:
        raise DataError(
            f"{len(values)} value(s) have no spread: run more seeds, or use wilson_interval for a single run"
        )
    mean = fmean(values)
    half = _student_quantile(len(values) - 1, confidence) * stdev(values) * math.sqrt(1 / len(values) + ratio)
    return Interval(mean, mean - half, mean + half)


def interval_of_runs(proportions: Sequence[float], n: int, ratio: float = 0.0) -> Interval:
    """The interval of one proportion for each seed: Wilson's over the n examples of a single run, else Student's t.

    ``ratio`` is that of `mean_interval`.

    Raises:
        DataError: If there is no run, or a single one on no examples.
    """
    if not proportions:
        raise DataError("no run has an interval: pass one proportion for each seed")
    if len(proportions) > 1:
        return mean_interval(proportions, ratio=ratio)
    # round: a proportion of n examples times n is a whole number up to rounding.
    return wilson_interval(round(proportions[0] * n), n)


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
