"""Blocks from timm's group matcher and from layouts that torchvision and many research networks share."""

from __future__ import annotations

import re
from itertools import groupby
from types import SimpleNamespace

from torch import nn

from .inventory import CONVS, Cut, Inventory, arrange, attends, is_token_name, name_blocks, owner

_CLASSIFIERS = ("fc", "linear", "classifier", "head", "heads", "last_linear")
_NUMBERED = re.compile(r"(layer|stage|block|denseblock|s)_?(\d+)")

# --- what a module is ---


def final_linear(path: str, module: nn.Module) -> list[str]:
    """Paths of a classifier's own linear maps: what precedes them inside it (a norm, a hidden map) is not head.

    Usually one. A module that holds classifiers side by side (RepViT's two, CrossViT's one per branch) has several.
    """
    mapped = {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, *CONVS))}
    if not mapped:
        return [path]
    *_, (last_name, last) = mapped.items()
    serial = isinstance(module, nn.Sequential)
    same = [name for name, child in mapped.items() if not serial and _shape(child) == _shape(last)]
    return [".".join(filter(None, (path, name))) for name in same or [last_name]]


def _shape(module: nn.Module) -> tuple[object, ...]:
    return type(module), *(getattr(module, name, None) for name in ("in_features", "out_features", "out_channels"))


def width(module: nn.Module) -> int:
    """Channels that the last convolution in a module gives; 0 without one."""
    convs = [child for child in module.modules() if isinstance(child, CONVS)]
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


def are_residual_units(modules: list[nn.Module]) -> bool:
    """Whether a convolutional network lists residual units rather than stages (no container of composites inside)."""
    inner = [child for module in modules for child in module.modules()]
    lists = any(isinstance(child, nn.ModuleList) for child in inner)
    stages = any(isinstance(child, nn.Sequential) and all_composite(child) for child in inner)
    return not (lists or stages or attends(inner)) and all(map(width, modules))


def unclear_parameters(inventory: Inventory, roots: set[str]) -> list[str]:
    """Raw parameters of a root, neither tokens nor positions: their place in the order says nothing about their use."""
    return [name for name in inventory.parameters if owner(name) in roots and not is_token_name(name)]


# --- timm ---

# A name that no matcher knows: it lands in the tail, where matchers put what they do not name (necks, norms, heads).
_PROBE = "peft_surgical_probe.weight"


def cut_timm(model: nn.Module, inventory: Inventory) -> Cut | str:
    """Cuts by timm's ``group_matcher(coarse=True)``: the stem, one group per stage or transformer layer, a tail.

    Swin, like every hierarchical transformer, is cut by *stages* in all sources: timm's coarse groups are stages,
    transformers refuses to split a ``SwinStage``, and the surgical paper's blocks are the stages of a network.
    """
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        return "the model has no group_matcher()"
    try:
        from timm.models import group_parameters  # timm is an extra; duck-typed models can have a matcher without it
    except ImportError:
        return "the model has a group_matcher(), but timm is not installed"
    parameters = list(inventory.parameters)
    probed = SimpleNamespace(named_parameters=lambda: dict.fromkeys([*parameters, _PROBE]).items())
    try:
        group_of = group_parameters(probed, matcher(coarse=True), reverse=True)
    except Exception as error:  # a matcher is code of the model's own; RDNet's asserts that it is not asked for coarse
        return f"group_matcher(coarse=True) raised {type(error).__name__}: {error}"
    tail = group_of.pop(_PROBE)
    head = inventory.below(*_timm_classifiers(model, inventory))
    groups: dict[int, list[str]] = {}
    for name in parameters:
        if name not in head and group_of[name] != tail:
            groups.setdefault(group_of[name], []).append(name)
    if len(groups) < 2:
        return f"group_matcher(coarse=True) gives {len(groups)} group(s) besides the head, at least 2 are needed"
    if all(len({owner(name) for name in names}) == 1 for names in groups.values()):
        return "group_matcher(coarse=True) cuts between single modules, which are not blocks"
    stem, *units = (groups[index] for index in sorted(groups))
    first_start = inventory.position[units[0][0]]
    for name in parameters:
        # The tail may hold a final norm (Swin), a convolution before the classifier (MobileNetV3) or, where the matcher
        # forgets one, an early parameter: it is placed by registration order. A raw parameter of the root is registered
        # early whatever it is for, so only a token or position is stem.
        if name not in head and group_of[name] == tail:
            early = inventory.position[name] < first_start and ("." in name or is_token_name(name))
            (stem if early else units[_stage_of_norm(inventory, name, len(units))]).append(name)
    _add_buffers(inventory, [stem, *units, head])
    return name_blocks("timm", inventory, stem, units, head)


def _stage_of_norm(inventory: Inventory, name: str, stages: int) -> int:
    """The stage of a norm in a list with one norm for each stage, as in EfficientViM; the last for everything else."""
    path, _, rest = name.partition(".")
    norms = inventory.modules.get(path)
    if not isinstance(norms, nn.ModuleList) or len(norms) not in (stages, stages + 1):
        return stages - 1
    if any(parameter.dim() > 1 for parameter in norms.parameters()):
        return stages - 1
    return min(int(rest.partition(".")[0]), stages - 1)


