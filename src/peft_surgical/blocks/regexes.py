"""Regexes and globs of targets, compiled, and refused where matching one could take for ever.

Python's matcher tries one way after the other. Where a repetition contains another one, or a choice, the number of ways
doubles with every character, and a few repetitions one after the other are enough to wait for hours. Targets come with
adapters of strangers, so the ways are counted before anything is matched.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from ..errors import TargetError
from ..files import printable

if sys.version_info >= (3, 11):
    from re import _parser
else:
    import sre_parse as _parser

_LONGEST = 2000
_MOST_WAYS = 2_000_000
_MANY = 64  # what an unbounded repetition counts for: about the length of a path


def compiled(regex: str, text: str) -> re.Pattern[str]:
    """A regex, compiled.

    Args:
        regex: The regex.
        text: The term or argument that holds it, for messages.

    Raises:
        TargetError: It does not compile, Python is about to change its meaning, or matching it could take for ever.
    """
    if len(regex) > _LONGEST:
        raise TargetError(f"{printable(text)} is longer than {_LONGEST} characters: give several terms")
    try:
        found, ways = _compiled(regex)
    except (re.error, ValueError, OverflowError, RecursionError, Warning) as error:
        raise TargetError(f"{printable(text)} holds a bad regex: {error}") from error
    if ways > _MOST_WAYS:
        raise TargetError(
            f"{printable(text)} could take for ever: it repeats what repeats or branches itself, or repeats too often. "
            "Use at most three of '*' and '+', none inside another, or several terms joined by '+'"
        )
    return found


@functools.lru_cache(256)
def _compiled(regex: str) -> tuple[re.Pattern[str], float]:
    with warnings.catch_warnings():
        # Python warns where a regex is about to change its meaning; an adapter outlives the Python that wrote it.
        warnings.simplefilter("error")
        return re.compile(regex), _ways(_parser.parse(regex))


def translated(glob: str) -> re.Pattern[str]:
    """A glob as a regex; ``fnmatch`` writes each star so that it is not retried, which keeps the search short.

    Raises:
        TargetError: It does not compile, which depends on the version of Python.
    """
    try:
        return re.compile(fnmatch.translate(glob))
    except re.error as error:
        raise TargetError(f"{printable(glob)} holds a bad regex: {error}") from error


def _ways(parsed: Any) -> float:
    """In how many ways Python may try to match a parsed regex from one position; infinite where they multiply."""
    total = 1.0
    for kind, arguments in parsed:
        name, inner = str(kind), [part for part in _leaves(arguments) if isinstance(part, _parser.SubPattern)]
        if name == "BRANCH":
            total *= sum(map(_ways, inner))
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            low, high, body = arguments
            if (ways := _ways(body)) > 1 and high > 1:
                return math.inf
            total *= ways * (1 + min(int(high) - low, _MANY))
        else:
            total *= math.prod(map(_ways, inner))
    return total


def _leaves(arguments: Any) -> Iterator[Any]:
    """What a node of a parsed regex holds, in one sequence."""
    if isinstance(arguments, (tuple, list)):
        for part in arguments:
            yield from _leaves(part)
    else:
        yield arguments
