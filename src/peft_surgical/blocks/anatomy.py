"""The ordered blocks of any network: `embedding` or stem, `block1` to `blockN`, `head`.

`anatomy_of` cuts a network into blocks that are total and disjoint over its parameters and persistent buffers, either
by an explicit spec or by what `peft_surgical.blocks.sources` can tell from the structure of the network. It never
guesses: a network that no source knows is an error that shows the spec to fill in.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import AnatomyError, UnknownTargetError, UnresolvedTargetError
from .inventory import (
    NUMBERED,
    highest_modules,
    module_sizes,
    near_misses,
    shortened,
)
from .parsing import NUMBERED_BLOCK, Count, Name, Pattern, Range, TargetSpec, Term, compiled, dotted

_ALIASES = {"first": "block1", "last": "head"}


@dataclass(frozen=True)
class Block:
    """One block: a named part of a network.

    Attributes:
        name: For example ``"block1"``.
        tensors: Canonical names of its parameters and persistent buffers, in the model's order.
        num_parameters: Number of scalars in its parameters, buffers not counted, a tied parameter counted once.
        modules: The highest modules that lie wholly within the block, for display. Raw parameters beside child modules
            (``cls_token``) are in ``tensors`` only.
    """

    name: str
    tensors: tuple[str, ...]
    num_parameters: int
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a network, total and disjoint over its parameters and persistent buffers.

    Iterating gives the blocks in the order in which data flows; printing gives a table. ``anatomy["block2"]`` gives one
    block; ``first`` (block1), ``last`` (head), ``stem``, ``embedding`` and ``stage1`` work where the network has them.

    Attributes:
        blocks: The blocks, in the order in which data flows.
        parts: Finer names -> tensor names. Convolutional networks: ``stem`` (what comes before the first stage) and
            ``stage1`` (the rest of block1). Transformers: ``stem``, the same tensors as the block ``embedding``.
        aliases: Every further name of a shared tensor (tied weights, a module used twice) -> its canonical name, the
            first one in ``named_parameters()``. Only canonical names are in blocks.
        source: What they come from: ``spec``, ``timm``, ``transformers``, ``torchvision`` or ``layout`` (a network
            laid out like torchvision's).
    """

    blocks: tuple[Block, ...]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = "spec"
    _sizes: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [block.name for block in self.blocks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise AnatomyError(f"Block names must be unique; given twice: {', '.join(twice)}.")
        if len(self._block_of) != sum(len(block.tensors) for block in self.blocks):
            holders: dict[str, list[str]] = {}
            for block in self.blocks:
                for tensor in block.tensors:
                    holders.setdefault(tensor, []).append(block.name)
            shared = {tensor: found for tensor, found in holders.items() if len(found) > 1}
            listed = "; ".join(f"{tensor} in {' and '.join(found)}" for tensor, found in list(shared.items())[:8])
            raise AnatomyError(f"{len(shared)} tensors are in more than one block: {listed}.")

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __contains__(self, name: object) -> bool:
        """Whether this is one of the blocks, or a name that ``anatomy[name]`` knows."""
        return name in self.blocks if isinstance(name, Block) else self._find(name) is not None

    def __getitem__(self, name: str) -> Block:
        """The block of this name or alias.

        Raises:
            UnknownTargetError: If the network has no such block; the message lists the ones it has.
        """
        if (block := self._find(name)) is None:
            raise UnknownTargetError(self._why_missing(name))
        return block

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the blocks, in the order in which data flows."""
        return tuple(block.name for block in self.blocks)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Canonical names of all tensors, block by block."""
        return tuple(tensor for block in self.blocks for tensor in block.tensors)

    def block_of(self, tensor: str) -> Block:
        """The block that holds a parameter or persistent buffer; a shared tensor may be given by any of its names.

        Raises:
            UnknownTargetError: If no block holds it; the message names the near misses.
        """
        if (block := self._block_of.get(self.aliases.get(tensor, tensor))) is None:
            near = near_misses(tensor, [*self._block_of, *self.aliases])
            raise UnknownTargetError(
                f"No block holds a tensor {tensor!r}{near or '.'} Parameters and persistent buffers go by their full "
                f"names, such as {self.tensors[0]!r}."
            )
        return block

    @cached_property
    def _block_of(self) -> dict[str, Block]:
        return {tensor: block for block in self.blocks for tensor in block.tensors}

    def _find(self, name: object) -> Block | None:
        by_name = {block.name: block for block in self.blocks}
        for candidate in (name, _ALIASES.get(str(name))):
            if candidate in by_name:
                return by_name[str(candidate)]
        if name not in self.parts:
            return None
        tensors = self.parts[str(name)]
        same = [block for block in self.blocks if block.tensors == tensors]
        modules = highest_modules(tensors, module_sizes(self.tensors))
        return same[0] if same else Block(str(name), tensors, sum(self._sizes.get(t, 0) for t in tensors), modules)

    def _why_missing(self, name: str) -> str:
        wanted = _ALIASES.get(name, name)
        towers = [other for other in self.names if other.endswith(f".{wanted}")]
        message = f"This network has no block {name!r}"
        if wanted == "head":
            tied = [f"{alias} is {self.aliases[alias]}" for alias in self.aliases][:3]
            message += ": it has no classifier of its own"
            message += f" (shared tensors belong to the block that holds them first: {'; '.join(tied)})" if tied else ""
        elif towers:
            message += f"; it has {' and '.join(map(repr, towers))}"
        elif name == "embedding" and "stem" in self:
            message += "; what comes before its first stage is 'stem'"
        else:
            message += near_misses(name, [*self.names, *self.parts, *_ALIASES]).removesuffix("?")
        return f"{message}. Its blocks: {_listed(self.names)}."

    def __str__(self) -> str:
        total = sum(block.num_parameters for block in self.blocks)
        rows = [("block", "modules", "tensors", "parameters", "share")]
        for block in self.blocks:
            share = f"{block.num_parameters / max(total, 1):.1%}"
            shown = shortened([*_raw_tensors(block), *block.modules])
            rows.append((block.name, shown, str(len(block.tensors)), f"{block.num_parameters:,}", share))
        rows.append(("total", "", str(len(self.tensors)), f"{total:,}", "100.0%"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        return "\n".join([*lines, f"source: {self.source}"])


def _raw_tensors(block: Block) -> list[str]:
    return [name for name in block.tensors if not any(name.startswith(f"{path}.") for path in block.modules)]


def _listed(names: Sequence[str]) -> str:
    """Block names in one line, runs of numbered blocks shortened: embedding, block1 to block12, head."""
    shown: list[str] = []
    for name in names:
        match = NUMBERED.fullmatch(name)
        previous = NUMBERED.fullmatch(shown[-1].split(" to ")[-1]) if shown else None
        if match and previous and match[1] == previous[1]:
            shown[-1] = f"{shown[-1].split(' to ')[0]} to {name}"
        else:
            shown.append(name)
    return ", ".join(shown)


# --- What a target means in one network: ``resolve(spec, anatomy)`` names its tensors. ---


_BY_SCORES = "call config = peft_surgical.resolve_target(config, model, dataloader) before get_peft_model"
_BY_RUNS = "call peft_surgical.training.search.{}, which trains candidates, or run `peft-surgical tune --target {}`"
_SEARCHES = {"auto": "auto", "race": "race", "cross-val": "cross_val", "greedy": "greedy"}
_DECIDED_BY = {name: _BY_RUNS.format(function, name) for name, function in _SEARCHES.items()}
_OTHER_NAMES = {"first": "block1", "last": "head", "stem": "embedding"}


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
        >>> from peft_surgical.blocks import parse
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

    PEFT asks only whether anything matched at all; answering for each pattern lets the caller name those in vain.

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
        regex = compiled(patterns, patterns)
        return {patterns: tuple(path for path in paths if regex.fullmatch(path))}
    return {name: tuple(path for path in paths if path == name or path.endswith(f".{name}")) for name in patterns}


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
            regex = compiled(term.regex, text)
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
            if match := NUMBERED_BLOCK.fullmatch(block.name):
                towers.setdefault(match[1] or "", {})[int(match[2])] = block
        numbered = towers.get(term.tower)
        if numbered is None:
            if str(term) in self.paths:
                return self.paths[str(term)]
            if towers:
                plain = str(term).removeprefix(dotted(term.tower))
                choice = _either([dotted(tower) + plain for tower in towers])
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
