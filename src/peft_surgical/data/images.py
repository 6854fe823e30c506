"""One image: from its file or its bytes to 8-bit RGB, in the same way whatever the file's mode is."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def decode(encoded: bytes, where: str) -> Any:
    """The PIL image in RGB, upright.

    An orientation that a camera wrote into EXIF is applied, as `datasets` does. Of an animation the first frame counts.

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
    numpy, pillow = require("numpy", "reading images"), require("PIL.Image", "reading images")
    if image.mode in (*SIXTEEN_BIT, "I"):
        values = numpy.asarray(image).astype(numpy.int64)  # Pillow's own conversion clips everything above 255
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(
                f"{where} holds 32-bit values from {values.min()} to {values.max()}, whose range nothing says: save it "
                "as 8-bit or 16-bit"
            )
        return pillow.fromarray(((values + 128) // 257).astype(numpy.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{where} holds floating-point values, whose range nothing says: save it as 8-bit or 16-bit")
    if image.mode == "P":
        # Straight to RGB, Pillow warns about a palette that has transparency; the colours are the same.
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{where} has the colour mode {image.mode}: save it as RGB ({error})") from error
