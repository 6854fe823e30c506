"""From listed images to a `Published` data set: one table of all of them, cut into parts by row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_surgical.extras import require

from .parts import PARTS, Published


def images_of(paths: Sequence[str]) -> Any:
    """A ``datasets.Dataset`` whose column ``image`` opens these files when it is read."""
    datasets, pyarrow = require("datasets", "reading data"), require("pyarrow", "reading data")
    features = datasets.Features({"image": datasets.Image()})
    # An Arrow array, since a list would have each path encoded on its own.
    return datasets.Dataset.from_dict({"image": pyarrow.array(paths, pyarrow.string())}, features=features)


def cut(
    name: str,
    images: Any,
    files: Sequence[str],
    labels: np.ndarray,
    groups: np.ndarray,
    parts: Mapping[str, np.ndarray],
    *,
    label_names: Sequence[str],
    group_names: Sequence[str],
    origin: Mapping[str, str],
) -> Published:
    """A data set whose parts are rows of one table of n images.

    Args:
        name: Of the data set.
        images: A ``datasets.Dataset`` with the column ``image``, n rows.
        files: What to call each image: part of the fingerprint, so nothing that depends on where the files lie.
        labels: int64 (n,).
        groups: int64 (n,).
        parts: Part -> its rows, int64.
        label_names: The classes.
        group_names: The groups.
        origin: Part -> how it came about.
    """
    datasets = require("datasets", "reading data")
    # To all rows at once: adding a column to a selection would make datasets write out its images.
    table = images.add_column("label", labels, feature=datasets.ClassLabel(names=list(label_names)))
    table = table.add_column("group", groups, feature=datasets.Value("int64")).add_column("file", list(files))
    total = hashlib.sha256("\0".join([name, *label_names, *group_names]).encode())
    for part in (part for part in PARTS if part in parts):
        rows = parts[part]
        total.update("\0".join([f"\0{part}", *(files[row] for row in rows)]).encode())
        for values in (labels[rows], groups[rows]):
            total.update(values.astype("<i8").tobytes())
    return Published(
        name=name,
        **{part: table.select(parts[part]) if part in parts else None for part in PARTS},
        label_names=tuple(label_names),
        group_names=tuple(group_names),
        origin={part: origin[part] for part in PARTS if part in parts},
        fingerprint=total.hexdigest()[:16],
    )
