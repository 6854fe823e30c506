"""CIFAR-10's test images as `Published` data: under a corruption, with flipped labels, or as they are.

::

    data = read_cifar("frost", "folder", seed=0)        # CIFAR-10-C: an input-level shift
    data = read_cifar("flip", "clean.parquet", seed=0)  # CIFAR-Flip: label y becomes 9 - y, an output-level shift
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_surgical.data.layouts import parquet_files, split_of
from peft_surgical.errors import DataError
from peft_surgical.extras import require

from .cifar import CLASSES, TEST_SEED, Images, corruptions_in, read_images, split
from .parts import Published, cut

CIFAR10_HUB_ID = "uoft-cs/cifar10"

_BINARY, _PICKLE = "test_batch.bin", "test_batch"
_FOLDERS = (".", "cifar-10-batches-bin", "cifar-10-batches-py")


def read_cifar(
    task: str,
    source: str | os.PathLike[str],
    *,
    clean: str | os.PathLike[str] | None = None,
    severity: int = 5,
    seed: int = 0,
    tuning: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> Published:
    """Read the test images of a task, and cut them as every number of this project is.

    The parts are those of `cifar.split`: drawn with the seed, with equal numbers of each class to tune on and to
    validate on, and all others to test on. The group of an image is the class that is to be seen.

    Args:
        task: A corruption; ``flip``, where the label of an image of class y is 9 - y; or ``clean``.
        source: For a corruption, the folder of ``<corruption>.parquet`` or of the published ``.npy`` files, or one
            parquet file. For ``flip`` and ``clean`` a parquet file, or a folder with ``clean.parquet`` or with the
            Hub's parquet files; the published ``cifar-10-batches-bin``, or the folder above it; or the Hub id
            `CIFAR10_HUB_ID`, whose test split is taken.
        clean: The same photographs without the corruption, as for ``clean``: those that test become ``source_test``.
        severity: Severity of a corruption, 1 to 5.
        seed: Seed of the draw.
        tuning: Images to tune on, over all classes; None is 1,000, the paper's.
        validation: Images to choose with, over all classes; None is 200.
        test: Images to test on, over all classes, the same for every seed; None is all others.

    Raises:
        DataError: Nothing in one of these layouts is there, or the numbers do not fit; says what does.
    """
    images, table = _opened(task, os.fspath(source), severity)
    sizes = {"tune": tuning, "validation": validation}
    drawn = split(images.labels, seed, test=test, **{part: size for part, size in sizes.items() if size is not None})
    rows = {"tuning": drawn.tune.numpy(), "validation": drawn.validation.numpy(), "test": drawn.test.numpy()}
    origin = {part: f"drawn: seed {seed}, {len(rows[part]) // 10} of each class" for part in ("tuning", "validation")}
    fixed = f"drawn: seed {TEST_SEED}, {len(rows['test']) // 10} of each class, the same for every seed"
    origin["test"] = f"drawn: seed {seed}, the rest" if test is None else fixed
    labels, files = images.labels.numpy(), [f"row {row}" for row in range(len(images.labels))]
    whole = [images.pixels]
    if clean is not None:
        before, uncorrupted = _opened("clean", os.fspath(clean), severity)
        if not torch.equal(before.labels, images.labels):
            raise DataError(f"{clean} does not hold the same rows as {source}: pass the clean images of the same rows")
        table = require("datasets", "reading data").concatenate_datasets([table, uncorrupted])
        rows["source_test"] = len(labels) + rows["test"]
        origin["source_test"] = "the test images without the corruption"
        labels, files = np.concatenate([labels, labels]), [*files, *(f"clean {file}" for file in files)]
        whole.append(before.pixels)
    found = cut(
        "cifar-flip" if task == "flip" else f"cifar-10-c {task}",
        table,
        labels,
        9 - labels if task == "flip" else labels,
        rows,
        label_names=CLASSES,
        group_names=CLASSES,
        origin=origin,
        files=files,
    )
    # Which rows these are says nothing about the images, and a corrupted copy has the same labels.
    total = hashlib.sha256(found.fingerprint.encode())
    for pixels in whole:
        total.update(pixels.numpy().tobytes())
    return replace(found, fingerprint=total.hexdigest()[:16])


def with_source(data: Published, photographs: str | os.PathLike[str], clean: str | os.PathLike[str]) -> Published:
    """The data, with the photographs of a file as their source: all but those that the corrupted files show.

    Args:
        data: As `read_cifar` gives it.
        photographs: For instance all 10,000 test images, in a form that `read_cifar` takes for ``clean``.
        clean: The photographs that the corrupted files show, without the corruption; the same forms.

    Raises:
        DataError: No photograph is left.
    """
    images, table = _opened("clean", os.fspath(photographs), 5)
    shown = {pixels.tobytes() for pixels in task_images("clean", os.fspath(clean)).pixels.numpy()}
    rows = [row for row, pixels in enumerate(images.pixels.numpy()) if pixels.tobytes() not in shown]
    if not rows:
        raise DataError(f"{photographs} shows nothing that {clean} does not show: bring more photographs")
    labels, chosen = images.labels.numpy(), np.array(rows)
    names = {"label_names": CLASSES, "group_names": CLASSES, "files": [f"row {row}" for row in range(len(labels))]}
    parts, origin = {"source": chosen}, {"source": f"{len(rows)} photographs that no corrupted file shows"}
    source = cut("cifar-10", table, labels, labels, parts, origin=origin, **names).source
    return replace(data, source=source, source_test=None, origin={**data.origin, **origin})


@functools.lru_cache(maxsize=4)
def task_images(task: str, source: str, severity: int = 5) -> Images:
    """The images and labels of a task, see `read_cifar`."""
    if task in ("flip", "clean"):
        images = _read(source)
        return Images(images.pixels, 9 - images.labels) if task == "flip" else images
    place = Path(source)
    if place.is_file() and place.stem != task:
        raise DataError(f"{source} holds {place.stem} only: pass the folder to have {task}")
    return read_images(source, task, severity)


def tasks_in(source: str | os.PathLike[str]) -> list[str]:
    """The corruptions that `read_cifar` finds there."""
    place = Path(source)
    return [name for name in corruptions_in(place) if name != "clean"] if place.is_dir() else [place.stem]


@functools.lru_cache(maxsize=4)
def _opened(task: str, source: str, severity: int) -> tuple[Images, Any]:
    """The images, and a ``datasets.Dataset`` of them."""
    images = task_images(task, source, severity)
    datasets = require("datasets", "reading data")
    features = datasets.Features({"image": datasets.Image()})
    arrays = list(images.pixels.permute(0, 2, 3, 1).contiguous().numpy())
    return images, datasets.Dataset.from_dict({"image": arrays}, features=features)


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
            f"version ({_BINARY}), parquet files, or the Hub id {CIFAR10_HUB_ID}"
        )
    raise DataError(
        f"{place} holds neither {_BINARY} nor clean.parquet nor one parquet file of a test split: bring one of them, "
        f"or the Hub id {CIFAR10_HUB_ID}"
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
