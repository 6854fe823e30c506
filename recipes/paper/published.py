"""Waterbirds, CelebA, Camelyon17 and FMoW as they are published, cut into source and target for the paper's protocol.

::

    data = read_published("waterbirds", "grodino/waterbirds", seed=0)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_surgical.data.splits import draw
from peft_surgical.errors import DataError

from .parts import PARTS, Published, cut
from .wilds import read_rows
from .wilds_folders import FMOW_CATEGORIES, REGIONS, WildsTable

HOSPITALS = (0, 1, 2, 3, 4)
"""The hospitals of Camelyon17 as the files number them; WILDS trains on 0, 3 and 4, validates on 1 and tests on 2."""


@dataclass(frozen=True)
class ImageSplit:
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
        balanced: What a draw has equal numbers of: ``group`` or ``class``.
        tuning: Images to tune on.
        split: Rows and options -> source and target.
        validation: Images to choose with; None is what tuning leaves of the pool.
        options: Options of `read_published` that it knows.
        sparse: Whether the pool may lack a class.
    """

    label_names: tuple[str, ...]
    group_names: tuple[str, ...]
    balanced: str
    tuning: int
    split: Callable[..., ImageSplit]
    validation: int | None = None
    options: tuple[str, ...] = ()
    sparse: bool = False

    @property
    def balanced_names(self) -> tuple[str, ...]:
        """The classes or groups that a draw has equal numbers of."""
        return self.group_names if self.balanced == "group" else self.label_names


def _by_split(rows: WildsTable, attribute: str) -> ImageSplit:
    split = rows.facts["split"]
    for needed in ("train", "validation", "test"):
        if not (split == needed).any():
            raise DataError(
                f"{rows.shown} has no {needed} split: train, validation and test are needed. Put the split into the "
                "name of each parquet file, or pass a DatasetDict with all three"
            )
    given = {part: (split == of, f"given: the {of} split") for part, of in (("source", "train"), ("test", "test"))}
    group = 2 * rows.facts["label"] + rows.facts[attribute]
    return ImageSplit(given, split == "validation", "the validation split", "validation", group)


def _camelyon17(rows: WildsTable, center: int = 2) -> ImageSplit:
    if center not in HOSPITALS:
        said = ", ".join(map(str, HOSPITALS))
        raise DataError(f"center={center!r} is no hospital of camelyon17: choose one of {said}")
    hospital, split = rows.facts["center"], rows.facts["split"]
    target = hospital == center
    if not target.any():
        there = ", ".join(map(str, np.unique(hospital)))
        raise DataError(f"{rows.shown} has no image of hospital {center}, only of {there}: bring the split that has it")
    others = [h for h in (0, 3, 4) if h != center]
    of_source = np.isin(hospital, others)
    where = f"of hospitals {', '.join(map(str, others))}"
    given = {
        "source": (of_source & (split == "train"), f"given: the training images {where}"),
        "source_validation": (of_source & (split == "validation"), f"given: the validation images {where}"),
    }
    return ImageSplit(given, target, f"hospital {center}", "test", hospital)


def _fmow(
    rows: WildsTable, region: str = "Africa", years: tuple[int, int] | None = None, tune_on: str = "test"
) -> ImageSplit:
    if tune_on not in ("test", "validation"):
        raise DataError(
            f"tune_on={tune_on!r}: choose test or validation, the split that the images to tune on are from"
        )
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
    when_before = "split before 2013, all regions"
    given = {part: (before & (split == of), f"given: the {of} {when_before}") for part, of in names.items()}
    until = {s: " on" if last == 9999 else f" to {last}" for s, (_, last) in when.items()}
    words = {s: f"the {s} split in {region}, {first}{until[s]}" for s, (first, _) in when.items()}
    other, rest = ("validation", "test") if tune_on == "test" else ("test", "validation")
    given[other] = (target[other], f"given: {words[other]}")
    return ImageSplit(given, target[tune_on], words[tune_on], rest, rows.facts["region"])


