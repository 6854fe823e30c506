"""Image folders: ``class/image.png``, or ``train/class/image.png`` beside ``validation/`` and ``test/``."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .images import IMAGE_SUFFIXES

SPLITS = {
    "tuning": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Our name of each split -> the names under which people have it, in any mix of cases."""

_SYSTEM = ("__macosx", "@eadir", "$recycle.bin")
# Notes that people keep beside their images; anything else that is left out is worth a warning.
_SILENT = (".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".md", ".txt", ".xml", ".yaml", ".yml")


def split_of(name: str) -> str | None:
    """The split that a folder or file is named for: as a whole, or by a word of it (``val-00000-of-00001``)."""
    words = {name.lower(), *re.split(r"[^a-z]+", name.lower())}
    found = [split for split, names in SPLITS.items() if words & set(names)]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Listing:
    """The images of one split: their paths, the names of their classes, and their paths relative to the source."""

    paths: list[str]
    classes: list[str]
    files: list[str]


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden files and those of operating systems."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _SYSTEM)


def list_images(root: Path) -> dict[str, Listing]:
    """The images of a folder by split; without ``train/`` and the like, everything is in ``tuning``.

    Raises:
        DataError: If the folder is in neither layout; names the folder or file that does not fit.
    """
    folders = [p for p in visible(root) if p.is_dir()]
    by_split: dict[str, Path] = {}
    for folder in folders:
        split = next((s for s, names in SPLITS.items() if folder.name.lower() in names), None)
        if split in by_split:
            raise DataError(f"{by_split[split]} and {folder} both look like the {split} split: merge or rename one")
        if split is not None:
            by_split[split] = folder
    if not by_split:
        return {"tuning": _split(root, root, strict=True)}
    if "tuning" not in by_split:
        raise DataError(
            f"{root} has {by_split.popitem()[1].name}/ but no train/: name the folder with the images to tune on train/"
        )
    if others := [p for p in folders if p not in by_split.values() and next(_images_below(p), None)]:
        raise DataError(
            f"{others[0]} holds images but is none of the splits beside it: name it for one of "
            f"{', '.join(f'{names[0]}/' for names in SPLITS.values())}, or move it away"
        )
    return {split: _split(folder, root, strict=split == "tuning") for split, folder in by_split.items()}


def _split(folder: Path, root: Path, strict: bool) -> Listing:
    listing = Listing([], [], [])
    passed_over: Counter[str] = Counter()
    entries = visible(folder)
    stray = [p for p in entries if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    classes = [p for p in entries if p.is_dir()]
    if not classes:
        raise DataError(_why_no_class(folder, stray))
    if stray:
        _warn(f"{len(stray)} image(s) lie beside the class folders and belong to no class, first {stray[0]}: left out")
    for name in classes:
        images = sorted(_images_below(name, passed_over))
        if not images and strict:
            raise DataError(
                f"the class folder {name} holds no image ({_counted(passed_over)}): remove it, or add images that end "
                f"in {', '.join(IMAGE_SUFFIXES)}"
            )
        listing.paths.extend(map(str, images))
        listing.classes.extend([name.name] * len(images))
        listing.files.extend(image.relative_to(root).as_posix() for image in images)
    if not listing.paths:
        raise DataError(f"{folder} holds no image in any of its folders: add images, or remove it")
    if left := {suffix: n for suffix, n in passed_over.items() if suffix not in _SILENT}:
        _warn(f"left out of {folder}, because they are no images that can be read here: {_counted(left)}")
    return listing


def _images_below(folder: Path, passed_over: Counter[str] | None = None) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f.lower() not in _SYSTEM)
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if file.startswith(".") or file.lower() == "thumbs.db":
                continue
            if suffix in IMAGE_SUFFIXES:
                yield Path(place, file)
            elif passed_over is not None:
                passed_over[suffix] += 1


def _counted(suffixes: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {suffix or 'without ending'}" for suffix, n in sorted(suffixes.items())) or "nothing"


def _why_no_class(folder: Path, stray: list[Path]) -> str:
    if stray:
        return (
            f"the {len(stray)} images in {folder} have no labels: put each into a folder named for its class, such as "
            f"{folder / 'cat' / stray[0].name}"
        )
    return f"{folder} is empty: it needs one folder of images for each class, or parquet files"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
