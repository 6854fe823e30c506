"""A user's labelled images: read from a folder, parquet files or the Hub, checked, and split, without loading them.

::

    data = read_data("flowers/", tuning=200)
    base = load_base("resnet50.a1_in1k", label_names=data.label_names)
    tuning = items(data.tuning, base.transform_train, base.outputs)
    loader = torch.utils.data.DataLoader(tuning, 32, collate_fn=collate)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import ConfigError, DataError
from ..extras import LARGEST_SEED, check_range, require
from . import layouts
from .images import data_fingerprint, decode, digests_of, encoded, read_bytes, warn_of_duplicates, without_broken
from .labels import RawLabels, encode
from .splits import Size, draw_parts, labels_of

ON_BROKEN = ("raise", "skip", "later")


@dataclass(frozen=True)
class Data:
    """Labelled images in three disjoint parts.

    Each part is a map-style ``datasets.Dataset`` with the columns ``image`` (decoded when read), ``label`` (a
    ``ClassLabel``) and ``file`` (the path in the folder, or the row of the table).

    Attributes:
        tuning: The images to tune on.
        validation: Those to choose with.
        test: Those to report on, or None.
        label_names: The classes, in the order of their numbers.
        origin: How each part came about, in words: ``"given"`` or ``"drawn: seed 0, class-balanced"`` and how many.
        fingerprint: 16 hexadecimal digits over the images' bytes and labels in all parts: a key for ledgers that does
            not depend on where the files lie.
    """

    tuning: Any
    validation: Any
    test: Any | None
    label_names: tuple[str, ...]
    origin: Mapping[str, str]
    fingerprint: str

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that there are, by name."""
        named = {"tuning": self.tuning, "validation": self.validation, "test": self.test}
        return {name: part for name, part in named.items() if part is not None}

    def __str__(self) -> str:
        lines = [f"{name}: {len(part)} images ({self.origin[name]})" for name, part in self.parts.items()]
        return "\n".join([*lines, f"{len(self.label_names)} classes, fingerprint {self.fingerprint}"])


def read_data(
    source: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    tuning: Size = None,
    validation: Size = None,
    test: Size = None,
    on_broken: str = "raise",
) -> Data:
    """Read images with a class each, in any of the ways in which people have them.

    Sizes are numbers of images over all classes, or shares as floats below 1. A part that the source has is used whole,
    or, with a size, as a class-balanced draw from it. A validation part that it has not is drawn from the tuning images
    (a fifth, by default); so is a test part, but only when its size is given. The tuning draws of one seed are nested:
    ``tuning=100`` is a part of ``tuning=200``. A draw is balanced as far as it goes: where its size does not divide
    evenly over the classes, or a class has too few images, the others give more, and ``origin`` says so.

    Args:
        source: A folder of class folders, with or without ``train/``, ``validation/`` and ``test/`` above them; a
            parquet file, several, or a folder of them; what ``save_to_disk`` wrote; a Hub id ``owner/name`` or
            ``owner/name:config``; or a ``datasets.Dataset`` or ``DatasetDict``.
        image_column: Column with the images, where types and usual names do not tell.
        label_column: The same for the labels.
        seed: Seed of the draws.
        tuning: Size of a few-shot draw; None uses all tuning images.
        validation: Size of the validation part.
        test: Size of the test part.
        on_broken: What happens to images that cannot be decoded: ``"raise"`` looks at every image that is used and
            names the broken ones in an error, ``"skip"`` leaves them out with a warning, ``"later"`` does not look (for
            very many images), so that a broken one raises when `items` reaches it.

    Raises:
        DataError: Names the file or row that does not fit, and the way out.
        ConfigError: If ``on_broken`` is none of the three, or the seed is out of range.

    Warns:
        UserWarning: For images that are in two parts, for anything that is left out, and for a part that has fewer
            images than were asked for, which is then used whole.
    """
    if on_broken not in ON_BROKEN:
        raise ConfigError(f"on_broken={on_broken!r}: choose one of {', '.join(ON_BROKEN)}")
    check_range("seed", seed, 0, LARGEST_SEED)
    found = _find(source, image_column, label_column)
    _drop_unlabelled_test(found)
    names, numbers = encode({split: raw for split, (_, raw) in found.items()})
    parts = {split: _tidy(images, numbers[split], names, found[split][1].files) for split, (images, _) in found.items()}
    if on_broken == "skip":
        parts = {split: without_broken(part) for split, part in parts.items()}
    parts, origin = draw_parts(parts, names, {"tuning": tuning, "validation": validation, "test": test}, seed)
    digests = {split: digests_of(part, check=on_broken == "raise") for split, part in parts.items()}
    warn_of_duplicates(parts, digests)
    fingerprint = data_fingerprint({split: labels_of(part) for split, part in parts.items()}, digests, names)
    return Data(parts["tuning"], parts["validation"], parts.get("test"), names, origin, fingerprint)


