"""Which images a tuned network gets wrong, and which classes it takes for which."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..texts import csv_cell

MISTAKES = "mistakes.csv"
COLUMNS = ("file", "label", "predicted", "confidence")


def confusion_of(logits: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """Counts, true class by predicted class.

    Args:
        logits: (images, outputs).
        labels: int64 (images,).
        classes: Number of outputs.
    """
    counts = torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
    return counts.reshape(classes, classes).tolist()


def accuracy_of_class(confusion: Sequence[Sequence[int]]) -> list[float | None]:
    """The share of each class that is right; None for a class without images."""
    return [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)]


def write_mistakes(file: Path, files: Sequence[str], logits: Tensor, labels: Tensor, names: Sequence[str]) -> int:
    """Write the images that are wrong to a table, the most confident first.

    Args:
        file: Where to; columns are `COLUMNS`, the confidence is the softmax probability of the predicted class.
        files: What each image is called.
        logits: (images, outputs).
        labels: int64 (images,).
        names: What the outputs stand for, in their order.

    Returns:
        How many are wrong.
    """
    chances, predicted = logits.double().softmax(1).max(1)
    wrong = torch.nonzero(predicted != labels).flatten().tolist()
    wrong.sort(key=lambda i: -float(chances[i]))
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for i in wrong:
            words = [files[i], names[int(labels[i])], names[int(predicted[i])]]
            writer.writerow([*map(csv_cell, words), f"{float(chances[i]):.4f}"])
    return len(wrong)
