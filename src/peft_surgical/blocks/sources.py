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

from ..errors import AnatomyError
from .anatomy import Anatomy, Block
from .inventory import Cut, Inventory, arrange, attends, cut_by_spec, name_blocks, owner, shortened, skeleton
from .layouts import cut_layout, cut_timm, unclear_parameters
from .segmentation import cut_segmentation
from .stacks import are_parallel, beside, classifiers_in, embedding_inside, stacks_of, units_of
from .towers import BEFORE_BLOCKS, cut_towers

_CLASSIFIER = re.compile(r"classifier|lm_heads?|score|fc$|projection$|^head$")


def cut_transformers(model: nn.Module, inventory: Inventory) -> Cut | str:
    """Cuts a ``PreTrainedModel`` by its repeated blocks, its trunk (``base_model_prefix``) and what follows the trunk.

    Two stacks in two children of the trunk are two towers, whose blocks are prefixed: ``vision.block1`` and
    ``text.block1`` for CLIP, ``encoder.block1`` and ``decoder.block1`` for T5. So are those of a backbone in front of
    them (DETR).
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
        if name != trunk and inventory.below(name) and (trunk or _is_classifier(inventory, name))
    ]
    heads = [path for path in lists if path in outside and _CLASSIFIER.search(path) and _are_linear(model, path)]
    lists = [path for path in lists if path not in heads]
    if strange := [path for path in lists if not path.startswith(dot) or path.split(".")[0] in outside]:
        return f"{strange[0]!r} is a stack of modules outside the trunk {trunk!r}"
    stacks = stacks_of(model, inventory, lists)
    if not stacks:
        return "the trunk holds no ModuleList of blocks"
    towers = {path[len(dot) :].split(".")[0] for path in stacks}
    if trunk and len(stacks) > 1 and len(towers) == 1:
        deeper = f"{dot}{next(iter(towers))}"
        whole = {*inventory.below(deeper)} == {*inventory.below(trunk)}
        if whole and isinstance(inventory.modules[deeper], PreTrainedModel):
            # A model inside another, which only reads its outputs in its own way (ShieldGemma 2).
            dot = f"{deeper}."
            towers = {path[len(dot) :].split(".")[0] for path in stacks}
    declared = set(model._no_split_modules or ())
    if len(stacks) > 1 and len(towers) == len(stacks) and not are_parallel(inventory, stacks, declared):
        return cut_towers(inventory, dot, stacks, outside if trunk else [], find_cut)
    if isinstance(units := units_of(inventory, stacks), str):
        return units
    if raw := unclear_parameters(inventory, {"", trunk}):
        return f"cannot tell where the parameter {raw[0]!r} belongs"
    last_start = inventory.below(stacks[-1])[0]
    late = [name for name in outside if inventory.position[inventory.below(name)[0]] > inventory.position[last_start]]
    after = late + [n for n in outside if n not in late and _CLASSIFIER.search(n)]  # XLM-RoBERTa's comes first
    shared = _input_embedding(model, inventory)
    head = [name for name in inventory.below(*classifiers_in(inventory, after)) if name not in shared]
    units[-1] += [name for name in inventory.below(*after) if name not in (*head, *shared)]
    other = beside(inventory, stacks[0], r"decoder|neck")
    if other and not isinstance(inventory.modules[owner(other[0])], nn.Linear):  # ModernBERT calls its lm_head so
        return f"cannot tell what {other[0]!r} is to the blocks in {stacks[0]!r}"
    stem = beside(inventory, stacks[0], BEFORE_BLOCKS) or embedding_inside(inventory, stacks, units, head)
    stem, units, head = arrange(inventory, units, head, [*stem, *shared])
    return name_blocks("transformers", inventory, stem, units, head)


def _is_classifier(inventory: Inventory, name: str) -> bool:
    """Whether a child of a network without a trunk is its classifier; a head that attends only pools (SigLIP)."""
    return bool(_CLASSIFIER.search(name)) and not attends(inventory.modules[name].modules())


def _are_linear(model: nn.Module, path: str) -> bool:
    """Whether a list holds linear maps alone: classifiers beside each other (MusicGen's, one for each codebook)."""
    return all(isinstance(module, nn.Linear) for module in model.get_submodule(path).children())


def _input_embedding(model: PreTrainedModel, inventory: Inventory) -> list[str]:
    """The tensors of the token embedding: CamemBERT's has the name of the head that shares it and comes first."""
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    own = {id(tensor) for tensor in module.parameters()} if isinstance(module, nn.Embedding) else set()
    return [name for name, tensor in inventory.tensors.items() if id(tensor) in own]


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
