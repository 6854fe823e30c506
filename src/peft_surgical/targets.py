r"""The target language: ``parse(text)`` gives a plan, ``resolve(plan, anatomy)`` its tensors in one network.

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
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .anatomy import Anatomy, Block
from .errors import TargetError, UnknownTargetError, UnresolvedTargetError

#: Targets that data decides. They name no tensors by themselves.
DATA_TARGETS = ("auto", "auto-rgn", "auto-snr", "auto-fisher", "race", "cross-val", "greedy")
_BY_SCORES = "call config = peft_surgical.resolve_target(config, model, dataloader) before get_peft_model"
_BY_RUNS = "call peft_surgical.training.search.{}, which trains candidates, or run `peft-surgical tune --target {}`"
_SEARCHES = {"auto": "auto", "race": "race", "cross-val": "cross_val", "greedy": "greedy"}
_DECIDED_BY = {name: _BY_RUNS.format(function, name) for name, function in _SEARCHES.items()}

# A minus is a sign at the start of a token, and part of a word where the word goes on right behind it.
_TOKEN = re.compile(r"\s*(?:(?P<regex>re:\S*)|(?P<sign>[+-])|(?P<word>(?:[^\s+,-]|-(?=[^\s+,-]))+)|(?P<bad>\S))")
_RANGE = re.compile(r"(?:(.+)\.)?block([0-9]{1,9})-([0-9]{1,9})")
_COUNT = re.compile(r"(?:(.+)\.)?(first|last)([0-9]{1,9})")
_NUMBERED = re.compile(r"(?:(.+)\.)?block([1-9][0-9]*)")
_OTHER_NAMES = {"first": "block1", "last": "head", "stem": "embedding"}


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
    def regex(self) -> str:
        """What a whole path or name has to match."""
        return self.text[3:] if self.text.startswith("re:") else fnmatch.translate(self.text)


@dataclass(frozen=True)
class Range:
    """Numbered blocks from ``first`` to ``last``, both included; ``tower`` is empty in a network that has only one."""

    tower: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{_dotted(self.tower)}block{self.first}-{self.last}"


@dataclass(frozen=True)
class Count:
    """The first or last ``number`` of the numbered blocks."""

    tower: str
    end: Literal["first", "last"]
    number: int

    def __str__(self) -> str:
        return f"{_dotted(self.tower)}{self.end}{self.number}"


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
        >>> spec = parse(["all", "-head", "- *.bn*"])
        >>> str(spec)
        'all - head - *.bn*'
        >>> parse(str(spec)) == spec
        True
        >>> parse("auto-rgn").needs_data
        True
    """
    members = [text] if isinstance(text, str) else text
    if not isinstance(members, Sequence) or not all(isinstance(member, str) for member in members):
        raise TargetError(
            f"a target is a string or a list of strings, e.g. 'block1' or ['block1', 'head'], not {text!r}"
        )
    if not members:
        raise TargetError("the target is an empty list: name a block, e.g. 'block1'")
    steps = [step for member in members for step in _steps(member)]
    spec = TargetSpec(tuple(steps))
    if steps[0].minus:
        raise TargetError(f"target {str(spec)!r} starts by taking away: say from what, e.g. 'all - {steps[0].term}'")
    if spec.needs_data and len(steps) > 1:
        alone = next(term for term in spec.terms if isinstance(term, FromData))
        raise TargetError(f"'{alone}' stands alone, because data decides all of it; got {str(spec)!r}")
    for before, step in itertools.pairwise(steps):
        # Read literally this takes away every module called 4; far more often it is a range with spaces in it.
        if step.minus and re.fullmatch(r"[0-9]+", str(step.term)) and _NUMBERED.fullmatch(str(before.term)):
            raise TargetError(
                f"'{before.term} - {step.term}' is ambiguous: write '{before.term}-{step.term}' for a range of blocks, "
                rf"or 're:(.*\.)?{step.term}' for modules called {step.term}"
            )
    return spec


