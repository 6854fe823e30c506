"""Mixed batches: each sample through its own adapter, in one call of the network.

``model(images, adapter_names=["site_a", "__base__", ...])`` runs the network once per adapter, on that adapter's rows,
and puts the rows back in order: always right, whatever the network does to its batch inside. What lies in front of the
first tensor that one of them tunes is computed once, for all rows together (see `sharing`). While ``generate()`` runs
there is a cache that belongs to the whole batch, so there each tuned module splits its own rows instead; a module that
does not see one row per sample raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from ..errors import AdapterError
from .attach import link_of, surgical_layers
from .layer import SurgicalLayer
from .sharing import Prefix, may_share, record
from .specialise import base_class

BASE = "__base__"
"""PEFT's name for "no adapter" in ``adapter_names``."""

# Their fast paths take the children's weights and never call the children's forward.
_READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class _Routing:
    """The adapter of each sample. Inside a tuned module that has split its batch, all samples belong to one."""

    def __init__(self, names: Sequence[str], beams: int) -> None:
        self.names = [name for name in names for _ in range(beams)]
        self.beams = beams

    def names_for(self, rows: int | None) -> list[str]:
        """The names for that many rows: an encoder sees its samples before generate() repeats them for each beam."""
        unrepeated = self.names[:: self.beams]
        return unrepeated if rows == len(unrepeated) else self.names

    @contextmanager
    def narrowed(self, adapter: str, count: int) -> Iterator[None]:
        outer = self.names, self.beams
        self.names, self.beams = [adapter] * count, 1
        try:
            yield
        finally:
            self.names, self.beams = outer


@contextmanager
def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str], known: Sequence[str], args: Any, kwargs: Any
) -> Iterator[None]:
    """Within this context the model routes each sample of its batch through the adapter named for it.

    Args:
        model: The adapted network.
        adapter_names: One adapter name per sample, ``"__base__"`` for none.
        known: The adapters that exist.
        args: Positional arguments of the call that runs in this context.
        kwargs: Keyword arguments of that call; generate() repeats each sample ``num_beams`` times.

    Raises:
        AdapterError: For unknown names or another number of them, while training, or with merged adapters.
    """
    size = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    if size is not None and size != len(adapter_names):
        raise AdapterError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {size} respectively."
        )
    layers = [layer for _, layer in surgical_layers(model)]
    _check(model, layers, adapter_names, known)
    routing = _Routing(adapter_names, kwargs.get("num_beams") or 1)
    # A tied tensor is read by modules without a holder of their own; each of them splits its batch too. So do the
    # modules that read their children's tensors without calling the children.
    owners = {id(m): m for layer in layers for key in layer._sites for m, _ in layer.sites(key)}
    owners |= {id(m): m for m in model.modules() if isinstance(m, _READS_CHILDREN) and _layers_of(m)}
    patched = []

    def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
        patched.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    for module in owners.values():
        patch(module, _routed(module, module.forward, _layers_of(module), routing))
    patch(model, _at_root(model, layers, routing))
    # PEFT's own wrappers of modules_to_save split a batch by themselves when they are called with its adapters.
    handles = [
        module.register_forward_pre_hook(functools.partial(_name_adapters, routing), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, previous in reversed(patched):  # the root may have been patched twice
            if previous is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = previous


def _layers_of(module: nn.Module) -> list[SurgicalLayer]:
    """The layers that a forward of ``module`` reads: its own, those of tied tensors, and its descendants'."""
    below = [child for child in module.modules() if isinstance(child, SurgicalLayer)]
    linked = [link_of(module, name)[0] for name in module.__dict__.get("surgery_links", ())]
    return list({id(layer): layer for layer in (*linked, *below)}.values())


def _name_adapters(routing: _Routing, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    # An adapter that saves no module whole uses the base's, which PEFT's wrapper knows under a name of its own.
    own: Any = module._adapters
    names = [name if name in own else BASE for name in routing.names_for(_rows(args, kwargs))]
    return args, {**kwargs, "adapter_names": names}


def _rows(args: Any, kwargs: Any) -> int | None:
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim)
    return next((len(tensor) for tensor in tensors), None)


def _at_root(model: nn.Module, layers: list[SurgicalLayer], routing: _Routing) -> Callable[..., Any]:
    inside = model.forward

    @functools.wraps(inside)  # generate() asks the signature whether to pass position_ids
    def split(*args: Any, **kwargs: Any) -> Any:
        names = routing.names
        if _holds_cache((args, kwargs)) or len(set(names)) == 1:
            return inside(*args, **kwargs)
        if _rows(args, kwargs) != len(names):
            raise AdapterError(f"adapter_names has {len(names)} entries, the batch {_rows(args, kwargs)} rows.")
        if not may_share(model):
            return _by_rows(names, routing, layers, inside, args, kwargs)
        used = [layer for layer in layers if any(name in layer.surgical_delta for name in names)]
        run = functools.partial(_as_adapter, BASE, layers, inside, args, kwargs)
        with routing.narrowed(names[0], len(names)):  # no module has to tell the rows apart before it is in use
            prefix = record(model, used, len(names), run)
        if prefix.output is not None:
            return prefix.output
        return _by_rows(names, routing, layers, inside, args, kwargs, prefix if prefix.calls else None)

    return split


def _holds_cache(value: Any) -> bool:
    """Whether a cache of the whole batch is among the arguments, whatever the network calls the argument."""
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_cache, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Cache)


def _by_rows(
    names: list[str],
    routing: _Routing,
    layers: list[SurgicalLayer],
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    prefix: Prefix | None = None,
) -> Any:
    outputs = []
    for name in dict.fromkeys(names):
        index = torch.tensor([row for row, other in enumerate(names) if other == name])
        part, keywords = _select((args, kwargs), len(names), index)
        run = functools.partial(_as_adapter, name, layers, forward, part, keywords)
        again = run if prefix is None else functools.partial(_replaying, prefix, index, run)
        with routing.narrowed(name, len(index)):
            if prefix is not None and not prefix.is_sound(index, run, again):
                prefix = None
            outputs.append((index, run() if prefix is None else again()))
    return _scatter(outputs, len(names))


def _replaying(prefix: Prefix, index: torch.Tensor, run: Callable[[], Any]) -> Any:
    with prefix.replayed(index):
        return run()


def _check(model: nn.Module, layers: list[SurgicalLayer], names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := sorted({*names} - {*known} - {BASE}):
        raise AdapterError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has "
            f"{', '.join(known)}, and {BASE!r} stands for none."
        )
    if model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode: call model.eval().")
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise AdapterError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. Merged: "
            f"{', '.join(merged)}."
        )


