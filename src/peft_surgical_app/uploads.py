"""What visitors send: images and zip files of images, checked one by one before anything of them is kept.

Only what Pillow opens as a usual image format is written, under names that are made here from the sender's, below the
folder that is given. So there is nothing in that folder that could be read as anything else, such as a table.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from peft_surgical.data.images import IMAGE_SUFFIXES, decode, fault
from peft_surgical.data.layouts import SPLITS
from peft_surgical.errors import DataError
from peft_surgical.extras import require
from peft_surgical.files import shown

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's formats that are read: those of `IMAGE_SUFFIXES`, and so none that is a program, such as EPS."""
_DEEPEST = 8  # folders in one another
_LONGEST = 100  # characters of a name
_HIDDEN = (".", "__macosx", "thumbs.db", "desktop.ini")  # beginnings of names that operating systems add


@dataclass(frozen=True)
class UploadLimits:
    """How much one visitor may send.

    Attributes:
        images: Number of images, all uploads together.
        image_bytes: Size of one image file.
        total_bytes: Size of all of them.
        pixels: Width times height of one image.
    """

    images: int = 5000
    image_bytes: int = 20 * 2**20
    total_bytes: int = 2**30
    pixels: int = 50_000_000


@dataclass(frozen=True)
class Received:
    """What became of an upload.

    Attributes:
        kept: Number of images that were kept.
        left_out: Why others were not, a sentence each.
    """

    kept: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = "1 image was added" if self.kept == 1 else f"{self.kept} images were added"
        if not self.left_out:
            return f"{words}."
        return f"{words}, {len(self.left_out)} left out: {shown(self.left_out)}."


def add_images(folder: Path, label: str, files: Iterable[Path], limits: UploadLimits) -> Received:
    """Keep images of one class.

    Args:
        folder: Gets a folder for the class.
        label: Name of the class.
        files: The files, called as their sender calls them.
        limits: How much may be kept in all.

    Raises:
        DataError: The name cannot be that of a folder, or there is more than the limits allow.
    """
    name = _folder_name(label)
    return _keep(folder, ((PurePosixPath(name, file.name), _read(file, limits)) for file in files), limits)


