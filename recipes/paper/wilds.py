"""The rows of published datasets, in the layouts in which people have them; no image is opened.

================ =============================================== =======================================================
name             tables: a Hub id, parquet files, a DatasetDict  folder, as the WILDS package unpacks it
================ =============================================== =======================================================
``waterbirds``   ``image``, ``label``, ``place``                 ``waterbirds_v1.0/metadata.csv``: y, place,
                                                                 img_filename, split (0 train, 1 validation, 2 test)
``celeba``       ``image``, ``Blond_Hair``, ``Male``             ``celebA_v1.0/``: ``list_attr_celeba.csv``,
                                                                 ``list_eval_partition.csv``, ``img_align_celeba/``
``camelyon17``   ``image``, ``label``, ``center``                ``camelyon17_v1.0/metadata.csv``: patient, node,
                                                                 x_coord, y_coord, tumor, center, split; ``patches/``
``fmow``         none is published                               ``fmow_v1.1/``: ``rgb_metadata.csv`` (split, category,
                                                                 timestamp, country_code), ``country_code_mapping.csv``
                                                                 (alpha-3, region), ``images/rgb_img_{row}.png``
================ =============================================== =======================================================

The folders, their columns and codes follow the source of the ``wilds`` package. Columns and splits of the Hub's CelebA
and Camelyon17 follow their dataset cards, those of its Waterbirds the code of others that read it (whether its labels
are a ``ClassLabel`` or plain integers makes no difference here). None was compared with a full download.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_surgical.data import layouts as tables
from peft_surgical.data.layouts import SPLITS, split_of
from peft_surgical.errors import DataError
from peft_surgical.extras import require

from .wilds_folders import WildsTable, integers, read_camelyon17, read_celeba, read_fmow, read_waterbirds


class _Layouts(NamedTuple):
    """How a dataset is found: as the WILDS package unpacks it, or as tables in the columns of the Hub's copy.

    ``columns`` maps a fact to its column in tables; ``codes`` are the values that a fact may have.
    """

    folder: str
    listing: str
    read: Callable[[Path], WildsTable]
    hub: str | None = None
    columns: Mapping[str, str] = {}
    codes: Mapping[str, tuple[int, ...]] = {}


_LAYOUTS = {
    "waterbirds": _Layouts(
        "waterbirds_v1.0",
        "metadata.csv",
        read_waterbirds,
        "grodino/waterbirds",
        {"label": "label", "place": "place"},
        {"label": (0, 1), "place": (0, 1)},
    ),
    "celeba": _Layouts(
        "celebA_v1.0",
        "list_attr_celeba.csv",
        read_celeba,
        "flwrlabs/celeba",
        {"label": "Blond_Hair", "male": "Male"},
        {"label": (-1, 0, 1), "male": (-1, 0, 1)},
    ),
    "camelyon17": _Layouts(
        "camelyon17_v1.0",
        "metadata.csv",
        read_camelyon17,
        "wltjr1007/Camelyon17-WILDS",
        {"label": "label", "center": "center"},
        {"label": (0, 1), "center": (0, 1, 2, 3, 4)},
    ),
    "fmow": _Layouts("fmow_v1.1", "rgb_metadata.csv", read_fmow),
}
"""Name -> layouts. The Hub has no whole FMoW."""


def read_rows(name: str, source: Any) -> WildsTable:
    """The rows of a published dataset.

    Args:
        name: One of the names in the table above.
        source: A Hub id; the folder in the table, or the one above it; a parquet file, several, or a folder of them;
            what ``save_to_disk`` wrote; or a ``DatasetDict``.

    Raises:
        DataError: If it is none of these, or lacks a column or file; says what was expected.
    """
    datasets = require("datasets", tables.PURPOSE)
    if isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        alone = next(iter(source), None) if isinstance(source, Mapping) else source.split
        return _from_tables(name, _renamed(tables.by_split(source, "the dataset"), alone), "the dataset")
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Sequence) or not source:
            raise DataError(f"{source!r} is no data: {_ways_in(name)}")
        files = [_parquet(name, Path(file)) for file in source]
        return _from_tables(name, _renamed(tables.read_parquet(files, None), files[0].stem), "the parquet files")
    place, shown = Path(source).expanduser(), os.fspath(source)
    if place.is_file():
        found = tables.read_parquet([_parquet(name, place)], None)
        return _from_tables(name, _renamed(found, place.stem), shown)
    if place.is_dir():
        return _from_folder(name, place)
    if tables.is_hub_id(shown):
        return _from_tables(name, tables.by_split(tables.from_hub(shown), shown), shown)
    raise DataError(f"{shown} does not exist: {_ways_in(name)}")


def _ways_in(name: str) -> str:
    layouts = _LAYOUTS[name]
    folder = f"a folder that holds {layouts.folder}/{layouts.listing}"
    if layouts.hub is None:
        return f"pass {folder}"
    return f"pass {folder}, parquet files or a DatasetDict with the Hub's columns, or the Hub id {layouts.hub}"


def _renamed(found: dict[str, tuple[Any, list[str]]], alone: Any) -> dict[str, tuple[Any, list[str]]]:
    """Splits under their own names, also a single one, which `tables` takes for the tuning data whatever it is."""
    if set(found) == {"tuning"} and (split := split_of(str(alone))) is not None:
        return {split: found["tuning"]}
    return found


def _parquet(name: str, file: Path) -> Path:
    if not file.is_file() or file.suffix.lower() != ".parquet":
        what = "does not exist" if not file.exists() else "is no parquet file"
        raise DataError(f"{file} {what}: {_ways_in(name)}")
    return file


def _from_folder(name: str, place: Path) -> WildsTable:
    layouts = _LAYOUTS[name]
    for folder in (place, place / layouts.folder):
        if (folder / layouts.listing).is_file():
            return _checked(name, layouts.read(folder))
    # Only now, since looking for parquet files walks through every folder of images.
    if (saved := tables.from_disk(place)) is not None:
        return _from_tables(name, tables.by_split(saved, str(place)), str(place))
    if files := tables.parquet_files(place):
        return _from_tables(name, _renamed(tables.read_parquet(files, place), files[0].stem), str(place))
    raise DataError(f"{place} holds neither {layouts.listing} nor parquet files: {_ways_in(name)}")


def _from_tables(name: str, found: Mapping[str, tuple[Any, list[str]]], shown: str) -> WildsTable:
    columns = _LAYOUTS[name].columns
    if not columns:
        raise DataError(f"{shown} is a table, and no table of {name} is published: {_ways_in(name)}")
    datasets = require("datasets", tables.PURPOSE)
    images, splits, files = [], [], []
    facts: dict[str, list[np.ndarray]] = {fact: [] for fact in columns}
    # One order whatever the order of the files, since row numbers are part of fingerprints.
    for split in (split for split in SPLITS if split in found):
        dataset, places = found[split]
        ours = "train" if split == "tuning" else split
        where = f"the {ours} split of {shown}"
        _check_columns(dataset, {"image", *columns.values()}, where, name)
        for fact, column in columns.items():
            # Arrow, one column: a row of the dataset would decode its image.
            values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
            facts[fact].append(integers(values, f"column {column!r} of {where}"))
        images.append(dataset.with_format(None).select_columns(["image"]).cast_column("image", datasets.Image()))
        splits.append(np.full(len(dataset), ours))
        files += places
    # Datasets concatenates without copying, so that the images stay in the files that it maps.
    together = datasets.concatenate_datasets(images).add_column("file", files)
    joined = {fact: np.concatenate(values) for fact, values in facts.items()}
    return _checked(name, WildsTable(together, {**joined, "split": np.concatenate(splits)}, shown))


def _check_columns(dataset: Any, wanted: set[str], where: str, name: str) -> None:
    if missing := sorted(wanted - set(dataset.column_names)):
        raise DataError(
            f"{where} has no column {', '.join(missing)}, it has {', '.join(dataset.column_names)}: is it {name}? "
            f"{_ways_in(name)}"
        )
    image = dataset.features["image"]
    if getattr(image, "_type", None) != "Image" and not (isinstance(image, Mapping) and "bytes" in image):
        raise DataError(f"column 'image' of {where} holds no images: write it with datasets' Image feature")


def _checked(name: str, rows: WildsTable) -> WildsTable:
    """The rows, if their codes are the published ones."""
    for fact, valid in _LAYOUTS[name].codes.items():
        if len(wrong := np.flatnonzero(~np.isin(rows.facts[fact], valid))):
            file = rows.images.select_columns(["file"])[int(wrong[0])]["file"]
            raise DataError(
                f"{file} of {rows.shown} has the {fact} {rows.facts[fact][wrong[0]]}: {name} knows "
                f"{', '.join(map(str, valid))}; fetch the published files again"
            )
    if name != "celeba":
        return rows
    # CelebA's own lists say -1 for no, the Hub's copy says False.
    facts = {fact: v if fact == "split" else (v > 0).astype(np.int64) for fact, v in rows.facts.items()}
    return replace(rows, facts=facts)


# --- The rows of published datasets, in the layouts in which people have them; no image is opened. ---
