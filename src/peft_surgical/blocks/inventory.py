"""What every source of blocks shares: the tensors of a network, and how they become named blocks.

A source finds the *units* (stages or transformer layers) and the head; `arrange` places what lies around the units by
the order in which the network registers it, and `name_blocks` names the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor, nn

# ConvNd has no public base class.
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOKEN = re.compile(r"tok|pos|embed")


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
            for own_name, tensor in _own_tensors(module):
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
            parts = name.split(".")
            for end in range(len(parts) + 1):
                self._below.setdefault(".".join(parts[:end]), []).append(name)

    def below(self, *paths: str) -> list[str]:
        """Canonical names of the tensors at or below module or tensor paths, in registration order."""
        found = {name for path in paths for name in self._below.get(path, ())}
        return sorted(found, key=self.position.__getitem__)

    def has_matrix(self, path: str) -> bool:
        """Whether a module maps features (a linear map, a convolution) rather than only scaling them (a norm)."""
        return any(self.tensors[name].dim() > 1 for name in self.below(path))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


@dataclass(frozen=True)
class Cut:
    """What a source says: tensor names per block, in the order in which data flows, and finer names.

    Blocks may be unsorted inside; the caller sorts them and checks that they are total and disjoint.
    """

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
    """Give every tensor of the scope to the stem, to one unit, or to the head.

    What no unit and not the head holds is placed by registration order: before the first unit it is stem (patch
    embedding, positions, class token); between two units it opens the later one (a downsampling step, as in the
    papers of Swin and ConvNeXt); after the last unit it closes the last one (final norm, pooler, a convolution before
    the classifier). The head wins over a unit that contains it.

    Args:
        inventory: The tensors of the network.
        units: Tensor names of each stage or transformer layer.
        head: Tensor names of the classifier.
        stem: Tensor names that are stem wherever they are registered; they win over a unit.
        scope: The tensor names to place; all by default.

    Returns:
        Names of the stem, of each unit (empty ones left out), of the head.
    """
    head, stem = set(head), set(stem)
    held = {name: index for index, unit in enumerate(units) for name in unit if name not in head and name not in stem}
    starts: dict[int, int] = {}
    for name, index in held.items():
        starts[index] = min(inventory.position[name], starts.get(index, len(inventory.position)))
    stem_names: list[str] = []
    unit_names: list[list[str]] = [[] for _ in units]
    head_names: list[str] = []
    for name in inventory.tensors if scope is None else scope:
        if name in head:
            head_names.append(name)
        elif name in held:
            unit_names[held[name]].append(name)
        else:
            later = [index for index, start in starts.items() if start > inventory.position[name]]
            if name in stem or len(later) == len(starts):
                stem_names.append(name)
            else:
                unit_names[min(later) if later else max(starts)].append(name)
    return stem_names, [names for names in unit_names if names], head_names


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
        parts["stem"] = stem
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
    return attends(inside) or not any(isinstance(module, _CONVS) for module in inside)


def final_linear(path: str, module: nn.Module) -> list[str]:
    """Paths of a classifier's own linear maps: what precedes them inside it (a norm, a hidden map) is not head.

    Usually one. A module that holds classifiers side by side (RepViT's two, CrossViT's one per branch) has several.
    """
    mapped = {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, *_CONVS))}
    if not mapped:
        return [path]
    *_, (last_name, last) = mapped.items()
    serial = isinstance(module, nn.Sequential)
    same = [name for name, child in mapped.items() if not serial and _shape(child) == _shape(last)]
    return [".".join(filter(None, (path, name))) for name in same or [last_name]]


def _shape(module: nn.Module) -> tuple[object, ...]:
    return type(module), *(getattr(module, name, None) for name in ("in_features", "out_features", "out_channels"))


def owner(name: str) -> str:
    """The path of the module that holds a tensor or module."""
    return name.rpartition(".")[0]


def attends(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules is an attention.

    Squeeze-and-excitation is often *called* attn or attention, but its class is not, and it has no keys and values.
    """
    return any(
        "Attention" in type(module).__name__ or hasattr(module, "qkv") or hasattr(module, "kv") for module in modules
    )


def is_token_name(name: str) -> bool:
    """Whether a tensor is a token or a position embedding by its own name (``cls_token``, ``pos_embed``)."""
    return bool(_TOKEN.search(name.rpartition(".")[2]))


def width(module: nn.Module) -> int:
    """Channels that the last convolution in a module gives; 0 without one."""
    convs = [child for child in module.modules() if isinstance(child, _CONVS)]
    return convs[-1].out_channels if convs else 0


def is_composite(module: nn.Module) -> bool:
    """Whether a module has an inner structure of its own: a residual unit, not conv-norm-activation in a row."""
    return not isinstance(module, nn.Sequential) and any(True for _ in module.children())


def all_composite(module: nn.Module) -> bool:
    """Whether a container holds composite modules only."""
    children = list(module.children())
    return bool(children) and all(map(is_composite, children))


def merge_by_width(units: list[list[str]], widths: list[int]) -> list[list[str]]:
    """A stage of a MobileNet or EfficientNet is a run of residual units of one width, as in timm's groups."""
    runs = groupby(zip(widths, units, strict=True), key=lambda pair: pair[0])
    return [[name for _, unit in run for name in unit] for _, run in runs]


def unclear_parameters(inventory: Inventory, roots: set[str]) -> list[str]:
    """Raw parameters of a root module, neither tokens nor positions: registered first, but used who knows where."""
    return [name for name in inventory.parameters if owner(name) in roots and not is_token_name(name)]


def module_sizes(tensors: Iterable[str]) -> Counter[str]:
    """Module path -> how many of these tensors are below it."""
    return Counter(path for name in tensors for path in _ancestors(name))


def highest_modules(tensors: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Paths of the highest modules all of whose tensors are among these, in order.

    Args:
        tensors: Some tensors of a network.
        sizes: `module_sizes` of all its tensors.
    """
    inside = module_sizes(tensors)
    whole = (next((path for path in _ancestors(name) if inside[path] == sizes[path]), None) for name in tensors)
    return tuple(dict.fromkeys(path for path in whole if path))


def _ancestors(name: str) -> list[str]:
    """Module paths above a tensor, the highest first, the root left out."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
