"""Accuracy and accuracy by group, and the table of metrics by name: pure functions.

Accuracies and errors are fractions in [0, 1]; percent appears only where text is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

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
