"""Networks of two stacks: a dual encoder, or an encoder and a decoder, perhaps with a backbone in front."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from .inventory import Cut, Inventory, arrange, name_blocks, owner
from .parsing import NUMBERED
from .stacks import beside, classifiers_in, units_of

Find = Callable[[nn.Module, Inventory], Cut | Mapping[str, str]]
"""`sources.find_cut`."""
_BACKBONE = "backbone"
# What is beside a stack and feeds all of it, wherever it is registered: MPNet's relative_attention_bias, CPM-Ant's
# position_bias, Gemma 3n's per_layer_model_projection and altup_projections.
BEFORE_BLOCKS = r"embed|position|relative|interpolation|per_layer|altup_projections"
# Parts of a two-tower trunk that belong to neither tower and come after both.
_BETWEEN_TOWERS = re.compile(r"multi_modal_projector|connector")  # from images to a language model
_AFTER_TOWERS = re.compile(r"logit_|temperature|final_logits|\w+_projection\.|classifier\.|lm_head\.")


def cut_towers(inventory: Inventory, dot: str, stacks: list[str], outside: list[str], find: Find) -> Cut | str:
    """Two stacks: a dual encoder (CLIP) or an encoder and a decoder (T5, BART).

    A shared input embedding comes first as `embedding`. Projections, temperatures and whatever follows the trunk are
    the `head`; what precedes the classifier in a head of its own closes the last block. An image tower comes before a
    text tower, since it is what a shift of the images reaches; what leads from one to the other closes it. A network
    in front of both is cut by itself; what leads from it to the encoder closes it, and what else there is beside them
    belongs to what the decoder asks for (the queries of DETR).
    """
    roots = {path[len(dot) :].split(".")[0]: path for path in stacks}
    blocks, queries = _cut_backbone(inventory, dot, list(roots), find)
    for name in sorted(roots, key=lambda name: not name.startswith("vision")):
        if isinstance(units := units_of(inventory, [roots[name]]), str):
            return units
        own = queries if name == [*roots][-1] else []
        stem = [*beside(inventory, roots[name], BEFORE_BLOCKS), *own]
        scope = inventory.below(f"{dot}{name}", *own)
        stem, units, _ = arrange(inventory, units, stem=stem, scope=scope)
        prefix = re.sub(r"_(model|tower)$", "", name)
        blocks |= name_blocks("", inventory, stem, units, [], prefix=f"{prefix}.").blocks
    between = [n for n in inventory.below(dot.rstrip(".")) if _BETWEEN_TOWERS.match(n.removeprefix(dot))]
    first = next(iter(blocks)).rpartition(".")[0]
    *_, end = (name for name in blocks if name.startswith(f"{first}.block"))
    blocks[end] = blocks[end] + between
    placed = {name for names in blocks.values() for name in names}
    left = [name for name in inventory.tensors if name not in placed]
    embedding = [name for name in left if isinstance(inventory.modules[owner(name)], nn.Embedding)]
    if classifiers := classifiers_in(inventory, outside):
        hidden = [name for name in inventory.below(*outside) if name not in inventory.below(*classifiers)]
        *_, last = (name for name in blocks if NUMBERED.fullmatch(name))
        blocks[last] = blocks[last] + hidden
        left = [name for name in left if name not in hidden]
    head = [name for name in left if name not in embedding]
    for name in head:
        if name.startswith(dot) and not _AFTER_TOWERS.match(name.removeprefix(dot)):
            return f"cannot tell whether {name!r}, outside the towers {', '.join(roots)}, is head or block"
    cut = {"embedding": embedding} | blocks | {"head": head}
    return Cut("transformers", {name: held for name, held in cut.items() if held})


def _cut_backbone(
    inventory: Inventory, dot: str, towers: list[str], find: Find
) -> tuple[dict[str, list[str]], list[str]]:
    """The blocks of a network in front of both towers, and what else is beside these; nothing where there is none."""
    path = f"{dot}{_BACKBONE}"
    if path not in inventory.modules or _BACKBONE in towers:
        return {}, []
    while len(inside := [name for name in inventory.children(path) if inventory.below(name)]) == 1:
        (path,) = inside
    cut = find(inventory.modules[path], Inventory(inventory.modules[path]))
    if not isinstance(cut, Cut) or "head" in cut.blocks:
        return {}, []
    blocks = {f"{_BACKBONE}.{block}": [f"{path}.{name}" for name in names] for block, names in cut.blocks.items()}
    held = {*inventory.below(*(f"{dot}{name}" for name in (_BACKBONE, *towers)))}
    left = [name for name in inventory.below(dot.rstrip(".")) if name not in held]
    start = inventory.position[inventory.below(f"{dot}{towers[0]}")[0]]
    queries = [
        name
        for name in left
        if inventory.position[name] > start or isinstance(inventory.modules[owner(name)], nn.Embedding)
    ]
    *_, last = blocks
    blocks[last] = blocks[last] + [name for name in left if name not in queries]
    return blocks, queries
