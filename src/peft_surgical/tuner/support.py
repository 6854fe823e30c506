"""What cannot be tuned, and what an adapter file has to hold: refusals before anything is attached.

Each names the tensor and what can be done. PEFT would look for the file's tensors one after the other while the adapter
is on the model already, and answer a missing one with a KeyError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import SurgicalConfig
from ..errors import AdapterError, AdapterFileError, BaseMismatchError, UnsupportedModelError
from ..files import Held, differences, shown
from ..keys import DELTA, HOLDER, PEFT_PREFIX, STATISTIC, join
from .attach import base_value
from .layer import SurgicalLayer
from .specialise import base_class

Site = tuple[nn.Module, str]
_QUANTIZED = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "aqlm", "eetq", "hqq", "torchao", "quanto")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOLDERS = (HOLDER, DELTA, STATISTIC, "default")  # the last: PEFT's name of an adapter without one
_NO_FORWARD = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # PEFT's own list
_GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class ModulePlan:
    """One module whose tensors an adapter touches.

    Attributes:
        path: Its path in the model; "" for the root.
        module: The module.
        parameters: Name of a tuned parameter -> every (module, name) that stores it, this module first.
        statistics: Names of the buffers that the adapter owns.
    """

    path: str
    module: nn.Module
    parameters: Mapping[str, tuple[Site, ...]]
    statistics: tuple[str, ...]


def refuse_other_methods(model: nn.Module) -> None:
    """Raise `AdapterError` if another PEFT method has changed the model."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SurgicalLayer):
            raise AdapterError(
                f"{path} already carries another PEFT method ({type(module).__name__}). Merge or unload that adapter "
                "first: a delta on a wrapped module would not be the delta of the base's tensor."
            )


def check_supported(model: nn.Module, modules: Sequence[ModulePlan]) -> None:
    """Raise `UnsupportedModelError` for a tensor that cannot be read through a delta, or cannot be trained."""
    offloaded = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    some_real = any(not parameter.is_meta for parameter in model.parameters())
    for entry in modules:
        where = f"{entry.path or 'the root module'} ({base_class(entry.module).__name__})"
        for name in entry.parameters:
            value = base_value(entry.module, name)
            if is_quantized(entry.module, value):
                raise UnsupportedModelError(
                    f"{where}.{name} is quantized ({value.dtype}, {type(value).__name__}): a delta cannot be added to "
                    "it. Load the base unquantized, or target blocks that are."
                )
            if value.is_meta and (some_real or offloaded):
                raise UnsupportedModelError(
                    f"{where}.{name} is offloaded (it lies on the meta device): its delta would never train. Load the "
                    "base without device_map offloading, or target blocks that stay on a device."
                )
            _check_references(entry.module, name, value, where)
        if isinstance(entry.module, _CONTAINERS):
            raise UnsupportedModelError(
                f"{where} keeps tensors of its own beside the modules that it runs one after the other, so it has no "
                f"place for their deltas. Take them away from the target: - {entry.path}.{next(iter(entry.parameters))}"
            )
        if not isinstance(getattr(entry.module, HOLDER, None), (SurgicalLayer, type(None))):
            raise UnsupportedModelError(f"{where} has an attribute {HOLDER!r} of its own, the name that deltas need.")
        if isinstance(entry.module, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"{where} is a ScriptModule, whose class is fixed. Tune the eager model.")


def is_quantized(module: nn.Module, value: torch.Tensor) -> bool:
    """Whether a parameter is quantized, by the library that its module, its class or its state comes from."""
    libraries = {kind.__module__.partition(".")[0] for kind in (base_class(module), type(value))}
    return not libraries.isdisjoint(_QUANTIZED) or hasattr(value, "quant_state")


def _check_references(module: nn.Module, name: str, value: torch.Tensor, where: str) -> None:
    """Refuse a module that keeps a second reference to its tensor and may read that one, past the delta."""
    known = ("_parameters", "_buffers", "_modules", "surgery_links", "_flat_weights")
    for attribute, held in vars(module).items():
        if attribute in known or not isinstance(held, (list, tuple, dict)):
            continue
        members = held.values() if isinstance(held, dict) else held
        if any(member is value for member in members):
            raise UnsupportedModelError(
                f"{where} also keeps {name} in its attribute {attribute!r} and may read it there, past the delta. "
                "Target other tensors, or make the module read its own parameter."
            )


