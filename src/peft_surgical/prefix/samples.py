"""The rows of a data set with numbers in the place of their images, and the recorded features of these images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cut import UncutError
from .storage import Layout


@dataclass(frozen=True, eq=False)
class Part:
    """One data set and its features.

    Attributes:
        dataset: Its rows with their images.
        rows: Its rows without.
        start: The number of its first image.
        views: Readings of each image.
        image: One of its images.
        layouts: How the features are stored.
        dtypes: What they are computed in.
        features: (views x rows, ...) each, one view after the other.
        agrees: Kind of a batch (its size, mode and precision) -> whether what was recorded is what the prefix gives.
    """

    dataset: Any
    rows: Sequence[Any]
    start: int
    views: int
    image: Tensor
    layouts: Sequence[Layout]
    dtypes: Sequence[torch.dtype]
    features: Sequence[Tensor]
    agrees: dict[Any, bool]

    def holds(self, number: int) -> bool:
        """Whether a number is that of one of its images."""
        return self.start <= number < self.start + len(self.rows)

    def features_of(self, numbers: Tensor, view: int, device: torch.device) -> list[Tensor]:
        """What was recorded for these images, as it was recorded."""
        places = numbers - self.start + view * len(self.rows)
        read = zip(self.layouts, self.dtypes, self.features, strict=True)
        return [layout.read(kept.index_select(0, places)).to(device, dtype) for layout, dtype, kept in read]

    def images(self, numbers: Tensor, device: torch.device) -> Tensor:
        """The images themselves, (n, channels, h, w)."""
        return torch.stack([image_of(self.dataset[i]) for i in (numbers - self.start).tolist()]).to(device)


class Numbered(Dataset):
    """The rows of a part with numbers, int64 (1, 1, 1), in the place of images."""

    def __init__(self, rows: Sequence[Any], start: int) -> None:
        self.rows, self.start = rows, start

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return with_image(self.rows[index], torch.full((1, 1, 1), self.start + int(index)))


class Hole:
    """Stands in a row where an image was."""


def image_of(row: Any) -> Tensor:
    """The image in a row.

    Raises:
        UncutError: There is none, or more than one.
    """
    return row[_place_of(row)]


def with_image(row: Any, image: Any) -> Any:
    """A copy of a row with something else in the place of its image or hole."""
    entries = dict(row.items() if isinstance(row, dict) else enumerate(row))
    place = next((key for key, value in entries.items() if isinstance(value, Hole)), None)
    entries[_place_of(row) if place is None else place] = image
    return entries if isinstance(row, dict) else tuple(entries.values())


def _place_of(row: Any) -> Any:
    """The key or position of the image in a row."""
    entries = dict(row.items() if isinstance(row, dict) else enumerate(row) if isinstance(row, tuple) else ())
    found = [key for key, value in entries.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(found) != 1 or entries[found[0]].dim() != 3:
        raise UncutError("a row of the data is no dict or tuple with one image, a float tensor (channels, h, w)")
    return found[0]


def around(rows: Sequence[Any], n: int) -> list[Any]:
    """``n`` rows, from the beginning again where there are fewer."""
    return [rows[i % len(rows)] for i in range(n)]


def blank_images(like: Tensor, n: int, device: torch.device) -> Tensor:
    """Black images that take no memory: a network looks at their shape, and at their values only before the cut."""
    return torch.zeros((), dtype=like.dtype, device=device).expand(n, *like.shape)


def is_numbers(value: Any) -> bool:
    """Whether a tensor in a batch holds numbers of images, int64 (n, 1, 1, 1)."""
    numbers = isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 4
    return numbers and tuple(value.shape[1:]) == (1, 1, 1)


def put(given: Any, images: Tensor) -> Any:
    """Arguments of a forward, a tuple or a dict, with images in the place of their numbers."""
    if isinstance(given, tuple):
        return tuple(images if is_numbers(value) else value for value in given)
    return {name: images if is_numbers(value) else value for name, value in given.items()}
