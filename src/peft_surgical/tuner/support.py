"""What cannot be tuned, and why: refusals that name the tensor and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterError, UnsupportedModelError
from ..keys import HOLDER
from ..specialise import base_class
from .layer import SurgicalLayer
from .reading import base_value

Site = tuple[nn.Module, str]
_QUANTIZED = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "aqlm", "eetq", "hqq", "torchao", "quanto")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
        holder = getattr(entry.module, HOLDER, None)
        if holder is not None and not isinstance(holder, SurgicalLayer):
            raise UnsupportedModelError(f"{where} has an attribute {HOLDER!r} of its own, the name that deltas need.")
        if isinstance(entry.module, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"{where} is a ScriptModule, whose class is fixed. Tune the eager model.")


def is_quantized(module: nn.Module, value: torch.Tensor) -> bool:
    """Whether a parameter is quantized, by the library that its module, its class or its state comes from."""
    library = base_class(module).__module__.partition(".")[0]
    subclass = type(value).__module__.partition(".")[0]
    return library in _QUANTIZED or subclass in _QUANTIZED or hasattr(value, "quant_state")


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


def check_adapter_name(adapter: str, adapters: Iterable[str], paths: Iterable[str]) -> None:
    """Refuse a name that would make PEFT lose tensors in silence.

    When PEFT saves one adapter, it drops every key in which another adapter's name occurs as a part; so no adapter may
    be called like a part of a path that any adapter saves.

    Args:
        adapter: The new adapter's name.
        adapters: All adapters' names, the new one's included.
        paths: Full names of all tensors that these adapters save.
    """
    if not adapter or "." in adapter:
        raise AdapterError(f"{adapter!r} cannot be an adapter's name: use one without dots, such as 'frost'.")
    parts = {"base_model", "model", HOLDER, "surgical_delta", "surgical_stats"}
    parts.update(part for path in paths for part in path.split("."))
    for name in adapters:
        if name in parts:
            raise AdapterError(
                f"The adapter name {name!r} is also a part of a tensor's path in this model. PEFT would drop "
                f"tensors of the other adapters on saving; choose another name, such as '{name}-adapter'."
            )
