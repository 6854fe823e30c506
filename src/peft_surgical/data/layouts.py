"""How people keep images: folders (``class/image.png``, or ``train/class/image.png`` and so on), and tables."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..extras import require
from .images import IMAGE_SUFFIXES
from .listing import counted, image_files, visible

SPLITS = {
    "tuning": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Our name of each split -> the names under which people have it, in any mix of cases."""

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
    if others := [p for p in folders if p not in by_split.values() and next(image_files(p), None)]:
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
        images = sorted(image_files(name, passed_over, above=(root, folder)))
        if not images and strict:
            raise DataError(
                f"the class folder {name} holds no image ({counted(passed_over)}): remove it, or add images that end "
                f"in {', '.join(IMAGE_SUFFIXES)}"
            )
        listing.paths.extend(map(str, images))
        listing.classes.extend([name.name] * len(images))
        listing.files.extend(image.relative_to(root).as_posix() for image in images)
    if not listing.paths:
        raise DataError(f"{folder} holds no image in any of its folders: add images, or remove it")
    if left := {suffix: n for suffix, n in passed_over.items() if suffix not in _SILENT}:
        _warn(f"left out of {folder}, because they are no images that can be read here: {counted(left)}")
    return listing


def _why_no_class(folder: Path, stray: list[Path]) -> str:
    if stray:
        return (
            f"the {len(stray)} images in {folder} have no labels: put each into a folder named for its class, such as "
            f"{folder / 'cat' / stray[0].name}"
        )
    return f"{folder} is empty: it needs one folder of images for each class, or parquet files"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# --- tables: parquet files, datasets on disk, and datasets from the Hub, by split ---

PURPOSE = "reading data"
_IMAGE_NAMES = ("image", "img", "images", "pixels", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "y")


def parquet_files(folder: Path) -> list[Path]:
    """All parquet files in a folder and the folders below it, in order, without hidden ones."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() == ".parquet" and p.is_file()]
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_parquet(files: Sequence[Path], root: Path | None) -> dict[str, tuple[Any, list[str]]]:
    """Split -> its rows and the file and row of each; rows stay on disk.

    Args:
        files: A single one is the tuning data whatever its name says; several are told apart by their names, if those
            name splits, and together are the tuning data, if not.
        root: The folder that they were found in, whose folders may name splits, too.

    Raises:
        DataError: If a file cannot be read, or some names say a split and some do not.
    """
    pyarrow = require("pyarrow.parquet", PURPOSE)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of_file(file, root) or "", []).append(file)
    if len(files) == 1 or set(by_split) == {""}:
        by_split = {"tuning": list(files)}
    elif "" in by_split:
        raise DataError(
            f"{by_split[''][0]} says no split by its name, but {next(f for f in files if _split_of_file(f, root))} "
            "does: put train, validation or test into every name"
        )
    found = {}
    for split, of_split in by_split.items():
        places: list[str] = []
        for file in of_split:
            try:
                rows = pyarrow.ParquetFile(file).metadata.num_rows
            except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise DataError(f"{file} is no readable parquet file ({error}): fetch or write it again") from error
            shown = file.relative_to(root).as_posix() if root else file.name
            places.extend(f"{shown} row {row}" for row in range(rows))
        found[split] = (_load_parquet(of_split), places)
    return found


def _split_of_file(file: Path, root: Path | None) -> str | None:
    folders = file.relative_to(root).parts[:-1] if root else ()
    exact = [split for name in folders for split, names in SPLITS.items() if name.lower() in names]
    return exact[0] if exact else split_of(file.stem)


def _load_parquet(files: Sequence[Path]) -> Any:
    datasets = require("datasets", PURPOSE)
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # datasets wraps what pyarrow says in exceptions of its own
        cause = error.__cause__ or error
        raise DataError(
            f"cannot read {', '.join(f.name for f in files[:3])} as one table ({cause}): the files of a split need the "
            "same columns; fetch or write them again"
        ) from error


def from_disk(folder: Path) -> Any:
    """What `datasets`' own ``save_to_disk`` wrote to this folder, or None if it wrote nothing there."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    try:
        return require("datasets", PURPOSE).load_from_disk(str(folder))
    except Exception as error:  # as above
        raise DataError(f"{folder} was written by save_to_disk but cannot be read ({error}): save it again") from error


