"""The ordered blocks of any network: `embedding` or stem, `block1` to `blockN`, `head`.

`anatomy_of` cuts a network into blocks that are total and disjoint over its parameters and persistent buffers, either
by an explicit spec or by what `peft_surgical.sources` can tell from the structure of the network. It never guesses:
a network that no source knows is an error that shows the spec to fill in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from .errors import AnatomyError, UnknownTargetError
from .sources import Cut, Inventory, find_cut

_BLOCK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
# Words with a meaning of their own in a target.
_RESERVED = re.compile(r"(all|none|first\d*|last\d*|stage1|race.*|re|auto)")
_NUMBERED = re.compile(r"((?:.*\.)?block)(\d+)")
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
        source: What the blocks come from: ``"spec"``, ``"timm"``, ``"transformers"``, ``"torchvision"`` or ``"layout"``.
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
        """Whether ``anatomy[name]`` gives a block."""
        return self._find(name) is not None

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
            near = _near_misses(tensor, [*self._block_of, *self.aliases])
            raise UnknownTargetError(
                f"No block holds a tensor {tensor!r}{near}. Parameters and persistent buffers go by their full names, "
                "such as {self.tensors[0]!r}."
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
        modules = _highest_modules(tensors, self.tensors)
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
        else:
            message += _near_misses(name, [*self.names, *self.parts, *_ALIASES])
        return f"{message}. Its blocks: {_listed(self.names)}."

    def __str__(self) -> str:
        total = sum(block.num_parameters for block in self.blocks)
        rows = [("block", "modules", "tensors", "parameters", "share")]
        for block in self.blocks:
            share = f"{block.num_parameters / max(total, 1):.1%}"
            shown = _shortened([*_raw_tensors(block), *block.modules])
            rows.append((block.name, shown, str(len(block.tensors)), f"{block.num_parameters:,}", share))
        rows.append(("total", "", str(len(self.tensors)), f"{total:,}", "100.0%"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        return "\n".join([*lines, f"source: {self.source}"])


def anatomy_of(model: nn.Module, blocks: Mapping[str, str | Sequence[str]] | None = None) -> Anatomy:
    """Cuts a network into ordered blocks.

    Args:
        model: Any network, on any device (also ``meta``); nothing is run and nothing is changed.
        blocks: An explicit spec, block name -> one or more module or tensor paths, in the order in which data flows.
            It must name every parameter and persistent buffer exactly once. Without it the blocks come from timm's
            group matcher, the structure of a transformers model, or a known layout (torchvision's, CIFAR ResNets').

    Returns:
        The blocks. Every parameter and persistent buffer is in exactly one of them, non-persistent buffers in none.

    Raises:
        AnatomyError: If no source knows the network (the message shows a spec to fill in), or if the spec is not total
            and disjoint, names an unknown path, or uses a name that means something else in a target.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> anatomy = anatomy_of(net, blocks={"block1": ["0", "1"], "head": "3"})
        >>> anatomy.names
        ('block1', 'head')
        >>> anatomy.block_of("1.running_mean").name
        'block1'
        >>> anatomy["last"].num_parameters
        18
    """
    inventory = Inventory(model)
    if not inventory.tensors:
        raise AnatomyError(f"{type(model).__name__} has no parameters and no buffers: there is nothing to cut into blocks.")
    if blocks is not None:
        cut = _cut_by_spec(inventory, blocks)
    else:
        found = find_cut(model, inventory)
        if not isinstance(found, Cut):
            raise AnatomyError(
                f"Cannot tell the blocks of {type(model).__name__}. Tried:\n"
                + "".join(f"  {source}: {reason}\n" for source, reason in found.items())
                + "Name them yourself, in the order in which data flows, for example (edit as needed):\n"
                + _skeleton(inventory)
            )
        cut = found
    return _assemble(inventory, cut)


def _assemble(inventory: Inventory, cut: Cut) -> Anatomy:
    """Turns a cut into an anatomy, in the model's tensor order; refuses one that is not total."""
    placed = {name for names in cut.blocks.values() for name in names}
    if missing := [name for name in inventory.tensors if name not in placed]:
        raise AnatomyError(
            f"{len(missing)} of {len(inventory.tensors)} tensors are in no block: {_shortened(missing, 200)}. "
            "Name all blocks yourself with blocks={...}:\n" + _skeleton(inventory)
        )
    sizes = {name: inventory.tensors[name].numel() for name in inventory.parameters}

    def ordered(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=inventory.position.__getitem__))

    found = []
    for block, names in cut.blocks.items():
        tensors = ordered(names)
        size = sum(sizes.get(name, 0) for name in tensors)
        found.append(Block(block, tensors, size, _highest_modules(tensors, inventory.tensors)))
    parts = {part: ordered(names) for part, names in cut.parts.items()}
    return Anatomy(tuple(found), parts, dict(inventory.aliases), cut.source, sizes)


