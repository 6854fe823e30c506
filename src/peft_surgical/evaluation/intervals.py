"""Confidence intervals: of one run over its test examples, and of several runs over their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from ..errors import DataError


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


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t interval, in the unit of the values.

    Over seeds it covers the spread of draws and of training. Where the test sets of the seeds overlap, as with splits
    of one file, it understates the uncertainty about new images.

    Raises:
        DataError: If fewer than two values are given: one run has no spread, its interval is :func:`wilson_interval`.
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


def _student_quantile(freedom: int, confidence: float) -> float:
    """The t with P(|T| <= t) = confidence, for whole degrees of freedom.

    Abramowitz & Stegun 26.7.3-4, a finite series in the angle atan(t / sqrt(freedom)), bisected: the core has no scipy.
    """

    def within(angle: float) -> float:
        cosine, term, total = math.cos(angle), 1.0, 0.0
        if freedom % 2:
            term = cosine
            for k in range(3, freedom + 1, 2):
                total += term
                term *= cosine * cosine * (k - 1) / k
            return 2 / math.pi * (angle + math.sin(angle) * total)
        for k in range(2, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
