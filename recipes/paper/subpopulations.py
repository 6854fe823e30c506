"""Living-17 and Entity-30 as `Published` data: source and target subclasses of ImageNet on disk.

::

    train, val = imagenet_parts("imagenet")
    data = read_breeds("living17", hierarchy="modified", train=train, val=val, seed=0)

`breeds` makes the classes; here they become images.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_surgical.data.folders import visible
from peft_surgical.data.images import IMAGE_SUFFIXES
from peft_surgical.data.splits import draw, per_class
from peft_surgical.errors import DataError

from .breeds import Breeds, Subclass, breeds
from .parts import Published, cut, images_of

BREEDS_EACH = 50
"""Images of each superclass to tune on (paper: 850 for Living-17, 1,500 for Entity-30)."""

_KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")


class _Images(NamedTuple):
    """Images of one folder and one domain, in the order of `imagenet_files`."""

    paths: list[str]
    files: list[str]
    labels: np.ndarray
    groups: np.ndarray


def imagenet_parts(root: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The folders ``train`` and ``val`` of ImageNet.

    Args:
        root: The folder that holds both, or the one above ``ILSVRC/Data/CLS-LOC``, as Kaggle's archive has it.

    Raises:
        DataError: It does not hold both; names the one that is missing.
    """
    place = Path(root).expanduser()
    if not place.is_dir():
        raise DataError(f"{place} is no folder: pass the one that holds ImageNet's train/ and val/")
    for folder in (place, place / _KAGGLE):
        train, val = folder / "train", folder / "val"
        if train.is_dir() and val.is_dir():
            return train, val
    if place.name in ("train", "val") and (place.parent / "train").is_dir() and (place.parent / "val").is_dir():
        raise DataError(f"{place} is one part of ImageNet: pass the folder above it, {place.parent}")
    missing = [f"{part}/" for part in ("train", "val") if not (place / part).is_dir()]
    raise DataError(
        f"{place} has no {' and no '.join(missing)}: both are needed, each with a folder for every class, named "
        "n01440764 and so on"
    )


def read_breeds(
    name: str,
    *,
    hierarchy: str | os.PathLike[str],
    train: str | os.PathLike[str],
    val: str | os.PathLike[str],
    seed: int = 0,
    tuning: int | None = None,
    validation: int | None = None,
) -> Published:
    """A BREEDS benchmark from ImageNet on disk; no image is opened.

    The classes are the superclasses, the groups the subclasses. ``source`` are all training images of the source's
    subclasses, ``source_test`` their validation images. Of the training images of the target's subclasses, 50 of each
    superclass are drawn to tune on and as many to validate; the validation images of these subclasses are ``test``, so
    that no draw changes them.

    Chosen here, since the paper does not say: that the target's images are drawn from all of its subclasses together
    and from ImageNet's training images, and how many validate.

    Args:
        name: ``living17`` or ``entity30``.
        hierarchy: Folder with the hierarchy files, see `breeds`.
        train: ImageNet's training images, a folder for each class, named for its WordNet id.
        val: ImageNet's validation images, sorted into such folders.
        seed: Of the draw. Draws of one seed are nested: ``tuning=170`` is a part of ``tuning=340``.
        tuning: Number of images to tune on, over all superclasses; None is the paper's.
        validation: The same to validate; None is as many as the paper's to tune on.

    Raises:
        DataError: Names the file, folder, class or number that does not fit, and the way out.
    """
    benchmark = breeds(hierarchy, name)
    places = {"train": Path(train).expanduser(), "val": Path(val).expanduser()}
    for part, place in places.items():
        if (place / part).is_dir():
            raise DataError(f"{place} is the folder above ImageNet's {part} images: pass {place / part}")
    if all(place.is_dir() for place in places.values()) and places["train"].samefile(places["val"]):
        raise DataError(
            f"{places['val']} is given for the training and for the validation images: one image would tune and test"
        )
    # Source and target of train, then of val.
    found = [images for part, place in places.items() for images in _read(place, part, benchmark)]
    starts = np.cumsum([0, *(len(images.paths) for images in found)])
    rows = [np.arange(start, end) for start, end in itertools.pairwise(starts)]
    names = [one.name.split(",")[0] for one in benchmark.superclasses]
    drawn, each = _draw(found[1], places["train"], names, seed, tuning, validation)
    parts = {"source": rows[0], "source_test": rows[2], "test": rows[3]}
    parts |= {part: rows[1][of_part] for part, of_part in drawn.items()}
    pool = f"of each superclass of the training images of {len(benchmark.labels('target'))} other subclasses"
    return cut(
        name,
        images_of([path for images in found for path in images.paths]),
        np.concatenate([images.labels for images in found]),
        np.concatenate([images.groups for images in found]),
        parts,
        label_names=names,
        group_names=[f"{sub.name.split(',')[0]} ({sub.index})" for sub in _subclasses(benchmark)],
        origin={
            "source": f"given: the training images of {len(benchmark.labels('source'))} subclasses",
            "source_test": "given: the validation images of these subclasses",
            "test": "given: the validation images of the other subclasses",
            **{part: f"drawn: seed {seed}, {count} {pool}" for part, count in each.items()},
        },
        files=[file for images in found for file in images.files],
    )


