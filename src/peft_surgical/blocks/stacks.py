"""The stacks of repeated blocks in a transformers model, and what lies beside and behind them."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .inventory import CONVS, Inventory, owner
from .layouts import are_residual_units, final_linear, merge_by_width, width


def stacks_of(model: PreTrainedModel, inventory: Inventory, lists: list[str]) -> list[str]:
    """The ModuleLists that hold blocks: where some hold declared block classes, only those."""
    declared = set(model._no_split_modules or ())
    return [path for path in lists if holds_blocks(inventory.modules[path], declared)] or lists


def holds_blocks(stack: nn.Module, declared: set[str]) -> bool:
    """Whether a list holds what its library takes for a block."""
    children = stack.children()
    return any(isinstance(c, GradientCheckpointingLayer) or type(c).__name__ in declared for c in children)


def are_parallel(inventory: Inventory, stacks: list[str], declared: set[str]) -> bool:
    """Whether each list holds one kind of part of every layer (XLM: attentions, norms, feed-forward parts)."""
    modules = [inventory.modules[path] for path in stacks]
    same = len({(owner(path), len(list(module.children()))) for path, module in zip(stacks, modules, strict=True)}) == 1
    return same and not any(holds_blocks(module, declared) for module in modules)


def units_of(inventory: Inventory, stacks: list[str]) -> list[list[str]] | str:
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


def beside(inventory: Inventory, stack: str, pattern: str) -> list[str]:
    """Tensors of modules and parameters beside a stack, or beside what holds it, whose own name matches.

    Names decide here since the order of registration does not: BART's layernorm_embedding follows its layers.
    """
    found: list[str] = []
    while stack:
        above = owner(stack)
        module = inventory.modules[above]
        names = (name for named in (module.named_children(), module._parameters.items()) for name, _ in named)
        siblings = (f"{above}.{name}".lstrip(".") for name in names)
        found += [path for path in siblings if path != stack and re.search(pattern, path[len(above) :])]
        stack = above
    return inventory.below(*found)


def embedding_inside(inventory: Inventory, stacks: list[str], units: list[list[str]], head: list[str]) -> list[str]:
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


def classifiers_in(inventory: Inventory, outside: list[str]) -> list[str]:
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
