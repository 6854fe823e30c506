"""Labels as people write them: numbers, names or yes/no, made into the numbers 0..k-1 and the names of classes."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError


@dataclass(frozen=True)
class RawLabels:
    """The labels of one split as they stand in it.

    Attributes:
        values: One a row.
        files: The file, or file and row, that each belongs to, for messages.
        names: What the numbers mean, where the data says so.
        column: Where they come from, for messages: ``"the column 'label'"``.
    """

    values: Sequence[Any]
    files: Sequence[str]
    names: tuple[str, ...] | None = None
    column: str = "the class folders"


def encode(splits: Mapping[str, RawLabels]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Class numbers, int64, by split, and what they mean. The split ``tuning`` decides which classes there are.

    Strings become classes in sorted order. Whole numbers stay what they are when they are 0..k-1, and are numbered
    anew, in order, when they are not (with a warning, since a base's own classes then do not fit).

    Raises:
        DataError: Names the row whose label is missing or of another kind, a class that is not in the tuning images,
            or that there is one class only.
    """
    for raw in splits.values():
        _check_kinds(raw)
    declared = {raw.names for raw in splits.values()}
    if len(declared) == 1 and (names := splits["tuning"].names) is not None:
        numbers = {split: np.array(raw.values, dtype=np.int64) for split, raw in splits.items()}
        for split, raw in splits.items():
            _check_range(numbers[split], raw, names)
    else:
        names, numbers = _by_value({split: _spelled(raw) for split, raw in splits.items()}, splits)
    _check_classes(numbers, names, splits)
    return names, numbers


def _check_kinds(raw: RawLabels) -> None:
    kinds: dict[type, int] = {}
    for row, value in enumerate(raw.values):
        kinds.setdefault(type(value), row)
    for kind, row in kinds.items():
        where = f"{raw.column} holds {raw.values[row]!r} for {raw.files[row]}"
        if kind is type(None):
            raise DataError(f"{where}: every image needs a label; label it, or take the row out")
        if kind is float:
            raise DataError(
                f"{where}: floats name no classes. Write them as integers or strings (with pandas: "
                "frame['label'].astype(int)), or name another column"
            )
        if kind not in (int, str, bool):
            raise DataError(f"{where}: one class per image is needed, an integer or a string; name another column")
    if len(kinds) > 1:
        listed = " and ".join(f"{raw.values[row]!r} for {raw.files[row]}" for row in list(kinds.values())[:2])
        raise DataError(f"{raw.column} mixes kinds of labels, {listed}: write all as integers or all as strings")


def _check_range(numbers: np.ndarray, raw: RawLabels, names: tuple[str, ...]) -> None:
    if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= len(names)))):
        raise DataError(
            f"{raw.column} holds {numbers[wrong[0]]} for {raw.files[wrong[0]]}, and {len(wrong)} such label(s) in all: "
            f"its {len(names)} classes have the numbers 0 to {len(names) - 1} (-1 marks an unlabelled image; take "
            "those out)"
        )


def _spelled(raw: RawLabels) -> Sequence[Any]:
    """Where splits declare different names for the same numbers, only the names can be compared."""
    if raw.names is None:
        return [str(value) for value in raw.values] if raw.values and isinstance(raw.values[0], bool) else raw.values
    _check_range(np.array(raw.values, dtype=np.int64), raw, raw.names)
    return [raw.names[value] for value in raw.values]


def _by_value(
    values: Mapping[str, Sequence[Any]], splits: Mapping[str, RawLabels]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    kinds = {type(value) for column in values.values() for value in column}
    if len(kinds) > 1:
        raise DataError(
            f"{splits['tuning'].column} holds numbers in one split and strings in another: write the same in all"
        )
    order = sorted(set(values["tuning"]))
    if kinds == {int} and order != list(range(len(order))):
        shown = ", ".join(map(str, order[:8])) + (", ..." if len(order) > 8 else "")
        warnings.warn(
            f"the labels {shown} are numbered anew, 0 to {len(order) - 1}, and keep their old numbers as names: the "
            "classes of a base's own head do not fit them",
            stacklevel=2,
        )
    number = {value: i for i, value in enumerate(order)}
    for split, column in values.items():
        if (row := next((row for row, value in enumerate(column) if value not in number), None)) is not None:
            raise DataError(_why_unknown(str(column[row]), splits[split].files[row], split, list(map(str, order))))
    encoded = {split: np.array([number[v] for v in column], dtype=np.int64) for split, column in values.items()}
    return tuple(map(str, order)), encoded


def _check_classes(numbers: Mapping[str, np.ndarray], names: tuple[str, ...], splits: Mapping[str, RawLabels]) -> None:
    known = np.unique(numbers["tuning"])
    if len(known) < 2:
        only = names[known[0]] if len(known) else "none"
        raise DataError(
            f"{splits['tuning'].column} of the tuning images know(s) one class only ({only}): a classifier needs two "
            "or more. Is this the folder above the class folders, or the wrong column?"
        )
    for split, of_split in numbers.items():
        if len(rows := np.flatnonzero(~np.isin(of_split, known))):
            name = names[of_split[rows[0]]]
            raise DataError(_why_unknown(name, splits[split].files[rows[0]], split, [names[i] for i in known]))


def _why_unknown(name: str, file: str, split: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.8)
    meant = f" (did you mean {next(k for k in known if k.lower() == near[0])!r}?)" if near else ""
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return (
        f"{file} in the {split} split has the class {name!r}{meant}, which no tuning image has: those have {listed}. "
        f"Add tuning images of {name!r}, or take it out of {split}"
    )