def is_hub_id(source: str) -> bool:
    """Whether this is ``owner/name`` or ``owner/name:config``: a mistyped path must not be asked for on the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[^/]+)?", source) is not None


def from_hub(source: str) -> Any:
    """A dataset of the Hub, all its splits.

    Raises:
        DataError: If it cannot be loaded; the message says that no such folder is here, either.
    """
    datasets = require("datasets", PURPOSE)
    repository, _, config = source.partition(":")
    try:
        return datasets.load_dataset(repository, config or None)
    except Exception as error:  # the Hub, its cache, the network and the builders each have exceptions of their own
        raise DataError(
            f"{source!r} is no file or folder here, and cannot be loaded from the Hub ({error}): check the name, or "
            "pass an image folder or a parquet file"
        ) from error


def by_split(data: Any, source: str) -> dict[str, tuple[Any, list[str]]]:
    """The splits of a ``Dataset`` or ``DatasetDict`` under our names; a single one is the tuning data.

    Raises:
        DataError: If none of several is a training split, or two are the same one.
    """
    if not isinstance(data, Mapping):
        data = {"train": data}
    if len(data) == 1:
        data = {"train": next(iter(data.values()))}
    found: dict[str, tuple[Any, list[str]]] = {}
    for name, dataset in data.items():
        split = next((s for s, names in SPLITS.items() if str(name).lower() in names), None)
        if split is None:
            continue
        if split in found:
            raise DataError(f"{source} has two {split} splits, of which one is called {name!r}: pass the one you mean")
        found[split] = (dataset, [f"{source} {name} row {row}" for row in range(len(dataset))])
    if "tuning" not in found:
        raise DataError(
            f"{source} has the splits {', '.join(map(str, data))} and none is called train: save the one to tune on "
            f"as a parquet file, with load_dataset({source!r}, split=...).to_parquet(...), and pass that"
        )
    return found


def columns(dataset: Any, source: str, image: str | None, label: str | None) -> tuple[str, str]:
    """The names of the image and the label column.

    The one that is asked for; else the only one of its type (Image, ClassLabel); else one with a usual name.

    Raises:
        DataError: If there is none, or more than one could be meant; lists the columns.
    """
    features = dataset.features
    listed = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    for wanted, option in ((image, "image_column"), (label, "label_column")):
        if wanted is not None and wanted not in features:
            raise DataError(f"{option}={wanted!r}: {source} has no such column, it has {listed}")
    image = image or _guess(features, "Image", _IMAGE_NAMES)
    label = label or _guess(features, "ClassLabel", _LABEL_NAMES)
    if image is None or label is None:
        what, option = ("images", "image_column") if image is None else ("labels", "label_column")
        raise DataError(f"{source} has the columns {listed}: say which holds the {what} by {option}=")
    if _kind(features[image]) not in ("Image", "binary", "large_binary", "bytes and path"):
        raise DataError(
            f"column {image!r} of {source} holds {_kind(features[image])}, no images: write it with datasets' Image "
            "feature, or name another column by image_column="
        )
    return image, label


def _guess(features: Mapping[str, Any], kind: str, names: Sequence[str]) -> str | None:
    typed = [name for name, feature in features.items() if _kind(feature) == kind]
    if len(typed) == 1:
        return typed[0]
    return next((name for usual in names for name in (typed or features) if name.lower() == usual), None)


def _kind(feature: Any) -> str:
    if isinstance(feature, Mapping) and "bytes" in feature:
        return "bytes and path"
    return str(getattr(feature, "_type", "")).replace("Value", "") or str(getattr(feature, "dtype", type(feature)))
