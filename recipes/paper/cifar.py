"""The CIFAR images that recipes, benchmarks and slow tests share, and the split that every number of theirs uses.

CIFAR-10-C is read as people have it on disk, CIFAR-10 from the Hub. Nothing is downloaded unless a Hub id is given.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_surgical.errors import DataError
from peft_surgical.extras import require

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The classes of CIFAR-10, in the order of their own numbers."""

PUBLISHED_ROWS = 10_000
"""Rows of one severity in a published CIFAR-10-C ``.npy`` file, which stacks severities 1 to 5."""

TEST_SEED = 2026
"""Draws the test images that are the same for every seed."""


class Images(NamedTuple):
    """Images as read: ``pixels`` uint8 (n, 3, 32, 32) RGB in 0..255, ``labels`` int64 (n,)."""

    pixels: Tensor
    labels: Tensor


class Split(NamedTuple):
    """Row numbers, int64 and ascending: disjoint, and together every row unless the test images are fixed."""

    tune: Tensor
    validation: Tensor
    test: Tensor


def read_images(path: str | os.PathLike[str], corruption: str | None = None, severity: int = 5) -> Images:
    """Read CIFAR-10 or CIFAR-10-C in any of the layouts in which people have it.

    Args:
        path: A parquet file in the layout of Hugging Face ``datasets`` (an Image column and ``label``); a folder of
            ``<corruption>.parquet``; a folder in the published CIFAR-10-C layout (``<corruption>.npy`` of shape
            (50000, 32, 32, 3) and ``labels.npy``); or the Hub id of such a dataset (``uoft-cs/cifar10``), whose test
            split is taken.
        corruption: File stem inside a folder; not needed for a file or a Hub id.
        severity: 1 to 5, rows ``[(severity - 1) * 10000, severity * 10000)`` of a ``.npy`` file. The other layouts hold
            one severity per file.

    Raises:
        DataError: If nothing in one of these layouts is there.
    """
    place = Path(path)
    if place.is_file():
        if place.suffix == ".npy":
            return _read_npy(place, severity)
        return _read_parquet(place)
    if place.is_dir():
        if corruption is None:
            raise DataError(
                f"{place} is a folder: say which corruption to read, one of {', '.join(corruptions_in(place))}"
            )
        if (file := place / f"{corruption}.parquet").is_file():
            return _read_parquet(file)
        if (file := place / f"{corruption}.npy").is_file():
            return _read_npy(file, severity)
        there = ", ".join(corruptions_in(place)) or "no .parquet or .npy file at all"
        raise DataError(f"no {corruption}.parquet and no {corruption}.npy in {place}: it holds {there}")
    # A Hub id is "owner/name"; anything else is a mistyped path, and asking the Hub for it would hide that.
    parts = os.fspath(path).split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in {".", ".."} and not place.suffix:
        return _read_hub(os.fspath(path))
    raise DataError(
        f"{place} does not exist: pass a parquet file, a folder of them, a folder of .npy files or a Hub id"
    )


