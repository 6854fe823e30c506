"""Waterbirds, CelebA, Camelyon17 and FMoW as they are published, cut into source and target for the paper's protocol.

::

    data = read_published("waterbirds", "grodino/waterbirds", seed=0)
    loader = torch.utils.data.DataLoader(items(data.tuning, base.transform_train), 64, collate_fn=collate)
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_surgical.data.splits import draw
from peft_surgical.errors import DataError
from peft_surgical.extras import require

from .cuts import RECIPES, Cut, Recipe
from .parts import PARTS, Published
from .wilds_folders import Rows
from .wilds_layouts import read_rows


def read_published(
    name: str,
    source: Any,
    *,
    seed: int = 0,
    tuning: int | None = None,
    validation: int | None = None,
    center: int | None = None,
    region: str | None = None,
    years: tuple[int, int] | None = None,
) -> Published:
    """Read a dataset of the paper and cut it into source and target; images are opened when they are asked for.

    ``waterbirds`` (group ``2 * label + place``) and ``celeba`` (label blond, group ``2 * label + male``): the source is
    the training split. 400 images, 100 of each group, are drawn from the validation split to tune on; the rest of it
    validates. The test split tests. Report `peft_surgical.evaluation.worst_group_accuracy`. Few images of
    the rarest groups are left to validate on.

    ``camelyon17`` (group: hospital): the target is the hospital ``center``, by default 2 as the files number them, the
    test hospital of WILDS (which its paper calls hospital 5). 100 of its images, 50 of each class, are drawn to tune on
    and 100 to validate; all its others test, also patches of the same slides. The source are the training images of
    hospitals 0, 3 and 4, and ``source_validation`` those that WILDS sets aside there. Hospital 1, with which WILDS
    validates, is left out. A table without source images gives None for them.

    ``fmow`` (group: region): the target is a ``region``, by default Africa, after the source: 62 images, one of each
    class, are drawn from the validation split of WILDS (2013 to 2015) in that region, the rest of which validates, and
    its test split (from 2016) in that region tests. The source is that of WILDS, before 2013 and in all regions (the
    group tells which): train, ``source_validation`` and ``source_test``. A class of which the region has no image is
    left out of the draw, with a warning.

    What could not be looked up is chosen here: that the paper's target hospital is WILDS' test hospital, that FMoW's
    source keeps all regions, and that its tuning images come from WILDS' validation years.

    Args:
        name: ``waterbirds``, ``celeba``, ``camelyon17`` or ``fmow``.
        source: A Hub id (`wilds_layouts.HUB_IDS`); the folder that the WILDS package unpacks, or the one above it; a
            parquet file with the Hub's columns, several, or a folder of them; what ``save_to_disk`` wrote; or a
            ``DatasetDict``. Pass a ``DatasetDict`` as it was loaded: one that was filtered, datasets writes out anew.
        seed: Seed of the draws, class by class or group by group. Those of one seed are nested: ``tuning=40`` is a part
            of ``tuning=80``.
        tuning: Number of images to tune on, over all classes or groups; None is the paper's.
        validation: The same for validation. Where the paper uses the rest, the remaining images are then left out.
        center: Target hospital of ``camelyon17``, 0 to 4.
        region: Target region of ``fmow``.
        years: First and last year of the target of ``fmow``, both for the validation and the test split; None is as
            above. Images of the target are never in the source.

    Raises:
        DataError: Names the file, column, code or option that does not fit, or the class or group that has too few
            images, and the way out.

    Warns:
        UserWarning: For classes of FMoW that the target region does not have.
    """
    if name not in RECIPES:
        raise DataError(f"{name!r} is no published dataset known here: choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    options = {k: v for k, v in {"center": center, "region": region, "years": years}.items() if v is not None}
    if wrong := [option for option in options if option not in recipe.options]:
        knows = f"knows {', '.join(recipe.options)}" if recipe.options else "knows no such options"
        raise DataError(f"{wrong[0]}={options[wrong[0]]!r} means nothing for {name}, which {knows}: leave it out")
    sizes = {"validation": recipe.validation if validation is None else validation}
    sizes["tuning"] = recipe.tuning if tuning is None else tuning  # last, so that tuning draws are nested
    each = {part: _each(size, part, recipe) for part, size in sizes.items() if size is not None}
    rows = read_rows(name, source)
    return _assemble(name, recipe, rows, recipe.cut(rows, **options), each, seed)


def _each(size: int, part: str, recipe: Recipe) -> int:
    """Images of each class or group."""
    names = _balanced_names(recipe)
    what = "groups" if recipe.balanced == "group" else "classes"
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise DataError(f"{part}={size!r}: give a number of images over all {len(names)} {what}, such as {len(names)}")
    if size % len(names):
        below, above = size // len(names) * len(names), (size // len(names) + 1) * len(names)
        nearest = f"{below} or {above}" if below else str(above)
        raise DataError(f"{part}={size} images do not divide evenly over {len(names)} {what}: ask for {nearest}")
    return size // len(names)


def _balanced_names(recipe: Recipe) -> tuple[str, ...]:
    return recipe.group_names if recipe.balanced == "group" else recipe.label_names


def _unit(recipe: Recipe) -> str:
    return "group" if recipe.balanced == "group" else "class"


def _assemble(name: str, recipe: Recipe, rows: Rows, cut: Cut, each: Mapping[str, int], seed: int) -> Published:
    label, group = rows.facts["label"], cut.group
    parts = {part: np.flatnonzero(mask) for part, (mask, _) in cut.given.items()}
    origin = {part: origin for part, (_, origin) in cut.given.items()}
    pool = np.flatnonzero(cut.pool)
    balanced = (group if recipe.balanced == "group" else label)[pool]
    rest = None if cut.rest in each else cut.rest
    _check_counts(balanced, recipe, cut, each, rest)
    drawn = draw(balanced, each, None, seed, _balanced_names(recipe))
    parts |= {part: pool[of_part] for part, of_part in drawn.items()}
    origin |= {part: f"drawn: seed {seed}, {n} of each {_unit(recipe)} of {cut.pool_name}" for part, n in each.items()}
    if rest is not None:
        parts[rest] = np.setdiff1d(pool, np.concatenate([parts[part] for part in each]))
        origin[rest] = f"the rest of {cut.pool_name}"
    for part in ("tuning", "validation", "test"):
        if not len(parts[part]):
            raise DataError(
                f"no image is left for the {part} part of {name} ({origin[part]}): ask for fewer, widen the target, or "
                f"check that {rows.shown} is whole"
            )
    parts = {part: parts[part] for part in PARTS if part in parts and len(parts[part])}
    table = _with_columns(rows, recipe, group)
    return Published(
        name=name,
        **{part: table.select(parts[part]) if part in parts else None for part in PARTS},
        label_names=recipe.label_names,
        group_names=recipe.group_names,
        origin={part: origin[part] for part in parts},
        fingerprint=_fingerprint(name, recipe, parts, label, group),
    )


def _check_counts(balanced: np.ndarray, recipe: Recipe, cut: Cut, each: Mapping[str, int], rest: str | None) -> None:
    names, what = _balanced_names(recipe), _unit(recipe)
    counts = np.bincount(balanced, minlength=len(names))
    if not counts.any():
        raise DataError(f"there is no image in {cut.pool_name} to draw from: is the whole dataset there?")
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent and recipe.sparse:
        warnings.warn(
            f"{cut.pool_name} has no image of {len(absent)} of the {len(names)} classes ({', '.join(absent)}): the "
            "tuning images are without them; other years= may have some",
            stacklevel=4,
        )
    # A part that gets the rest is of use only with something of everything in it.
    needed = sum(each.values()) + (rest is not None and not recipe.sparse)
    for name, count in zip(names, counts, strict=True):
        if count < needed and not (recipe.sparse and not count):
            wanted = [f"{n} for {part}" for part, n in each.items()]
            wanted += [f"1 or more for {rest}"] * (rest is not None and not recipe.sparse)
            raise DataError(
                f"the {what} {name!r} has {count} image(s) in {cut.pool_name}, and {needed} are needed "
                f"({', '.join(wanted)}): ask for fewer, or check that the dataset is whole"
            )


def _with_columns(rows: Rows, recipe: Recipe, group: np.ndarray) -> Any:
    datasets = require("datasets", "reading data")
    label = datasets.ClassLabel(names=list(recipe.label_names))
    # To all rows at once: adding a column to a selection would make datasets write out its images.
    table = rows.images.add_column("label", rows.facts["label"], feature=label)
    return table.add_column("group", group, feature=datasets.Value("int64"))


def _fingerprint(
    name: str, recipe: Recipe, parts: Mapping[str, np.ndarray], label: np.ndarray, group: np.ndarray
) -> str:
    total = hashlib.sha256("\0".join([name, *recipe.label_names, *recipe.group_names]).encode())
    for part, of_part in parts.items():
        total.update(f"\0{part}\0".encode())
        for values in (of_part, label[of_part], group[of_part]):
            total.update(values.astype("<i8").tobytes())
    return total.hexdigest()[:16]
