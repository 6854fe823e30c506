"""How the paper cuts Waterbirds, CelebA, Camelyon17 and FMoW into source and target: which rows are what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from peft_surgical.errors import DataError

from .wilds_folders import FMOW_CATEGORIES, REGIONS, Rows

HOSPITALS = (0, 1, 2, 3, 4)
"""The hospitals of Camelyon17 as the files number them; WILDS trains on 0, 3 and 4, validates on 1 and tests on 2."""

_TRAINING_HOSPITALS = (0, 3, 4)


@dataclass(frozen=True)
class Cut:
    """Which rows are what.

    Attributes:
        given: Part -> the rows that it has whole, as a mask, and where they are from, in words.
        pool: The rows that the target's small parts are drawn from, as a mask.
        pool_name: The pool in words.
        rest: The part that gets what is left of the pool.
        group: int64, the group of every row.
    """

    given: Mapping[str, tuple[np.ndarray, str]]
    pool: np.ndarray
    pool_name: str
    rest: str
    group: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """How the paper uses a dataset.

    Attributes:
        label_names: Its classes.
        group_names: Its groups.
        balanced: What a draw has equal numbers of: ``group`` or ``label``.
        tuning: Images to tune on.
        validation: Images to choose with; None is what tuning leaves of the pool.
        cut: Rows and options -> source and target.
        options: Options of `read_published` that it knows.
        sparse: Whether the pool may lack a class.
    """

    label_names: tuple[str, ...]
    group_names: tuple[str, ...]
    balanced: str
    tuning: int
    validation: int | None
    cut: Callable[..., Cut]
    options: tuple[str, ...] = ()
    sparse: bool = False


def _by_split(rows: Rows, attribute: str) -> Cut:
    split = rows.facts["split"]
    for needed in ("train", "validation", "test"):
        if not (split == needed).any():
            raise DataError(
                f"{rows.shown} has no {needed} split: train, validation and test are needed. Put the split into the "
                "name of each parquet file, or pass a DatasetDict with all three"
            )
    given = {part: (split == of, f"given: the {of} split") for part, of in (("source", "train"), ("test", "test"))}
    group = 2 * rows.facts["label"] + rows.facts[attribute]
    return Cut(given, split == "validation", "the validation split", "validation", group)


def _waterbirds(rows: Rows) -> Cut:
    return _by_split(rows, "place")


def _celeba(rows: Rows) -> Cut:
    return _by_split(rows, "male")


def _camelyon17(rows: Rows, center: int = 2) -> Cut:
    if center not in HOSPITALS:
        raise DataError(
            f"center={center!r} is no hospital of camelyon17: choose one of {', '.join(map(str, HOSPITALS))}"
        )
    hospital, split = rows.facts["center"], rows.facts["split"]
    target = hospital == center
    if not target.any():
        there = ", ".join(map(str, np.unique(hospital)))
        raise DataError(f"{rows.shown} has no image of hospital {center}, only of {there}: bring the split that has it")
    others = [h for h in _TRAINING_HOSPITALS if h != center]
    of_source = np.isin(hospital, others)
    where = f"of hospitals {', '.join(map(str, others))}"
    given = {
        "source": (of_source & (split == "train"), f"given: the training images {where}"),
        "source_validation": (of_source & (split == "validation"), f"given: the validation images {where}"),
    }
    return Cut(given, target, f"hospital {center}", "test", hospital)


def _fmow(rows: Rows, region: str = "Africa", years: tuple[int, int] | None = None) -> Cut:
    if region not in REGIONS[:-1]:
        raise DataError(f"region={region!r} is no region of fmow: choose one of {', '.join(REGIONS[:-1])}")
    when = {"validation": (2013, 2015), "test": (2016, 9999)}
    if years is not None:
        if len(years) != 2 or not all(isinstance(y, int) for y in years) or years[0] > years[1]:
            raise DataError(f"years={years!r}: give the first and the last year, such as (2016, 2017)")
        when = dict.fromkeys(when, (years[0], years[1]))
    split, year = rows.facts["split"], rows.facts["year"]
    inside = rows.facts["region"] == REGIONS.index(region)
    target = {s: (split == s) & inside & (first <= year) & (year <= last) for s, (first, last) in when.items()}
    before = (year < 2013) & ~target["validation"] & ~target["test"]
    names = {"source": "train", "source_validation": "validation", "source_test": "test"}
    given = {
        part: (before & (split == of), f"given: the {of} split before 2013, all regions") for part, of in names.items()
    }
    words = {
        s: f"the {s} split in {region}, {first}" + (" on" if last == 9999 else f" to {last}")
        for s, (first, last) in when.items()
    }
    given["test"] = (target["test"], f"given: {words['test']}")
    return Cut(given, target["validation"], words["validation"], "validation", rows.facts["region"])


RECIPES: Mapping[str, Recipe] = {
    "waterbirds": Recipe(
        label_names=("landbird", "waterbird"),
        group_names=("landbird on land", "landbird on water", "waterbird on land", "waterbird on water"),
        balanced="group",
        tuning=400,
        validation=None,
        cut=_waterbirds,
    ),
    "celeba": Recipe(
        label_names=("not blond", "blond"),
        group_names=("not blond, not male", "not blond, male", "blond, not male", "blond, male"),
        balanced="group",
        tuning=400,
        validation=None,
        cut=_celeba,
    ),
    "camelyon17": Recipe(
        label_names=("normal", "tumor"),
        group_names=tuple(f"hospital {h}" for h in HOSPITALS),
        balanced="label",
        tuning=100,
        validation=100,
        cut=_camelyon17,
        options=("center",),
    ),
    "fmow": Recipe(
        label_names=FMOW_CATEGORIES,
        group_names=REGIONS,
        balanced="label",
        tuning=len(FMOW_CATEGORIES),
        validation=None,
        cut=_fmow,
        options=("region", "years"),
        sparse=True,
    ),
}
"""Name -> how the paper uses it. A further dataset is a row here, its reader in `wilds_folders`, and the columns of its
tables in `wilds_layouts`."""
