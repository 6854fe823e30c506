"""What every source of blocks shares: the tensors of a network, and how they become named blocks; blocks by a spec.

A source finds the *units* (stages or transformer layers) and the head; `arrange` places what lies around the units by
the order in which the network registers it, and `name_blocks` names the result.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..errors import AnatomyError
from .parsing import NUMBERED

# ConvNd has no public base class.
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOKEN = re.compile(r"tok|pos|embed|emb$")


class Inventory:
    """The tensors of a network in registration order, each under one name.

    Attributes:
        tensors: Parameters and persistent buffers under their canonical names. A tensor that is registered twice (tied
            weights, a module used in two places) has the name that ``named_parameters()`` gives it: its first.
        parameters: The parameters among ``tensors``.
        aliases: Every other name of a tensor -> its canonical name.
        modules: Every module under its first path, the root under ``""``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.tensors: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.aliases: dict[str, str] = {}
        self._below: dict[str, list[str]] = {}
        first_name: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for own_name, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is None or own_name in module._non_persistent_buffers_set:
                    continue
                name = f"{path}.{own_name}" if path else own_name
                canonical = first_name.setdefault(id(tensor), name)
                if canonical != name:
                    self.aliases[name] = canonical
                    continue
                self.tensors[name] = tensor
                if isinstance(tensor, nn.Parameter):
                    self.parameters[name] = tensor
        self.position = {name: index for index, name in enumerate(self.tensors)}
        for name in self.tensors:
            for path in ("", *_ancestors(name), name):
                self._below.setdefault(path, []).append(name)

    def below(self, *paths: str) -> list[str]:
        """Canonical names of the tensors at or below module or tensor paths, in registration order."""
        found = {name for path in paths for name in self._below.get(path, ())}
        return sorted(found, key=self.position.__getitem__)

    def children(self, path: str) -> list[str]:
        """Paths of the modules directly in a module."""
        return [f"{path}.{name}".lstrip(".") for name, _ in self.modules[path].named_children()]

    def highest(self, tensors: Sequence[str]) -> tuple[str, ...]:
        """Paths of the highest modules all of whose tensors are among these, in order."""
        held = Counter(path for name in tensors for path in _ancestors(name))
        whole = ([p for p in _ancestors(name) if held[p] == len(self._below[p])][:1] for name in tensors)
        return tuple(dict.fromkeys(path for paths in whole for path in paths))

    def outermost(self, asked: Callable[[str, nn.Module], bool]) -> list[str]:
        """Paths of the modules with tensors of which ``asked(path, module)`` holds, none of them inside another."""
        found: list[str] = []
        for path, module in self.modules.items():
            inside = path.startswith(tuple(f"{other}." for other in found))
            if not inside and self.below(path) and asked(path, module):
                found.append(path)
        return found


@dataclass(frozen=True)
class Cut:
    """What a source finds: block -> tensor names in any order, blocks in the order in which data flows; their parts."""

    source: str
    blocks: dict[str, list[str]]
    parts: dict[str, list[str]] = field(default_factory=dict)


def arrange(
    inventory: Inventory,
    units: Sequence[Iterable[str]],
    head: Iterable[str] = (),
    stem: Iterable[str] = (),
    scope: Iterable[str] | None = None,
) -> tuple[list[str], list[list[str]], list[str]]:
    """Give every tensor of the scope (all by default) to the stem, to one unit that is not empty, or to the head.

    What no unit and not the head holds is placed by registration order: before the first unit it is stem (patch
    embedding, positions, class token); between two units it opens the later one (a downsampling step, as in the
    papers of Swin and ConvNeXt); after the last unit it closes the last one (final norm, pooler, a convolution before
    the classifier). Tensors of the given head and stem belong there even if a unit contains them.
    """
    place = {name: number for number, unit in enumerate(units, start=1) for name in unit}
    place |= dict.fromkeys(stem, 0) | dict.fromkeys(head, len(units) + 1)
    starts: dict[int, int] = {}
    for name, number in place.items():
        if 0 < number <= len(units):
            starts[number] = min(inventory.position[name], starts.get(number, len(inventory.position)))
    groups: list[list[str]] = [[] for _ in range(len(units) + 2)]
    for name in inventory.tensors if scope is None else scope:
        if name not in place:
            later = [number for number, start in starts.items() if start > inventory.position[name]]
            place[name] = 0 if len(later) == len(starts) else min(later, default=max(starts))
        groups[place[name]].append(name)
    first, *middle, last = groups
    return first, [names for names in middle if names], last


