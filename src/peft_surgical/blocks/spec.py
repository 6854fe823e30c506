"""Blocks that the user names: the ``blocks=`` spec, its checks, and the spec that an error proposes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import AnatomyError
from .inventory import Cut, Inventory, highest_modules, module_sizes

NUMBERED = re.compile(r"((?:.*\.)?block)(\d+)")
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
        paths = paths_of[empty[0]]
        tied = [
            f"{a} is {name}" for a, name in inventory.aliases.items() if any(f"{a}.".startswith(f"{p}.") for p in paths)
        ]
        why = f" of its own ({'; '.join(tied[:3])})" if tied else ""
        raise AnatomyError(f"The block {empty[0]!r} holds no parameter and no persistent buffer{why}: leave it out.")
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
            expected = counted[match[1]] = counted.get(match[1], 0) + 1
            if match[2] != str(expected):
                raise AnatomyError(
                    f"{name!r} comes where '{match[1]}{expected}' is expected: number blocks 1, 2, ... in the order in "
                    "which data flows."
                )


def _where_missing_go(inventory: Inventory, missing: list[str], block_of: dict[str, str]) -> str:
    """Names tensors that a spec leaves out, as the highest modules, each with the block of its nearest neighbour."""
    order = list(inventory.tensors)
    modules = highest_modules(missing, module_sizes(inventory.tensors))
    raw = [name for name in missing if not any(name.startswith(f"{module}.") for module in modules)]
    proposals = []
    for path in [*raw, *modules]:
        start = inventory.position[inventory.below(path)[0]]
        before = [block_of[name] for name in order[:start] if name in block_of]
        after = [block_of[name] for name in order[start:] if name in block_of]
        proposals.append(f"  {path!r}: add it to {(before[-1:] or after[:1])[0]!r}, say")
    shown = "\n".join(proposals[:12] + (["  ..."] if len(proposals) > 12 else []))
    return f"blocks= leaves out {len(missing)} of {len(order)} tensors ({shortened(missing, 120)}):\n{shown}"


def skeleton(inventory: Inventory) -> str:
    """A spec from the top-level children that can be pasted, and is total and disjoint as it stands."""
    root = inventory.modules[""]
    raw = [name for name in inventory.tensors if "." not in name]
    children = [name for name, _ in root.named_children() if inventory.below(name)]
    while len(children) == 1:
        module = inventory.modules[children[0]]
        inner = [
            f"{children[0]}.{name}" for name, _ in module.named_children() if inventory.below(f"{children[0]}.{name}")
        ]
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