RECIPES: Mapping[str, Recipe] = {
    "waterbirds": Recipe(
        label_names=("landbird", "waterbird"),
        group_names=("landbird on land", "landbird on water", "waterbird on land", "waterbird on water"),
        balanced="group",
        tuning=400,
        split=functools.partial(_by_split, attribute="place"),
    ),
    "celeba": Recipe(
        label_names=("not blond", "blond"),
        group_names=("not blond, not male", "not blond, male", "blond, not male", "blond, male"),
        balanced="group",
        tuning=400,
        split=functools.partial(_by_split, attribute="male"),
    ),
    "camelyon17": Recipe(
        label_names=("normal", "tumor"),
        group_names=tuple(f"hospital {h}" for h in HOSPITALS),
        balanced="class",
        tuning=100,
        validation=100,
        split=_camelyon17,
        options=("center",),
    ),
    "fmow": Recipe(
        label_names=FMOW_CATEGORIES,
        group_names=REGIONS,
        balanced="class",
        tuning=len(FMOW_CATEGORIES),
        split=_fmow,
        options=("region", "years", "tune_on"),
        sparse=True,
    ),
}
"""Name -> how the paper uses it. A further dataset is a row here, and its layouts in `wilds`."""


def read_published(
    name: str,
    source: Any,
    *,
    seed: int = 0,
    tuning: int | None = None,
    validation: int | None = None,
    **options: Any,
) -> Published:
    """Read a dataset of the paper and cut it into source and target; images are opened when they are asked for.

    ``waterbirds`` (group ``2 * label + place``) and ``celeba`` (label blond, group ``2 * label + male``): the source is
    the training split. 400 images, 100 of each group, are drawn from the validation split to tune on; the rest of it
    validates. The test split tests. Few images of the rarest groups are left to validate on.

    ``camelyon17`` (group: hospital): the target is the hospital ``center``, by default 2 as the files number them, the
    test hospital of WILDS. 100 of its images, 50 of each class, are drawn to tune on and 100 to validate; all its
    others test, also patches of the same slides. The source are the training images of hospitals 0, 3 and 4, and
    ``source_validation`` those that WILDS sets aside there. A table without source images gives None for them.

    ``fmow`` (group: region): the target is a ``region``, by default Africa, after the source: 62 images, one of each
    class, are drawn from the test split of WILDS (from 2016) in that region, the rest of which tests (paper, A.3); its
    validation split (2013 to 2015) in that region validates. With ``tune_on="validation"`` it is the other way round:
    the 62 are drawn from the validation split, whose rest validates, and the whole test split tests. The source is that
    of WILDS, before 2013 and in all regions (the group tells which): train, ``source_validation`` and ``source_test``.
    A class of which the region has no image is left out of the draw, with a warning.

    Chosen here, since the paper does not say: the target hospital, that of WILDS; that FMoW's source keeps all regions,
    and which of its images validate.

    Args:
        name: ``waterbirds``, ``celeba``, ``camelyon17`` or ``fmow``.
        source: A Hub id; the folder that the WILDS package unpacks, or the one above it; a parquet file with the Hub's
            columns, several, or a folder of them; what ``save_to_disk`` wrote; or a ``DatasetDict``. Pass a
            ``DatasetDict`` as it was loaded: one that was filtered, datasets writes out anew.
        seed: Seed of the draws, class by class or group by group. Those of one seed are nested: ``tuning=40`` is a part
            of ``tuning=80``.
        tuning: Number of images to tune on, over all classes or groups; None is the paper's.
        validation: The same for validation. Where the paper uses the rest, the remaining images are then left out.
        **options: ``center``, the target hospital of ``camelyon17``, 0 to 4. ``region``, the target region of ``fmow``,
            ``years``, its first and last year, both for the validation and the test split, and ``tune_on``. None is as
            above.
            Images of the target are never in the source.

    Raises:
        DataError: Names the file, column, code or option that does not fit, or the class or group that has too few
            images, and the way out.

    Warns:
        UserWarning: For classes of FMoW that the target region does not have.
    """
    if name not in RECIPES:
        raise DataError(f"{name!r} is no published dataset known here: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    options = {option: value for option, value in options.items() if value is not None}
    if wrong := [option for option in options if option not in recipe.options]:
        knows = f"knows {', '.join(recipe.options)}" if recipe.options else "knows no such options"
        raise DataError(f"{wrong[0]}={options[wrong[0]]!r} means nothing for {name}, which {knows}: leave it out")
    sizes = {"validation": recipe.validation if validation is None else validation}
    sizes["tuning"] = recipe.tuning if tuning is None else tuning  # last, so that tuning draws are nested
    each = {part: _each(size, part, recipe) for part, size in sizes.items() if size is not None}
    rows = read_rows(name, source)
    return _assemble(name, recipe, rows, recipe.split(rows, **options), each, seed)


def _each(size: int, part: str, recipe: Recipe) -> int:
    names = recipe.balanced_names
    what = "groups" if recipe.balanced == "group" else "classes"
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise DataError(f"{part}={size!r}: give a number of images over all {len(names)} {what}, such as {len(names)}")
    if size % len(names):
        below, above = size // len(names) * len(names), (size // len(names) + 1) * len(names)
        nearest = f"{below} or {above}" if below else str(above)
        raise DataError(f"{part}={size} images do not divide evenly over {len(names)} {what}: ask for {nearest}")
    return size // len(names)


def _assemble(
    name: str, recipe: Recipe, rows: WildsTable, split: ImageSplit, each: Mapping[str, int], seed: int
) -> Published:
    label, group = rows.facts["label"], split.group
    parts = {part: np.flatnonzero(mask) for part, (mask, _) in split.given.items()}
    origin = {part: origin for part, (_, origin) in split.given.items()}
    pool = np.flatnonzero(split.pool)
    balanced = (group if recipe.balanced == "group" else label)[pool]
    rest = None if split.rest in each else split.rest
    _check_counts(balanced, recipe, split, each, rest)
    drawn = draw(balanced, each, None, seed, recipe.balanced_names)
    parts |= {part: pool[of_part] for part, of_part in drawn.items()}
    pool_name = f"of each {recipe.balanced} of {split.pool_name}"
    origin |= {part: f"drawn: seed {seed}, {n} {pool_name}" for part, n in each.items()}
    if rest is not None:
        parts[rest] = np.setdiff1d(pool, np.concatenate([parts[part] for part in each]))
        origin[rest] = f"the rest of {split.pool_name}"
    for part in ("tuning", "validation", "test"):
        if not len(parts[part]):
            raise DataError(
                f"no image is left for the {part} part of {name} ({origin[part]}): ask for fewer, widen the target, or "
                f"check that {rows.shown} is whole"
            )
    return cut(
        name,
        rows.images,
        label,
        group,
        {part: parts[part] for part in PARTS if part in parts and len(parts[part])},
        label_names=recipe.label_names,
        group_names=recipe.group_names,
        origin=origin,
    )


def _check_counts(
    balanced: np.ndarray, recipe: Recipe, split: ImageSplit, each: Mapping[str, int], rest: str | None
) -> None:
    names = recipe.balanced_names
    counts = np.bincount(balanced, minlength=len(names))
    if not counts.any():
        raise DataError(f"there is no image in {split.pool_name} to draw from: is the whole dataset there?")
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent and recipe.sparse:
        warnings.warn(
            f"{split.pool_name} has no image of {len(absent)} of the {len(names)} classes ({', '.join(absent)}): the "
            "tuning images are without them; other years= may have some",
            stacklevel=4,
        )
    at_least = rest is not None and not recipe.sparse  # the rest is of use only with something of everything in it
    needed = sum(each.values()) + at_least
    for name, count in zip(names, counts, strict=True):
        if count < needed and not (recipe.sparse and not count):
            wanted = [f"{n} for {part}" for part, n in each.items()]
            wanted += [f"1 or more for {rest}"] * at_least
            raise DataError(
                f"the {recipe.balanced} {name!r} has {count} image(s) in {split.pool_name}, and {needed} are needed "
                f"({', '.join(wanted)}): ask for fewer, or check that the dataset is whole"
            )