def name_blocks(
    source: str, inventory: Inventory, stem: list[str], units: list[list[str]], head: list[str], prefix: str = ""
) -> Cut:
    """Names the blocks: `embedding` for a network of tokens, the stem as part of `block1` for a convolutional one.

    The paper's "Block 1" of a ResNet is the first stage together with the stem (its code tunes conv1 + block1), while
    its transformer experiments tune the embedding by itself.
    """
    blocks: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    if stem and _works_on_tokens(inventory, stem, units[0]):
        blocks[f"{prefix}embedding"] = stem
    elif stem:
        parts = {"stem": stem, "stage1": units[0]}
        units = [stem + units[0], *units[1:]]
    blocks |= {f"{prefix}block{number}": unit for number, unit in enumerate(units, start=1)}
    if head:
        blocks[f"{prefix}head"] = head
    return Cut(source, blocks, {} if prefix else parts)


def _works_on_tokens(inventory: Inventory, stem: list[str], unit: list[str]) -> bool:
    """Whether the first unit attends, or mixes without convolutions, or the stem holds token or position parameters."""
    if any("." not in name and is_token_name(name) for name in stem):
        return True
    held = set(unit)
    paths = {name.rsplit(".", end)[0] for name in unit for end in range(1, name.count(".") + 1)}
    inside = [inventory.modules[path] for path in paths if held.issuperset(inventory.below(path))]
    return attends(inside) or not any(isinstance(module, CONVS) for module in inside)


def owner(name: str) -> str:
    """The path of the module that holds a tensor or module."""
    return name.rpartition(".")[0]


def attends(modules: Iterable[nn.Module]) -> bool:
    """Whether one is an attention: not squeeze-and-excitation, called attn in places, but without keys and values."""
    return any(
        "Attention" in type(module).__name__ or hasattr(module, "qkv") or hasattr(module, "kv") for module in modules
    )


def is_token_name(name: str) -> bool:
    """Whether a tensor is a token or a position embedding by its own name (``cls_token``, ``pos_embed``)."""
    return bool(_TOKEN.search(name.rpartition(".")[2]))


