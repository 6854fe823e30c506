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

from peft_surgical.data.images import IMAGE_SUFFIXES
from peft_surgical.data.layouts import visible
from peft_surgical.data.splits import draw, per_class
from peft_surgical.errors import DataError

from .breeds import Breeds, Subclass, breeds
from .parts import Published, cut, images_of

BREEDS_EACH = 50
"""Images of each superclass to tune on (paper: 850 for Living-17, 1,500 for Entity-30)."""

_KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")


class ImageNetFiles(NamedTuple):
    """Images of one folder and one domain, by superclass, then class, then file name.

    Attributes:
        paths: Where they are.
        files: What to call them wherever they are: the class and the name of the file.
        labels: int64 (n,), the superclass.
        groups: int64 (n,), the subclass among all, superclass by superclass, those of the source first.
    """

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
    subclasses, ``source_test`` their validation images. From the training images of the target's subclasses, 50 of each
    superclass are drawn to tune on and as many to validate; the validation images of these subclasses are ``test``, so
    that no draw changes them.

    Chosen here, since the paper does not say: that the target's images are drawn from all of its subclasses together
    and from ImageNet's training images, and how many validate.

    Args:
        name: ``living17`` or ``entity30``.
        hierarchy: Folder with the hierarchy files, see `breeds`.
        train: ImageNet's training images, a folder for each class, named for its WordNet id.
        val: ImageNet's validation images, sorted into such folders.
        seed: Seed of the draw. Draws of one seed are nested: ``tuning=170`` is a part of ``tuning=340``.
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
    found = [images for part, place in places.items() for images in imagenet_files(place, benchmark)]
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
        files=[
            f"{part}/{file}"
            for part, images in zip(("train", "train", "val", "val"), found, strict=True)
            for file in images.files
        ],
    )


def _subclasses(benchmark: Breeds) -> tuple[Subclass, ...]:
    """All subclasses, whose places are the groups: superclass by superclass, those of the source first."""
    return tuple(sub for one in benchmark.superclasses for sub in (*one.source, *one.target))


def _draw(
    pool: ImageNetFiles, place: Path, names: list[str], seed: int, tuning: int | None, validation: int | None
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


def imagenet_files(folder: str | os.PathLike[str], benchmark: Breeds) -> tuple[ImageNetFiles, ImageNetFiles]:
    """The images of a benchmark's source and target in ImageNet on disk; none is opened.

    Args:
        folder: Holds a folder for each class, named for its WordNet id: ImageNet's ``train/``, or ``val/`` sorted so.
        benchmark: From `breeds`.

    Raises:
        DataError: A class has no folder or no image.
    """
    place = Path(folder)
    if not place.is_dir():
        raise DataError(f"{place} is no folder: pass the one that holds ImageNet's folders n01440764, n01443537, ...")
    source, target = benchmark.labels("source"), benchmark.labels("target")
    if missing := sorted(wnid for wnid in (*source, *target) if not (place / wnid).is_dir()):
        raise DataError(_no_folder(place, missing, len(source) + len(target)))
    group = {sub.wnid: number for number, sub in enumerate(_subclasses(benchmark))}
    return _listed(place, source, group), _listed(place, target, group)


def _listed(place: Path, labels: Mapping[str, int], group: Mapping[str, int]) -> ImageNetFiles:
    listed: list[tuple[str, str]] = []
    for wnid in labels:
        images = [file.name for file in visible(place / wnid) if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise DataError(f"{place / wnid} holds no image: unpack the archive of this class again")
        listed += [(wnid, image) for image in images]
    return ImageNetFiles(
        [f"{place}{os.sep}{wnid}{os.sep}{image}" for wnid, image in listed],
        [f"{wnid}/{image}" for wnid, image in listed],
        np.array([labels[wnid] for wnid, _ in listed], dtype=np.int64),
        np.array([group[wnid] for wnid, _ in listed], dtype=np.int64),
    )


def _no_folder(place: Path, missing: list[str], needed: int) -> str:
    said = f"{place} has no folder for {len(missing)} of {needed} classes, first {missing[0]}: "
    inside = [name for name in ("train", "val") if (place / name / missing[0]).is_dir()]
    if inside:
        return said + f"pass {place / inside[0]}"
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in visible(place)):
        return said + "its images lie in no folders; sort them into one for each class, named n01440764 and so on"
    return said + "pass ImageNet's train/ or val/ with all 1,000 classes in folders named n01440764 and so on"
