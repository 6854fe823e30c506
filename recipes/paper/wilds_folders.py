"""The rows of Waterbirds, CelebA, Camelyon17 and FMoW in folders as the WILDS package unpacks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_surgical.data import layouts as tables
from peft_surgical.errors import DataError
from peft_surgical.extras import require

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
class WildsTable:
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


def read_waterbirds(folder: Path) -> WildsTable:
    """``metadata.csv`` and the images beside it."""
    read = _csv(folder / "metadata.csv", ("img_filename", "y", "place", "split"), ("y", "place", "split"))
    facts = {"label": read["y"], "place": read["place"], "split": _split_names(read["split"], folder / "metadata.csv")}
    return WildsTable(_images(folder, read["img_filename"]), facts, str(folder))


def read_celeba(folder: Path) -> WildsTable:
    """``list_attr_celeba.csv``, ``list_eval_partition.csv`` and ``img_align_celeba/``."""
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
    return WildsTable(images, facts, str(folder))


def read_camelyon17(folder: Path) -> WildsTable:
    """``metadata.csv`` and ``patches/``."""
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
    return WildsTable(_images(folder, files), facts, str(folder))


def read_fmow(folder: Path) -> WildsTable:
    """``rgb_metadata.csv``, ``country_code_mapping.csv`` and ``images/``."""
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
    return WildsTable(_images(folder, [f"images/rgb_img_{row}.png" for row in rows]), facts, str(folder))


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
        column: integers(table.column(column), f"column {column!r} of {file}")
        if column in numbers
        else table.column(column).to_numpy()
        for column in columns
    }


def integers(values: Any, where: str) -> np.ndarray:
    """An Arrow column as int64; a cell that is empty or no whole number is an error."""
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
