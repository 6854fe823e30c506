"""A stream of images as they come in at a site, with or without labels."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..extras import require
from .checks import encoded, read_bytes
from .folders import visible
from .images import IMAGE_SUFFIXES, decode
from .labelled import read_data

_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class Incoming:
    """Images in the order of the stream.

    Attributes:
        files: The name of each: its path below the folder, or its row.
        read: Number of the image -> PIL image in RGB.
        labels: int64 (n,), or None.
        label_names: The classes, or None.
        fingerprint: Of the labelled data, as `Data` has it; None without labels.
    """

    files: tuple[str, ...]
    read: Callable[[int], Any]
    labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.files)


def read_incoming(
    source: Any, *, unlabelled: bool = False, seed: int | None = 0, limit: int | None = None, **columns: Any
) -> Incoming:
    """Read a stream.

    A folder of images without class folders is a stream without labels, in the order of the files' names. Everything
    else is read by `read_data`: the test part that it brings, or its validation part, or else all of it.

    Args:
        source: A folder of images, or what `read_data` takes.
        unlabelled: Take a folder's subfolders for a way to keep images, not for classes.
        seed: Of a random order of labelled images; None keeps that of the data, which in class folders is by class, and
            a stream of one class after the other misleads whatever adapts to it.
        limit: So many images at most, the first of the stream.
        columns: ``image_column`` and ``label_column`` of `read_data`.

    Raises:
        DataError: As `read_data`; or if there is no image.
    """
    place = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if place is not None and place.is_dir() and (unlabelled or _has_no_classes(place)):
        found = _unlabelled(place)
    elif unlabelled:
        raise DataError(f"{source} is no folder: streams without labels are read from folders of images only")
    else:
        found = _labelled(source, **columns)
    order = list(range(len(found)))
    if seed is not None and found.labels is not None:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    order = order[:limit]
    return Incoming(
        tuple(found.files[i] for i in order),
        lambda number: found.read(order[number]),
        None if found.labels is None else found.labels[order],
        found.label_names,
        found.fingerprint,
    )


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES


def _has_no_classes(folder: Path) -> bool:
    entries = visible(folder)
    return any(map(_is_image, entries)) and not any(entry.is_dir() for entry in entries)


def _images_below(folder: Path) -> Iterator[Path]:
    for entry in visible(folder):
        if entry.is_dir():
            yield from _images_below(entry)
        elif _is_image(entry):
            yield entry


def _natural(name: str) -> list[Any]:
    """Sorts row 9 before row 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]


def _unlabelled(folder: Path) -> Incoming:
    paths = list(_images_below(folder))
    if not paths:
        raise DataError(f"{folder} holds no image: add files that end in {', '.join(IMAGE_SUFFIXES)}")
    files = tuple(path.relative_to(folder).as_posix() for path in paths)
    return Incoming(files, lambda number: decode(paths[number].read_bytes(), files[number]))


def _labelled(source: Any, **columns: Any) -> Incoming:
    # The least that a reader which splits can be asked to draw; it is put back below.
    data = read_data(source, on_broken="later", validation=_LEAST_SHARE, **columns)
    if data.test is not None:
        part = data.test
    elif data.origin["validation"].startswith("drawn"):
        part = require("datasets", "reading data").concatenate_datasets([data.tuning, data.validation])
    else:
        data = read_data(source, on_broken="later", **columns)
        part = data.validation
    rows, files = encoded(part), part.select_columns(["file"])["file"][:]
    order = sorted(range(len(files)), key=lambda row: _natural(files[row]))  # of the data again: a part was drawn

    def read(number: int) -> Any:
        row = rows[order[number]]
        return decode(read_bytes(row), row["file"])

    labels = torch.tensor(part.select_columns(["label"])["label"][:], dtype=torch.int64)[order]
    return Incoming(tuple(files[row] for row in order), read, labels, data.label_names, data.fingerprint)
