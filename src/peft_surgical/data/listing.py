"""Which files in a folder, and in the folders below it, are images."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .images import IMAGE_SUFFIXES

_SYSTEM = ("__macosx", "@eadir", "$recycle.bin")


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden files and those of operating systems."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _SYSTEM)


def image_files(folder: Path, passed_over: Counter[str] | None = None, above: Sequence[Path] = ()) -> Iterator[Path]:
    """The images in a folder and the folders below it, sorted by name, each folder once whatever links lead to it.

    Args:
        folder: Where to look.
        passed_over: Counts the endings of other files, and what has the ending of an image and is no regular file: a
            pipe would be waited for without end.
        above: Folders that a link below must not lead back to.

    Raises:
        DataError: A name is not UTF-8, which tables and results cannot hold.
    """
    visited = {(place.stat().st_dev, place.stat().st_ino) for place in (*above, folder)}
    pending = [iter(visible(folder))]
    while pending:
        path = next(pending[-1], None)
        if path is None:
            pending.pop()
            continue
        try:
            found = path.stat()
        except OSError:
            found = None  # a broken link: whoever reads it says so
        kind = found.st_mode if found is not None else stat.S_IFREG
        suffix = path.suffix.lower()
        if found is not None and stat.S_ISDIR(kind):
            if (found.st_dev, found.st_ino) not in visited:
                visited.add((found.st_dev, found.st_ino))
                pending.append(iter(visible(path)))
        elif suffix in IMAGE_SUFFIXES and stat.S_ISREG(kind):
            if not _is_utf8(path):
                raise DataError(f"{str(path)!a} has a name that is not UTF-8: rename it")
            yield path
        elif passed_over is not None and path.name.lower() != "thumbs.db":
            passed_over[f"{suffix} that are no regular files" if suffix in IMAGE_SUFFIXES else suffix] += 1


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def counted(suffixes: Mapping[str, int]) -> str:
    """How many files there are of each ending, in words."""
    return ", ".join(f"{n} {suffix or 'without ending'}" for suffix, n in sorted(suffixes.items())) or "nothing"
