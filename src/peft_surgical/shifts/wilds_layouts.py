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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import tables
from ..data.folders import SPLITS, split_of
from ..errors import DataError
from ..extras import require

HUB_IDS = {
    "waterbirds": "grodino/waterbirds",
    "celeba": "flwrlabs/celeba",
    "camelyon17": "wltjr1007/Camelyon17-WILDS",
}
"""Where the Hub has each dataset in the columns that are read here; it has no whole FMoW."""

REGIONS = ("Asia", "Europe", "Africa", "Americas", "Oceania", "Other")
"""The regions of FMoW, in the order of their numbers; ``Other`` are countries that the mapping does not know."""

# fmt: off
FMOW_CATEGORIES = (
    "airport", "airport_hangar", "airport_terminal", "amusement_park", "aquaculture", "archaeological_site", "barn",
    "border_checkpoint", "burial_site", "car_dealership", "construction_site", "crop_field", "dam", "debris_or_rubble",
    "educational_institution", "electric_substation", "factory_or_powerplant", "fire_station", "flooded_road",
    "fountain", "gas_station", "golf_course", "ground_transportation_station", "helipad", "hospital",
    "impoverished_settlement", "interchange", "lake_or_pond", "lighthouse", "military_facility",
    "multi-unit_residential", "nuclear_powerplant", "office_building", "oil_or_gas_facility", "park",
    "parking_lot_or_garage", "place_of_worship", "police_station", "port", "prison", "race_track", "railway_bridge",
    "recreational_facility", "road_bridge", "runway", "shipyard", "shopping_mall", "single-unit_residential",
    "smokestack", "solar_farm", "space_facility", "stadium", "storage_tank", "surface_mine", "swimming_pool",
    "toll_booth", "tower", "tunnel_opening", "waste_disposal", "water_treatment_facility", "wind_farm", "zoo",
)
# fmt: on
"""The classes of FMoW, in the order of their numbers, which is that of the alphabet."""

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Every image of a dataset in the order in which it is published, and what is known of each.

    Attributes:
        images: A ``datasets.Dataset`` with the columns ``image`` (decoded when read) and ``file``.
        facts: Arrays of as many rows: ``label`` int64, ``split`` (train, validation or test), and what the dataset has
            besides: ``place``, ``male``, ``center``, or ``region`` and ``year``, int64.
        shown: What was read, for messages.
    """

    images: Any
    facts: Mapping[str, np.ndarray]
    shown: str


def read_rows(name: str, source: Any) -> Rows:
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
    folder = f"a folder that holds {_FOLDERS[name]}/{_INDEX[name]}"
    if name not in HUB_IDS:
        return f"pass {folder}"
    return f"pass {folder}, parquet files or a DatasetDict with the Hub's columns, or the Hub id {HUB_IDS[name]}"


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


def _from_folder(name: str, place: Path) -> Rows:
    for folder in (place, place / _FOLDERS[name]):
        if (folder / _INDEX[name]).is_file():
            return _READERS[name](folder)
    # Only now, since looking for parquet files walks through every folder of images.
    if (saved := tables.from_disk(place)) is not None:
        return _from_tables(name, tables.by_split(saved, str(place)), str(place))
    if files := tables.parquet_files(place):
        return _from_tables(name, _renamed(tables.read_parquet(files, place), files[0].stem), str(place))
    raise DataError(f"{place} holds neither {_INDEX[name]} nor parquet files: {_ways_in(name)}")


# Tables

_TABLE_COLUMNS = {
    "waterbirds": {"label": "label", "place": "place"},
    "celeba": {"label": "Blond_Hair", "male": "Male"},
    "camelyon17": {"label": "label", "center": "center"},
}


def _from_tables(name: str, found: Mapping[str, tuple[Any, list[str]]], shown: str) -> Rows:
    if name not in _TABLE_COLUMNS:
        raise DataError(f"{shown} is a table, and no table of {name} is published: {_ways_in(name)}")
    datasets = require("datasets", tables.PURPOSE)
    images, splits, files = [], [], []
    facts: dict[str, list[np.ndarray]] = {fact: [] for fact in _TABLE_COLUMNS[name]}
    # One order whatever the order of the files, since row numbers are part of fingerprints.
    for split in (split for split in SPLITS if split in found):
        dataset, places = found[split]
        ours = "train" if split == "tuning" else split
        where = f"the {ours} split of {shown}"
        _check_columns(dataset, {"image", *_TABLE_COLUMNS[name].values()}, where, name)
        for fact, column in _TABLE_COLUMNS[name].items():
            # Arrow, one column: a row of the dataset would decode its image.
            values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
            facts[fact].append(_integers(values, f"column {column!r} of {where}"))
        images.append(dataset.with_format(None).select_columns(["image"]).cast_column("image", datasets.Image()))
        splits.append(np.full(len(dataset), ours))
        files += places
    # Datasets concatenates without copying, so that the images stay in the files that it maps.
    together = datasets.concatenate_datasets(images).add_column("file", files)
    joined = {fact: np.concatenate(values) for fact, values in facts.items()}
    return _checked(name, Rows(together, {**joined, "split": np.concatenate(splits)}, shown))


def _check_columns(dataset: Any, wanted: set[str], where: str, name: str) -> None:
    if missing := sorted(wanted - set(dataset.column_names)):
        raise DataError(
            f"{where} has no column {', '.join(missing)}, it has {', '.join(dataset.column_names)}: is it {name}? "
            f"{_ways_in(name)}"
        )
    image = dataset.features["image"]
    if getattr(image, "_type", None) != "Image" and not (isinstance(image, Mapping) and "bytes" in image):
        raise DataError(f"column 'image' of {where} holds no images: write it with datasets' Image feature")


# Folders


def _waterbirds(folder: Path) -> Rows:
    read = _csv(folder / "metadata.csv", ("img_filename", "y", "place", "split"), ("y", "place", "split"))
    facts = {"label": read["y"], "place": read["place"], "split": _split_names(read["split"], folder / "metadata.csv")}
    return _checked("waterbirds", Rows(_images(folder, read["img_filename"]), facts, str(folder)))


def _celeba(folder: Path) -> Rows:
    attributes = _csv(folder / "list_attr_celeba.csv", ("image_id", "Blond_Hair", "Male"), ("Blond_Hair", "Male"))
    parts = _csv(folder / "list_eval_partition.csv", ("image_id", "partition"), ("partition",))
    if not np.array_equal(attributes["image_id"], parts["image_id"]):
        raise DataError(f"list_attr_celeba.csv and list_eval_partition.csv of {folder} list other images: fetch both")
    facts = {
        "label": attributes["Blond_Hair"],
        "male": attributes["Male"],
        "split": _split_names(parts["partition"], folder / "list_eval_partition.csv"),
    }
    images = _images(folder, [f"img_align_celeba/{file}" for file in attributes["image_id"]])
    return _checked("celeba", Rows(images, facts, str(folder)))


def _camelyon17(folder: Path) -> Rows:
    numbers = ("tumor", "center", "split")
    read = _csv(folder / "metadata.csv", ("patient", "node", "x_coord", "y_coord", *numbers), numbers)
    files = [
        f"patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{x}_y_{y}.png"
        for patient, node, x, y in zip(read["patient"], read["node"], read["x_coord"], read["y_coord"], strict=True)
    ]
    # The file numbers only the images of hospitals 0, 3 and 4: 0 to train, 1 to validate. It gives those of hospitals
    # 1 and 2 numbers, too, which WILDS overrides by the hospital.
    split = _split_names(read["split"], folder / "metadata.csv")
    facts = {"label": read["tumor"], "center": read["center"], "split": split}
    return _checked("camelyon17", Rows(_images(folder, files), facts, str(folder)))


def _fmow(folder: Path) -> Rows:
    read = _csv(folder / "rgb_metadata.csv", ("split", "category", "timestamp", "country_code"), ())
    countries = _csv(folder / "country_code_mapping.csv", ("alpha-3", "region"), ())
    split = read["split"].astype(str)
    if unknown := sorted(set(np.unique(split).tolist()) - {"train", "val", "test", "seq"}):
        raise DataError(f"{folder / 'rgb_metadata.csv'} has the split {unknown[0]!r}: it is train, val, test or seq")
    # Images are numbered by their row in the whole file, also by the rows of sequestered images, which are not used.
    rows = np.flatnonzero(split != "seq")
    split = np.where(split[rows] == "val", "validation", split[rows])
    regions = dict(zip(countries["alpha-3"], countries["region"], strict=True))
    facts = {
        "label": _numbered(read["category"][rows], FMOW_CATEGORIES, "category", folder),
        # An empty region is Antarctica's.
        "region": _numbered([regions.get(c) or "Other" for c in read["country_code"][rows]], REGIONS, "region", folder),
        "year": _years(read["timestamp"][rows], folder),
        "split": split,
    }
    return Rows(_images(folder, [f"images/rgb_img_{row}.png" for row in rows]), facts, str(folder))


_FOLDERS = {
    "waterbirds": "waterbirds_v1.0",
    "celeba": "celebA_v1.0",
    "camelyon17": "camelyon17_v1.0",
    "fmow": "fmow_v1.1",
}
_INDEX = {
    "waterbirds": "metadata.csv",
    "celeba": "list_attr_celeba.csv",
    "camelyon17": "metadata.csv",
    "fmow": "rgb_metadata.csv",
}
_READERS: dict[str, Callable[[Path], Rows]] = {
    "waterbirds": _waterbirds,
    "celeba": _celeba,
    "camelyon17": _camelyon17,
    "fmow": _fmow,
}


def _csv(file: Path, columns: Sequence[str], numbers: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV file: int64 where they are numbers, else the strings as they stand (``004``, ``NA``)."""
    csv, pyarrow = require("pyarrow.csv", tables.PURPOSE), require("pyarrow", tables.PURPOSE)
    if not file.is_file():
        raise DataError(f"{file} does not exist: unpack the whole archive, and pass the folder with all its files")
    types = csv.ConvertOptions(
        include_columns=list(columns), column_types={column: pyarrow.string() for column in columns}
    )
    try:
        table = csv.read_csv(file, convert_options=types)
    except (KeyError, OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise DataError(
            f"{file} cannot be read ({error}): it needs the columns {', '.join(columns)}; fetch it again, or check "
            "that the folder is that of the dataset you named"
        ) from error
    return {
        column: _integers(table.column(column), f"column {column!r} of {file}")
        if column in numbers
        else table.column(column).to_numpy()
        for column in columns
    }


def _integers(values: Any, where: str) -> np.ndarray:
    compute, pyarrow = require("pyarrow.compute", tables.PURPOSE), require("pyarrow", tables.PURPOSE)
    if values.null_count:
        raise DataError(f"{where} has {values.null_count} empty cell(s): every image needs a value; fetch it again")
    try:
        return compute.cast(values, pyarrow.int64()).to_numpy().astype(np.int64)
    except pyarrow.ArrowException as error:  # text, fractions
        raise DataError(f"{where} holds no whole numbers ({error}): fetch the published file again") from error


def _split_names(codes: np.ndarray, file: Path) -> np.ndarray:
    if len(wrong := codes[(codes < 0) | (codes >= len(_SPLITS))]):
        raise DataError(f"{file} has the split {wrong[0]}: it is 0 (train), 1 (validation) or 2 (test)")
    return np.array(_SPLITS)[codes]


def _numbered(values: Iterable[str], names: Sequence[str], what: str, folder: Path) -> np.ndarray:
    number = {name: i for i, name in enumerate(names)}
    try:
        return np.array([number[value] for value in values], dtype=np.int64)
    except KeyError as error:
        listed = ", ".join(names)
        raise DataError(
            f"{folder} has the {what} {error.args[0]!r}, which is none of {listed}: fetch it again"
        ) from error


def _years(timestamps: np.ndarray, folder: Path) -> np.ndarray:
    # WILDS compares with midnight UTC, and the timestamps are in UTC: their first four digits are the year.
    try:
        return np.array([int(text[:4]) for text in timestamps], dtype=np.int64)
    except ValueError as error:
        raise DataError(
            f"a timestamp in {folder / 'rgb_metadata.csv'} does not begin with a year ({error}): fetch it again"
        ) from error


def _images(folder: Path, files: Any) -> Any:
    datasets, pyarrow = require("datasets", tables.PURPOSE), require("pyarrow", tables.PURPOSE)
    if not len(files):
        raise DataError(f"the tables in {folder} list no images: fetch them again")
    if not (above := (folder / files[0]).parent).is_dir():
        raise DataError(f"{above} does not exist: {folder} has the list of images without them; unpack them beside it")
    # Arrow arrays, since a list would have each path encoded on its own.
    paths = pyarrow.array([f"{folder}/{file}" for file in files], pyarrow.string())
    features = datasets.Features({"image": datasets.Image(), "file": datasets.Value("string")})
    columns = {"image": paths, "file": pyarrow.array(files, pyarrow.string())}
    return datasets.Dataset.from_dict(columns, features=features)


_CODES: dict[str, dict[str, tuple[int, ...]]] = {
    "waterbirds": {"label": (0, 1), "place": (0, 1)},
    "celeba": {"label": (-1, 0, 1), "male": (-1, 0, 1)},
    "camelyon17": {"label": (0, 1), "center": (0, 1, 2, 3, 4)},
}


def _checked(name: str, rows: Rows) -> Rows:
    """The rows, if their codes are the published ones."""
    for fact, valid in _CODES[name].items():
        if len(wrong := np.flatnonzero(~np.isin(rows.facts[fact], valid))):
            file = rows.images.select_columns(["file"])[int(wrong[0])]["file"]
            raise DataError(
                f"{file} of {rows.shown} has the {fact} {rows.facts[fact][wrong[0]]}: {name} knows "
                f"{', '.join(map(str, valid))}; fetch the published files again"
            )
    if name != "celeba":
        return rows
    # CelebA's own lists say -1 for no, the Hub's copy says False.
    return Rows(
        rows.images, {k: v if k == "split" else (v > 0).astype(np.int64) for k, v in rows.facts.items()}, rows.shown
    )
