"""How the base of an adapter is built again: the record ``base.json`` that lies beside an adapter.

PEFT's config names a base and no more. What else it takes (the commit, the library, the number of classes, what became
of the head, the size of its images) is recorded in a file of its own, written when an adapter is pushed and proven
then: the record is opened, the adapter is loaded onto the result, and every tensor of the base is fingerprinted, also
those that the adapter does not tune. A field of the config would be carried from one base to another with the config
object, which people reuse; a file that holds the SHA-256 of its weights cannot lie beside other weights unnoticed.

Nothing that is read is executed: a record holds strings, numbers and hashes. Weights come from safetensors only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError
from ..files import canonical_json, write_atomically
from ..keys import RECORD_FILE

LIBRARIES = ("timm", "transformers")
RECORDED_HEADS = ("keep", "new", "zero")
DTYPES = ("float64", "float32", "bfloat16", "float16")
FORMAT = 1
_LARGEST = 2**24  # bytes of a record; one of a network with 1,000 tensors has 0.1 MB
_MOST_CLASSES = 10**6
MOST_PIXELS = 4096
"""The largest image size that a record may ask for."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseRecord:
    """How to build a base, and what its tensors must be. What is None is found out by `rebuilding.rebuild`.

    Attributes:
        id: A repository of the Hub (``owner/name``), or a folder as an absolute path.
        revision: Commit of the repository; None for a folder.
        library: One of `LIBRARIES`.
        architecture: timm's name of the architecture, or transformers' class.
        dtype: The dtype of its floating-point tensors, such as ``"float32"``.
        num_classes: Number of outputs.
        label_names: What the outputs mean.
        head: ``"keep"`` the checkpoint's; ``"zero"``, a new one of zeros, which the adapter's deltas add to; ``"new"``,
            of any values, because the adapter holds the head whole.
        fingerprint: Tensor -> hash (see `files.fingerprint`), of all tensors that the adapter does not hold whole.
        weights_sha256: SHA-256 of the adapter file that the record belongs to.
        image_size: Height and width of its inputs in pixels, where the adapter was tuned on another size than the
            checkpoint's.
    """

    id: str
    revision: str | None = None
    library: str | None = None
    architecture: str | None = None
    dtype: str | None = None
    num_classes: int | None = None
    label_names: tuple[str, ...] | None = None
    head: str = "keep"
    fingerprint: Mapping[str, str] | None = None
    weights_sha256: str | None = None
    image_size: int | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the base is a folder of this machine."""
        return os.path.isabs(self.id)


def write_record(folder: str | os.PathLike[str], record: BaseRecord) -> None:
    """Write ``base.json`` in one step."""
    write_atomically(Path(folder, RECORD_FILE), canonical_json({"format": FORMAT, **asdict(record)}))


def read_record(folder: str | os.PathLike[str], weights_sha256: str | None = None) -> BaseRecord | None:
    """The record in an adapter's folder; None where there is none.

    Args:
        folder: The adapter's.
        weights_sha256: SHA-256 of the adapter file beside it, if it is known.

    Raises:
        AdapterFileError: It is no record, was written by a later version, or belongs to another adapter.
    """
    file = Path(folder, RECORD_FILE)
    if not file.is_file():
        return None
    if file.stat().st_size > _LARGEST:
        raise AdapterFileError(f"{file} has {file.stat().st_size:,} bytes: no record of a base is that large")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain.pop("format") != FORMAT:
            raise AdapterFileError(f"{file} was written by a later version: pip install -U peft-surgical")
        names = plain.pop("label_names")
        record = BaseRecord(label_names=None if names is None else tuple(names), **plain)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        expected = ", ".join(entry.name for entry in fields(BaseRecord))
        raise AdapterFileError(f"{file} is no record of a base ({error}): expected {expected}") from error
    _check(record, file)
    if weights_sha256 is not None and record.weights_sha256 not in (None, weights_sha256):
        raise AdapterFileError(
            f"{file} belongs to another adapter file (SHA-256 {record.weights_sha256[:12]}...) than the one beside it "
            f"({weights_sha256[:12]}...): remove it, and say base= or push again"
        )
    return record


def is_count(value: Any, most: int) -> bool:
    """Whether this is None or a whole number from 1 to ``most``."""
    return value is None or (type(value) is int and 1 <= value <= most)


def _check(record: BaseRecord, file: Path) -> None:
    """Raise `AdapterFileError` unless all fields have their types and the values that this version knows."""

    def text(value: Any) -> bool:
        return isinstance(value, str | None)

    revision, names, prints = record.revision, record.label_names, record.fingerprint
    named = names is None or (all(map(text, names)) and record.num_classes in (None, len(names)))
    hashes = prints is None or (isinstance(prints, dict) and all(isinstance(v, str) for v in prints.values()))
    for name, valid, expected in (
        ("id", isinstance(record.id, str) and record.id, "a repository of the Hub or a folder"),
        ("revision", text(revision) and (revision is None or _COMMIT.fullmatch(revision)), "a commit of 40 hex digits"),
        ("library", record.library in (None, *LIBRARIES), f"one of {', '.join(LIBRARIES)}, which this version builds"),
        ("architecture", text(record.architecture), "a string"),
        ("dtype", record.dtype in (None, *DTYPES), f"one of {', '.join(DTYPES)}"),
        ("num_classes", is_count(record.num_classes, _MOST_CLASSES), f"a number from 1 to {_MOST_CLASSES:,}"),
        ("label_names", named, "a name for each class"),
        ("head", record.head in RECORDED_HEADS, f"one of {', '.join(RECORDED_HEADS)}"),
        ("fingerprint", hashes, "tensor -> hash"),
        ("weights_sha256", text(record.weights_sha256), "a string"),
        ("image_size", is_count(record.image_size, MOST_PIXELS), f"a number from 1 to {MOST_PIXELS:,}"),
    ):
        if not valid:
            raise AdapterFileError(f"{file}: {name} is {getattr(record, name)!r}, not {expected}")
