"""ImageNet-C as `Published` data, one corruption and severity at a time, and networks that know its classes.

The classes are ImageNet's in the order of their WordNet ids, which is the order of the outputs of torchvision's, timm's
and transformers' ImageNet networks: `open_classifier` keeps their head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_surgical.bases.load import Base, load_base
from peft_surgical.data import layouts as tables
from peft_surgical.data.images import IMAGE_SUFFIXES
from peft_surgical.data.layouts import visible
from peft_surgical.data.splits import draw, per_class
from peft_surgical.errors import DataError
from peft_surgical.extras import require

from .parts import Published, cut, images_of

ALEXNET_ERRORS: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error per ImageNet-C corruption, mean over severities (Hendrycks & Dietterich 2019): mCE divides by it."""

SEVERITIES = (1, 2, 3, 4, 5)
"""The severities of ImageNet-C."""

CORRUPTIONS = tuple(ALEXNET_ERRORS)
"""The 15 corruptions that are reported; the four others of ImageNet-C are for validation (Hendrycks & Dietterich)."""

IMAGENET_C_EACH = 5
"""Images of each class to tune on (paper, A.3: 5,000 of 1,000 classes)."""
HELD_OUT_EACH = 10
"""Images of each class to validate, and to test (reference code, dataset.py)."""

IMAGENET_C_HUB_ID = "WNJXYK/TTA-ImageNet-C"
"""A copy on the Hub, as parquet files ``data/<corruption>/severity_<1-5>/*.parquet``."""


class _Cell(NamedTuple):
    """The images of one corruption and severity."""

    images: Any
    files: list[str]
    labels: np.ndarray
    names: tuple[str, ...]


