"""Which parameters of a model are trained, by the names of the base's tensors that they stand for.

The criteria and schedules speak of the network's own tensors (``layer1.0.conv1.weight``). What an optimizer holds is a
delta, a copy inside ``modules_to_save``, or the tensor itself in a network without any adapter; `trained_tensors` is
the one place that knows how the three correspond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..blocks import Anatomy, anatomy_of
from ..errors import AdapterError, UnsupportedModelError
from ..keys import HOLDER, join
from ..tuner.attach import bare, surgical_layers

_DELTA = f"{HOLDER}.surgical_delta."


@dataclass(frozen=True, eq=False)
class TrainedTensor:
    """One tensor of the base as it is trained.

    Attributes:
        parameter: What the optimizer updates.
        path: The parameter's name in the model's own ``named_parameters()``.
        owner: The module that uses the tensor.
        attribute: The tensor's name there.
        is_delta: Whether ``parameter`` is a difference from the base.
    """

    parameter: nn.Parameter
    path: str
    owner: nn.Module
    attribute: str
    is_delta: bool

    @property
    def value(self) -> torch.Tensor:
        """The tensor as the network reads it (base + deltas), detached."""
        return getattr(self.owner, self.attribute).detach()


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of DDP, torch.compile and the like: what a user built."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True)


def network_of(model: nn.Module) -> nn.Module:
    """The network below PEFT's wrappers, whose names the tensors go by."""
    model = unwrapped(model)
    return model.base_model.model if isinstance(model, PeftModel) else model


def has_adapter(model: nn.Module) -> bool:
    """Whether a surgical adapter is on the network."""
    return any(True for _ in surgical_layers(network_of(model)))


def trained_tensors(model: nn.Module, frozen_too: bool | None = None) -> dict[str, TrainedTensor]:
    """Name of each tensor of the base -> how it is trained, in the model's order.

    Args:
        model: A network, a PeftModel around one, or either in the wrappers of Accelerate or torch.compile.
        frozen_too: Whether parameters without ``requires_grad`` count. By default they do in a network without an
            adapter, where nothing says yet what will be tuned, and do not in one with an adapter.

    Raises:
        AdapterError: Nothing is trainable.
        UnsupportedModelError: Two active adapters train the same tensor.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(trained_tensors(net))
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    model, network = unwrapped(model), network_of(model)
    frozen_too = not has_adapter(model) if frozen_too is None else frozen_too
    prefix = next((f"{path}." for path, module in model.named_modules() if module is network and path), "")
    found: dict[str, TrainedTensor] = {}
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not (frozen_too or parameter.requires_grad):
            continue
        name, tensor = _named(network, path.removeprefix(prefix).replace("_orig_mod.", ""), path, parameter)
        if name in found and not (found[name].is_delta and tensor.is_delta):
            found[name] = tensor if tensor.is_delta else found[name]  # the base's own tensor below its delta
            continue
        if name in found:
            raise UnsupportedModelError(
                f"{name} is trained twice, as {found[name].path} and as {path}: criteria and schedules give a tensor "
                "one rate. Activate one adapter at a time for training (model.set_adapter)."
            )
        found[name] = tensor
    if not found:
        raise AdapterError(
            f"{type(model).__name__} has no trainable parameter: the adapter was loaded for inference, or everything "
            "is frozen. Load it with is_trainable=True."
        )
    return found


def _named(network: nn.Module, name: str, path: str, parameter: nn.Parameter) -> tuple[str, TrainedTensor]:
    if _DELTA in f".{name}":
        owner, _, rest = name.rpartition(_DELTA)
        owner, attribute = owner.removesuffix("."), rest.split(".", 1)[1]
        tensor = TrainedTensor(parameter, path, network.get_submodule(owner), attribute, True)
        return join(owner, attribute), tensor
    owner, _, attribute = name.rpartition(".")
    module = network.get_submodule(owner)
    parts = owner.split(".")
    if "modules_to_save" in parts:  # head.modules_to_save.default -> head
        at = parts.index("modules_to_save")
        if isinstance(network.get_submodule(".".join(parts[:at])), ModulesToSaveWrapper):
            owner = ".".join(parts[:at] + parts[at + 2 :])
    return join(owner, attribute), TrainedTensor(parameter, path, module, attribute, False)


def anatomy_under(model: nn.Module, blocks: Mapping[str, str | Sequence[str]] | Anatomy | None = None) -> Anatomy:
    """The blocks of the network below the adapters.

    Args:
        model: As for `trained_tensors`.
        blocks: A spec as for `anatomy_of`; by default that of the active adapter's config, if it has one.
    """
    if isinstance(blocks, Anatomy):
        return blocks
    model, network = unwrapped(model), network_of(model)
    if blocks is None:
        configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
        blocks = next((config.blocks for config in configs.values() if getattr(config, "blocks", None)), None)
    with bare(network):
        return anatomy_of(network, blocks)


def refuse_sharded(tensors: Mapping[str, TrainedTensor]) -> None:
    """Raise for parameters that FSDP has cut up: their gradients exist only inside its own backward."""
    sharded = [name for name, tensor in tensors.items() if isinstance(tensor.parameter, DTensor)]
    if sharded:
        raise UnsupportedModelError(
            f"{sharded[0]} is sharded (FSDP): score the network before accelerator.prepare, or on one process."
        )
