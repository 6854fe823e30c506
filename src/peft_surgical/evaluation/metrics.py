"""Accuracy, accuracy by group, and corruption errors: pure functions of predictions and labels.

Accuracies and errors are fractions in [0, 1]; percent appears only where text is printed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from ..errors import DataError

ALEXNET_ERRORS: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error per ImageNet-C corruption, mean over severities (Hendrycks & Dietterich 2019): mCE divides by it."""

SEVERITIES = (1, 2, 3, 4, 5)
"""The severities of ImageNet-C and CIFAR-10-C."""


def predicted_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """The predicted classes (n,), of as many examples as there are labels; none is allowed.

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


def _predictions(scores: Tensor, labels: Tensor) -> Tensor:
    predictions = predicted_classes(scores, labels)
    if not len(labels):
        raise DataError("no examples to evaluate on: check the split or the filter that made this set")
    return predictions


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of correct predictions, a fraction.

    Args:
        scores: Logits (n, classes), of which the first largest counts, or predicted classes (n,).
        labels: int64 (n,).

    Raises:
        DataError: If the shapes do not fit, nothing is there, or a score is NaN.
    """
    return int((_predictions(scores, labels) == labels).sum()) / len(labels)


def group_accuracies(
    scores: Tensor, labels: Tensor, groups: Tensor, *, minimum: int = 1, ignore: Collection[int] = ()
) -> dict[int, float]:
    """Accuracy within each group, a fraction, by the group's number.

    Args:
        scores: Logits (n, classes) or predicted classes (n,).
        labels: int64 (n,).
        groups: int64 (n,), for example label x background of Waterbirds.
        minimum: A group with fewer examples is left out.
        ignore: Groups that are left out, such as the region "Other" of WILDS FMoW.

    Raises:
        DataError: If the shapes do not fit, nothing is there or left, or a score is NaN.
    """
    correct = _predictions(scores, labels) == labels
    if groups.shape != labels.shape:
        raise DataError(
            f"groups of shape {tuple(groups.shape)} do not fit labels of shape {tuple(labels.shape)}: one each"
        )
    counts = {int(g): int(n) for g, n in zip(*groups.unique(return_counts=True), strict=True)}
    kept = {g: n for g, n in counts.items() if n >= minimum and g not in ignore}
    if not kept:
        there = ", ".join(f"{g} ({n})" for g, n in counts.items())
        raise DataError(
            f"no group is left with minimum={minimum} and ignore={list(ignore)}: the groups and their examples are "
            f"{there}; ask for fewer examples or ignore fewer groups"
        )
    return {g: int(correct[groups == g].sum()) / n for g, n in kept.items()}


def worst_group_accuracy(
    scores: Tensor, labels: Tensor, groups: Tensor, *, minimum: int = 1, ignore: Collection[int] = ()
) -> float:
    """Accuracy of the worst group, a fraction: what the paper reports for Waterbirds and CelebA (Sec. 3.1).

    A group without examples does not count. Arguments and errors as for :func:`group_accuracies`.
    """
    return min(group_accuracies(scores, labels, groups, minimum=minimum, ignore=ignore).values())


def average_group_accuracy(
    scores: Tensor, labels: Tensor, groups: Tensor, *, minimum: int = 1, ignore: Collection[int] = ()
) -> float:
    """Mean of the accuracies of the groups, a fraction: each group weighs the same, however many examples it has.

    :func:`accuracy` weighs them by their examples. Arguments and errors as for :func:`group_accuracies`.
    """
    return fmean(group_accuracies(scores, labels, groups, minimum=minimum, ignore=ignore).values())


