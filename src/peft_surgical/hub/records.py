"""How the base of an adapter is built again: the record ``base.json`` that lies beside an adapter.

PEFT's config names a base and no more. What else it takes (the commit, the library, the number of classes, what became
of the head) is recorded in a file of its own, written when an adapter is pushed and proven then: the record is opened,
the adapter is loaded onto what comes of it, and every tensor of the base is fingerprinted, also those that the adapter
does not tune. A field of the config would be carried from one base to another with the config object, which people
reuse; a file that names the SHA-256 of its weights cannot come to lie beside others unnoticed.

Nothing that is read is executed: a record holds strings, numbers and hashes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import AdapterFileError
from ..files import canonical_json, write_atomically
from ..keys import RECORD_FILE

LIBRARIES = ("timm", "transformers")
RECORDED_HEADS = ("keep", "new", "zero")
DTYPES = ("float64", "float32", "bfloat16", "float16")
FORMAT = 1
_LARGEST = 2**24  # bytes of a record; one of a network with 1,000 tensors has 0.1 MB
_MOST_CLASSES = 10**6
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseRecord:
    """How to build a base, and what must come of it. What is None is found out by `rebuild`.

    Attributes:
        id: A repository of the Hub (``owner/name``), or a folder as an absolute path.
        revision: Commit of the repository; None for a folder.
        library: One of `LIBRARIES`.
        architecture: timm's name of the architecture, or transformers' class.
        dtype: Of the floating-point tensors, such as ``"float32"``.
        num_classes: Outputs.
        label_names: What they mean.
        head: ``"keep"`` the checkpoint's; ``"zero"``, a new one of zeros, which the adapter's deltas add to; ``"new"``,
            of any values, because the adapter holds the head whole.
        fingerprint: Tensor -> hash (see `delta.fingerprint`), of all tensors that the adapter does not hold whole.
        weights_sha256: SHA-256 of the adapter file that the record belongs to.
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
        folder: Of the adapter.
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


def _check(record: BaseRecord, file: Path) -> None:
    """Raise `AdapterFileError` unless all fields have their types and the values that this version knows."""

    def refuse(name: str, expected: str) -> None:
        raise AdapterFileError(f"{file}: {name} is {getattr(record, name)!r}, not {expected}")

    for name in ("revision", "library", "architecture", "dtype", "weights_sha256"):
        if not isinstance(getattr(record, name), str | None):
            refuse(name, "a string")
    if not isinstance(record.id, str) or not record.id:
        refuse("id", "a repository of the Hub or a folder")
    if record.library not in (None, *LIBRARIES):
        refuse("library", f"one of {', '.join(LIBRARIES)}, which this version can build")
    if record.head not in RECORDED_HEADS:
        refuse("head", f"one of {', '.join(RECORDED_HEADS)}")
    if record.dtype not in (None, *DTYPES):
        refuse("dtype", f"one of {', '.join(DTYPES)}")
    if record.revision is not None and not _COMMIT.fullmatch(record.revision):
        refuse("revision", "a commit of 40 hexadecimal digits")
    count = record.num_classes
    if count is not None and (type(count) is not int or not 1 <= count <= _MOST_CLASSES):
        refuse("num_classes", f"a number from 1 to {_MOST_CLASSES:,}")
    names = record.label_names
    if names is not None and (not all(isinstance(n, str) for n in names) or count not in (None, len(names))):
        refuse("label_names", "a name for each class")
    prints = record.fingerprint
    if prints is not None and not (isinstance(prints, dict) and all(isinstance(v, str) for v in prints.values())):
        refuse("fingerprint", "tensor -> hash")
