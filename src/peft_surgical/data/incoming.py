"""A stream of images as they come in at a site, with or without labels."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..extras import require
from .images import IMAGE_SUFFIXES, decode, encoded, fault, read_bytes, sound
from .labelled import ON_BROKEN, read_data
from .listing import counted, image_files, visible


@dataclass(frozen=True)
class Incoming:
    """Images in the order of the stream.

    Attributes:
        files: The name of each: its path below the folder, or its row.
        encoded: Number of the image -> the bytes of its file.
        labels: int64 (n,), or None.
        label_names: The classes, or None.
        fingerprint: That of the labelled data, as `Data` has it; None without labels.
    """

    files: tuple[str, ...]
    encoded: Callable[[int], bytes]
    labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> Any:
        """An image of the stream, a PIL image in RGB.

        Raises:
            DataError: It cannot be decoded.
        """
        return decode(self.encoded(number), self.files[number])

    def fault(self, number: int) -> str | None:
        """What `read` would complain about, or None."""
        try:
            return fault(self.encoded(number), self.files[number])
        except (DataError, OSError) as error:  # it cannot be read at all
            return str(error)

    def among(self, outputs: Sequence[int], label_names: Sequence[str]) -> Incoming:
        """The same images with their classes as a network numbers them.

        Args:
            outputs: For each class of `label_names` the network's output.
            label_names: What all outputs of the network mean.
        """
        labels = None if self.labels is None else torch.tensor(outputs, dtype=torch.int64)[self.labels]
        return replace(self, labels=labels, label_names=tuple(label_names))


def read_incoming(
    source: Any,
    *,
    unlabelled: bool = False,
    seed: int | None = 0,
    limit: int | None = None,
    on_broken: str = "later",
    in_order: bool = True,
    **columns: Any,
) -> Incoming:
    """Read a stream.

    A folder of images without class folders is a stream without labels, in the order of the files' names. Everything
    else is read by `read_data`: the test part that it brings, or its validation part, or else all of it.

    Args:
        source: A folder of images, or what `read_data` takes.
        unlabelled: Take a folder's subfolders for a way to keep images, not for classes.
        seed: Seed of a random order of labelled images; None keeps that of the data, which in class folders is by
            class, and a stream of one class after the other misleads whatever adapts to it.
        limit: So many images at most, the first of the stream.
        on_broken: As for `read_data`, for the images of the stream.
        in_order: Keep the order of images without labels; False draws theirs with the seed, too.
        columns: ``image_column`` and ``label_column`` of `read_data`.

    Raises:
        DataError: As `read_data`; or if there is no image.
        ConfigError: As `read_data`.
    """
    if on_broken not in ON_BROKEN:
        raise ConfigError(f"on_broken={on_broken!r}: choose one of {', '.join(ON_BROKEN)}")
    place = Path(os.path.expanduser(source)) if isinstance(source, (str, os.PathLike)) else None
    if place is not None and os.path.isdir(place) and (unlabelled or _has_no_classes(place)):
        found = _unlabelled(place)
    elif unlabelled:
        raise DataError(f"{source} is no folder: streams without labels are read from folders of images only")
    else:
        found = _labelled(source, **columns)
    order = list(range(len(found)))
    if seed is not None and (found.labels is not None or not in_order):
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    if on_broken == "later":
        order = order[:limit]
    else:
        order = sound(order, found.fault, on_broken == "skip", limit)
    return Incoming(
        tuple(found.files[i] for i in order),
        lambda number: found.encoded(order[number]),
        None if found.labels is None else found.labels[order],
        found.label_names,
        found.fingerprint,
    )


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES


def _has_no_classes(folder: Path) -> bool:
    entries = visible(folder)
    return any(map(_is_image, entries)) and not any(entry.is_dir() for entry in entries)


def _natural(name: str) -> list[Any]:
    """Sorts row 9 before row 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", name)]


def _unlabelled(folder: Path) -> Incoming:
    passed_over: Counter[str] = Counter()
    paths = list(image_files(folder, passed_over))
    if not paths:
        raise DataError(f"{folder} holds no image: add files that end in {', '.join(IMAGE_SUFFIXES)}")
    if odd := {suffix: n for suffix, n in passed_over.items() if " " in suffix}:
        warnings.warn(f"left out of {folder}: {counted(odd)}", stacklevel=3)
    files = tuple(path.relative_to(folder).as_posix() for path in paths)
    return Incoming(files, lambda number: paths[number].read_bytes())


def _labelled(source: Any, **columns: Any) -> Incoming:
    # The least that a reader which splits can be asked to draw; it is put back below.
    data = read_data(source, on_broken="later", validation=1, **columns)
    if data.test is not None:
        part = data.test
    elif data.origin["validation"].startswith("drawn"):
        part = require("datasets", "reading data").concatenate_datasets([data.tuning, data.validation])
    else:
        data = read_data(source, on_broken="later", **columns)
        part = data.validation
    rows, files = encoded(part), part.select_columns(["file"])["file"][:]
    order = sorted(range(len(files)), key=lambda row: _natural(files[row]))  # of the data again: a part was drawn

    labels = torch.tensor(part.select_columns(["label"])["label"][:], dtype=torch.int64)[order]
    return Incoming(
        tuple(files[row] for row in order),
        lambda number: read_bytes(rows[order[number]]),
        labels,
        data.label_names,
        data.fingerprint,
    )
