"""`anatomy_of` and where it finds blocks: timm's group matcher, the structure of a transformers model, known layouts.

It never guesses: a network that no source knows is an error that shows the spec to fill in. Each source is one function
``(model, inventory) -> Cut | str`` and one row of `SOURCES`; a string says why the source does not apply, so that the
error can list what was tried. A source looks at module classes, containers and attribute names, never at the name of a
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import AnatomyError
from .anatomy import Anatomy, Block
from .inventory import (
    CONVS,
    Cut,
    Inventory,
    arrange,
    cut_by_spec,
    name_blocks,
    owner,
    shortened,
    skeleton,
)
from .layouts import are_residual_units, cut_layout, cut_timm, final_linear, merge_by_width, unclear_parameters, width
from .parsing import NUMBERED
from .segmentation import cut_segmentation

_CLASSIFIER = re.compile(r"classifier|lm_head|score|fc$|projection$|^head$")
# What is beside a stack and feeds all of it, wherever it is registered: MPNet's relative_attention_bias, CPM-Ant's
# position_bias, Gemma 3n's per_layer_model_projection and altup_projections.
_BEFORE_BLOCKS = r"embed|position|relative|interpolation|per_layer|altup_projections"
# Parts of a two-tower trunk that belong to neither tower and come after both.
_BETWEEN_TOWERS = re.compile(r"multi_modal_projector|connector")  # from images to a language model
_AFTER_TOWERS = re.compile(r"logit_|temperature|final_logits|\w+_projection\.|classifier\.|lm_head\.")


def cut_transformers(model: nn.Module, inventory: Inventory) -> Cut | str:
    """Cuts a ``PreTrainedModel`` by its repeated blocks, its trunk (``base_model_prefix``) and what follows the trunk.

    Two stacks in two children of the trunk are two towers, whose blocks are prefixed: ``vision.block1`` and
    ``text.block1`` for CLIP, ``encoder.block1`` and ``decoder.block1`` for T5.
    """
    if not isinstance(model, PreTrainedModel):
        return "not a transformers PreTrainedModel"
    if isinstance(wrapped := getattr(model, "timm_model", None), nn.Module):
        inner = find_cut(wrapped, Inventory(wrapped))
        if not isinstance(inner, Cut):
            return "; ".join(f"wrapped model, {source}: {reason}" for source, reason in inner.items())
        blocks, parts = (
            {block: [f"timm_model.{name}" for name in names] for block, names in named.items()}
            for named in (inner.blocks, inner.parts)
        )
        return Cut(inner.source, blocks, parts)
    trunk = model.base_model_prefix if model.base_model is not model else ""
    dot = f"{trunk}." if trunk else ""
    lists = inventory.outermost(lambda path, module: isinstance(module, nn.ModuleList))
    outside = [
        name
        for name, _ in model.named_children()
        if name != trunk and inventory.below(name) and (trunk or _CLASSIFIER.search(name))
    ]
    if strange := [path for path in lists if not path.startswith(dot) or path.split(".")[0] in outside]:
        return f"{strange[0]!r} is a stack of modules outside the trunk {trunk!r}"
    stacks = _stacks(model, inventory, lists)
    towers = {path[len(dot) :].split(".")[0] for path in stacks}
    if not stacks:
        return "the trunk holds no ModuleList of blocks"
    declared = set(model._no_split_modules or ())
    if len(stacks) > 1 and len(towers) == len(stacks) and not _are_parallel(inventory, stacks, declared):
        return _cut_towers(inventory, dot, stacks, outside if trunk else [])
    if isinstance(units := _units(inventory, stacks), str):
        return units
    if raw := unclear_parameters(inventory, {"", trunk}):
        return f"cannot tell where the parameter {raw[0]!r} belongs"
    last_start = inventory.below(stacks[-1])[0]
    late = [name for name in outside if inventory.position[inventory.below(name)[0]] > inventory.position[last_start]]
    after = late + [n for n in outside if n not in late and _CLASSIFIER.search(n)]  # XLM-RoBERTa's comes first
    shared = _input_embedding(model, inventory)
    head = [name for name in inventory.below(*_transformers_classifiers(inventory, after)) if name not in shared]
    units[-1] += [name for name in inventory.below(*after) if name not in (*head, *shared)]
    beside = _beside(inventory, stacks[0], r"decoder|neck")
    if beside and not isinstance(inventory.modules[owner(beside[0])], nn.Linear):  # ModernBERT calls its lm_head so
        return f"cannot tell what {beside[0]!r} is to the blocks in {stacks[0]!r}"
    stem = _beside(inventory, stacks[0], _BEFORE_BLOCKS) or _embedding_inside(inventory, stacks, units, head)
    stem, units, head = arrange(inventory, units, head, [*stem, *shared])
    return name_blocks("transformers", inventory, stem, units, head)


def _input_embedding(model: PreTrainedModel, inventory: Inventory) -> list[str]:
    """The tensors of the token embedding: CamemBERT's has the name of the head that shares it and comes first."""
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    own = {id(tensor) for tensor in module.parameters()} if isinstance(module, nn.Embedding) else set()
    return [name for name, tensor in inventory.tensors.items() if id(tensor) in own]