def _cut_by_spec(inventory: Inventory, spec: Mapping[str, str | Sequence[str]]) -> Cut:
    if not spec:
        raise AnatomyError("blocks={} names no block; leave it out to let the blocks be found.")
    _check_names(list(spec))
    paths_of = {block: [paths] if isinstance(paths, str) else list(paths) for block, paths in spec.items()}
    known = [*inventory.modules, *inventory.tensors, *inventory.aliases]
    holder: dict[str, tuple[str, str]] = {}
    for block, paths in paths_of.items():
        for path in paths:
            if path not in known or not path:
                near = _near_misses(path, [name for name in known if name])
                raise AnatomyError(f"blocks[{block!r}] names {path!r}, which is no module and no tensor of this network{near}.")
            for name in inventory.below(inventory.aliases.get(path, path)):
                other, other_path = holder.setdefault(name, (block, path))
                if other != block:
                    raise AnatomyError(
                        f"{name!r} is in two blocks: in {other!r} by {other_path!r} and in {block!r} by {path!r}. "
                        f"Name it in one of them, or list the children of {_wider(path, other_path)!r} instead."
                    )
    cut: dict[str, list[str]] = {block: [] for block in spec}
    for name, (block, _) in holder.items():
        cut[block].append(name)
    if empty := [block for block, names in cut.items() if not names]:
        tied = [f"{alias} is {name}" for alias, name in inventory.aliases.items()][:3]
        why = f" (a shared tensor belongs to the block that names it first: {'; '.join(tied)})" if tied else ""
        raise AnatomyError(f"The block {empty[0]!r} holds no parameter and no persistent buffer{why}; leave it out.")
    if missing := [name for name in inventory.tensors if name not in holder]:
        raise AnatomyError(_where_missing_go(inventory, missing, {name: block for name, (block, _) in holder.items()}))
    return Cut("spec", cut, {"stem": cut["embedding"]} if "embedding" in cut else {})


def _check_names(names: list[str]) -> None:
    counted: dict[str, int] = {}
    for index, name in enumerate(names):
        if not isinstance(name, str) or not _BLOCK_NAME.fullmatch(name):
            raise AnatomyError(
                f"{name!r} is no block name: use letters, digits, '_' and '.', starting with a letter, as in 'block1'."
            )
        if _RESERVED.fullmatch(name):
            raise AnatomyError(f"{name!r} cannot name a block: it has a meaning of its own in a target. Use 'block1', say.")
        if name in ("stem", "embedding") and index > 0:
            raise AnatomyError(f"{name!r} is what comes before every other block: name it first, not after {names[0]!r}.")
        if name == "head" and index < len(names) - 1:
            raise AnatomyError(f"'head' is the classifier: name it last, after {names[-1]!r}.")
        if match := _NUMBERED.fullmatch(name):
            expected = counted[match[1]] = counted.get(match[1], 0) + 1
            if match[2] != str(expected):
                raise AnatomyError(
                    f"{name!r} comes where {match[1]}{expected} is expected: number blocks 1, 2, ... in the order in which "
                    "data flows."
                )


