"""The base under the adapters: which tensors it has, and whether they are still those that it had at first.

What the base was is recorded when the first adapter is attached, and stays with the network until the last one is
taken off. An adapter that is saved later is thus saved for the base that it was attached to, also when the network was
cast since (``bf16_full_eval`` leaves it in bfloat16), and a change of the base, which no adapter's file would hold, is
noticed while there is still something to save.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..config import SurgicalConfig
from ..files import shown
from ..fingerprints import UNKNOWN, TensorMark, mark_of
from ..keys import BASE_MARKS, join
from .attach import bare, base_value
from .support import is_quantized


def is_whole(name: str, config: SurgicalConfig) -> bool:
    """Whether the adapter holds this tensor whole, by PEFT's rule for ``modules_to_save``."""
    ends = tuple(config.modules_to_save or ())
    parts = name.split(".")
    return bool(ends) and any(".".join(parts[:n]).endswith(ends) for n in range(1, len(parts)))


def base_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Name -> (module, value) of every parameter and persistent buffer of the base, whatever is merged into it.

    Integers other than quantized weights are left out: index tables and counters, which libraries keep or drop as they
    like from version to version. A tied tensor has its first name.
    """
    network = getattr(model, "_orig_mod", model)
    with bare(network):
        places = [
            (path, module, name)
            for path, module in network.named_modules()
            for name, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None and name not in module._non_persistent_buffers_set
        ]
    found: dict[int, tuple[str, nn.Module, torch.Tensor]] = {}
    for path, module, name in places:
        value = base_value(module, name)
        if value.is_floating_point() or is_quantized(module, value):
            found.setdefault(id(value), (join(path, name), module, value))
    return {name: (module, value) for name, module, value in found.values()}


def recorded_base(model: nn.Module) -> Mapping[str, TensorMark] | None:
    """The marks of the base as it was when the first adapter was attached; now, where there is none yet.

    None where its values are not at hand: on the meta device, or spread over processes.
    """
    return model.__dict__.get(BASE_MARKS) or _marks(base_tensors(model))


def _marks(tensors: Mapping[str, tuple[nn.Module, torch.Tensor]]) -> dict[str, TensorMark] | None:
    if any(value.is_meta or hasattr(value, "full_tensor") for _, value in tensors.values()):
        return None
    return {name: mark_of(name, value, not is_quantized(module, value)) for name, (module, value) in tensors.items()}


def warn_of_unfrozen(model: nn.Module) -> None:
    """Warn of parameters of the base that would be trained and then not saved."""
    with bare(model):
        free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if free:
        warnings.warn(
            f"{shown(free)} of the base will be trained, and no adapter holds them: saving will be refused. Tune them "
            "with target, or list their module in modules_to_save; or freeze them with requires_grad_.",
            stacklevel=2,
        )


def changed_since(
    then: Mapping[str, TensorMark], tensors: Mapping[str, tuple[nn.Module, torch.Tensor]]
) -> tuple[list[str], dict[str, str]]:
    """The tensors of the base that are no longer what they were, and the dtype of those that were only cast."""
    now = _marks(tensors)
    if now is None:
        return [], {}
    changed, cast = [], {}
    for name in {**then, **now}:
        if now.get(name) == then.get(name):
            continue
        dtype = _cast_to(then[name], now[name], tensors[name][1]) if name in now and name in then else None
        if dtype is None:
            changed.append(name)
        else:
            cast[name] = dtype
    return changed, cast


def _cast_to(then: TensorMark, now: TensorMark, value: torch.Tensor) -> str | None:
    """The dtype in which a tensor is now, or was since then; None if that is not all."""
    if now.is_cast_of(then):
        return now.dtype
    for dtype, one, other in zip((torch.bfloat16, torch.float16), then[3:5], now[3:5], strict=True):
        if one == other != UNKNOWN and torch.equal(value, value.to(dtype).to(value.dtype)):
            return str(dtype).removeprefix("torch.")
    return None
