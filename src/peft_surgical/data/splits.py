"""Splits that are drawn: seeded, with equal numbers of images per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import DataError

LEAST = 5
"""Images that every class needs before a validation split is drawn without being told its size: one to validate on,
and four times as many to tune on."""

Size = int | float | None


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
            f"class are needed to draw a validation split. Bring more, give a validation split of your own, or say "
            f"validation={len(classes)} to validate on one image of each class"
        )
    return max(1, min(round(0.2 * float(counts.mean())), smallest // 2))


def draw(
    labels: np.ndarray, sizes: Mapping[str, int], rest: str | None, seed: int, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Row numbers, ascending, of splits with equal numbers of images per class.

    Drawn class by class, in the order of the classes, from one ``numpy.random.default_rng(seed)``, in the order of
    ``sizes``: the same seed with a larger last size gives a superset of the smaller draw.

    Args:
        labels: int64 (n,).
        sizes: Split -> images per class.
        rest: The split that gets everything else, at least one image of each class; None leaves it out.
        seed: Seed of the draw.
        names: The names of the classes, for messages.

    Raises:
        DataError: Names the class that has too few images.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum(list(sizes.values()))
    needed = int(ends[-1]) + (rest is not None)
    parts: dict[str, list[np.ndarray]] = {split: [] for split in (*sizes, *([rest] if rest else []))}
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < needed:
            wanted = [f"{n} for {split}" for split, n in sizes.items()] + [f"1 or more for {rest}"] * (rest is not None)
            raise DataError(
                f"class {names[label]!r} has {_images(len(rows))} to draw from, and {needed} are needed "
                f"({', '.join(wanted)}): ask for fewer, or bring more of that class"
            )
        for part, drawn in zip(parts, np.split(rows, ends), strict=False):
            parts[part].append(drawn)
    return {split: np.sort(np.concatenate(drawn)) for split, drawn in parts.items()}


def _images(n: int) -> str:
    return f"{n} image" if n == 1 else f"{n} images"
