"""CIFAR-Flip (paper, Sec. 3.1): CIFAR-10 with every label y replaced by 9 - y, an output-level shift.

::

    data = read_cifar_flip("clean.parquet", seed=0)
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_surgical.data.folders import split_of
from peft_surgical.data.tables import parquet_files
from peft_surgical.errors import DataError
from peft_surgical.extras import require

from .cifar import Images, read_images, split
from .parts import Published, cut

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The classes of CIFAR-10, in the order of their own numbers."""

HUB_ID = "uoft-cs/cifar10"

_BINARY, _PICKLE = "test_batch.bin", "test_batch"
_FOLDERS = (".", "cifar-10-batches-bin", "cifar-10-batches-py")


def read_cifar_flip(
    source: str | os.PathLike[str], *, seed: int = 0, tuning: int | None = None, validation: int | None = None
) -> Published:
    """Read the test images of CIFAR-10, flip their labels, and cut them as every number of this project is.

    The label of an image is 9 - y, so that an airplane is called truck; its group is y, what is to be seen. The parts
    are those of `cifar.split`: drawn with the seed, with equal numbers of each class to tune on and to validate on, and
    all others to test on. The source is what the network was pretrained on, and no part of it.

    Args:
        source: A parquet file, or a folder with ``clean.parquet`` or with the Hub's parquet files; the published
            ``cifar-10-batches-bin``, or the folder above it; or the Hub id `HUB_ID`, whose test split is taken.
        seed: Of the draw.
        tuning: Images to tune on, over all classes; None is 1,000, the paper's.
        validation: Images to choose with, over all classes; None is 200.

    Raises:
        DataError: Nothing in one of these layouts is there, or the numbers do not fit; says what does.
    """
    images = _read(source)
    labels = 9 - images.labels
    sizes = {"tune": tuning, "validation": validation}
    drawn = split(labels, seed, **{part: size for part, size in sizes.items() if size is not None})
    rows = {"tuning": drawn.tune.numpy(), "validation": drawn.validation.numpy(), "test": drawn.test.numpy()}
    origin = {part: f"drawn: seed {seed}, {len(rows[part]) // 10} of each class" for part in ("tuning", "validation")}
    found = cut(
        "cifar-flip",
        _table(images),
        labels.numpy(),
        images.labels.numpy(),
        rows,
        label_names=CLASSES,
        group_names=CLASSES,
        origin={**origin, "test": f"drawn: seed {seed}, the rest"},
        files=[f"row {row}" for row in range(len(labels))],
    )
    # Which rows these are says nothing about the images, and a corrupted copy has the same labels.
    whole = hashlib.sha256(found.fingerprint.encode() + images.pixels.numpy().tobytes())
    return replace(found, fingerprint=whole.hexdigest()[:16])


def _read(source: str | os.PathLike[str]) -> Images:
    place = Path(source).expanduser()
    if place.name == _BINARY and place.is_file():
        return _read_binary(place)
    if not place.is_dir():
        return _checked(read_images(source), place)
    for folder in _FOLDERS:
        if (file := place / folder / _BINARY).is_file():
            return _read_binary(file)
    for clean in (place / "clean.parquet", place / "clean.npy"):
        if clean.is_file():
            return _checked(read_images(place, "clean"), clean)
    tests = [file for file in parquet_files(place) if split_of(file.stem) == "test"]
    if len(tests) == 1:
        return _checked(read_images(tests[0]), tests[0])
    if any((place / folder / _PICKLE).is_file() for folder in _FOLDERS):
        raise DataError(
            f"{place} has the Python version of CIFAR-10, which are pickles, and none are opened: bring the binary "
            f"version ({_BINARY}), parquet files, or the Hub id {HUB_ID}"
        )
    raise DataError(
        f"{place} holds neither {_BINARY} nor clean.parquet nor one parquet file of a test split: bring one of them, "
        f"or the Hub id {HUB_ID}"
    )


def _read_binary(file: Path) -> Images:
    """Each record is a label and 3,072 bytes: red, green and blue, row by row."""
    content = np.fromfile(file, dtype=np.uint8)
    if not len(content) or len(content) % (1 + 3 * 32 * 32):
        raise DataError(f"{file} has {len(content)} bytes, no multiple of 3,073: it is not whole, unpack it again")
    records = content.reshape(-1, 1 + 3 * 32 * 32)
    pixels = records[:, 1:].reshape(-1, 3, 32, 32)
    labels = records[:, 0].astype(np.int64)
    return _checked(Images(torch.from_numpy(pixels.copy()), torch.from_numpy(labels)), file)


def _checked(images: Images, place: Path) -> Images:
    if set(images.labels.tolist()) != set(range(10)):
        said = ", ".join(map(str, images.labels.unique().tolist()[:12]))
        raise DataError(f"{place} has the labels {said}: CIFAR-10's are 0 to 9; is it another data set, or a part?")
    return images


def _table(images: Images) -> Any:
    datasets = require("datasets", "reading data")
    features = datasets.Features({"image": datasets.Image()})
    arrays = list(images.pixels.permute(0, 2, 3, 1).contiguous().numpy())
    return datasets.Dataset.from_dict({"image": arrays}, features=features)
