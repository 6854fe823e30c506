"""Put adapters on a network and take them off: holders, links, and classes that read base + deltas."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import AdapterError
from ..keys import BASE_MARKS, HOLDER, join
from .layer import SurgicalLayer
from .specialise import Special, base_class, restore, specialise, stored


class ReadsDeltas(Special):
    """Trait of a module whose tuned tensors are read as base + active deltas.

    Attributes:
        surgery_links: Tensor name -> (the `SurgicalLayer` that holds its deltas, the tensor's name there). A tied
            tensor's deltas are held once, by the module that comes first. None stands for the module's own holder, so
            that nn.DataParallel's replicas find theirs.
    """

    # Any stands for SurgicalLayer or None: transformers evaluates the annotations of every subclass of its models.
    surgery_links: dict[str, tuple[Any, str]]

    @classmethod
    def tensor_property(cls, name: str) -> property:
        """Read ``name`` as base + deltas."""

        def read(self: ReadsDeltas) -> torch.Tensor:
            base = stored(self, name)
            try:
                layer, key = link_of(self, name)
                return base if _is_asked_by_fsdp(base) else layer.effective(key, base)
            except AttributeError as error:
                # nn.Module.__getattr__ would answer with the base tensor in silence.
                raise RuntimeError(f"reading the tuned tensor {name!r} failed: {error}") from error

        def write(self: ReadsDeltas, value: Any) -> None:
            # Reached only for what nn.Module does not store itself: nn.DataParallel's replicas hold plain tensors.
            self.__dict__[name] = value

        def delete(self: ReadsDeltas) -> None:
            self.__dict__.pop(name, None)

        return property(read, write, delete)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to replace a tuned tensor: what a caller computes from it has the deltas inside already."""
        if self._check_kept(name):
            # As FSDP does where it finds nn.Module's own __setattr__, which would read base + delta first.
            cast(nn.Module, self)._parameters[name] = value
            return
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Refuse to take a tuned tensor away, as parametrizations do."""
        self._check_kept(name)
        super().__delattr__(name)

    def _check_kept(self, name: str) -> bool:
        """Refuse that a tuned tensor is replaced, but by a state dict or FSDP; whether it is FSDP, with its shard."""
        if name not in self.__dict__.get("surgery_links", ()) or self.__dict__.get("_is_replica"):
            return False
        caller = sys._getframe(2).f_code
        # A state dict holds the base's own tensors, and so does what FSDP shards.
        if caller.co_name == "_load_from_state_dict" or "fsdp" in caller.co_filename:
            return "fsdp" in caller.co_filename
        raise AdapterError(
            f"{name} of {base_class(cast(nn.Module, self)).__name__} is tuned: it reads as base + delta, so what is "
            "put in its place would get the delta a second time. Call merge_and_unload first, and change what it "
            "returns."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for name in self.surgery_links:
            layer, key = link_of(self, name)
            layer.add_site(key, cast(nn.Module, self), name)


class ReadsRecurrentDeltas(ReadsDeltas):
    """The same for nn.RNNBase, whose forward reads a list of its parameters that it made beforehand."""

    @property
    def _flat_weights(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]  # type: ignore[attr-defined]

    @_flat_weights.setter
    def _flat_weights(self, value: list[torch.Tensor]) -> None:
        # Dropped: it would keep the base's tensors, or copies of the effective ones, when these have changed.
        return


def _is_asked_by_fsdp(base: torch.Tensor) -> bool:
    """Whether FSDP2 is looking for the parameter that it shards, which it does by attribute, outside any forward."""
    if type(base) is nn.Parameter or not isinstance(base, DTensor):
        return False
    return sys._getframe(2).f_code.co_filename.endswith("_fsdp_param.py")


def link_of(module: Any, name: str) -> tuple[SurgicalLayer, str]:
    """The `SurgicalLayer` that holds the deltas of a module's tensor, and the tensor's name there."""
    layer, key = module.surgery_links[name]
    return (module._modules[HOLDER] if layer is None else layer), key


def base_value(module: nn.Module, name: str) -> torch.Tensor:
    """The base's value of a module's tensor, tuned or not, whatever is merged into it."""
    if name not in module.__dict__.get("surgery_links", {}):
        return stored(module, name)
    layer, key = link_of(module, name)
    return layer.base_tensor(key)


def attach(
    owner: nn.Module,
    adapter: str,
    parameters: Mapping[str, Sequence[tuple[nn.Module, str]]],
    statistics: Sequence[str],
    scale: float,
    hold: bool = False,
    double: bool = False,
) -> SurgicalLayer:
    """Give ``owner`` an adapter.

    Args:
        owner: The module that stores the tensors.
        adapter: The adapter's name.
        parameters: Name of each tuned parameter of ``owner`` -> every (module, name) that stores it, the owner's own
            first; more than one for a tied parameter.
        statistics: Names of the owner's buffers that the adapter owns.
        scale: The factor of its deltas.
        hold: Whether the statistics are held in training.
        double: Whether its deltas are float64, whatever the dtype of the base.
    """
    layer = owner._modules.get(HOLDER)
    if not isinstance(layer, SurgicalLayer):
        layer = SurgicalLayer(owner)
        owner._modules[HOLDER] = layer
    for key in statistics:
        _link(layer, key, owner, key)
    for key, sites in parameters.items():
        for module, name in sites:
            _link(layer, key, module, name)
    layer.update_layer(adapter, parameters, statistics, scale, hold, double)
    return layer


def _link(layer: SurgicalLayer, key: str, module: nn.Module, name: str) -> None:
    own = module._modules.get(HOLDER) is layer
    module.__dict__.setdefault("surgery_links", {})[name] = (None if own else layer, key)
    layer.add_site(key, module, name)
    module.__dict__.pop("_flat_weights", None)
    specialise(module, ReadsRecurrentDeltas if isinstance(module, nn.RNNBase) else ReadsDeltas, (name,))


def detach(model: nn.Module) -> None:
    """Remove every trace: holders, links, special classes. Base tensors stay as they are (merge first to keep)."""
    model.__dict__.pop(BASE_MARKS, None)
    for _, module in list(walk(model)):
        if isinstance(module._modules.get(HOLDER), SurgicalLayer):
            del module._modules[HOLDER]
        links = module.__dict__.pop("surgery_links", None)
        restore(module)
        if links and isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def surgical_layers(model: nn.Module) -> Iterator[tuple[str, SurgicalLayer]]:
    """(path of the tuned module, its `SurgicalLayer`), in the model's order; the root's path is ""."""
    for path, module in walk(model):
        if SurgicalLayer in type(module).__mro__:
            yield path.removesuffix(HOLDER).removesuffix("."), cast(SurgicalLayer, module)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what lies in a `SurgicalLayer`: there is some for every adapter."""
    seen, waiting = set(), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if SurgicalLayer not in type(module).__mro__:  # isinstance() is slow for a class with an abstract parent
            children = [(join(path, name), child) for name, child in module._modules.items() if child is not None]
            waiting += reversed(children)


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Show ``model`` as it was before any adapter: no holders, no special classes, no ``modules_to_save`` wrappers.

    Blocks, paths and tensor names are then those of the network before any adapter, also for a second one.
    """
    hidden = [
        (module, name, child)
        for _, module in walk(model)
        for name, child in module._modules.items()
        if isinstance(child, (SurgicalLayer, AuxiliaryTrainingWrapper))
    ]
    special = [(module, type(module)) for _, module in walk(model) if isinstance(module, Special)]
    try:
        for module, name, child in hidden:
            if isinstance(child, SurgicalLayer):
                del module._modules[name]
            else:
                module._modules[name] = cast(nn.Module, child.original_module)
        for module, _ in special:
            restore(module)
        yield
    finally:
        for module, cls in special:
            module.__class__ = cls
        for module, name, child in hidden:
            module._modules[name] = child


@contextmanager
def without_base_layer(model: nn.Module) -> Iterator[None]:
    """Let no module of the network have a child ``base_layer``, as timm's DLA does: PEFT takes it for its own mark."""
    named = [module for module in model.modules() if "base_layer" in module._modules]
    swap = {"base_layer": "own_base_layer", "own_base_layer": "base_layer"}
    try:
        for module in named:
            module._modules = {swap.get(name, name): child for name, child in module._modules.items()}
        yield
    finally:
        for module in named:
            module._modules = {swap.get(name, name): child for name, child in module._modules.items()}
