"""What is looked at in every image that is read: can it be decoded, is it in two parts, which bytes are they."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from ..extras import require
from .images import content, fault

_SHOWN = 5  # broken files that a message names before it counts the rest


def encoded(part: Any) -> Any:
    """The rows of a part with the images' bytes instead of the images."""
    return part.cast_column("image", require("datasets", "reading data").Image(decode=False))


def read_bytes(row: Mapping[str, Any]) -> bytes:
    """The bytes of the image in a row of `encoded`.

    Raises:
        DataError: If its file is gone, or the row holds none.
    """
    try:
        return content(row["image"])
    except (OSError, ValueError) as error:
        raise DataError(f"{row['file']} cannot be read ({error}): bring it back, or take it out") from error


def _read_all(part: Any, check: bool) -> Iterator[tuple[bytes, str | None]]:
    """The bytes of every image, and what is wrong with it, if anything."""
    for row in encoded(part):
        try:
            read = read_bytes(row)
        except DataError as error:
            yield b"", str(error)
        else:
            yield read, fault(read, row["file"]) if check else None


def without_broken(part: Any) -> Any:
    """The part without the images that cannot be decoded, with a warning that names them.

    Raises:
        DataError: If none is left.
    """
    faults = {i: reason for i, (_, reason) in enumerate(_read_all(part, check=True)) if reason is not None}
    if not faults:
        return part
    if len(faults) == len(part):
        raise DataError(f"no image is left: {_listed(list(faults.values()))}")
    warnings.warn(f"left out {len(faults)} image(s): {_listed(list(faults.values()))}", stacklevel=3)
    return part.select([i for i in range(len(part)) if i not in faults])


def digests_of(part: Any, check: bool) -> list[bytes]:
    """A hash of every image's bytes.

    Args:
        part: Images with the columns ``image`` and ``file``.
        check: Whether to decode every one on the way.

    Raises:
        DataError: Names the images that cannot be read or decoded.
    """
    digests, faults = [], []
    for read, reason in _read_all(part, check):
        digests.append(hashlib.blake2b(read, digest_size=16).digest())
        faults += [reason] if reason is not None else []
    if faults:
        raise DataError(_refused(faults))
    return digests


def sound(
    numbers: Sequence[int], fault_of: Callable[[int], str | None], skip: bool, limit: int | None = None
) -> list[int]:
    """The first images of a stream that can be decoded.

    Args:
        numbers: The images, in the order of the stream.
        fault_of: What is wrong with an image, or None.
        skip: Leave broken images out, with a warning, instead of raising.
        limit: So many images at most; the rest is not looked at.

    Raises:
        DataError: Names the broken images, or says that no image is left.
    """
    kept: list[int] = []
    faults: list[str] = []
    for number in numbers:
        if limit is not None and len(kept) + (0 if skip else len(faults)) == limit:
            break
        reason = fault_of(number)
        if reason is None:
            kept.append(number)
        else:
            faults.append(reason)
    if faults and not (skip and kept):
        raise DataError(f"no image is left: {_listed(faults)}" if skip else _refused(faults))
    if faults:
        warnings.warn(f"left out {len(faults)} image(s): {_listed(faults)}", stacklevel=3)
    return kept


def _refused(faults: Sequence[str]) -> str:
    return f'{_listed(faults)}; on_broken="skip" leaves such images out'


def _listed(faults: Sequence[str]) -> str:
    rest = len(faults) - _SHOWN
    return "; ".join(faults[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def warn_of_duplicates(parts: Mapping[str, Any], digests: Mapping[str, Sequence[bytes]]) -> None:
    """Warn of images that are in two parts, and name a pair."""
    seen: dict[bytes, tuple[str, int]] = {}
    shared: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for split in parts:
        for row, digest in enumerate(digests[split]):
            first, at = seen.setdefault(digest, (split, row))
            if first != split:
                shared.setdefault((first, split), []).append((at, row))
    for (first, second), rows in shared.items():
        a, b = _file(parts[first], rows[0][0]), _file(parts[second], rows[0][1])
        warnings.warn(
            f"{len(rows)} image(s) of {second} are byte for byte in {first} too, such as {b} and {a}: numbers measured "
            "on such images look better than they are; take the copies out",
            stacklevel=3,
        )


def _file(part: Any, row: int) -> str:
    return part.select_columns(["file"])[row]["file"]


def data_fingerprint(
    labels: Mapping[str, np.ndarray], digests: Mapping[str, Sequence[bytes]], names: Sequence[str]
) -> str:
    """16 hexadecimal digits over the names of the classes, and the labels and bytes of every part."""
    total = hashlib.sha256("\0".join(names).encode())
    for split in sorted(labels):
        total.update(f"\0{split}\0".encode())
        total.update(labels[split].tobytes())
        total.update(b"".join(digests[split]))
    return total.hexdigest()[:16]