def add_archive(folder: Path, file: Path, limits: UploadLimits) -> Received:
    """Keep the images of a zip file with a folder for each class, with or without ``train/`` and the like above them.

    A folder around everything is taken away. Nothing is unpacked whose path leads elsewhere, and no more than the
    limits allow, whatever sizes the file says it holds.

    Raises:
        DataError: It is no zip file, has a password or such a path, holds no image in a folder, or is too large.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [one for one in archive.infolist() if not one.is_dir() and not _is_hidden(one.filename)]
            if len(members) > 2 * limits.images:
                raise DataError(f"{file.name} holds {len(members)} files, more than can be taken: {_most(limits)}")
            places = {one.filename: _place(one.filename) for one in members}
            if any(one.flag_bits & 1 for one in members):
                raise DataError(f"{file.name} has a password: make a zip file without one")
            around = _folder_around([place for place in places.values() if place.suffix.lower() in IMAGE_SUFFIXES])
            found = _keep(folder, _unpacked(archive, members, places, around, limits), limits)
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{file.name} cannot be read as a zip file ({error}): make it anew") from error
    if not found.kept:
        why = f" ({shown(found.left_out)})" if found.left_out else ""
        raise DataError(f"{file.name} holds no image in a folder of its class, such as cat/1.jpg{why}")
    return found


def class_counts(folder: Path) -> dict[str, int]:
    """Folder of images, relative to ``folder`` -> number of images in it and below, as `read_data` finds classes."""
    counts: dict[str, int] = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.is_file():
            parts = file.relative_to(folder).parts
            depth = 2 if parts[0].lower() in _SPLIT_NAMES and len(parts) > 2 else 1
            name = "/".join(parts[:depth])
            counts[name] = counts.get(name, 0) + 1
    return counts


def read_image(file: Path, limits: UploadLimits) -> Any:
    """An image that a visitor sent, as a PIL image in RGB.

    Raises:
        DataError: It is no image of `IMAGE_FORMATS`, too large, or broken.
    """
    content = _read(file, limits)
    if isinstance(content, str) or (content_fault := _fault(content, file.name, limits)):
        raise DataError(content if isinstance(content, str) else content_fault)
    return decode(content, file.name)


_SPLIT_NAMES = {name for names in SPLITS.values() for name in names}


def _keep(folder: Path, found: Iterable[tuple[PurePosixPath, bytes | str]], limits: UploadLimits) -> Received:
    """Write what is an image; contents that are texts say why there is none.

    All or nothing: where one cannot be kept, or the limits are exceeded, what was made here is removed again.
    """
    own = [file for file in folder.rglob("*") if file.is_file()] if folder.is_dir() else []
    count, size = len(own), sum(file.stat().st_size for file in own)
    before = count
    made: list[Path] = []
    left_out: list[str] = []
    try:
        for place, content in found:
            if place.suffix.lower() not in IMAGE_SUFFIXES:
                left_out.append(f"{place} is no image that can be read here ({', '.join(IMAGE_SUFFIXES)})")
                continue
            reason = content if isinstance(content, str) else _fault(content, str(place), limits)
            if reason is not None or isinstance(content, str):
                left_out.append(str(reason))
                continue
            count, size = count + 1, size + len(content)
            if count > limits.images or size > limits.total_bytes:
                raise DataError(f"these are too many or too large images: {_most(limits)}")
            try:
                _write(folder, place, content, made)
            except OSError as error:
                raise DataError(f"{place} cannot be kept ({error.strerror}): nothing was added") from error
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # a folder in which there is something else by now
                path.rmdir() if path.is_dir() else path.unlink()
        raise
    return Received(count - before, tuple(left_out))


def _write(folder: Path, place: PurePosixPath, content: bytes, made: list[Path]) -> None:
    """Write a file; what is made for it below the folder is added to ``made``, also where it fails."""
    target = folder.joinpath(*place.parts)
    if not target.resolve().is_relative_to(folder.resolve()):  # cannot be, after `_place`
        raise DataError(f"{place} leads out of the folder: nothing was kept")
    folder.mkdir(parents=True, exist_ok=True)
    for depth in range(1, len(place.parts)):
        parent = folder.joinpath(*place.parts[:depth])
        with contextlib.suppress(FileExistsError):
            parent.mkdir()
            made.append(parent)
    number = 1
    while True:
        try:
            with target.open("xb") as out:
                made.append(target)
                out.write(content)
            return
        except FileExistsError:  # another image of the same name
            number += 1
            target = target.with_name(f"{place.stem}-{number}{place.suffix}")


def _read(file: Path, limits: UploadLimits) -> bytes | str:
    if file.stat().st_size > limits.image_bytes:
        return _too_large(file.name, limits)
    return file.read_bytes()


def _unpacked(
    archive: zipfile.ZipFile,
    members: Iterable[zipfile.ZipInfo],
    places: dict[str, PurePosixPath],
    around: str | None,
    limits: UploadLimits,
) -> Iterator[tuple[PurePosixPath, bytes | str]]:
    for member in members:
        place = places[member.filename]
        if around is not None and place.parts[0] == around:
            place = PurePosixPath(*place.parts[1:])
        if place.suffix.lower() not in IMAGE_SUFFIXES:
            yield place, ""
        elif len(place.parts) < 2:
            yield place, f"{place} lies in no folder, and so has no class"
        elif member.file_size > limits.image_bytes:
            yield place, _too_large(str(place), limits)
        else:
            with archive.open(member) as source:
                content = source.read(limits.image_bytes + 1)  # whatever size it says
            yield place, content if len(content) <= limits.image_bytes else _too_large(str(place), limits)


def _place(name: str) -> PurePosixPath:
    """Where a member of an archive belongs, below a folder.

    Raises:
        DataError: Its path leads elsewhere, or cannot be a path here.
    """
    parts = re.split(r"[/\\]", name)
    refused = not name.isprintable() or len(parts) > _DEEPEST or any(part in ("", ".", "..") for part in parts)
    if refused or any(":" in part or len(part) > _LONGEST or part != part.strip() for part in parts):
        raise DataError(f"{name[:200]!a} is no path that can be unpacked here: rename it, and make the zip file anew")
    return PurePosixPath(*parts)


def _folder_around(places: list[PurePosixPath]) -> str | None:
    """The folder that everything lies in, if the classes are below it."""
    tops = {place.parts[0] for place in places if len(place.parts) > 1}
    deep = all(len(place.parts) > 2 for place in places)
    (top,) = tops if len(tops) == 1 and deep else (None,)
    return None if top is None or top.lower() in _SPLIT_NAMES else top


def _is_hidden(name: str) -> bool:
    return any(part.lower().startswith(_HIDDEN) for part in re.split(r"[/\\]", name) if part not in (".", ".."))


def _folder_name(label: str) -> str:
    name = " ".join(label.split())
    if (
        not name
        or name.startswith(".")
        or len(name) > _LONGEST
        or not name.isprintable()
        or set(name) & set('/\\:*?"<>|')
    ):
        raise DataError(
            f"{label!r} cannot be the name of a class: give letters, digits, spaces, - and _, at most {_LONGEST}"
        )
    return name


def _fault(content: bytes, where: str, limits: UploadLimits) -> str | None:
    """Why this is no image that is taken; None if it is one."""
    pillow = require("PIL.Image", "reading images")
    try:
        with pillow.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            wide, high = image.size
    except Exception as error:  # each of Pillow's decoders has its own
        reason = str(error).split(" <_io")[0] or type(error).__name__
        return f"{where} is no image of {', '.join(IMAGE_FORMATS)} ({reason})"
    if wide * high > limits.pixels:
        return f"{where} has {wide} x {high} pixels, more than {limits.pixels / 1e6:.0f} million: make it smaller"
    return fault(content, where)


def _too_large(name: str, limits: UploadLimits) -> str:
    return f"{name} is larger than {limits.image_bytes / 2**20:.0f} MiB: make it smaller"


def _most(limits: UploadLimits) -> str:
    return f"at most {limits.images} images of {limits.total_bytes / 2**20:.0f} MiB together. Nothing was added"


def remove_uploads(folder: Path) -> None:
    """Remove everything that was kept."""
    shutil.rmtree(os.fspath(folder), ignore_errors=True)