def check_adapter_name(
    adapter: str, configs: Mapping[str, SurgicalConfig], model: nn.Module, names: Sequence[str]
) -> None:
    """Refuse a name that would make PEFT lose tensors in silence.

    When PEFT saves one adapter, it drops every key in which another adapter's name occurs as a part; so no adapter may
    be called like a part of a path that any adapter saves.

    Args:
        adapter: The new adapter's name.
        configs: All adapters, the new one included.
        model: The network.
        names: Full names of the tensors that the new adapter tunes.
    """
    if not adapter or "." in adapter:
        raise AdapterError(f"{adapter!r} cannot be an adapter's name: use one without dots, such as 'frost'.")
    whole = tuple(name for config in configs.values() for name in (config.modules_to_save or ()))
    paths = [path for path, _ in model.named_modules() if whole and path.endswith(whole)]
    parts = {"base_model", "model", HOLDER, DELTA, STATISTIC}
    parts.update(part for path in (*names, *paths) for part in path.split("."))
    # The other adapters' names have been compared with each other's paths already.
    others = (name for config in configs.values() for name in (getattr(config, "tensor_names", None) or ()))
    taken = any(adapter in path and adapter in path.split(".") for path in others)
    for name in configs:
        if name in parts or (taken and name == adapter):
            raise AdapterError(
                f"The adapter name {name!r} is also a part of a tensor's path in this model. PEFT would drop "
                f"tensors of the other adapters on saving; choose another name, such as '{name}-adapter'."
            )


# --- an adapter file, compared with the base ---


def check_held(modules: Mapping[str, nn.Module], entries: Sequence[ModulePlan], config: SurgicalConfig) -> None:
    """Raise unless the file that was read with ``config`` holds what the base needs; a no-op for other configs.

    Args:
        modules: Path -> module of the base without adapters.
        entries: What the adapter touches.
        config: Read from disk, with what was found in its file.

    Raises:
        AdapterFileError: Names are missing or surplus, shapes or kinds differ, or ``modules_to_save`` cannot be saved.
        AdapterError: Shapes or kinds differ in a module that the adapter holds whole.
        BaseMismatchError: The config's task is one that this base has no methods for.
    """
    if (held := config.held) is None:
        return
    root = modules[""]
    if config.task_type in _GENERATES and not hasattr(root, "prepare_inputs_for_generation"):
        raise BaseMismatchError(
            f"The adapter is for {config.task_type}, and {type(root).__name__} generates nothing: load the base "
            f"{config.base_model_name_or_path or 'that it was made for'}."
        )
    expected: dict[str, torch.Tensor] = {}
    for entry in entries:
        place = f"{PEFT_PREFIX}{join(entry.path, HOLDER)}"
        expected |= {f"{place}.{DELTA}.{name}": getattr(entry.module, name) for name in entry.parameters}
        expected |= {f"{place}.{STATISTIC}.{name}": getattr(entry.module, name) for name in entry.statistics}
    whole: dict[str, torch.Tensor] = {}
    for path in _saved_whole(modules, entries, tuple(config.modules_to_save or ())):
        whole |= {f"{PEFT_PREFIX}{path}.{key}": value for key, value in modules[path].state_dict().items()}
    if wrong := differences(held, {**expected, **whole}):
        raise AdapterFileError(f"For this base the adapter file {wrong}. Load the base that is named in its config.")
    _check_kinds(held, expected, AdapterFileError, "The adapter belongs to another architecture or head")
    # The file is right and so is the base, but for a module that the adapter brings.
    _check_kinds(held, whole, AdapterError, "The adapter holds that module whole; open the base with one like it")


def _check_kinds(held: Held, expected: Mapping[str, torch.Tensor], error: type[AdapterError], why: str) -> None:
    for key, tensor in expected.items():
        shape, floating = held[key]
        if shape != tuple(tensor.shape):
            raise error(f"{key} has shape {shape}, the base's tensor has {tuple(tensor.shape)}. {why}.")
        if floating != tensor.is_floating_point():
            kinds = ("integer", "floating point")
            raise error(f"{key} is {kinds[floating]} in the file, and {kinds[not floating]} in the base. {why}.")


def _saved_whole(
    modules: Mapping[str, nn.Module], entries: Sequence[ModulePlan], saved: tuple[str, ...]
) -> Sequence[str]:
    """The paths of the modules that PEFT will put wrappers around: those that end in one of the texts."""
    if bad := [text for text in saved if not text or any(name.endswith(text) for name in _HOLDERS)]:
        raise AdapterFileError(f"modules_to_save={bad[0]!a} names parts of every adapter, not a module of a base.")
    found = [path for path in modules if path.endswith(saved)]
    for path in found:
        if isinstance(modules[path], _NO_FORWARD):
            kind = type(modules[path]).__name__
            raise AdapterFileError(f"modules_to_save names {path}, a {kind}, which has no forward of its own.")
        inner = [other for other in found if other.startswith(f"{path}.")]
        tuned = [entry.path for entry in entries if entry.path == path or entry.path.startswith(f"{path}.")]
        if inner or tuned:
            raise AdapterFileError(
                f"modules_to_save names {path}, and the config also {'tunes' if tuned else 'names'} "
                f"{shown(tuned or inner)}: no adapter that was saved does."
            )
    return found
