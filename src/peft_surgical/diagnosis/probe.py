"""What the labels tell: a closed-form probe on the last features, its learning curve, and what to label next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation import Interval, mean_interval

PROBE_FOLDS = 5
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties of the probe, in units of the mean squared length of a feature vector; chosen by leave-one-out errors."""


def fitted(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Ridge regression onto one-hot labels in closed form: (d + 1, classes), the last row a bias.

    The penalty is the one with the smallest squared leave-one-out error, which has a closed form, too.
    """
    x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)
    y = torch.nn.functional.one_hot(labels, classes).double()
    gram = x @ x.T  # (n, n): there are fewer images than features
    values, vectors = torch.linalg.eigh(gram)
    best: tuple[float, Tensor] | None = None
    for ridge in RIDGES:
        strength = ridge * float(gram.diagonal().mean())
        inverse = (vectors / (values.clamp(min=0) + strength)) @ vectors.T
        dual = inverse @ y
        error = float((dual / inverse.diagonal()[:, None]).square().mean())
        if best is None or error < best[0]:
            best = (error, dual)
    assert best is not None
    return x.T @ best[1]


def predicted(weights: Tensor, features: Tensor) -> Tensor:
    """The classes (n,) that a probe predicts."""
    return (features.double() @ weights[:-1] + weights[-1]).argmax(1)


def standardised(features: Tensor) -> Tensor:
    """Each feature with mean 0 and deviation 1 over the images."""
    return (features - features.mean(0)) / features.std(0).clamp(min=1e-6)


def folds_of(labels: Tensor, seed: int = 0) -> Tensor:
    """The fold of each image, drawn within classes, int64 (n,)."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros_like(labels)
    begun = 0
    for label in labels.unique():
        rows = torch.nonzero(labels == label).flatten()
        mixed = rows[torch.randperm(len(rows), generator=generator)]
        found[mixed] = (torch.arange(len(rows)) + begun) % PROBE_FOLDS
        begun += len(rows)
    return found


def probe_right(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Which images a probe gets right that was fitted on the other folds, bool (n,)."""
    x, folds = standardised(features), folds_of(labels)
    right = torch.zeros(len(labels), dtype=torch.bool)
    for fold in range(PROBE_FOLDS):
        out = folds == fold
        if out.any() and not out.all():
            right[out] = predicted(fitted(x[~out], labels[~out], classes), x[out]) == labels[out]
    return right


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy of a probe that was fitted on so many images.

    Attributes:
        images: Number of labelled images.
        accuracy: On held-out folds, a fraction, with Student's t interval over the folds.
    """

    images: int
    accuracy: Interval


def learning_curve(features: Tensor, labels: Tensor, classes: int) -> tuple[CurvePoint, ...]:
    """What labels bring: a probe on a fifth, two fifths, ... of all folds but one, tested on that one."""
    x, folds = standardised(features), folds_of(labels)
    found: dict[int, list[float]] = {}
    for fold in range(PROBE_FOLDS):
        out = folds == fold
        rows = torch.nonzero(~out).flatten()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(fold))]
        for part in range(1, 6):
            chosen = rows[: len(rows) * part // 5]
            if not len(chosen) or not out.any():
                continue
            accuracy = (predicted(fitted(x[chosen], labels[chosen], classes), x[out]) == labels[out]).double().mean()
            found.setdefault(part, []).append(float(accuracy))
    most = len(labels) - len(labels) // PROBE_FOLDS
    points = {part: mean_interval(values) for part, values in found.items() if len(values) > 1}
    # Student's t knows nothing of the ends of a proportion.
    within = {part: Interval(one.value, max(0.0, one.low), min(1.0, one.high)) for part, one in points.items()}
    return tuple(CurvePoint(most * part // 5, one) for part, one in within.items())


# --- what to label next ---


def spread(features: Tensor, count: int, seed: int = 0) -> list[int]:
    """Rows to label: the images nearest to the centres of as many clusters (k-means, 10 rounds), each once.

    With few labels, images that stand for many others teach more than those the network is least sure of (Hacohen et
    al. 2022, arXiv 2202.02794).
    """
    x = standardised(features).float()
    count = min(count, len(x))
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator)[:1]]
    for _ in range(count - 1):  # k-means++: far from what is there
        away = torch.cdist(x, centres).amin(1).square()
        weights = away if float(away.sum()) > 0 else torch.ones(len(x))
        centres = torch.cat([centres, x[torch.multinomial(weights, 1, generator=generator)]])
    for _ in range(10):
        nearest = torch.cdist(x, centres).argmin(1)
        for number in range(count):
            members = nearest == number
            if members.any():
                centres[number] = x[members].mean(0)
    chosen: list[int] = []
    sizes = torch.bincount(torch.cdist(x, centres).argmin(1), minlength=count)
    for number in sizes.argsort(descending=True, stable=True).tolist():
        order = torch.cdist(centres[number][None], x)[0].argsort().tolist()
        chosen.append(next(row for row in order if row not in chosen))
    return chosen


def spread_against_random(
    features: Tensor, labels: Tensor, classes: int, counts: Sequence[int], draws: int = 10
) -> dict[int, Interval]:
    """Accuracy of a probe on images chosen by `spread` minus that on random ones, for each number of images.

    Each draw holds a different half of the images out to test on; the interval is Student's t over the draws, which
    share images, so that it is somewhat too narrow.
    """
    x = standardised(features)
    found = {}
    for count in counts:
        gains = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(1000 + draw)
            order = torch.randperm(len(x), generator=generator)
            pool, test = order[: len(x) // 2], order[len(x) // 2 :]

            def worth(rows: Tensor, test: Tensor = test) -> float:
                weights = fitted(x[rows], labels[rows], classes)
                return float((predicted(weights, x[test]) == labels[test]).double().mean())

            random = [worth(pool[torch.randperm(len(pool), generator=generator)[:count]]) for _ in range(5)]
            gains.append(worth(pool[spread(features[pool], count, draw)]) - sum(random) / len(random))
        found[count] = mean_interval(gains)
    return found
