"""The images of a BREEDS benchmark in ImageNet on disk, by domain and superclass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_surgical.data.images import IMAGE_SUFFIXES
from peft_surgical.data.layouts import visible
from peft_surgical.data.splits import draw
from peft_surgical.errors import DataError

from .breeds import Breeds


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