def resolve(spec: TargetSpec, anatomy: Anatomy) -> tuple[str, ...]:
    """Name the tensors that a target means in one network.

    Args:
        spec: What `parse` returned.
        anatomy: The blocks of the network. The other names of tied tensors count as names of the tensor itself.

    Returns:
        Canonical names of parameters and persistent buffers, each once, in the order of the anatomy. Never empty.

    Raises:
        UnresolvedTargetError: Data has to decide first.
        UnknownTargetError: A term matches nothing in this network or takes nothing away, or nothing is left at the end.

    Example:
        >>> anatomy = Anatomy((Block("block1", ("conv1.weight", "bn1.weight"), 9), Block("head", ("fc.weight",), 4)))
        >>> resolve(parse("all - head"), anatomy)
        ('conv1.weight', 'bn1.weight')
        >>> resolve(parse("*.weight - bn1"), anatomy)
        ('conv1.weight', 'fc.weight')
    """
    if spec.needs_data:
        raise UnresolvedTargetError(
            f"{spec} names no tensors until it has seen data: {_DECIDED_BY.get(str(spec), _BY_SCORES)}, or name a "
            "block, e.g. target='block1'."
        )
    network = _Network(anatomy)
    chosen: set[str] = set()
    for step in spec.steps:
        found = network.select(step.term)
        if step.minus and not found & chosen:
            raise network.unknown(
                step.term, f"takes nothing away in {str(spec)!r}: what stands before it holds none of it"
            )
        chosen = chosen - found if step.minus else chosen | found
    if not chosen:
        raise network.unknown(spec, "takes away everything that it names, so nothing is left to tune")
    return tuple(name for name in network.tensors if name in chosen)