def _ancestors(name: str) -> list[str]:
    """Module paths above a tensor, the highest first, the root left out."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


# --- blocks that the user names: the ``blocks=`` spec, its checks, and the spec that an error proposes ---

_BLOCK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
# Words with a meaning of their own in a target.
_RESERVED = re.compile(r"all|none|first\d*|last\d*|stage1|race.*|re|auto")


def cut_by_spec(inventory: Inventory, spec: Mapping[str, str | Sequence[str]]) -> Cut:
    """Cuts by block name -> module or tensor paths, in the order in which data flows.

    A module path takes the tensors whose canonical names are below it: of a shared tensor, only its first place does.

    Raises:
        AnatomyError: If a name or path is wrong, or the spec is not total and disjoint. The message names the tensors
            and where they could go.
    """
    if not spec:
        raise AnatomyError("blocks={} names no block; leave it out to let the blocks be found.")
    _check_names(list(spec))
    paths_of = {block: [paths] if isinstance(paths, str) else list(paths) for block, paths in spec.items()}
    known = dict.fromkeys(filter(None, [*inventory.modules, *inventory.tensors, *inventory.aliases]))
    holder: dict[str, tuple[str, str]] = {}
    for block, paths in paths_of.items():
        for path in paths:
            if path not in known:
                raise AnatomyError(
                    f"blocks[{block!r}] names {path!r}, which is no module and no tensor of this network"
                    f"{near_misses(str(path), list(known)) or '.'}"
                )
            for name in inventory.below(inventory.aliases.get(path, path)):
                other, other_path = holder.setdefault(name, (block, path))
                if other != block:
                    raise AnatomyError(
                        f"{name!r} is in two blocks: in {other!r} by {other_path!r} and in {block!r} by {path!r}. "
                        f"Name it in one of them, or list the children of {min(path, other_path, key=len)!r} instead."
                    )
    cut: dict[str, list[str]] = {block: [] for block in spec}
    for name, (block, _) in holder.items():
        cut[block].append(name)
    if empty := [block for block, names in cut.items() if not names]:
        below = tuple(f"{path}." for path in paths_of[empty[0]])
        tied = [f"{alias} is {name}" for alias, name in inventory.aliases.items() if f"{alias}.".startswith(below)]
        why = f" of its own ({'; '.join(tied[:3])})" if tied else ""
        raise AnatomyError(f"The block {empty[0]!r} holds no parameter and no persistent buffer{why}: leave it out.")
    if missing := [name for name in inventory.tensors if name not in holder]:
        raise AnatomyError(_where_missing_go(inventory, missing, {name: block for name, (block, _) in holder.items()}))
    return Cut("spec", cut)


def _check_names(names: list[str]) -> None:
    counted: Counter[str] = Counter()
    for index, name in enumerate(names):
        if not isinstance(name, str) or not _BLOCK_NAME.fullmatch(name):
            raise AnatomyError(
                f"{name!r} is no block name: use letters, digits, '_' and '.', starting with a letter, as in 'block1'."
            )
        if _RESERVED.fullmatch(name):
            raise AnatomyError(
                f"{name!r} cannot name a block: it has a meaning of its own in a target. Use 'block1', say."
            )
        if name in ("stem", "embedding") and index > 0:
            raise AnatomyError(
                f"{name!r} is what comes before every other block: name it first, not after {names[0]!r}."
            )
        if name == "head" and index < len(names) - 1:
            raise AnatomyError(f"'head' is the classifier: name it last, after {names[-1]!r}.")
        if match := NUMBERED.fullmatch(name):
            counted[match[1]] += 1
            if match[2] != str(counted[match[1]]):
                raise AnatomyError(
                    f"{name!r} comes where '{match[1]}block{counted[match[1]]}' is expected: number blocks 1, 2, ... "
                    "in the order in which data flows."
                )


def _where_missing_go(inventory: Inventory, missing: list[str], block_of: dict[str, str]) -> str:
    """Names tensors that a spec leaves out, as the highest modules, each with the block of its nearest neighbour."""
    modules = inventory.highest(missing)
    raw = [name for name in missing if not any(name.startswith(f"{module}.") for module in modules)]
    proposals = []
    for path in [*raw, *modules]:
        start = inventory.position[inventory.below(path)[0]]
        nearest = min(block_of, key=lambda name: abs(inventory.position[name] - start))
        proposals.append(f"  {path!r}: add it to {block_of[nearest]!r}, say")
    shown = "\n".join(proposals[:12] + (["  ..."] if len(proposals) > 12 else []))
    return (
        f"blocks= leaves out {len(missing)} of {len(inventory.tensors)} tensors ({shortened(missing, 120)}):\n{shown}"
    )


def skeleton(inventory: Inventory) -> str:
    """A spec from the top-level children that can be pasted, and is total and disjoint as it stands."""
    children, raw = [""], []
    while len(children) == 1:
        (path,) = children
        raw += [name for name in inventory.below(path) if owner(name) == path]
        children = [name for name in inventory.children(path) if inventory.below(name)]
    head = children[-1:] if children and isinstance(inventory.modules[children[-1]], nn.Linear) else []
    body = children[: len(children) - len(head)]
    spec = {"stem" if body else "block1": raw} if raw else {}
    spec |= {f"block{number}": [path] for number, path in enumerate(body, start=1)} | ({"head": head} if head else {})
    return "\n".join(["blocks={", *(f'    "{name}": {json.dumps(paths)},' for name, paths in spec.items()), "}"])


def near_misses(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: what may have been meant, or nothing."""
    ends = [other for other in known if other.endswith(f".{name}")][:3]
    near = list(dict.fromkeys(ends + difflib.get_close_matches(name, known, n=3)))[:3]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def shortened(names: Sequence[str], width: int = 48) -> str:
    """Names in one line of at most about ``width`` characters."""
    shown = ""
    for index, name in enumerate(names):
        if index and len(shown) + len(name) > width:
            return f"{shown}, ... (+{len(names) - index})"
        shown += f", {name}" if index else name
    return shown