def _timm_classifiers(model: nn.Module, inventory: Inventory) -> list[str]:
    """Paths of the classifiers' linear maps: what ``get_classifier()`` gives, and what the model's own config names."""
    get_classifier = getattr(model, "get_classifier", None)
    classifiers = get_classifier() if callable(get_classifier) else ()
    if isinstance(classifiers, nn.Module) and not isinstance(classifiers, nn.ModuleList):
        classifiers = (classifiers,)
    found = {id(module) for module in classifiers or ()}
    paths = [path for path, module in inventory.modules.items() if id(module) in found and inventory.below(path)]
    if paths:
        # VOLO's get_classifier() leaves out its second classifier, which its config names.
        named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
        paths += [path for path in ((named,) if isinstance(named, str) else named) if path in inventory.modules]
    return [linear for path in paths for linear in final_linear(path, inventory.modules[path])]


def _add_buffers(inventory: Inventory, groups: list[list[str]]) -> None:
    """Lets buffers follow their module; in a module that has no parameters, the nearest tensor before them."""
    label = {name: index for index, names in enumerate(groups) for name in names}
    for name in inventory.tensors:
        path = name
        while name not in label:
            path = owner(path)
            placed = [other for other in inventory.below(path) if other in label]
            before = [other for other in placed if inventory.position[other] < inventory.position[name]]
            if placed:
                label[name] = label[(before or placed)[-1 if before else 0]]
                groups[label[name]].append(name)


# --- torchvision, and networks laid out like its own ---


def cut_layout(model: nn.Module, inventory: Inventory) -> Cut | str:
    """Cuts torchvision's families and networks laid out like them, with a classifier named fc, linear, head or so.

    In this order: numbered children (``layer1``, ``layer2``, ...), ``features`` made of stages (ConvNeXt, EfficientNet,
    Swin), of residual units (MobileNet), of convolutions between poolings (VGG), and one stack of equal modules (ViT).
    """
    if raw := unclear_parameters(inventory, {""}):
        return f"cannot tell where the parameter {raw[0]!r} belongs"
    classifiers = [name for name, _ in model.named_children() if name in _CLASSIFIERS]
    if len(classifiers) > 1:
        return f"several children are named like a classifier: {', '.join(classifiers)}"
    body = {name: child for name, child in model.named_children() if name not in classifiers}
    units = _numbered(inventory, body) or _features(inventory, body) or _equal_modules(inventory, body)
    if not units:
        return "no numbered children (layer1, ...), no 'features' of a known form, no single stack of equal modules"
    head = inventory.below(*(path for name in classifiers for path in final_linear(name, inventory.modules[name])))
    held = {name for unit in units for name in unit}
    last = max(inventory.position[name] for name in held)
    for path, module in inventory.modules.items():
        after = isinstance(module, nn.Linear) and any(inventory.position[name] > last for name in inventory.below(path))
        if after and not classifiers:
            return f"cannot tell whether {path!r} is the classifier (known: {', '.join(_CLASSIFIERS)})"
    stem, units, head = arrange(inventory, units, head)
    from_torchvision = any(base.__module__.startswith("torchvision.") for base in type(model).__mro__)
    return name_blocks("torchvision" if from_torchvision else "layout", inventory, stem, units, head)


def _numbered(inventory: Inventory, body: dict[str, nn.Module]) -> list[list[str]]:
    """Units from consecutively numbered siblings, at the root or in its only container (RegNet's trunk, DenseNet)."""
    candidates = [("", body)] + [(f"{name}.", dict(child.named_children())) for name, child in body.items()]
    for prefix, children in candidates:
        families: dict[str, list[tuple[int, str]]] = {}
        for name in children:
            if (match := _NUMBERED.fullmatch(name)) and inventory.below(prefix + name):
                families.setdefault(match[1], []).append((int(match[2]), prefix + name))
        for family in families.values():
            numbers = [number for number, _ in family]
            if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
                # A DenseNet's transition1 closes denseblock1, as in timm; unnumbered siblings go by position.
                return [inventory.below(path, f"{prefix}transition{number}") for number, path in family]
    return []


def _features(inventory: Inventory, body: dict[str, nn.Module]) -> list[list[str]]:
    """Units from a Sequential ``features``: stages, residual units of one width, or what lies between poolings."""
    features = body.get("features")
    if not isinstance(features, nn.Sequential):
        return []
    children = {f"features.{name}": child for name, child in features.named_children()}
    stages = [path for path, child in children.items() if type(child) is nn.Sequential and all_composite(child)]
    if len(stages) > 1:
        return [inventory.below(path) for path in stages]
    if sum(isinstance(child, nn.MaxPool2d) for child in features) > 1:
        units: list[list[str]] = [[]]
        for path, child in children.items():
            if isinstance(child, nn.MaxPool2d):
                units.append([])
            units[-1] += inventory.below(path)
        return [unit for unit in units if unit]
    residual = {path: child for path, child in children.items() if is_composite(child)}
    return merge_by_width([inventory.below(path) for path in residual], [width(child) for child in residual.values()])


def _equal_modules(inventory: Inventory, body: dict[str, nn.Module]) -> list[list[str]]:
    """Units from the only outermost container with two or more composite modules of one class."""

    def holds_equals(path: str, module: nn.Module) -> bool:
        classes = [type(child) for child in module.children()]
        container = type(module) in (nn.ModuleList, nn.Sequential) and path.split(".")[0] in body
        return container and len(classes) > 1 and len(set(classes)) == 1 and all_composite(module)

    found = inventory.outermost(holds_equals)
    if len(found) != 1:
        return []
    return [inventory.below(f"{found[0]}.{name}") for name, _ in inventory.modules[found[0]].named_children()]