def paths_matched(patterns: str | Collection[str], paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Match module paths as PEFT's ``target_modules`` and ``exclude_modules`` do, pattern by pattern.

    PEFT asks only whether anything matched at all; answering for each pattern lets the caller refuse one that is dead.

    Args:
        patterns: A string is a regex for the whole path; a collection holds names that are a path or the end of one,
            in whole components. Unlike in a target, an exact path does not keep its name from matching others.
        paths: Module paths, as ``named_modules()`` gives them.

    Returns:
        For each pattern the paths that it matches, in the order given; an empty tuple where there are none.

    Raises:
        TargetError: The regex does not compile.

    Example:
        >>> paths_matched(["conv1", "fc"], ["conv1", "layer1.0.conv1"])
        {'conv1': ('conv1', 'layer1.0.conv1'), 'fc': ()}
    """
    paths = tuple(paths)
    if isinstance(patterns, str):
        regex = _compiled(patterns, patterns)
        return {patterns: tuple(path for path in paths if regex.fullmatch(path))}
    return {name: tuple(path for path in paths if path == name or path.endswith(f".{name}")) for name in patterns}


def _steps(text: str) -> list[Step]:
    """Cut one string into steps; each carries its sign, so that a list member may start with a minus."""
    steps: list[Step] = []
    signs = ""
    for token in _TOKEN.finditer(text):
        word = token.group().strip()
        if token["bad"]:
            raise TargetError(f"unexpected {word!r} at position {token.start('bad')} of {text!r}: terms join with '+'")
        if token["sign"]:
            signs += word
            # '+ -head' is what joining the members of a list with ' + ' gives.
            if signs not in ("+", "-", "+-") or (signs[0] == "+" and not steps):
                raise TargetError(f"{word!r} at position {token.start('sign')} of {text!r} has no term before it")
            continue
        if steps and not signs:
            raise TargetError(f"{text!r} needs a '+' or a '-' between '{steps[-1].term}' and {word!r}")
        steps.append(Step(_term(word), minus="-" in signs))
        signs = ""
    if signs:
        raise TargetError(f"{text!r} ends in {signs[-1]!r} with no term behind it")
    if not steps:
        raise TargetError("the target is empty: name a block, e.g. 'block1'")
    return steps


def _term(word: str) -> Term:
    if word.startswith("re:"):
        if word == "re:":
            raise TargetError(r"'re:' has no regex behind it; write e.g. 're:layers\.[0-3]\..*'")
        _compiled(word[3:], word)
        return Pattern(word)
    if any(character in word for character in "*?["):
        _compiled(fnmatch.translate(word), word)
        return Pattern(word)
    if word in DATA_TARGETS:
        return FromData(word)
    if word.startswith("auto-"):
        raise TargetError(f"unknown criterion in {word!r}; targets that data decides are {', '.join(DATA_TARGETS)}")
    if match := _RANGE.fullmatch(word):
        first, last = int(match[2]), int(match[3])
        if not 1 <= first <= last:
            raise TargetError(f"{word!r} is not a range of blocks: they count from 1 and upwards, e.g. 'block2-4'")
        return Range(match[1] or "", first, last)
    if match := _COUNT.fullmatch(word):
        if int(match[3]) < 1:
            raise TargetError(f"{word!r} names no block; write e.g. '{match[2]}3', or '{match[2]}' alone")
        return Count(match[1] or "", "first" if match[2] == "first" else "last", int(match[3]))
    if re.fullmatch("block0+", word):
        raise TargetError(f"{word!r} is no block: they count from 1; for a module of that name write 're:{word}'")
    return Name(word)


def _compiled(regex: str, text: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            # Python warns where a regex is about to change its meaning; an adapter outlives the Python that wrote it.
            warnings.simplefilter("error")
            return re.compile(regex)
    except (re.error, ValueError, OverflowError, RecursionError, Warning) as error:
        raise TargetError(f"{text!r} holds a bad regex: {error}") from error


def _dotted(tower: str) -> str:
    return f"{tower}." if tower else ""


class _Network:
    """The names of one network, and what they stand for."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.tensors = tuple(name for block in anatomy for name in block.tensors)
        self.named = {**anatomy.parts, **{block.name: block.tensors for block in anatomy}}
        self.paths: dict[str, set[str]] = {}
        for name, tensor in [*((name, name) for name in self.tensors), *anatomy.aliases.items()]:
            components = name.split(".")
            for depth in range(1, len(components) + 1):
                self.paths.setdefault(".".join(components[:depth]), set()).add(tensor)

    def select(self, term: Term) -> set[str]:
        text = str(term)
        if text in self.named:
            found = set(self.named[text])
        elif isinstance(term, Range | Count):
            found = self._numbered(term)
        elif isinstance(term, Pattern):
            regex = _compiled(term.regex, text)
            found = self._under(path for path in self.paths if regex.fullmatch(path))
        else:
            found = self._by_name(text)
        found = found.intersection(self.tensors)
        if not found:
            reason = "holds no tensors" if text in self.named else "matches nothing"
            raise self.unknown(term, f"{reason} in this model", near=text not in self.named)
        return found

    def _under(self, paths: Iterable[str]) -> set[str]:
        return set().union(*(self.paths[path] for path in paths))

    def _by_name(self, text: str) -> set[str]:
        tower, dot, word = text.rpartition(".")
        other = tower + dot + _OTHER_NAMES.get(word, word)
        if other in self.named:
            return set(self.named[other])
        if text == "all":
            return set(self.tensors)
        if text in self.paths:
            return self.paths[text]
        # Before the ends of paths: 'head' must not mean some inner module while 'vision.head' is a block.
        if inner := [name for name in self.named if name.endswith((f".{text}", f".{other}"))]:
            raise self.unknown(text, f"does not say which tower of this model it means: write {_either(inner)}")
        return self._under(path for path in self.paths if path.endswith(f".{text}"))

    def _numbered(self, term: Range | Count) -> set[str]:
        towers: dict[str, dict[int, Block]] = {}
        for block in self.anatomy:
            if match := _NUMBERED.fullmatch(block.name):
                towers.setdefault(match[1] or "", {})[int(match[2])] = block
        numbered = towers.get(term.tower)
        if numbered is None:
            if str(term) in self.paths:
                return self.paths[str(term)]
            if towers:
                plain = str(term).removeprefix(_dotted(term.tower))
                choice = _either([_dotted(tower) + plain for tower in towers])
                raise self.unknown(term, f"does not say which tower of this model it means: write {choice}")
            raise self.unknown(term, "counts numbered blocks, of which this model has none")
        if isinstance(term, Range):
            blocks = [block for number, block in numbered.items() if term.first <= number <= term.last]
            asked = term.last - term.first + 1
        else:
            blocks = list(numbered.values())
            blocks = blocks[: term.number] if term.end == "first" else blocks[-term.number :]
            asked = term.number
        if len(blocks) < asked:
            raise self.unknown(term, f"asks for more than the {len(numbered)} numbered blocks that there are")
        return {name for block in blocks for name in block.tensors}

    def unknown(self, term: Term | TargetSpec | str, reason: str, *, near: bool = False) -> UnknownTargetError:
        """The error for a term, with what may have been meant and what there is to choose from."""
        text = str(term)
        says = [f"target {text!r} {reason}."]
        if near:
            plain = text.removeprefix("re:").replace("\\", "").strip("*.")
            # A name may also be the end of a path, so ends of the same depth are candidates as well.
            depth = plain.count(".") + 1
            ends = (".".join(path.split(".")[-depth:]) for path in self.paths)
            names = ["all", "first", "last", *self.named, *self.paths, *ends]
            known = {name.lower(): name for name in reversed(names)}
            if close := difflib.get_close_matches(plain.lower(), known, n=4):
                says.append(f"Near misses: {', '.join(known[name] for name in close)}.")
            if isinstance(term, Name) and "-" in text:
                says.append("To take away, put spaces around the minus ('all - head'); a range is written 'block2-4'.")
        sizes = ", ".join(f"{block.name} ({block.num_parameters:,})" for block in self.anatomy)
        says.append(f"Blocks of this model, with their parameters: {sizes}.")
        if parts := [name for name in self.anatomy.parts if self.named[name]]:
            says.append(f"Parts of them: {', '.join(parts)}.")
        return UnknownTargetError(" ".join(says))


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
