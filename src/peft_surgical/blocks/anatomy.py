"""The ordered blocks of any network: `embedding` or stem, `block1` to `blockN`, `head`.

`anatomy_of` cuts a network into blocks that are total and disjoint over its parameters and persistent buffers, either
by an explicit spec or by what `peft_surgical.blocks.sources` can tell from the structure of the network. It never
guesses: a network that no source knows is an error that shows the spec to fill in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ..errors import AnatomyError, UnknownTargetError
from .inventory import Cut, Inventory, highest_modules, module_sizes
from .sources import find_cut
from .spec import NUMBERED, cut_by_spec, near_misses, shortened, skeleton

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
        raise AnatomyError(
            f"{type(model).__name__} has no parameters and no buffers: there is nothing to cut into blocks."
        )
    if blocks is not None:
        cut = cut_by_spec(inventory, blocks)
    else:
        found = find_cut(model, inventory)
        if not isinstance(found, Cut):
            raise AnatomyError(
                f"Cannot tell the blocks of {type(model).__name__}. Tried:\n"
                + "".join(f"  {source}: {reason}\n" for source, reason in found.items())
                + "Name them yourself, in the order in which data flows, for example (edit as needed):\n"
                + skeleton(inventory)
            )
        cut = found
    return _assemble(inventory, cut)


def _assemble(inventory: Inventory, cut: Cut) -> Anatomy:
    """Turns a cut into an anatomy, in the model's tensor order; refuses one that is not total."""
    placed = {name for names in cut.blocks.values() for name in names}
    if missing := [name for name in inventory.tensors if name not in placed]:
        raise AnatomyError(
            f"{len(missing)} of {len(inventory.tensors)} tensors are in no block: {shortened(missing, 200)}. "
            "Name all blocks yourself with blocks={...}:\n" + skeleton(inventory)
        )
    sizes = {name: inventory.tensors[name].numel() for name in inventory.parameters}

    def ordered(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=inventory.position.__getitem__))

    found = []
    below = module_sizes(inventory.tensors)
    for block, names in cut.blocks.items():
        tensors = ordered(names)
        size = sum(sizes.get(name, 0) for name in tensors)
        found.append(Block(block, tensors, size, highest_modules(tensors, below)))
    parts = {part: ordered(names) for part, names in cut.parts.items()}
    return Anatomy(tuple(found), parts, dict(inventory.aliases), cut.source, sizes)


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