def _find(source: Any, image: str | None, label: str | None) -> dict[str, tuple[Any, RawLabels]]:
    """Split -> a dataset that has an ``image`` column, and its labels as they stand."""
    datasets = require("datasets", "reading data")
    if isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        return _from_tables(layouts.by_split(source, "the dataset"), "the dataset", image, label)
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Sequence) or not source:
            raise DataError(f"{source!r} is no data: pass a folder, parquet files, a Hub id or a datasets.Dataset")
        return _from_tables(layouts.read_parquet([_parquet(Path(file)) for file in source], None), "them", image, label)
    place, shown = Path(os.path.expanduser(source)), os.fspath(source)
    if os.path.isfile(place):
        return _from_tables(layouts.read_parquet([_parquet(place)], None), shown, image, label)
    if os.path.isdir(place):
        if (saved := layouts.from_disk(place)) is not None:
            return _from_tables(layouts.by_split(saved, shown), shown, image, label)
        if files := layouts.parquet_files(place):
            return _from_tables(layouts.read_parquet(files, place), shown, image, label)
        return _from_folder(place)
    if layouts.is_hub_id(shown):
        return _from_tables(layouts.by_split(layouts.from_hub(shown), shown), shown, image, label)
    raise DataError(f"{shown} does not exist: pass an image folder, a parquet file, a folder of them, or a Hub id")


def _parquet(file: Path) -> Path:
    if not file.is_file() or file.suffix.lower() != ".parquet":
        what = "does not exist" if not file.exists() else "is no parquet file"
        raise DataError(f"{file} {what}: pass parquet files, or a folder with one folder of images for each class")
    return file


def _from_folder(root: Path) -> dict[str, tuple[Any, RawLabels]]:
    datasets = require("datasets", "reading data")
    features = datasets.Features({"image": datasets.Image()})
    return {
        split: (
            datasets.Dataset.from_dict({"image": listing.paths}, features=features),
            RawLabels(listing.classes, listing.files, column=f"the folder {root}"),
        )
        for split, listing in layouts.list_images(root).items()
    }


def _from_tables(
    found: Mapping[str, tuple[Any, list[str]]], source: str, image: str | None, label: str | None
) -> dict[str, tuple[Any, RawLabels]]:
    datasets = require("datasets", "reading data")
    raw = {}
    for split, (dataset, places) in found.items():
        if not len(dataset):
            raise DataError(f"the {split} split of {source} has no rows: leave it out, or write it again")
        of_image, of_label = layouts.columns(dataset, source, image, label)
        names = getattr(dataset.features[of_label], "names", None)
        labels = list(dataset.select_columns([of_label]).with_format(None)[of_label])
        images = dataset.with_format(None).select_columns([of_image])
        images = images.rename_column(of_image, "image") if of_image != "image" else images
        raw[split] = (
            images.cast_column("image", datasets.Image()),
            RawLabels(labels, places, tuple(names) if names else None, f"the column {of_label!r}"),
        )
    return raw


def _drop_unlabelled_test(found: dict[str, tuple[Any, RawLabels]]) -> None:
    # Competitions publish their test images with the label -1.
    if "test" in found and set(found["test"][1].values) <= {None, -1}:
        warnings.warn("the test split has no labels: left out", stacklevel=3)
        del found["test"]


def _tidy(images: Any, numbers: np.ndarray, names: Sequence[str], files: Sequence[str]) -> Any:
    feature = require("datasets", "reading data").ClassLabel(names=list(names))
    return images.add_column("label", numbers.tolist(), feature=feature).add_column("file", list(files))


class _Items(Dataset):
    """See `items`. A class of the module, so that worker processes can be handed one."""

    def __init__(
        self, part: Any, transform: Callable[[Any], torch.Tensor], outputs: Sequence[int] | None = None
    ) -> None:
        self.part = encoded(part)
        self.transform = transform
        self.outputs = outputs

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.part[int(index)]
        image, label = decode(read_bytes(row), row["file"]), row["label"]
        return {
            "pixel_values": self.transform(image),
            "labels": label if self.outputs is None else self.outputs[label],
        }


def items(part: Any, transform: Callable[[Any], torch.Tensor], outputs: Sequence[int] | None = None) -> Dataset:
    """A part of `Data` as a torch dataset of ``{"pixel_values": tensor, "labels": int}``, decoded when asked for.

    Args:
        part: For example ``data.tuning``.
        transform: PIL image in RGB -> float tensor (3, h, w), such as a base's ``transform_eval``.
        outputs: For each class of the data the network's output that stands for it, such as a base's ``outputs``, which
            its labels become; None leaves them as they are.
    """
    return _Items(part, transform, outputs)


def collate(batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Items -> a batch: ``pixel_values`` (n, 3, h, w) and ``labels`` int64 (n,).

    Raises:
        DataError: If the images differ in size.
    """
    shapes = {tuple(item["pixel_values"].shape) for item in batch}
    if len(shapes) > 1:
        raise DataError(
            f"the images of a batch have the shapes {sorted(shapes)}: the transform has to give all one size"
        )
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in batch]),
        "labels": torch.tensor([item["labels"] for item in batch], dtype=torch.int64),
    }