def severity_errors(
    scores: Tensor, labels: Tensor, corruptions: Sequence[str], severities: Tensor
) -> dict[str, dict[int, float]]:
    """Top-1 error, a fraction, by corruption and severity.

    Args:
        scores: Logits (n, classes) or predicted classes (n,).
        labels: int64 (n,).
        corruptions: n names.
        severities: int64 (n,), such as 1 to 5.

    Raises:
        DataError: If the shapes do not fit, nothing is there, or a score is NaN.
    """
    names = sorted(set(corruptions))
    position = {name: number for number, name in enumerate(names)}
    numbers = torch.tensor([position[name] for name in corruptions], dtype=torch.int64, device=labels.device)
    if severities.shape != labels.shape or len(numbers) != len(labels):
        raise DataError(
            f"{len(numbers)} corruptions and severities of shape {tuple(severities.shape)} do not fit labels of shape "
            f"{tuple(labels.shape)}: one each"
        )
    if (severities < 0).any():
        raise DataError(f"severity {int(severities.min())} does not exist: pass numbers such as 1 to 5")
    # One number for each pair, so that it is a grouping like any other.
    steps = int(severities.max()) + 1 if len(severities) else 1
    errors: dict[str, dict[int, float]] = {name: {} for name in names}
    for pair, right in group_accuracies(scores, labels, numbers * steps + severities).items():
        errors[names[pair // steps]][pair % steps] = 1 - right
    return errors


def corruption_error(errors: Sequence[float], baseline_errors: Sequence[float]) -> float:
    """CE of one corruption: error summed over severities, over a baseline's (Hendrycks & Dietterich 2019, Sec. 4).

    Args:
        errors: The model's top-1 errors by severity, fractions.
        baseline_errors: The baseline's, in the same order.

    Raises:
        DataError: If the numbers of severities differ or the baseline makes no error.
    """
    if len(errors) != len(baseline_errors) or not errors:
        raise DataError(
            f"{len(errors)} errors against {len(baseline_errors)} baseline errors: one per severity in both"
        )
    if sum(baseline_errors) <= 0:
        raise DataError(
            "the baseline makes no error, so the corruption error has no meaning: pass errors, not accuracies"
        )
    return sum(errors) / sum(baseline_errors)


def corruption_errors(
    errors: Mapping[str, Mapping[int, float]],
    baseline_errors: Mapping[str, float | Mapping[int, float]] = ALEXNET_ERRORS,
) -> dict[str, float]:
    """:func:`corruption_error` of every corruption, a fraction; mCE is their mean.

    Args:
        errors: The model's top-1 errors by corruption and severity, fractions, as :func:`severity_errors` gives them.
        baseline_errors: The baseline's in the same form; a single number is its mean over severities 1 to 5, as
            published for AlexNet on ImageNet-C.

    Raises:
        DataError: If the baseline lacks a corruption, or its severities are not the model's.
    """
    if missing := sorted(set(errors) - set(baseline_errors)):
        raise DataError(f"no baseline error for {', '.join(missing)}: it has {', '.join(sorted(baseline_errors))}")
    result = {}
    for name, found in errors.items():
        reference = baseline_errors[name]
        expected = dict(reference) if isinstance(reference, Mapping) else dict.fromkeys(SEVERITIES, float(reference))
        if set(found) != set(expected):
            raise DataError(
                f"{name} has errors for the severities {sorted(found)}, its baseline for {sorted(expected)}: evaluate "
                "them all, or pass a baseline with an error for each severity"
            )
        result[name] = corruption_error([found[s] for s in expected], list(expected.values()))
    return result


def mean_corruption_error(errors: Mapping[str, float], baseline_errors: Mapping[str, float] = ALEXNET_ERRORS) -> float:
    """mCE: mean over corruptions of :func:`corruption_error`, a fraction (the literature prints it in percent).

    Args:
        errors: Per corruption, the model's mean top-1 error over severities.
        baseline_errors: The same for the baseline, AlexNet on ImageNet-C by default.

    Raises:
        DataError: If nothing is given or the baseline lacks a corruption.
    """
    if missing := sorted(set(errors) - set(baseline_errors)):
        raise DataError(f"no baseline error for {', '.join(missing)}: it has {', '.join(sorted(baseline_errors))}")
    if not errors:
        raise DataError("no corruption given: pass the error of each corruption by name")
    return fmean(corruption_error([error], [baseline_errors[name]]) for name, error in errors.items())