def _routed(
    module: nn.Module, forward: Callable[..., Any], layers: list[SurgicalLayer], routing: _Routing
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def routed(*args: Any, **kwargs: Any) -> Any:
        names = routing.names_for(_rows(args, kwargs))
        if len(set(names)) == 1:
            return _as_adapter(names[0], layers, forward, args, kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        inner = module.self_attn if isinstance(module, nn.TransformerEncoderLayer) else module
        sequential = isinstance(inner, (nn.MultiheadAttention, nn.RNNBase))
        if sequential and not (inner.batch_first and tensors[0].ndim == 3):
            raise AdapterError(
                f"{base_class(module).__name__} without batch_first=True sees time first, so its samples cannot be "
                "told apart by rows. Run each adapter's samples by themselves."
            )
        if tensors and tensors[0].shape[:1] == (1,):  # one row for all: positions, say
            rows = [_as_adapter(name, layers, forward, args, kwargs) for name in names]
            return _scatter([(torch.tensor([i]), row) for i, row in enumerate(rows)], len(names))
        if not tensors or tensors[0].shape[:1] != (len(names),):
            seen = tuple(tensors[0].shape) if tensors else "no tensor"
            raise AdapterError(
                f"{base_class(module).__name__} sees {seen}, not a batch of {len(names)} samples (it works on windows "
                "or flattened tokens), so its samples cannot be told apart. Run each adapter's samples by themselves."
            )
        return _by_rows(names, routing, layers, forward, args, kwargs)

    return routed


def _as_adapter(name: str, layers: list[SurgicalLayer], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    previous = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name] if name in layer.surgical_delta else []
        return forward(*args, **kwargs)
    finally:
        for layer, active in zip(layers, previous, strict=True):
            layer._active_adapter = active


def _select(value: Any, batch: int, index: torch.Tensor) -> Any:
    """The rows ``index`` of every tensor with ``batch`` rows in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value.index_select(0, index.to(value.device)) if value.shape[:1] == (batch,) else value
    if isinstance(value, (list, tuple)):
        return type(value)(_select(member, batch, index) for member in value)
    if isinstance(value, dict):
        # A two-dimensional mask is (queries, keys), shared by all samples, however many there are.
        masks = ("attn_mask", "src_mask")
        shared = {key for key, member in value.items() if key in masks and getattr(member, "ndim", 0) == 2}
        chosen = {key: member if key in shared else _select(member, batch, index) for key, member in value.items()}
        return type(value)(**chosen) if isinstance(value, ModelOutput) else chosen
    return value


def _scatter(parts: list[tuple[torch.Tensor, Any]], batch: int) -> Any:
    """Put the rows of each adapter's output back in their places."""
    first = parts[0][1]
    if isinstance(first, torch.Tensor):
        if any(output.shape[:1] != index.shape for index, output in parts):
            raise AdapterError("An output has no row per sample (a loss, perhaps): pass inputs without labels.")
        whole = first.new_empty(batch, *first.shape[1:])
        for index, output in parts:
            whole = whole.index_copy(0, index.to(whole.device), output.to(whole.dtype))
        return whole
    if isinstance(first, dict):  # ModelOutput is one
        merged = {key: _scatter([(index, out[key]) for index, out in parts], batch) for key in first}
        return type(first)(**merged)
    if isinstance(first, (list, tuple)):
        members = [_scatter([(index, out[i]) for index, out in parts], batch) for i in range(len(first))]
        return type(first)(members)
    # A cache, for example, holds one adapter's rows only.
    return first if all(output == first for _, output in parts) else None