def read_imagenet_c(
    source: str | os.PathLike[str],
    corruption: str,
    severity: int,
    seed: int = 0,
    tuning: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> Published:
    """ImageNet's validation images under one corruption; no image is opened.

    From each class 5 images are drawn to tune on, 10 to validate and 10 to test, as the paper's reference code does. In
    the published folders the same seed draws the same photographs under every corruption and severity.

    Args:
        source: The folder with ``<corruption>/<1-5>/<WordNet id>/*.JPEG``; a Hub id such as `IMAGENET_C_HUB_ID`; or a
            copy of that repository. Its files need the columns ``image`` and ``label``, the number of the class.
        corruption: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Seed of the draw. Draws of one seed are nested: ``tuning=1000`` is a part of ``tuning=5000``.
        tuning: Number of images to tune on, over all classes; None is the paper's.
        validation: The same to validate.
        test: The same to test; 0 is all others.

    Raises:
        DataError: Names the folder, file, class or number that does not fit, and the way out.
    """
    if corruption not in CORRUPTIONS:
        raise DataError(f"unknown corruption {corruption!r}: choose one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise DataError(f"severity={severity!r}: choose one of {', '.join(map(str, SEVERITIES))}")
    cell = _read(source, corruption, severity)
    classes = len(cell.names)
    sizes = {} if test == 0 else {"test": HELD_OUT_EACH * classes if test is None else test}
    sizes["validation"] = HELD_OUT_EACH * classes if validation is None else validation
    sizes["tuning"] = IMAGENET_C_EACH * classes if tuning is None else tuning  # last, so that its draws are nested
    each = {part: per_class(size, cell.labels, part) for part, size in sizes.items()}
    shown = f"{corruption}, severity {severity}"
    try:
        parts = draw(cell.labels, each, "test" if test == 0 else None, seed, cell.names)
    except DataError as error:
        raise DataError(f"{source}, {shown}: {error}") from error
    drawn = {part: f"drawn: seed {seed}, {count} of each class of {shown}" for part, count in each.items()}
    return cut(
        "imagenet-c",
        cell.images,
        cell.labels,
        np.zeros(len(cell.labels), dtype=np.int64),
        parts,
        label_names=cell.names,
        group_names=(shown,),
        origin={"test": f"the rest of {shown}", **drawn},
        files=cell.files,
    )


def check_cells(
    source: str | os.PathLike[str], corruptions: Sequence[str], severities: Sequence[int]
) -> list[tuple[str, int]]:
    """All pairs of a corruption and a severity, if a local copy has a folder for each; of a Hub id nothing is asked.

    Raises:
        DataError: A pair has none.
    """
    cells = [(corruption, severity) for corruption in corruptions for severity in severities]
    if Path(source).expanduser().exists() or not tables.is_hub_id(os.fspath(source)):
        for cell in cells:
            _folder(Path(source).expanduser(), *cell)
    return cells


def open_classifier(
    name: str | os.PathLike[str], *, label_names: Sequence[str], head: str = "keep", **how: Any
) -> Base:
    """`load_base` for a network whose outputs are these classes already: whatever ``head`` asks for, it is kept.

    Images of the network's own size, as ImageNet-C's are of most networks', are taken as they are, not scaled and cut.

    Args:
        name: As for `load_base`.
        label_names: The classes of the data; WordNet ids are not what checkpoints call their outputs, so that only
            their number is compared.
        head: Is not looked at.
        **how: As for `load_base`.

    Raises:
        DataError: The network has another number of outputs.
    """
    base = load_base(name, head="keep", **how)
    if base.classes != len(label_names):
        raise DataError(
            f"{os.fspath(name)} has {base.classes} outputs, and the data has {len(label_names)} classes: the head is "
            f"kept, so bring the images of all its classes, or a network whose outputs are these {len(label_names)}"
        )
    as_it_is = _AsItIs(base.transform_eval)
    train = as_it_is if base.transform_train is base.transform_eval else base.transform_train
    return replace(base, transform_train=train, transform_eval=as_it_is)


class _AsItIs:
    """A transform that leaves images of the network's own size uncut, as the reference code does; scales others."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        pillow = require("PIL.Image", "opening images")
        self.transform = transform
        black, white = (transform(pillow.new("RGB", (64, 64), (value,) * 3)) for value in (0, 255))
        self.size = black.shape[1:]
        self.low = black.flatten(1).mean(1).view(3, 1, 1)
        self.span = white.flatten(1).mean(1).view(3, 1, 1) - self.low

    def __call__(self, image: Any) -> Tensor:
        if (image.height, image.width) != tuple(self.size):
            return self.transform(image)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return pixels.float() / 255 * self.span + self.low


def _read(source: str | os.PathLike[str], corruption: str, severity: int) -> _Cell:
    place, shown = Path(source).expanduser(), os.fspath(source)
    if not place.exists() and tables.is_hub_id(shown):
        table = _from_hub(shown, corruption, severity)
        return _of_table(table, f"{shown} {corruption} severity_{severity}", f"{corruption}/severity_{severity}")
    folder = _folder(place, corruption, severity)
    if not folder.name.startswith("severity_"):
        return _of_folder(folder, f"{corruption}/{severity}")
    files = tables.parquet_files(folder)
    if not files:
        raise DataError(f"{folder} holds no parquet file: fetch those of data/{corruption}/severity_{severity} again")
    table, _ = next(iter(tables.read_parquet(files, None).values()))
    return _of_table(table, str(folder), f"{corruption}/severity_{severity}")


def _folder(place: Path, corruption: str, severity: int) -> Path:
    """Where the images of a corruption and severity lie, in either layout."""
    for folder in (place / corruption / str(severity), place / "data" / corruption / f"severity_{severity}"):
        if folder.is_dir():
            return folder
    if not place.is_dir():
        raise DataError(
            f"{place} does not exist: pass the folder of ImageNet-C's corruptions, or the Hub id {IMAGENET_C_HUB_ID}"
        )
    if (place / corruption).is_dir():
        there = ", ".join(entry.name for entry in visible(place / corruption)) or "nothing"
        raise DataError(
            f"{place / corruption} has no folder {severity}, but {there}: unpack the whole archive of {corruption}, "
            "whose severities are the folders 1 to 5"
        )
    deeper = [entry for entry in visible(place) if (entry / corruption).is_dir()]
    if deeper:
        raise DataError(f"{corruption} lies in {deeper[0]}: pass that, or put the folders of all corruptions into one")
    if place.name in (*CORRUPTIONS, *map(str, SEVERITIES)):
        above = place.parent if place.name in CORRUPTIONS else place.parent.parent
        raise DataError(f"{place} is one corruption or severity: pass the folder of all corruptions, {above}")
    there = ", ".join(name for name in CORRUPTIONS if (place / name).is_dir()) or "none"
    raise DataError(
        f"{place} has no folder {corruption}: unpack its archive there; of ImageNet-C's corruptions it has {there}"
    )


def _of_folder(folder: Path, shown: str) -> _Cell:
    classes = [entry for entry in visible(folder) if entry.is_dir()]
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folder(s): it needs one for every class, named n01440764 and so on"
        )
    paths, files, labels = [], [], []
    for label, place in enumerate(classes):
        images = [file.name for file in visible(place) if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise DataError(f"{place} holds no image: unpack the archive again")
        paths += [f"{place}{os.sep}{image}" for image in images]
        files += [f"{shown}/{place.name}/{image}" for image in images]
        labels += [label] * len(images)
    return _Cell(images_of(paths), files, np.array(labels, dtype=np.int64), tuple(place.name for place in classes))


def _from_hub(repository: str, corruption: str, severity: int) -> Any:
    file = f"data/{corruption}/severity_{severity}/*.parquet"
    try:
        # Not by its config, which would fetch the other severities, too.
        return require("datasets", tables.PURPOSE).load_dataset(repository, data_files=file, split="train")
    except Exception as error:  # the Hub, its cache, the network and the builders each have exceptions of their own
        raise DataError(
            f"{file} of {repository!r} cannot be loaded from the Hub ({error}): check the name, or pass a folder with "
            f"{corruption}/{severity}/<WordNet id>/*.JPEG"
        ) from error


def _of_table(table: Any, where: str, shown: str) -> _Cell:
    image, label = tables.columns(table, where, None, None)
    names = getattr(table.features[label], "names", None)
    values = list(table.select_columns([label]).with_format(None)[label])
    if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int)][:1]:
        raise DataError(f"column {label!r} of {where} holds {wrong[0]!r}: the number of a class is needed, from 0")
    labels = np.array(values, dtype=np.int64)
    classes = len(names) if names else int(labels.max(initial=-1)) + 1
    present = np.unique(labels)
    if len(present) < 2 or not np.array_equal(present, np.arange(classes)):
        raise DataError(f"{where} has images of {len(present)} of {classes} classes: fetch all of its files")
    images = table.with_format(None).select_columns([image])
    images = images.rename_column(image, "image") if image != "image" else images
    images = images.cast_column("image", require("datasets", tables.PURPOSE).Image())
    files = [f"{shown} row {row}" for row in range(len(labels))]
    return _Cell(images, files, labels, tuple(names or map(str, range(classes))))
