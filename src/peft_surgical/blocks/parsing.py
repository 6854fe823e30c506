r"""Reading a target: ``parse(text)`` gives a plan, which `anatomy.resolve` turns into tensors of one network.

A target is a string, or a list of strings that are read one after the other. Terms contain no space::

    block1   head   embedding   stem   stage1   all      a block or a part of one; any block of an explicit spec
    first   last                                         block1, and the head
    block2-4   vision.block2-4                           a range of numbered blocks, both ends included
    first3   last3   vision.first3                       so many of the numbered blocks, never the embedding or the head
    layer1   encoder.layer.0   cls_token   conv1.weight  the path of a module or tensor; if no path is exactly this, all
                                                         paths that end in these whole components, as in PEFT's lists
    *.norm*   layer?.0.bn[12].*                          a glob (``fnmatch``) over module paths and tensor names
    re:layers\.[0-3]\..*                                 a regex that matches a whole module path or tensor name
    auto-rgn   race   ...                                decided by data; such a target stands alone

``+`` adds and ``-`` takes away, strictly from left to right: ``block1 - *.bn* + head`` is the first block without its
norms, and then the head. Spaces around ``+`` are free. A ``-`` takes away when a space (or an end of the text) is on
either side of it, and is otherwise part of the term: ``all -head`` and ``all - head`` take the head away, ``block2-4``
is a range. A ``re:`` term runs to the next space, so that ``+`` and ``-`` keep their meaning inside it; ``\s`` stands
for a space in a name. A regex also reaches names that the grammar reserves: ``re:race`` is a module called ``race``.

One name can mean several things; the first of these that exists wins: a block, a part, an exact path, a path's end.

A target may come from a stranger's file, so reading one takes time in proportion to its length, and matching it bounded
time: terms are few and short, and a regex whose search could explode is refused.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import TargetError
from ..files import printable
from .regexes import compiled, translated

DATA_TARGETS = ("auto", "auto-rgn", "auto-snr", "auto-fisher", "auto-sensitivity", "race", "cross-val", "greedy")
"""Targets that data decides. They name no tensors by themselves."""

MAX_TERMS, MAX_LENGTH = 4096, 1000
"""The largest number of terms, and of characters of one term."""

# A minus is a sign at the start of a token, and part of a word where the word goes on right behind it.
_TOKEN = re.compile(r"\s*(?:(?P<regex>re:\S*)|(?P<sign>[+-])|(?P<word>(?:[^\s+,-]|-(?=[^\s+,-]))+)|(?P<bad>\S))")
_RANGE = re.compile(r"(.+\.|)block([0-9]{1,9})-([0-9]{1,9})")
_COUNT = re.compile(r"(.+\.|)(first|last)([0-9]{1,9})")
NUMBERED = re.compile(r"(.+\.|)block([0-9]+)")
"""The name of a numbered block: its tower, such as ``vision.``, empty in a network without; and its number."""


@dataclass(frozen=True)
class _Text:
    text: str

    def __str__(self) -> str:
        return self.text


class Name(_Text):
    """A block, a part, ``all``, ``first``, ``last``, or the path of a module or tensor."""


class FromData(_Text):
    """A target that data decides, such as ``auto-rgn``."""


class Pattern(_Text):
    """A glob, or a regex behind ``re:``, over module paths and tensor names."""

    @property
    def regex(self) -> re.Pattern[str]:
        """What a whole path or name has to match; a `TargetError` as `compiled` says."""
        return compiled(self.text[3:], self.text) if self.text.startswith("re:") else translated(self.text)


@dataclass(frozen=True)
class Range:
    """Numbered blocks from ``first`` to ``last``, both included; ``tower`` is such as ``vision.``, or empty."""

    tower: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.tower}block{self.first}-{self.last}"


@dataclass(frozen=True)
class Count:
    """The first or last ``number`` of the numbered blocks."""

    tower: str
    end: Literal["first", "last"]
    number: int

    def __str__(self) -> str:
        return f"{self.tower}{self.end}{self.number}"


Term = Name | Range | Count | Pattern | FromData


@dataclass(frozen=True)
class Step:
    """One term, added to what the terms before it collected, or taken away from it."""

    term: Term
    minus: bool = False


@dataclass(frozen=True, repr=False)
class TargetSpec:
    """A parsed target. ``str()`` of it is the canonical text, which parses to an equal spec."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " ".join(f"{'-' if step.minus else '+'} {step.term}" for step in self.steps).removeprefix("+ ")

    def __repr__(self) -> str:
        return f"TargetSpec({str(self)!r})"

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms in order, without their signs."""
        return tuple(step.term for step in self.steps)

    @property
    def needs_data(self) -> bool:
        """Whether data has to decide before this target names tensors."""
        return any(isinstance(term, FromData) for term in self.terms)


def parse(text: str | Sequence[str]) -> TargetSpec:
    """Read a target. Needs no network, so a typing error surfaces before a model is loaded.

    Args:
        text: A target, or a list of them that is read as their sum (a member such as ``-head`` takes away).

    Returns:
        The plan, for `resolve`.

    Raises:
        TargetError: The text is empty or does not follow the grammar in this module's docstring.

    Example:
        >>> str(parse(["all", "-head", "- *.bn*"]))
        'all - head - *.bn*'
    """
    members = [text] if isinstance(text, str) else text
    if not isinstance(members, Sequence) or not all(isinstance(member, str) for member in members):
        raise TargetError(
            f"a target is a string or a list of strings, e.g. 'block1' or ['block1', 'head'], not {printable(text)}"
        )
    if not members:
        raise TargetError("the target is an empty list: name a block, e.g. 'block1'")
    return _spec(tuple(members))


@functools.lru_cache(maxsize=256)
def _spec(members: tuple[str, ...]) -> TargetSpec:
    # A config's target is checked when the config is made and read again when its tensors are looked up.
    steps = list(itertools.islice((step for member in members for step in _steps(member)), MAX_TERMS + 1))
    if len(steps) > MAX_TERMS:
        raise TargetError(f"the target has more than {MAX_TERMS} terms: say it with globs, such as '*.norm*'")
    spec = TargetSpec(tuple(steps))
    if steps[0].minus:
        raise TargetError(f"target {str(spec)!r} starts by taking away: say from what, e.g. 'all - {steps[0].term}'")
    if spec.needs_data and len(steps) > 1:
        alone = next(term for term in spec.terms if isinstance(term, FromData))
        raise TargetError(f"'{alone}' stands alone, because data decides all of it; got {str(spec)!r}")
    for before, step in itertools.pairwise(steps):
        # Read literally this takes away every module called 4; far more often it is a range with spaces in it.
        if step.minus and re.fullmatch(r"[0-9]+", str(step.term)) and NUMBERED.fullmatch(str(before.term)):
            raise TargetError(
                f"'{before.term} - {step.term}' is ambiguous: write '{before.term}-{step.term}' for a range of blocks, "
                rf"or 're:(.*\.)?{step.term}' for modules called {step.term}"
            )
    return spec


def _steps(text: str) -> Iterator[Step]:
    """Cut one string into steps; each carries its sign, so that a list member may start with a minus."""
    before: Step | None = None
    signs, shown = "", printable(text)
    for token in _TOKEN.finditer(text.rstrip()):  # spaces at the end belong to no token, and would all be tried
        word = token.group().strip()
        if token["bad"]:
            raise TargetError(f"unexpected {word!r} at position {token.start('bad')} of {shown}: terms join with '+'")
        if token["sign"]:
            signs += word
            # '+ -head' is what joining the members of a list with ' + ' gives.
            if signs not in ("+", "-", "+-") or (signs[0] == "+" and before is None):
                raise TargetError(f"{word!r} at position {token.start('sign')} of {shown} has no term before it")
            continue
        if len(word) > MAX_LENGTH:
            raise TargetError(f"{printable(word)} has {len(word)} characters, where a term has at most {MAX_LENGTH}")
        if before is not None and not signs:
            raise TargetError(f"{shown} needs a '+' or a '-' between '{before.term}' and {word!r}")
        before = Step(_term(word), minus="-" in signs)
        yield before
        signs = ""
    if signs:
        raise TargetError(f"{shown} ends in {signs[-1]!r} with no term behind it")
    if before is None:
        raise TargetError("the target is empty: name a block, e.g. 'block1'")


def _term(word: str) -> Term:
    if word == "re:":
        raise TargetError(r"'re:' has no regex behind it; write e.g. 're:layers\.[0-3]\..*'")
    if word.startswith("re:") or any(character in word for character in "*?["):
        found = Pattern(word)
        _ = found.regex  # refuses what cannot be used
        return found
    if word in DATA_TARGETS:
        return FromData(word)
    if word.startswith("auto-"):
        raise TargetError(f"unknown criterion in {word!r}; targets that data decides are {', '.join(DATA_TARGETS)}")
    if match := _RANGE.fullmatch(word):
        first, last = int(match[2]), int(match[3])
        if not 1 <= first <= last:
            raise TargetError(f"{word!r} is not a range of blocks: they count from 1 and upwards, e.g. 'block2-4'")
        return Range(match[1], first, last)
    if match := _COUNT.fullmatch(word):
        if int(match[3]) < 1:
            raise TargetError(f"{word!r} names no block; write e.g. '{match[2]}3', or '{match[2]}' alone")
        return Count(match[1], "first" if match[2] == "first" else "last", int(match[3]))
    if re.fullmatch("block0+", word):
        raise TargetError(f"{word!r} is no block: they count from 1; for a module of that name write 're:{word}'")
    return Name(word)


def paths_matched(patterns: str | Collection[str], paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Match module paths as PEFT's ``target_modules`` and ``exclude_modules`` do, but answer for each pattern.

    A string is a regex for the whole path; a collection holds names that are a path or the end of one, in whole
    components. Unlike in a target, an exact path does not keep its name from matching others.

    Returns:
        Pattern -> the paths that it matches, in the order given; an empty tuple where there are none.

    Raises:
        TargetError: The regex does not compile.
    """
    paths = tuple(paths)
    if isinstance(patterns, str):
        regex = compiled(patterns, patterns)
        return {patterns: tuple(path for path in paths if regex.fullmatch(path))}
    return {name: tuple(path for path in paths if path == name or path.endswith(f".{name}")) for name in patterns}
