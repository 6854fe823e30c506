"""The ordered blocks of any network (`embedding` or stem, `block1` to `blockN`, `head`), and what a target means there.

`peft_surgical.blocks.sources.anatomy_of` makes an `Anatomy` of a network; `resolve` gives the tensors that a parsed
target names in it. Whatever matches nothing is an error that lists what there is to choose from.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import AnatomyError, UnknownTargetError, UnresolvedTargetError
from .inventory import near_misses, shortened
from .parsing import NUMBERED, Count, Name, Pattern, Range, TargetSpec, Term

_ALIASES = {"first": "block1", "last": "head", "stem": "embedding"}
_BY_SCORES = "call config = peft_surgical.resolve_target(config, model, dataloader) before get_peft_model"
_BY_RUNS = "call peft_surgical.training.search.{}, which trains candidates, or run `peft-surgical tune --target {}`"
_SEARCHES = {"auto": "auto", "race": "race", "cross-val": "cross_val", "greedy": "greedy"}


@dataclass(frozen=True)
class Block:
    """A block of a network, or a named part of a block.

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

    @property
    def outline(self) -> str:
        """The tensors that are in none of its modules, and its modules, in one line."""
        inside = tuple(f"{path}." for path in self.modules)
        return shortened([*(name for name in self.tensors if not name.startswith(inside)), *self.modules])


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a network, total and disjoint over its parameters and persistent buffers.

    Iterating gives the blocks in the order in which data flows; printing gives a table. ``anatomy["block2"]`` gives one
    block; ``first`` (block1), ``last`` (head), ``stem``, ``embedding`` and ``stage1`` work where the network has them.

    Attributes:
        blocks: The blocks, in the order in which data flows.
        parts: The two parts of a convolutional network's block1: ``stem`` (what comes before the first
            stage) and ``stage1`` (the rest). In a network with a block ``embedding``, ``stem`` is another name of it.
        aliases: Every further name of a shared tensor (tied weights, a module used twice) -> its canonical name, the
            first one in ``named_parameters()``. Only canonical names are in blocks.
        source: What they come from: ``spec``, ``timm``, ``transformers``, ``torchvision`` or ``layout`` (a network
            laid out like torchvision's).
    """

    blocks: tuple[Block, ...]
    parts: tuple[Block, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = "spec"

    def __post_init__(self) -> None:
        if twice := sorted(name for name, count in Counter(self.names).items() if count > 1):
            raise AnatomyError(f"Block names must be unique; given twice: {', '.join(twice)}.")
        if shared := [tensor for tensor, count in Counter(self.tensors).items() if count > 1]:
            holders = {one: [block.name for block in self if one in block.tensors] for one in shared[:8]}
            listed = "; ".join(f"{one} in {' and '.join(names)}" for one, names in holders.items())
            raise AnatomyError(f"{len(shared)} tensors are in more than one block: {listed}.")

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __contains__(self, name: object) -> bool:
        """Whether this is one of the blocks, or a name that ``anatomy[name]`` knows."""
        return name in self.blocks if isinstance(name, Block) else self._find(str(name)) is not None

    def __getitem__(self, name: str) -> Block:
        """The block of this name or alias.

        Raises:
            UnknownTargetError: If the network has no such block; the message lists the ones it has.
        """
        if (block := self._find(name)) is None:
            raise UnknownTargetError(f"This network has no block {name!r}{self._hint(name)}.{_choices(self)}")
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

    @cached_property
    def _named(self) -> dict[str, Block]:
        """Name -> block or part; a block wins over a part of the same name."""
        return {block.name: block for block in (*self.parts, *self.blocks)}

    @cached_property
    def _paths(self) -> dict[str, set[str]]:
        """Path of a module or tensor, by any of its names -> the canonical names of the tensors there."""
        paths: dict[str, set[str]] = {}
        for name, tensor in [*((name, name) for name in self.tensors), *self.aliases.items()]:
            components = name.split(".")
            for depth in range(1, len(components) + 1):
                paths.setdefault(".".join(components[:depth]), set()).add(tensor)
        return paths

    def _find(self, name: str) -> Block | None:
        return self._named.get(name) or self._named.get(_ALIASES.get(name, name))

    def _hint(self, name: str) -> str:
        """What a name that no block has may have meant."""
        wanted = _ALIASES.get(name, name)
        if wanted == "head":
            tied = "; ".join([f"{alias} is {tensor}" for alias, tensor in self.aliases.items()][:3])
            why = f" (shared tensors belong to the block that holds them first: {tied})" if tied else ""
            return f": it has no classifier of its own{why}"
        if towers := [repr(other) for other in self.names if other.endswith(f".{wanted}")]:
            return f"; it has {' and '.join(towers)}"
        if name == "embedding" and "stem" in self:
            return "; what comes before its first stage is 'stem'"
        return near_misses(name, [*self._named, *_ALIASES]).removesuffix("?")

    def __str__(self) -> str:
        total = sum(block.num_parameters for block in self.blocks)
        rows = [("block", "modules", "tensors", "parameters", "share")]
        for block in self.blocks:
            share = f"{block.num_parameters / max(total, 1):.1%}"
            rows.append((block.name, block.outline, str(len(block.tensors)), f"{block.num_parameters:,}", share))
        rows.append(("total", "", str(len(self.tensors)), f"{total:,}", "100.0%"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        line = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<>>>", widths, strict=True))
        return "\n".join([*(line.format(*row) for row in rows), f"source: {self.source}"])


# --- targets ---


def resolve(spec: TargetSpec, anatomy: Anatomy) -> tuple[str, ...]:
    """Name the tensors that a target means in one network.

    Args:
        spec: What `parse` returned.
        anatomy: The blocks of the network. The other names of tied tensors count as names of the tensor itself.

    Returns:
        Canonical names, each once and at least one, in the order of the anatomy.

    Raises:
        UnresolvedTargetError: Data has to decide first.
        UnknownTargetError: A term matches nothing in this network or takes nothing away, or nothing is left at the end.
    """
    text = str(spec)
    if spec.needs_data:
        how = _BY_RUNS.format(_SEARCHES[text], text) if text in _SEARCHES else _BY_SCORES
        raise UnresolvedTargetError(
            f"{text} names no tensors until it has seen data: {how}, or name a block, e.g. target='block1'."
        )
    chosen: set[str] = set()
    for step in spec.steps:
        found = _select(anatomy, step.term)
        if step.minus and not found & chosen:
            raise _unknown(
                anatomy, step.term, f"takes nothing away in {text!r}: what stands before it holds none of it"
            )
        chosen = chosen - found if step.minus else chosen | found
    if not chosen:
        raise _unknown(anatomy, spec, "takes away everything that it names, so nothing is left to tune")
    return tuple(name for name in anatomy.tensors if name in chosen)


def _select(anatomy: Anatomy, term: Term) -> set[str]:
    """The tensors of one term."""
    text = str(term)
    if text in anatomy._named:
        found = set(anatomy._named[text].tensors)
    elif isinstance(term, Range | Count):
        found = _numbered(anatomy, term)
    elif isinstance(term, Pattern):
        regex = term.regex
        found = set().union(*(tensors for path, tensors in anatomy._paths.items() if regex.fullmatch(path)))
    else:
        found = _by_name(anatomy, text)
    found = found.intersection(anatomy.tensors)
    if not found:
        reason = "holds no tensors" if text in anatomy._named else "matches nothing"
        raise _unknown(anatomy, term, f"{reason} in this model", near=text not in anatomy._named)
    return found


def _by_name(anatomy: Anatomy, text: str) -> set[str]:
    tower, dot, word = text.rpartition(".")
    other = tower + dot + _ALIASES.get(word, word)
    if other in anatomy._named:
        return set(anatomy._named[other].tensors)
    if text == "all":
        return set(anatomy.tensors)
    if text in anatomy._paths:
        return anatomy._paths[text]
    # Before the ends of paths: 'head' must not mean some inner module while 'vision.head' is a block.
    if inner := [name for name in anatomy._named if name.endswith((f".{text}", f".{other}"))]:
        raise _unknown(anatomy, text, _which_tower(inner))
    return set().union(*(tensors for path, tensors in anatomy._paths.items() if path.endswith(f".{text}")))


def _numbered(anatomy: Anatomy, term: Range | Count) -> set[str]:
    towers: dict[str, list[Block]] = {}
    for block in anatomy:
        if match := NUMBERED.fullmatch(block.name):
            towers.setdefault(match[1], []).append(block)
    numbered = towers.get(term.tower)
    if numbered is None:
        if str(term) in anatomy._paths:
            return anatomy._paths[str(term)]
        plain = str(term).removeprefix(term.tower)
        which = _which_tower([tower + plain for tower in towers])
        raise _unknown(anatomy, term, which if towers else "counts numbered blocks, of which this model has none")
    if isinstance(term, Range):  # blocks are numbered 1, 2, ... without a gap
        asked, blocks = term.last, numbered[term.first - 1 : term.last]
    else:
        asked, blocks = term.number, numbered[: term.number] if term.end == "first" else numbered[-term.number :]
    if len(numbered) < asked:
        raise _unknown(anatomy, term, f"asks for more than the {len(numbered)} numbered blocks that there are")
    return {name for block in blocks for name in block.tensors}


def _which_tower(names: Iterable[str]) -> str:
    return f"does not say which tower of this model it means: write {' or '.join(map(repr, names))}"


def _unknown(anatomy: Anatomy, term: Term | TargetSpec | str, reason: str, *, near: bool = False) -> UnknownTargetError:
    """The error for a term, with what may have been meant and what there is to choose from."""
    text = str(term)
    message = f"target {text!r} {reason}."
    if near:
        plain = text.removeprefix("re:").replace("\\", "").strip("*.")
        # A name may also be the end of a path, so ends of the same depth are candidates as well.
        depth = plain.count(".") + 1
        ends = (".".join(path.split(".")[-depth:]) for path in anatomy._paths)
        names = ["all", "first", "last", *anatomy._named, *anatomy._paths, *ends]
        known = {name.lower(): name for name in reversed(names)}
        if close := difflib.get_close_matches(plain.lower(), known, n=4):
            message += f" Near misses: {', '.join(known[name] for name in close)}."
        if isinstance(term, Name) and "-" in text:
            message += " To take away, put spaces around the minus ('all - head'); a range is written 'block2-4'."
    return UnknownTargetError(message + _choices(anatomy))


def _choices(anatomy: Anatomy) -> str:
    """The blocks and parts of a network, as the last sentences of an error."""
    sizes = ", ".join(f"{block.name} ({block.num_parameters:,})" for block in anatomy)
    parts = ", ".join(part.name for part in anatomy.parts)
    return f" Blocks of this model, with their parameters: {sizes}." + (f" Parts of them: {parts}." if parts else "")