def _where_missing_go(inventory: Inventory, missing: list[str], block_of: dict[str, str]) -> str:
    """Names tensors that a spec leaves out, as the highest modules, each with the block of its nearest neighbour."""
    order = list(inventory.tensors)
    modules = _highest_modules(missing, inventory.tensors)
    raw = [name for name in missing if not any(name.startswith(f"{module}.") for module in modules)]
    proposals = []
    for path in [*raw, *modules]:
        start = inventory.position[inventory.below(path)[0]]
        before = [block_of[name] for name in order[:start] if name in block_of]
        after = [block_of[name] for name in order[start:] if name in block_of]
        proposals.append(f"  {path!r}: add it to {(before[-1:] or after[:1])[0]!r}, say")
    shown = "\n".join(proposals[:12] + (["  ..."] if len(proposals) > 12 else []))
    return f"blocks= leaves out {len(missing)} of {len(order)} tensors ({_shortened(missing, 120)}):\n{shown}"


def _skeleton(inventory: Inventory) -> str:
    """A spec from the top-level children that can be pasted, and is total and disjoint as it stands."""
    root = inventory.modules[""]
    raw = [name for name in inventory.tensors if "." not in name]
    children = [name for name, _ in root.named_children() if inventory.below(name)]
    while len(children) == 1:
        module = inventory.modules[children[0]]
        inner = [f"{children[0]}.{name}" for name, _ in module.named_children() if inventory.below(f"{children[0]}.{name}")]
        own = [name for name in inventory.below(children[0]) if name.rpartition(".")[0] == children[0]]
        if not inner:
            break
        children, raw = inner, raw + own
    last_is_linear = len(children) > 1 and isinstance(inventory.modules[children[-1]], nn.Linear)
    body = children[:-1] if last_is_linear else children
    lines = [f'    "block{number}": ["{path}"],' for number, path in enumerate(body, start=1)]
    if raw:
        own_names = ", ".join(f'"{name}"' for name in raw)
        lines = [f'    "stem": [{own_names}],', *lines] if body else [f'    "block1": [{own_names}],']
    if last_is_linear:
        lines.append(f'    "head": ["{children[-1]}"],')
    return "\n".join(["blocks={", *lines, "}"])


def _highest_modules(tensors: Sequence[str], everything: Iterable[str]) -> tuple[str, ...]:
    """Paths of the highest modules all of whose tensors are among these, in order."""
    count: dict[str, int] = {}
    for name in everything:
        for path in _ancestors(name):
            count[path] = count.get(path, 0) + 1
    inside: dict[str, int] = {}
    for name in tensors:
        for path in _ancestors(name):
            inside[path] = inside.get(path, 0) + 1
    highest: dict[str, None] = {}
    for name in tensors:
        for path in _ancestors(name):
            if inside[path] == count[path]:
                highest[path] = None
                break
    return tuple(highest)


def _ancestors(name: str) -> list[str]:
    """Module paths above a tensor, the highest first, the root left out."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _raw_tensors(block: Block) -> list[str]:
    return [name for name in block.tensors if not any(name.startswith(f"{path}.") for path in block.modules)]


def _near_misses(name: str, known: Sequence[str]) -> str:
    ends = [other for other in known if other.endswith(f".{name}")][:3]
    near = list(dict.fromkeys(ends + difflib.get_close_matches(name, known, n=3)))[:3]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _wider(path: str, other: str) -> str:
    return min(path, other, key=len)


def _listed(names: Sequence[str]) -> str:
    """Block names in one line, runs of numbered blocks shortened: embedding, block1 to block12, head."""
    shown: list[str] = []
    for name in names:
        match = _NUMBERED.fullmatch(name)
        previous = _NUMBERED.fullmatch(shown[-1].split(" to ")[-1]) if shown else None
        if match and previous and match[1] == previous[1]:
            shown[-1] = f"{shown[-1].split(' to ')[0]} to {name}"
        else:
            shown.append(name)
    return ", ".join(shown)


def _shortened(names: Sequence[str], width: int = 48) -> str:
    """Names in one line of at most about ``width`` characters."""
    shown = ""
    for index, name in enumerate(names):
        if index and len(shown) + len(name) > width:
            return f"{shown}, ... (+{len(names) - index})"
        shown += f", {name}" if index else name
    return shown
