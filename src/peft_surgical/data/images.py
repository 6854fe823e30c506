"""Images: from a file or bytes to 8-bit RGB whatever the mode, and what is looked at in all images that are read."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..extras import require

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File endings that are read, in any mix of cases."""

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def content(cell: Mapping[str, Any]) -> bytes:
    """The bytes of an encoded image, as a column of datasets' undecoded images holds it.

    Args:
        cell: ``{"bytes": ..., "path": ...}``; the path is read where the bytes are None.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the cell holds neither.
    """
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise ValueError("there is no image in it")
    if cell["bytes"] is not None:
        return cell["bytes"]
    if (place := Path(cell["path"])).exists() and not place.is_file():
        raise ValueError(f"{str(place)!a} is no regular file")  # a pipe would be waited for without end
    return place.read_bytes()


def decode(encoded: bytes, where: str) -> Any:
    """The PIL image in RGB, upright.

    An orientation that a camera wrote into EXIF is applied, as `datasets` does. An animation's first frame counts.

    Args:
        encoded: The bytes of the file.
        where: The file, or the row, for the message.

    Raises:
        DataError: Names what cannot be decoded.
    """
    pillow, operations = require("PIL.Image", "reading images"), require("PIL.ImageOps", "reading images")
    try:
        image = pillow.open(io.BytesIO(encoded))
        image.load()
        image = operations.exif_transpose(image)
    except Exception as error:  # each of Pillow's decoders has its own: OSError, SyntaxError, struct.error, ...
        raise DataError(_broken(where, error)) from error
    return to_rgb(image, where)


def fault(encoded: bytes, where: str) -> str | None:
    """What `decode` would complain about, or None: cheaper for a JPEG, which is decoded at an eighth of its size."""
    pillow = require("PIL.Image", "reading images")
    try:
        image = pillow.open(io.BytesIO(encoded))
        image.draft(None, (1, 1))
        image.load()
        if image.mode in ("I", "F", "LAB", *SIXTEEN_BIT):
            to_rgb(image, where)
    except DataError as error:
        return str(error)
    except Exception as error:  # as in decode
        return _broken(where, error)
    return None


def _broken(where: str, error: Exception) -> str:
    reason = str(error).split(" <_io")[0]  # Pillow's "cannot identify image file <_io.BytesIO object at 0x...>"
    return f"{where} cannot be decoded ({reason or type(error).__name__}): fetch it again, or remove it"


def to_rgb(image: Any, where: str = "the image") -> Any:
    """A PIL image of any mode in 8-bit RGB.

    Grey becomes three equal channels. Transparency is dropped: the colour that is stored under a transparent pixel
    counts, which is also what timm, torchvision and transformers' pipelines show a network. 16-bit grey is divided by
    257, so that its full range 0..65535 becomes 0..255, never an image's own range: brightness stays comparable between
    images, but 12-bit values in a 16-bit file come out dark and are better rescaled before.

    Args:
        image: A PIL image.
        where: Its file, for the message.

    Raises:
        DataError: If its values have no known range (32-bit and floating-point images), or no way to RGB.
    """
    if image.mode == "RGB":
        return image
    pillow = require("PIL.Image", "reading images")
    if image.mode in (*SIXTEEN_BIT, "I"):
        values = np.asarray(image).astype(np.int64)  # Pillow's own conversion clips everything above 255
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(
                f"{where} holds 32-bit values from {values.min()} to {values.max()}, whose range nothing says: save it "
                "as 8-bit or 16-bit"
            )
        return pillow.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{where} holds floating-point values, whose range nothing says: save it as 8-bit or 16-bit")
    if image.mode == "P":
        # Straight to RGB, Pillow warns about a palette that has transparency; the colours are the same.
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{where} has the colour mode {image.mode}: save it as RGB ({error})") from error


# --- every image that is read: can it be decoded, is it in two parts, which bytes are they ---

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


def without_broken(part: Any) -> Any:
    """The part without the images that cannot be decoded, with a warning that names them.

    Raises:
        DataError: If none is left.
    """
    rows = encoded(part)

    def fault_of(number: int) -> str | None:
        row = rows[number]
        try:
            return fault(read_bytes(row), row["file"])
        except DataError as error:
            return str(error)

    kept = sound(range(len(part)), fault_of, skip=True)
    return part if len(kept) == len(part) else part.select(kept)


def digests_of(part: Any, check: bool) -> list[bytes]:
    """A hash of every image's bytes.

    Args:
        part: Images with the columns ``image`` and ``file``.
        check: Whether to decode every one on the way.

    Raises:
        DataError: Names the images that cannot be read or decoded.
    """
    digests, faults = [], []
    for row in encoded(part):
        try:
            read = read_bytes(row)
            reason = fault(read, row["file"]) if check else None
        except DataError as error:
            read, reason = b"", str(error)
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