def _subclasses(benchmark: Breeds) -> tuple[Subclass, ...]:
    """All subclasses, whose places are the groups: superclass by superclass, those of the source first."""
    return tuple(sub for one in benchmark.superclasses for sub in (*one.source, *one.target))


def _read(place: Path, part: str, benchmark: Breeds) -> list[_Images]:
    group = {sub.wnid: number for number, sub in enumerate(_subclasses(benchmark))}
    found = []
    for listed in imagenet_files(place, benchmark):
        ends = [path.rsplit(os.sep, 2)[1:] for path, _ in listed]
        found.append(
            _Images(
                [path for path, _ in listed],
                [f"{part}/{wnid}/{file}" for wnid, file in ends],
                np.array([label for _, label in listed], dtype=np.int64),
                np.array([group[wnid] for wnid, _ in ends], dtype=np.int64),
            )
        )
    return found


def _draw(
    pool: _Images, place: Path, names: list[str], seed: int, tuning: int | None, validation: int | None
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Part -> rows of the pool, and images of each class."""
    usual = BREEDS_EACH * len(names)
    # Tuning last, so that its draws are nested.
    sizes = {"validation": usual if validation is None else validation, "tuning": usual if tuning is None else tuning}
    each = {part: per_class(size, pool.labels, part) for part, size in sizes.items()}
    try:
        return draw(pool.labels, each, None, seed, names), each
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


# --- The images of a BREEDS benchmark in ImageNet on disk, by domain and superclass. ---


class Files(NamedTuple):
    """Images of each domain: (path, label of the superclass), by superclass, then class, then file name."""

    source: list[tuple[str, int]]
    target: list[tuple[str, int]]


def imagenet_files(
    folder: str | os.PathLike[str], benchmark: Breeds, per_class: int | None = None, seed: int = 0
) -> Files:
    """The images of a benchmark in ImageNet on disk; none is opened.

    To tune on 50 images per superclass, as the paper does, and test on ImageNet's validation images::

        tune = imagenet_files("imagenet/train", living17, per_class=50, seed=0).target
        test = imagenet_files("imagenet/val", living17).target

    Args:
        folder: Holds a folder for each class, named for its WordNet id: ImageNet's ``train/``, or ``val/`` sorted so.
        benchmark: From :func:`breeds`.
        per_class: Draw so many images of each superclass, from all of its classes together; None takes all.
        seed: Of the draw, which is the one of :func:`peft_surgical.data.splits.draw`. The paper does not say which
            images it drew.

    Raises:
        DataError: If a class has no folder or no image, or a superclass has fewer than ``per_class`` images.
    """
    if per_class is not None and per_class <= 0:
        raise DataError(f"per_class={per_class} draws nothing: pass a positive number, or None for all images")
    place = Path(folder)
    if not place.is_dir():
        raise DataError(f"{place} is no folder: pass the one that holds ImageNet's folders n01440764, n01443537, ...")
    domains = {domain: benchmark.labels(domain) for domain in ("source", "target")}
    missing = sorted(wnid for labels in domains.values() for wnid in labels if not (place / wnid).is_dir())
    if missing:
        raise DataError(_no_folder(place, missing, sum(map(len, domains.values()))))
    names = [one.name.split(",")[0] for one in benchmark.superclasses]
    return Files(*(_images(place, labels, per_class, seed, names) for labels in domains.values()))


def _images(
    place: Path, labels: Mapping[str, int], per_class: int | None, seed: int, names: list[str]
) -> list[tuple[str, int]]:
    files: list[tuple[str, int]] = []
    for wnid, label in labels.items():
        images = [str(file) for file in visible(place / wnid) if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise DataError(f"{place / wnid} holds no image: unpack the archive of this class again")
        files.extend((image, label) for image in images)
    if per_class is None:
        return files
    numbers = np.array([label for _, label in files])
    return [files[row] for row in draw(numbers, {"the draw": per_class}, None, seed, names)["the draw"]]


def _no_folder(place: Path, missing: list[str], needed: int) -> str:
    said = f"{place} has no folder for {len(missing)} of {needed} classes, first {missing[0]}: "
    inside = [name for name in ("train", "val") if (place / name / missing[0]).is_dir()]
    if inside:
        return said + f"pass {place / inside[0]}"
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in visible(place)):
        return said + "its images lie in no folders; sort them into one for each class, named n01440764 and so on"
    return said + "pass ImageNet's train/ or val/ with all 1,000 classes in folders named n01440764 and so on"
