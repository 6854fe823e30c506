"""Which output of a checkpoint stands for which class of the data: found by name, never by a guess."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..files import shown

_SHOWN = 5  # classes that a message names before it counts the rest


@dataclass(frozen=True)
class HeadFit:
    """What becomes of a checkpoint's head.

    Attributes:
        classes: Outputs that the network is to have.
        outputs: For each class of the data its output of the checkpoint's head; None if the head has to be new.
        note: What happens to the head and why, in words that begin with ``kept`` or ``new``.
        warning: Whether the note is worth a warning: the caller might have expected something else.
    """

    classes: int
    outputs: tuple[int, ...] | None
    note: str
    warning: bool = False


FitHead = Callable[[int, "tuple[str, ...] | None"], HeadFit]
"""Number of a checkpoint's classes, and their names or None -> what becomes of its head."""


def fit_head(
    classes: int, known: Sequence[str] | None, given: Sequence[str] | None, wanted: int | None, keep: bool, name: str
) -> HeadFit:
    """Decide whether a checkpoint's head serves the data.

    Names are the same if they differ only in case, and in whether words are joined by spaces, ``_`` or ``-``.

    Args:
        classes: Outputs of the checkpoint; 0 where it has no head.
        known: What they mean, or None.
        given: The classes of the data, or None.
        wanted: Their number, or None for as many as the checkpoint has.
        keep: Whether the caller asks for the head: what cannot be kept is an error, and without names that can be
            compared the n-th class of the data is taken for the n-th output.
        name: The checkpoint's, for messages.

    Raises:
        ConfigError: The head is to be kept, and does not have the classes of the data.
    """
    number = len(given) if given is not None else wanted
    if number is None:
        return HeadFit(classes, tuple(range(classes)), "kept")
    if given is not None and known is not None and not (_numbers(known) or _numbers(given)):
        return _by_name(known, given, keep, name)
    if number == classes:
        return HeadFit(classes, tuple(range(classes)), "kept")
    if keep and given is not None and _numbers(given) and all(int(one) < classes for one in given):
        return HeadFit(
            classes, tuple(int(one) for one in given), f"kept: the classes of the data are numbers of {name}'s"
        )
    has = f"{classes} classes, whose names it does not say" if known is None else f"{classes} classes"
    if keep:
        raise ConfigError(f'head="keep": {name} has {has}, and the data {number}: head="new" gives it a new head')
    return HeadFit(number, None, f"new: {name} has {has}, and the data {number}")


def _by_name(known: Sequence[str], given: Sequence[str], keep: bool, name: str) -> HeadFit:
    outputs, unknown = _find(known, given)
    if not unknown:
        note = "kept"
        if len(given) < len(known):
            note += f": the data has {len(given)} of the {len(known)} classes of {name}, found by name"
        elif outputs != tuple(range(len(known))):
            note += f": the data has the classes of {name} in another order, found by name"
        respelled = [
            f"{one!r} is {known[output]!r}"
            for one, output in zip(given, outputs, strict=True)
            if one.strip().casefold() != known[output].strip().casefold()
        ]
        if respelled:
            note += f"{';' if ':' in note else ':'} spelled differently, {shown(respelled, _SHOWN)}"
        return HeadFit(len(known), outputs, note, note != "kept")
    found = len(given) - len(unknown)
    if keep and not found and len(known) == len(given):
        return HeadFit(
            len(known), tuple(range(len(known))), f"kept: class n of the data is taken for class n of {name}"
        )
    there = shown([f"{one!r}{reason}" for one, reason in unknown.items()], _SHOWN)
    has = f"the data has {len(unknown)} of {len(given)} classes that {name} does not know: {there}. It knows "
    has += shown([repr(one) for one in known], _SHOWN)
    if keep:
        raise ConfigError(f'head="keep": {has}. Rename the classes of the data, or say head="new" for a new head')
    note = f"new: {has}"
    if found or len(known) == len(given):  # so much in common that another head may surprise
        alike = '; or say head="keep" to take class n of the data for class n of the model' if not found else ""
        note += f'. To keep the head, rename the classes of the data{alike}. head="new" agrees'
        return HeadFit(len(given), None, note, True)
    return HeadFit(len(given), None, note)


def _find(known: Sequence[str], given: Sequence[str]) -> tuple[tuple[int, ...], Mapping[str, str]]:
    """The outputs of the names that are known; and those that are not, each with a remark."""
    exact: dict[str, list[int]] = {}
    alike: dict[str, list[int]] = {}
    for output, one in enumerate(known):
        exact.setdefault(one, []).append(output)
        alike.setdefault(_plain(one), []).append(output)
    outputs: list[int] = []
    unknown: dict[str, str] = {}
    for one in given:
        found = exact.get(one) or alike.get(_plain(one), [])
        if len(found) == 1 and found[0] not in outputs:
            outputs.append(found[0])
        elif found:
            unknown[one] = " (which could be more than one of them)" if len(found) > 1 else " (as another class)"
        else:
            near = difflib.get_close_matches(_plain(one), list(alike), n=1, cutoff=0.8)
            unknown[one] = f" (did you mean {known[alike[near[0]][0]]!r}?)" if near else ""
    return tuple(outputs), unknown


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def _numbers(names: Sequence[str]) -> bool:
    """Whether these are numbers in place of names, which name nothing."""
    return all(one.strip().isdecimal() for one in names)
