"""A part of the data as a training loop takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.labelled import items

_KEPT_BYTES = 2**30  # transformed images of one part that are kept in memory rather than decoded in every epoch


class Rows(Dataset):
    """A part of the data with its labels at hand, and its images in memory once they have been read, if they fit.

    Args:
        part: As for `items`.
        transform: As for `items`.
        keep: Whether an image may be kept once it has been transformed.
        outputs: As for `items`.
    """

    def __init__(
        self, part: Any, transform: Callable[[Any], Tensor], keep: bool, outputs: Sequence[int] | None = None
    ) -> None:
        labels: list[int] = list(part.select_columns(["label"])["label"][:])
        self.labels = labels if outputs is None else [outputs[label] for label in labels]
        grouped = "group" in part.column_names
        self.groups = torch.tensor(part.select_columns(["group"])["group"][:]) if grouped else None
        self.items = items(part, transform, outputs)
        self.keep = keep
        self.kept: dict[int, dict[str, Any]] = {}

    @property
    def label_tensor(self) -> Tensor:
        """int64 (n,)."""
        return torch.tensor(self.labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.kept:
            return self.kept[index]
        row: dict[str, Any] = self.items[index]
        if self.keep and row["pixel_values"].nbytes * len(self) <= _KEPT_BYTES:
            self.kept[index] = row
        return row
