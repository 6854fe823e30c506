"""`Published`: a published dataset in disjoint parts of a source and a target domain, and how one is made of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_surgical.extras import require

PARTS = ("source", "source_validation", "source_test", "tuning", "validation", "test")


@dataclass(frozen=True)
class Published:
    """A published dataset in disjoint parts, of a source and of a target domain.

    Each part is a map-style ``datasets.Dataset`` with the columns ``image`` (decoded when read), ``label`` (a
    ``ClassLabel``), ``group`` (int64) and ``file`` (the path in the folder, or the row of the table), as
    `peft_surgical.data.labelled.items` reads them.

    Attributes:
        name: Name of the dataset.
        source: Images of the source domain to train on, or None.
        source_validation: Held-out images of the source domain, or None.
        source_test: The same, to report on, or None.
        tuning: The few images of the target domain to tune on.
        validation: Those of the target domain to choose with.
        test: Those of the target domain to report on.
        label_names: The classes, in the order of their numbers.
        group_names: The groups, in the order of their numbers: class with background or sex, hospital, or region.
        origin: How each part came about, in words.
        fingerprint: 16 hexadecimal digits over the rows, labels and groups of all parts, not over the images. It does
            not depend on where the files lie, but on their order: the Hub's copy and the WILDS folder differ in it.
    """

    name: str
    source: Any | None
    source_validation: Any | None
    source_test: Any | None
    tuning: Any
    validation: Any
    test: Any
    label_names: tuple[str, ...]
    group_names: tuple[str, ...]
    origin: Mapping[str, str]
    fingerprint: str

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that there are, by name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def __str__(self) -> str:
        lines = [f"{name}: {len(part)} images ({self.origin[name]})" for name, part in self.parts.items()]
        counts = f"{len(self.label_names)} classes, {len(self.group_names)} groups, fingerprint {self.fingerprint}"
        return "\n".join([f"{self.name}:", *lines, counts])


# --- From listed images to a `Published` data set: one table of all of them, cut into parts by row. ---


def images_of(paths: Sequence[str]) -> Any:
    """A ``datasets.Dataset`` whose column ``image`` opens these files when it is read."""
    datasets, pyarrow = require("datasets", "reading data"), require("pyarrow", "reading data")
    features = datasets.Features({"image": datasets.Image()})
    # An Arrow array, since a list would have each path encoded on its own.
    return datasets.Dataset.from_dict({"image": pyarrow.array(paths, pyarrow.string())}, features=features)


def cut(
    name: str,
    images: Any,
    labels: np.ndarray,
    groups: np.ndarray,
    parts: Mapping[str, np.ndarray],
    *,
    label_names: Sequence[str],
    group_names: Sequence[str],
    origin: Mapping[str, str],
    files: Sequence[str] | None = None,
) -> Published:
    """A data set whose parts are rows of one table of n images.

    Args:
        name: Name of the data set.
        images: A ``datasets.Dataset`` with the column ``image``, n rows.
        labels: int64 (n,).
        groups: int64 (n,).
        parts: Part -> its rows, int64.
        label_names: The classes.
        group_names: The groups.
        origin: Part -> how it came about.
        files: What to call each image: part of the fingerprint, so nothing that depends on where the files lie. None:
            ``images`` has a column ``file``, and row numbers are part of the fingerprint.
    """
    datasets = require("datasets", "reading data")
    # To all rows at once: adding a column to a selection would make datasets write out its images.
    table = images.add_column("label", labels, feature=datasets.ClassLabel(names=list(label_names)))
    table = table.add_column("group", groups, feature=datasets.Value("int64"))
    table = table if files is None else table.add_column("file", list(files))
    parts = {part: parts[part] for part in PARTS if part in parts}
    total = hashlib.sha256("\0".join([name, *label_names, *group_names]).encode())
    for part, rows in parts.items():
        named = map(str, rows.tolist()) if files is None else (files[row] for row in rows)
        total.update("\0".join([f"\0{part}", *named]).encode())
        for values in (labels[rows], groups[rows]):
            total.update(values.astype("<i8").tobytes())
    return Published(
        name=name,
        **{part: table.select(parts[part]) if part in parts else None for part in PARTS},
        label_names=tuple(label_names),
        group_names=tuple(group_names),
        origin={part: origin[part] for part in parts},
        fingerprint=total.hexdigest()[:16],
    )
