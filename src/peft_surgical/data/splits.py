"""Splits that are drawn: seeded, with as equal numbers of images per class as there are images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from .layouts import SPLITS

LEAST = 5
"""Images that every class needs before a validation split is drawn without being told its size: one to validate on,
and four times as many to tune on."""

Size = int | float | None


def labels_of(part: Any) -> np.ndarray:
    """The labels of a part, int64 (n,)."""
    return np.array(part.select_columns(["label"])["label"][:], dtype=np.int64)


def per_class(size: int | float, labels: np.ndarray, split: str) -> int:
    """Images per class of a split of this size.

    Args:
        size: A number of images over all classes, or, as a float between 0 and 1, a share of all images.
        labels: int64 (n,), the images to draw from.
        split: Its name, for messages.

    Raises:
        DataError: If the size means nothing or does not divide evenly over the classes.
    """
    classes = len(np.unique(labels))
    if isinstance(size, float) and 0 < size < 1:
        return max(1, round(size * len(labels) / classes))
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise DataError(f"{split}={size!r}: give a number of images, such as {10 * classes}, or a share, such as 0.2")
    if size % classes:
        below, above = size // classes * classes, (size // classes + 1) * classes
        nearest = f"{below} or {above}" if below else str(above)
        raise DataError(f"{split}={size} images do not divide evenly over {classes} classes: ask for {nearest}")
    return size // classes


def total(size: int | float, labels: np.ndarray, split: str) -> int:
    """Images over all classes of a split of this size; a share is rounded to the same number for every class.

    Args:
        size: As for `per_class`, but any positive number will do.
        labels: int64 (n,), the images to draw from.
        split: Its name, for messages.

    Raises:
        DataError: If the size means nothing.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if not isinstance(size, float) or not 0 < size < 1:
        example = max(1, len(labels) // 5)
        raise DataError(f"{split}={size!r}: give a number of images, such as {example}, or a share, such as 0.2")
    return per_class(size, labels, split) * len(np.unique(labels))


def level(size: int, room: np.ndarray) -> np.ndarray:
    """So many images over classes with so much room each, as equal as the room allows: int64 (classes,).

    One image at a time goes to the class that has the fewest, and among those to the one with the most room: a larger
    size gives every class as many or more.

    Args:
        size: At most the sum of the room.
        room: int64 (classes,), the most that each class can give.
    """
    rounds = [(given, -most, c) for c, most in enumerate(room.tolist()) for given in range(most)]
    found = np.zeros(len(room), dtype=np.int64)
    for _, _, c in sorted(rounds)[:size]:
        found[c] += 1
    return found


def allot(counts: np.ndarray, wanted: Mapping[str, int], rest: bool) -> dict[str, np.ndarray]:
    """Images of each class for every split that is drawn from the same images, int64 (classes,).

    Every split gets equal numbers of all classes where that can be. Where it cannot, because its size does not divide
    or a class has too few images, it gets numbers that are as equal as can be. At least half of what a class has then
    stays for the splits that follow, or one image for each of them where the size asks for more.

    Args:
        counts: int64 (classes,), the images that there are.
        wanted: Split -> images over all classes, in the order in which they are drawn. ``tuning`` comes last, may ask
            for more than is left, and then gets all of it.
        rest: Whether all that is not drawn is a split too, which needs an image of every class.

    Raises:
        DataError: If a split cannot have its size.
    """
    left, found = counts.copy(), {}
    for number, (split, size) in enumerate(wanted.items(), start=1):
        if split == "tuning":
            if size < len(counts):
                raise DataError(f"tuning={size}: there are {len(counts)} classes, and each needs an image to tune on")
            found[split] = level(size, left)
            continue
        room = np.maximum(left - (len(wanted) - number + rest), 0)
        if size > room.sum():
            raise DataError(
                f"{split}={size}: only {room.sum()} of the {left.sum()} images can be drawn for that, because each "
                f"class has to keep an image for every other part: ask for fewer, or bring a {split} part of its own"
            )
        each, odd = divmod(size, len(counts))
        if not odd and each <= room.min():
            found[split] = np.full(len(counts), each)
        else:
            half = np.minimum(left // 2, room)
            found[split] = level(size, half if half.sum() >= size else room)
        left = left - found[split]
    return found


def default_validation(labels: np.ndarray, names: Sequence[str]) -> int:
    """Images per class to validate on where nobody says how many: a fifth of an average class, at most half of any.

    Raises:
        DataError: If a class has fewer than `LEAST` images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    smallest = int(counts.min())
    if smallest < LEAST:
        raise DataError(
            f"class {names[classes[counts.argmin()]]!r} has {_images(smallest)}, too few to split: {LEAST} of every "
            f"class are needed to draw a validation split by itself. Bring more, give a validation split of your own, "
            f"or say validation={len(classes)}, which is drawn as evenly as the classes allow"
        )
    return max(1, min(round(0.2 * float(counts.mean())), smallest // 2))


def draw(
    labels: np.ndarray, sizes: Mapping[str, int | np.ndarray], rest: str | None, seed: int, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Row numbers, ascending, of splits with so many images of each class.

    Drawn class by class, in the order of the classes, from one ``numpy.random.default_rng(seed)``, in the order of
    ``sizes``: the same seed with a larger last size gives a superset of the smaller draw.

    Args:
        labels: int64 (n,).
        sizes: Split -> images per class: a number for all classes, or int64 (classes,), as `allot` gives them.
        rest: The split that gets everything else, at least one image of each class; None leaves it out.
        seed: Seed of the draw.
        names: The names of the classes, for messages.

    Raises:
        DataError: Names the class that has too few images.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    table = np.stack([np.broadcast_to(n, len(classes)) for n in sizes.values()])  # (splits, classes)
    parts: dict[str, list[np.ndarray]] = {split: [] for split in (*sizes, *([rest] if rest else []))}
    for label, each in zip(classes, table.T, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(each)
        needed = int(ends[-1]) + (rest is not None)
        if len(rows) < needed:
            wanted = [f"{n} for {split}" for split, n in zip(sizes, each, strict=True)]
            wanted += [f"1 or more for {rest}"] * (rest is not None)
            raise DataError(
                f"class {names[label]!r} has {_images(len(rows))} to draw from, and {needed} are needed "
                f"({', '.join(wanted)}): ask for fewer, or bring more of that class"
            )
        for part, drawn in zip(parts, np.split(rows, ends), strict=False):
            parts[part].append(drawn)
    return {split: np.sort(np.concatenate(drawn)) for split, drawn in parts.items()}


def _images(n: int) -> str:
    return f"{n} image" if n == 1 else f"{n} images"


def draw_parts(
    parts: Mapping[str, Any], names: Sequence[str], sizes: Mapping[str, Size], seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The three parts and how they came about."""
    drawn: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for split in ("validation", "test"):
        if split in parts:
            drawn[split], origin[split] = parts[split], "given"
            if (size := sizes[split]) is not None:
                labels = labels_of(parts[split])
                asked = total(size, labels, split)
                if asked >= len(labels):
                    origin[split] = "given" + _short(split, len(labels), asked)
                    continue
                each = {split: level(asked, _counts(labels))}
                drawn[split] = parts[split].select(draw(labels, each, None, seed, names)[split])
                origin[split] = f"{_each(each[split])} of {len(labels)} given, {_how(seed, each[split])}"
    pool = parts["tuning"]
    labels = labels_of(pool)
    wanted = {}
    if "test" not in parts and (size := sizes["test"]) is not None:
        wanted["test"] = total(size, labels, "test")
    if "validation" not in parts:
        size = sizes["validation"]
        wanted["validation"] = (
            default_validation(labels, names) * len(_counts(labels))
            if size is None
            else total(size, labels, "validation")
        )
    origin = {"tuning": "given" if not wanted else f"given, without what was drawn from it, seed {seed}", **origin}
    few = sizes["tuning"]
    if few is not None:
        wanted["tuning"] = total(few, labels, "tuning")
    if not wanted:
        return {"tuning": pool, **drawn}, origin
    each = allot(_counts(labels), wanted, rest=few is None)
    rows = draw(labels, each, None if few is not None else "tuning", seed, names)
    for split, numbers in each.items():
        of = f"of {len(pool)} given" if split == "tuning" else "of the tuning images"
        fewer = _short(split, int(numbers.sum()), wanted[split])
        origin[split] = f"{_how(seed, numbers)}, {_each(numbers)} {of}{fewer}"
    drawn |= {split: pool.select(of_split) for split, of_split in rows.items()}
    return {split: drawn[split] for split in SPLITS if split in drawn}, origin


def _counts(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_counts=True)[1]


def _how(seed: int, each: np.ndarray) -> str:
    return f"drawn: seed {seed}, class-balanced{'' if np.ptp(each) == 0 else ' as far as it goes'}"


def _each(each: np.ndarray) -> str:
    return f"{each.min()} per class" if np.ptp(each) == 0 else f"{each.min()} to {each.max()} per class"


def _short(split: str, taken: int, asked: int) -> str:
    """A note that fewer images are there than were asked for, with a warning; nothing where there are enough."""
    if taken >= asked:
        return ""
    warnings.warn(f"{split}={asked}: there are {taken}, and all of them are taken", stacklevel=5)
    return f", all there are ({asked} asked for)"
