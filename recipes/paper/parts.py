"""`Published`: a published dataset in disjoint parts, of a source and of a target domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("source", "source_validation", "source_test", "tuning", "validation", "test")


@dataclass(frozen=True)
class Published:
    """A published dataset in disjoint parts, of a source and of a target domain.

    Each part is a map-style ``datasets.Dataset`` with the columns ``image`` (decoded when read), ``label`` (a
    ``ClassLabel``), ``group`` (int64) and ``file`` (the path in the folder, or the row of the table), as
    `peft_surgical.data.labelled.items` reads them.

    Attributes:
        name: Of the dataset.
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