def digest_of(images: Images) -> str:
    """16 hex digits of pixels and labels. As a part of a run's key: a ledger never answers for other data."""
    return hashlib.sha256(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()[:16]


def corruptions_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names that :func:`read_images` accepts for this folder, sorted."""
    return sorted(f.stem for f in Path(folder).iterdir() if f.suffix in {".parquet", ".npy"} and f.stem != "labels")


def split(labels: Tensor, seed: int, tune: int = 1000, validation: int = 200, test: int | None = None) -> Split:
    """Split rows into tuning, validation and test images, with equal numbers per class in the first two.

    Drawn per class, in the order of the classes, with one ``numpy.random.default_rng(seed)``. A departure from the
    paper's reference code, which selects with 100 images: those cannot tell candidates two points apart.

    Args:
        labels: int64 (n,).
        seed: Seed of the draw.
        tune: Images to tune on, over all classes.
        validation: Images to select with, over all classes.
        test: Images to test on, over all classes: drawn once with `TEST_SEED`, so that they are the same for every seed
            and no seed tunes or selects on another's. None tests on those that the seed leaves.

    Raises:
        DataError: If the numbers are no multiple of the number of classes, or a class leaves no test image.
    """
    values = labels.cpu().numpy()
    classes = np.unique(values)
    if not len(classes) or test == 0 or any(size % len(classes) for size in (tune, validation, test or 0)):
        tested = "" if test is None else f" and {test} test"
        raise DataError(
            f"{tune} tuning and {validation} validation{tested} images do not divide evenly over {len(classes)} "
            "classes: choose multiples of the number of classes"
        )
    a, b = tune // len(classes), (tune + validation) // len(classes)
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(TEST_SEED)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in classes:
        rows, kept = np.flatnonzero(values == label), None
        if test is not None:
            kept, rows = np.split(fixed.permutation(rows), [test // len(classes)])
        rows = rng.permutation(rows)
        if len(rows) < b + (kept is None):  # one at least is left to test on
            raise DataError(
                f"class {label} has {len(rows)} images: {a} to tune and {b - a} to validate leave none to test on; "
                "ask for fewer or bring more images"
            )
        tuned, validated, left = np.split(rows, [a, b])
        for part, drawn in zip(parts, (tuned, validated, left if kept is None else kept), strict=True):
            part.append(drawn)
    return Split(*(torch.from_numpy(np.sort(np.concatenate(part))) for part in parts))


def _images(arrays: list[np.ndarray] | np.ndarray, labels: Any, source: str) -> Images:
    try:
        pixels = np.array(arrays)
    except ValueError as error:  # ragged
        raise DataError(f"{source} holds images of several sizes: these readers are for CIFAR's 32 x 32") from error
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3):
        raise DataError(
            f"{source} holds {pixels.dtype} images of shape {pixels.shape[1:]}, not uint8 (32, 32, 3): "
            "these readers are for CIFAR; use datasets with your own processor for other images"
        )
    targets = np.array(labels, dtype=np.int64)
    if targets.shape != (len(pixels),):
        raise DataError(
            f"{source} has {len(pixels)} images but labels of shape {targets.shape}: one label per image is needed"
        )
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(targets))


def _columns(names: Sequence[str], source: str) -> tuple[str, str]:
    image = next((name for name in ("img", "image") if name in names), None)
    label = next((name for name in ("label", "labels", "fine_label") if name in names), None)
    if image is None or label is None:
        raise DataError(
            f"{source} has the columns {', '.join(names)}: an image column (img) and a label column are needed"
        )
    return image, label


def _read_parquet(file: Path) -> Images:
    # Straight from Arrow: datasets would first write its own copy of the file into the user's cache.
    parquet = require("pyarrow.parquet", "reading a parquet file")
    pillow = require("PIL.Image", "reading a parquet file")
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{file} is not a readable parquet file ({error}): fetch or write it again") from error
    image, label = _columns(table.column_names, str(file))
    cells = table.column(image).to_pylist()
    if not all(isinstance(cell, dict) and cell.get("bytes") for cell in cells):
        raise DataError(f"column {image!r} of {file} does not embed its images: write it with datasets' Image feature")
    arrays = [np.asarray(pillow.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in cells]
    return _images(arrays, table.column(label).to_numpy(), str(file))


def _read_npy(file: Path, severity: int) -> Images:
    if severity not in range(1, 6):
        raise DataError(f"severity {severity!r} does not exist: CIFAR-10-C has 1 to 5")
    labels = file.with_name("labels.npy")
    if not labels.is_file():
        raise DataError(f"{labels} is missing: the published layout keeps the labels of every corruption there")
    pixels, targets = np.load(file, mmap_mode="r", allow_pickle=False), np.load(labels, allow_pickle=False)
    rows = slice((severity - 1) * PUBLISHED_ROWS, severity * PUBLISHED_ROWS)
    if len(pixels) != 5 * PUBLISHED_ROWS:
        raise DataError(
            f"{file} has {len(pixels)} rows, not 50,000: severities are cut by row, so a partial file cannot be used"
        )
    return _images(pixels[rows], targets[rows], str(file))


def _read_hub(repo: str) -> Images:
    datasets = require("datasets", "reading from the Hub")
    try:
        data = datasets.load_dataset(repo, split="test")
    except Exception as error:  # the Hub, its cache and the network each have their own exceptions
        raise DataError(f"cannot load {repo!r} from the Hub ({error}): pass a local parquet file or folder") from error
    image, label = _columns(data.column_names, repo)
    return _images([np.asarray(cell.convert("RGB")) for cell in data[image]], data[label], repo)
