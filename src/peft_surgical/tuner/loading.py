"""What a state dict must hold for an adapter that is on a network already, and what it may make of the network."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..config import SurgicalConfig
from ..errors import AdapterError, AdapterFileError, UnsupportedModelError
from ..files import check_tensors
from ..keys import DELTA, HOLDER, PEFT_PREFIX, STATISTIC, join
from .attach import surgical_layers
from .layer import SurgicalLayer
from .specialise import base_class


def checked_state(
    state: dict[str, torch.Tensor], model: nn.Module, adapter: str, config: SurgicalConfig
) -> dict[str, torch.Tensor]:
    """The state dict as the network will take it.

    Args:
        state: What is to be loaded, by the model's keys. Gets the tensors that were verified with the config, if
            another file has taken the place of theirs since.
        model: The adapted network.
        adapter: The adapter's name.
        config: Its config.

    Raises:
        AdapterFileError: It does not hold what the adapter needs, or would give tensors with which no network works.
        UnsupportedModelError: The network has its own way of loading, which refuses it.
    """
    content, config.content = config.content, None
    if content is not None:
        content.settle(state, functools.partial(_key_in_file, adapter))
    own = model.state_dict()
    marks = (f"{HOLDER}.{DELTA}.{adapter}.", f"{HOLDER}.{STATISTIC}.{adapter}.")
    expected = {key: tuple(value.shape) for key, value in own.items() if any(mark in key for mark in marks)}
    # What belongs to modules_to_save has been given its place by PEFT already; it may be called anything.
    deltas = {key: value for key, value in state.items() if key not in own or key in expected}
    check_tensors(deltas, expected, f"adapter {adapter!r}")
    for path, layer in surgical_layers(model):
        for name, kind, own_value in _held(layer, adapter):
            value = state[join(path, f"{HOLDER}.{kind}.{adapter}.{name}")].to(own_value.dtype)
            _check_result(join(path, name), layer, name, kind, value, config.scale, AdapterFileError)
    # With the versions that PEFT leaves out: torchvision's MNASNet loads nothing without them.
    found = OrderedDict(state)
    found._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    _try_loading(model, found)
    return found


def _key_in_file(adapter: str, key: str) -> str:
    for mark in (f"{HOLDER}.{DELTA}.", f"{HOLDER}.{STATISTIC}."):
        key = key.replace(f"{mark}{adapter}.", mark)
    return key.replace(f".modules_to_save.{adapter}.", ".")


def set_scale(model: nn.Module, adapter_name: str, scale: float) -> None:
    """`SurgicalModel.set_scale` for a network that transformers' own ``load_adapter`` adapted, without a tuner."""
    if scale != scale or scale in (float("inf"), float("-inf")):
        raise AdapterError(f"scale={scale} is not a finite number: 0 is the base, 1 the tuned model.")
    layers = {path: layer for path, layer in surgical_layers(model) if adapter_name in layer.scaling}
    if not layers:
        raise AdapterError(f"No adapter {adapter_name!r} on this model.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise AdapterError(f"Adapter {adapter_name!r} is merged; unmerge it, set its scale, and merge it again.")
    for path, layer in (
        layers.items() if not 0 <= scale <= 1 else ()
    ):  # between the base and the tuned model all is well
        for name, kind, value in _held(layer, adapter_name):
            _check_result(join(path, name), layer, name, kind, value, float(scale), AdapterError)
    for layer in layers.values():
        layer.scaling[adapter_name] = float(scale)
        layer.forget()


def _held(layer: SurgicalLayer, adapter: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    if adapter in layer.surgical_delta:
        yield from ((name, DELTA, value) for name, value in layer.surgical_delta[adapter].named_parameters())
    if adapter in layer.surgical_stats:
        yield from ((name, STATISTIC, value) for name, value in layer.surgical_stats[adapter].named_buffers())


@torch.no_grad()
def _check_result(
    where: str, layer: SurgicalLayer, name: str, kind: str, value: torch.Tensor, scale: float, error: type[AdapterError]
) -> None:
    """Check the tensor that the network will read: a finite delta may still give one that overflows."""
    base = layer.base_tensor(name)
    if base.is_meta or value.is_meta or not base.is_floating_point() or hasattr(base, "full_tensor"):
        return
    value = value.to(base.device)
    if kind == DELTA:
        result = torch.add(base, value, alpha=scale).to(base.dtype)
    else:
        result = value if scale == 1.0 else torch.lerp(base, value.to(base.dtype), scale)
    wrong = ""
    if name.endswith("running_var") and bool((result < 0).any()):
        wrong = "be a variance below zero"
    elif not bool(torch.isfinite(torch.linalg.vector_norm(result.float()))):  # the first product would overflow
        wrong = f"be too large for {str(base.dtype).removeprefix('torch.')}"
    if wrong:
        where = where.removeprefix(PEFT_PREFIX)
        raise error(
            f"With scale={scale:g} the adapter gives predictions that are not numbers: {where} "
            f"would {wrong}. Choose a scale between 0 and 1, or get the adapter anew."
        )


def _try_loading(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Ask a network that has its own way of loading whether it takes the tensors, while they can still be refused."""
    own = [base_class(m) for m in model.modules() if not base_class(m).__module__.startswith(("torch.", "peft"))]
    special = [kind for kind in own if kind._load_from_state_dict is not nn.Module._load_from_state_dict]
    if not special or any(value.is_meta for name, value in model.state_dict().items() if name in state):
        return
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:  # the method is code of the network's own
        raise UnsupportedModelError(
            f"{special[0].__name__} does not load an adapter's tensors by themselves ({type(error).__name__}: {error})."
            " Its _load_from_state_dict would have to pass on what it does not know."
        ) from error
