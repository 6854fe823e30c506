"""The trait by which a module reads its tuned tensors as base + deltas."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..keys import HOLDER
from ..specialise import Special, base_class

if TYPE_CHECKING:
    from .layer import SurgicalLayer


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
        """Read ``name`` as base + deltas; assigning reaches nn.Module's own storage, as ever."""

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
        # Dropped: it would hold the base's tensors, or copies of the effective ones, past their time.
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


def stored(module: Any, name: str) -> torch.Tensor:
    """The tensor that ``module`` stores under ``name``, without deltas."""
    for store in (module._parameters, module._buffers, module.__dict__):
        if name in store:
            return store[name]
    # As for any attribute that is not there: FSDP1 takes a parameter away and asks with hasattr().
    raise AttributeError(f"{base_class(module).__name__} no longer has the tuned tensor {name!r}")