def _stacks(model: PreTrainedModel, inventory: Inventory, lists: list[str]) -> list[str]:
    """The ModuleLists that hold blocks: where some hold declared block classes, only those."""
    declared = set(model._no_split_modules or ())
    return [path for path in lists if _holds_blocks(inventory.modules[path], declared)] or lists


def _holds_blocks(stack: nn.Module, declared: set[str]) -> bool:
    children = stack.children()
    return any(isinstance(c, GradientCheckpointingLayer) or type(c).__name__ in declared for c in children)


def _are_parallel(inventory: Inventory, stacks: list[str], declared: set[str]) -> bool:
    """Whether each list holds one kind of part of every layer (XLM: attentions, norms, feed-forward parts)."""
    modules = [inventory.modules[path] for path in stacks]
    same = len({(owner(path), len(list(module.children()))) for path, module in zip(stacks, modules, strict=True)}) == 1
    return same and not any(_holds_blocks(module, declared) for module in modules)


def _units(inventory: Inventory, stacks: list[str]) -> list[list[str]] | str:
    """Tensor names per unit of one stack, or of parallel stacks (PVT, PoolFormer: a list per kind of module)."""
    parents = {owner(path) for path in stacks}
    names = [[name for name, _ in inventory.modules[path].named_children()] for path in stacks]
    if len(parents) > 1 or any(other != names[0] for other in names):
        return f"several stacks of blocks that do not run in parallel: {', '.join(stacks)}"
    units = [inventory.below(*(f"{path}.{name}" for path in stacks)) for name in names[0]]
    for index, name in enumerate(names[0][:-1]):
        stage = f"{stacks[0]}.{name}"
        children = [child for child, _ in inventory.modules[stage].named_children()]
        if children and children[-1] == "downsample" and len(children) > 1:
            # transformers' Swin ends a stage with the patch merging that opens the next one in the paper, in timm and
            # in torchvision: a block is the same set of weights whichever library holds it.
            moved = inventory.below(f"{stage}.downsample")
            units[index] = [name for name in units[index] if name not in moved]
            units[index + 1] = moved + units[index + 1]
    if len(stacks) == 1 and are_residual_units(list(inventory.modules[stacks[0]].children())):
        widths = [width(module) for module in inventory.modules[stacks[0]].children()]
        units = merge_by_width(units, widths)
    return units


def _beside(inventory: Inventory, stack: str, pattern: str) -> list[str]:
    """Tensors of modules and parameters beside a stack, or beside what holds it, whose own name matches.

    Names decide here since the order of registration does not: BART's layernorm_embedding follows its layers.
    """
    found: list[str] = []
    while stack:
        above = owner(stack)
        module = inventory.modules[above]
        beside = (name for named in (module.named_children(), module._parameters.items()) for name, _ in named)
        siblings = (f"{above}.{name}".lstrip(".") for name in beside)
        found += [path for path in siblings if path != stack and re.search(pattern, path[len(above) :])]
        stack = above
    return inventory.below(*found)


def _embedding_inside(inventory: Inventory, stacks: list[str], units: list[list[str]], head: list[str]) -> list[str]:
    """The patch embedding of a network that keeps it inside its first stage (CvT, SegFormer, PVT)."""
    placed = set(head).union(*units)
    first = min(inventory.position[name] for name in units[0])
    if any(name not in placed and inventory.position[name] < first for name in inventory.tensors):
        return []
    for path in stacks:
        if "embed" in path.rpartition(".")[2]:
            return inventory.below(f"{path}.0")
        for name, _ in inventory.modules[path].get_submodule("0").named_children():
            if "embed" in name:
                return inventory.below(f"{path}.0.{name}")
    return []


def _transformers_classifiers(inventory: Inventory, outside: list[str]) -> list[str]:
    """The last linear map outside the trunk, and those beside it that give as many outputs (DeiT's two classifiers)."""
    mapped = [
        path
        for name in outside
        if any(isinstance(module, (nn.Linear, *CONVS)) for module in inventory.modules[name].modules())
        for path in final_linear(name, inventory.modules[name])
    ]
    widths = [getattr(inventory.modules[path], "out_features", None) for path in mapped]
    final = [path for path, width in zip(mapped, widths, strict=True) if path == mapped[-1] or width == widths[-1]]
    # BERT's decoder.bias is cls.predictions.bias: shared inside the head, so still the head's own.
    own = [canonical for alias, canonical in inventory.aliases.items() if owner(alias) in final]
    return final + [name for name in own if name.split(".")[0] in outside]


def _cut_towers(inventory: Inventory, dot: str, stacks: list[str], outside: list[str]) -> Cut | str:
    """Two stacks: a dual encoder (CLIP) or an encoder and a decoder (T5, BART).

    A shared input embedding comes first as `embedding`. Projections, temperatures and whatever follows the trunk are
    the `head`; what precedes the classifier in a head of its own closes the last block. An image tower comes before a
    text tower, since it is what a shift of the images reaches; what leads from one to the other closes it.
    """
    blocks: dict[str, list[str]] = {}
    roots = {path[len(dot) :].split(".")[0]: path for path in stacks}
    for name in sorted(roots, key=lambda name: not name.startswith("vision")):
        if isinstance(units := _units(inventory, [roots[name]]), str):
            return units
        stem = _beside(inventory, roots[name], _BEFORE_BLOCKS)
        stem, units, _ = arrange(inventory, units, stem=stem, scope=inventory.below(f"{dot}{name}"))
        prefix = re.sub(r"_(model|tower)$", "", name)
        blocks |= name_blocks("", inventory, stem, units, [], prefix=f"{prefix}.").blocks
    between = [n for n in inventory.below(dot.rstrip(".")) if _BETWEEN_TOWERS.match(n.removeprefix(dot))]
    first = next(iter(blocks)).rpartition(".")[0]
    *_, end = (name for name in blocks if name.startswith(f"{first}.block"))
    blocks[end] = blocks[end] + between
    placed = {name for names in blocks.values() for name in names}
    left = [name for name in inventory.tensors if name not in placed]
    embedding = [name for name in left if isinstance(inventory.modules[owner(name)], nn.Embedding)]
    if classifiers := _transformers_classifiers(inventory, outside):
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


SOURCES: dict[str, Callable[[nn.Module, Inventory], Cut | str]] = {
    "timm group_matcher": cut_timm,
    "segmentation": lambda model, inventory: cut_segmentation(model, inventory, find_cut),
    "transformers structure": cut_transformers,
    "torchvision and known layouts": cut_layout,
}


def find_cut(model: nn.Module, inventory: Inventory) -> Cut | dict[str, str]:
    """The cut of the first source that applies, else why each source did not."""
    tried: dict[str, str] = {}
    for source, cut in SOURCES.items():
        result = cut(model, inventory)
        if isinstance(result, Cut):
            return result
        tried[source] = result
    return tried


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
    cut = find_cut(model, inventory) if blocks is None else cut_by_spec(inventory, blocks)
    if not isinstance(cut, Cut):
        raise AnatomyError(
            f"Cannot tell the blocks of {type(model).__name__}. Tried:\n"
            + "".join(f"  {source}: {reason}\n" for source, reason in cut.items())
            + "Name them yourself, in the order in which data flows, for example (edit as needed):\n"
            + skeleton(inventory)
        )
    placed = set().union(*cut.blocks.values())
    if missing := [name for name in inventory.tensors if name not in placed]:
        raise AnatomyError(
            f"{len(missing)} of {len(inventory.tensors)} tensors are in no block: {shortened(missing, 200)}. "
            "Name all blocks yourself with blocks={...}:\n" + skeleton(inventory)
        )
    sizes = {name: parameter.numel() for name, parameter in inventory.parameters.items()}

    def made(named: Mapping[str, list[str]]) -> Iterator[Block]:
        for name, held in named.items():
            tensors = tuple(inventory.below(*held))
            yield Block(name, tensors, sum(sizes.get(tensor, 0) for tensor in tensors), inventory.highest(tensors))

    return Anatomy(tuple(made(cut.blocks)), tuple(made(cut.parts)), dict(inventory.aliases), cut.source)
