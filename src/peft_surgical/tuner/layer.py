"""Live deltas: a module that reads base + delta, and the place where its deltas are kept.

A tuned module keeps its ``forward``, tensors and state-dict keys (see `specialise`); each of its tuned tensors is read
through a property that adds the active adapters' deltas. Its deltas live in a child named ``surgery``, a
`SurgicalLayer`, which is what PEFT finds, saves, switches and merges::

    conv1                                    nn.Conv2d, read through `ReadsDeltas`
    conv1.weight                             the base's parameter, frozen, where it always was
    conv1.surgery                            SurgicalLayer
    conv1.surgery.surgical_delta.default     Deltas with the trainable parameter `weight`

This serves every kind of tensor in one way: a convolution's weight, timm's root-level ``cls_token``, CLIP's
``class_embedding`` beside child modules, ``nn.MultiheadAttention.in_proj_weight``, the weights of an LSTM, and tensors
that are read from outside (``out_proj.weight``) or by another method than ``forward``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn

from ..errors import AdapterError
from ..keys import HOLDER
from .specialise import base_class


def stored(module: Any, name: str) -> torch.Tensor:
    """The tensor that ``module`` stores under ``name``, without deltas."""
    for store in (module._parameters, module._buffers, module.__dict__):
        if name in store:
            return store[name]
    # As for any attribute that is not there: FSDP1 takes a parameter away and asks with hasattr().
    raise AttributeError(f"{base_class(module).__name__} no longer has the tuned tensor {name!r}")


class Deltas(nn.Module):
    """The tensors that one adapter brings to one module, under the module's own names for them."""


class SurgicalLayer(nn.Module, BaseTunerLayer):
    """The deltas (and, under a moving norm policy, the statistics) of all adapters for one module.

    W = W0 + sum over active adapters of scale * delta (Lee et al. 2023 tune W itself; the delta makes it additive, as
    PEFT's machinery expects). The sum is formed in the wider dtype of the two and rounded to the base's, so fp32
    deltas on a bf16 base start as the identity and lose nothing while they are trained.
    """

    adapter_layer_names = ("surgical_delta",)
    other_param_names = ("surgical_stats", "scaling")
    cast_input_dtype_enabled = False  # inputs are never cast; peft.helpers reads this attribute of every layer

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.surgical_delta = nn.ModuleDict()
        self.surgical_stats = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._movable: set[str] = set()
        self._backup: dict[str, torch.Tensor] = {}
        self._owner = weakref.ref(owner)
        self._sites: dict[str, list[tuple[weakref.ref[nn.Module], str]]] = {}

    # --- copying: weak references do not copy; the owner puts itself back in __setstate__ ---

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_owner", "_sites")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sites = {}

    def add_site(self, key: str, module: nn.Module, name: str) -> None:
        """Record that ``module`` reads the deltas ``key`` for its tensor ``name``."""
        if module._modules.get(HOLDER) is self:
            self._owner = weakref.ref(module)
        sites = self._sites.setdefault(key, [])
        if not any(site() is module and attribute == name for site, attribute in sites):
            sites.append((weakref.ref(module), name))

    def sites(self, key: str) -> Iterator[tuple[nn.Module, str]]:
        """Every (module, name) under which the tensor ``key`` is stored; more than one where it is tied."""
        for reference, name in self._sites.get(key, ()):
            module = reference()
            if module is not None:
                yield module, name

    # --- reading ---

    def effective(self, key: str, base: torch.Tensor) -> torch.Tensor:
        """Base + deltas of the active adapters, differentiable; for statistics, the active adapter's own."""
        if self.merged_adapters or self._disable_adapters:
            return base
        return self._combine(key, base, self._active_adapter)

    def _combine(self, key: str, base: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
        total = base
        holders: Any = self._modules["surgical_delta"]  # past nn.Module.__getattr__: this runs at every read
        for adapter in adapters:
            scale = self.scaling.get(adapter, 0.0)
            if scale == 0.0:  # exactly the base, and no cost
                continue
            deltas = holders._modules.get(adapter)
            delta = None if deltas is None else deltas._parameters.get(key)
            if delta is None:  # nn.DataParallel's replicas hold plain attributes
                delta = getattr(deltas, key, None)
            if delta is not None:
                total = torch.add(total, delta, alpha=scale)
            elif adapter in self.surgical_stats and key in self.surgical_stats[adapter]._buffers:
                return self._statistics(key, base, adapters)
        return total if total.dtype == base.dtype else total.to(base.dtype)

    def _statistics(self, key: str, base: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
        owners = [a for a in adapters if a in self.surgical_stats and self.scaling[a] != 0.0]
        if len(owners) > 1:
            raise AdapterError(
                f"The active adapters {', '.join(owners)} each carry their own {key}: statistics do not add up. "
                "Activate one of them, or train them with norm_stats='frozen'."
            )
        own, scale = self.surgical_stats[owners[0]]._buffers[key], self.scaling[owners[0]]
        assert own is not None
        # In training the module writes to what it reads, which must then be the adapter's own tensor.
        if scale == 1.0 or self.get_base_layer().training or not own.is_floating_point():
            return own
        return torch.lerp(base, own.to(base.dtype), scale)

    def statistics_move(self) -> bool:
        """Whether a training forward may update the owner's statistics: an active adapter owns and trains them."""
        if self.merged_adapters or self._disable_adapters:
            return False
        return any(adapter in self._movable for adapter in self._active_adapter)

    def base_tensor(self, key: str) -> torch.Tensor:
        """The base's value of ``key``, also while adapters are merged into it."""
        if key in self._backup:
            return self._backup[key]
        module, name = next(self.sites(key))
        return stored(module, name)

    def keys_of(self, adapter: str) -> tuple[str, ...]:
        """The names of the tensors that ``adapter`` brings to this module: deltas, then statistics."""
        if adapter not in self.surgical_delta:
            return ()
        statistics = self.surgical_stats[adapter]._buffers if adapter in self.surgical_stats else ()
        return (*self.surgical_delta[adapter]._parameters, *statistics)

    def delta(self, adapter: str, key: str) -> torch.Tensor:
        """The delta of ``adapter`` for the parameter ``key``, unscaled."""
        return getattr(self.surgical_delta[adapter], key)

    def get_base_layer(self) -> nn.Module:
        """The module whose tensors are tuned. It is the parent: nothing is wrapped."""
        owner = self._owner()
        assert owner is not None, "a SurgicalLayer outlived its module"
        return owner

    @property
    def in_features(self) -> int | None:
        """The owner's number of inputs, where PEFT knows its kind; None otherwise."""
        return _get_in_out_features(self.get_base_layer())[0]

    @property
    def out_features(self) -> int | None:
        """The owner's number of outputs, where PEFT knows its kind; None otherwise."""
        return _get_in_out_features(self.get_base_layer())[1]

    # --- adapters ---

    def update_layer(
        self, adapter: str, parameters: Iterable[str], statistics: Iterable[str], scale: float, double: bool = False
    ) -> None:
        """Add ``adapter`` with zero deltas for ``parameters``, float64 if ``double``, and its own ``statistics``."""
        deltas = Deltas()
        for key in parameters:
            base = self.base_tensor(key)
            # fp32 for a half-precision base: a step of a small learning rate would vanish in its 8 or 11 bits.
            narrow = torch.float32 if base.dtype in (torch.float16, torch.bfloat16) else base.dtype
            dtype = torch.float64 if double else narrow
            # -0.0, not 0.0: x + -0.0 is x for every x, while 0.0 would turn a weight of -0.0 into 0.0.
            deltas.register_parameter(key, nn.Parameter(torch.full_like(base, -0.0, dtype=dtype)))
        self.surgical_delta[adapter] = deltas
        own = Deltas()
        for key in statistics:
            own.register_buffer(key, self.base_tensor(key).clone())
        if own._buffers:
            self.surgical_stats[adapter] = own
        self.scaling[adapter] = scale

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; see BaseTunerLayer. Their statistics move unless ``inference_mode`` freezes them."""
        super().set_adapter(adapter_names, inference_mode)
        self.forget()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active_adapter = names
        self._movable = {name for name in names if name in self.surgical_stats and not inference_mode}

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Enable or disable training of adapters, their statistics included."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = ({adapter_names} if isinstance(adapter_names, str) else {*adapter_names}) & {*self.surgical_stats}
        self._movable = self._movable | names if requires_grad else self._movable - names

    def enable_adapters(self, enabled: bool) -> None:
        """Toggle all adapters. Disabling shows the base, so a merged adapter is taken out first, as in PEFT."""
        if not enabled and self.merged_adapters:
            self.unmerge()
        super().enable_adapters(enabled)
        self.forget()

    def forget(self) -> None:
        """Empty what the owners computed from their tensors and kept, as timm's LeViT does with its biases."""
        for key in self._sites:
            for module, _ in self.sites(key):
                for attribute, kept in vars(module).items():
                    if attribute.endswith("_cache") and isinstance(kept, dict):
                        kept.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this module."""
        super().delete_adapter(adapter_name)
        self._movable.discard(adapter_name)

    # --- merging ---

    def merged_values(self, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
        """What each tensor would be with ``adapters`` merged: exactly what a forward with them active reads."""
        keys = dict.fromkeys(key for adapter in adapters for key in self.keys_of(adapter))
        with torch.no_grad():
            return {key: self._combine(key, stored(*next(self.sites(key))), adapters) for key in keys}

    def check_finite(self, adapters: Sequence[str]) -> None:
        """Raise unless merging ``adapters`` gives finite tensors."""
        for key, value in self.merged_values([name for name in adapters if name in self.surgical_delta]).items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                # The wording begins as PEFT's does, which callers match.
                raise AdapterError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken: "
                    f"{key} of {type(self.get_base_layer()).__name__} would not be finite. The model is unchanged."
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put base + deltas in the place of the base tensors, keeping these to unmerge bit for bit.

        Parameters are swapped, never written to: a partner that shares the tensor but is not read through this layer,
        or an optimizer that holds it, does not change.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.surgical_delta]
        if not names:
            return
        if safe_merge:
            self.check_finite(names)
        for key, value in self.merged_values(names).items():
            base = stored(*next(self.sites(key)))
            self._backup.setdefault(key, base)
            is_parameter = isinstance(base, nn.Parameter)
            # A clone where the value is an adapter's own buffer, which must not become the base's.
            merged = nn.Parameter(value, requires_grad=False) if is_parameter else value.clone()
            self._put(key, merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base tensors back, bit for bit."""
        for key, base in self._backup.items():
            current = stored(*next(self.sites(key)))
            if base.device != current.device or (base.dtype != current.dtype and base.is_floating_point()):
                # The model moved while merged; the backup is not registered and has stayed behind.
                moved = base.detach().to(current.device, current.dtype)
                base = nn.Parameter(moved, requires_grad=False) if isinstance(base, nn.Parameter) else moved
            self._put(key, base)
        self._backup.clear()
        self.merged_adapters.clear()

    def _put(self, key: str, value: torch.Tensor) -> None:
        for module, name in self.sites(key):
            store = module._parameters if name in module._parameters else module._buffers
            store[name] = value  # type: ignore[assignment]
        self.forget()

    # --- placement ---

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The base class looks for one `weight`; here each tensor follows its own base.
        for container in (self.surgical_delta, self.surgical_stats):
            if adapter_name not in container:
                continue
            for key, value in (*container[adapter_name]._parameters.items(), *container[adapter_name]._buffers.items()):
                target = device if device is not None else self.base_tensor(key).device
                if value is not None and not value.is_meta and value.device != target:
                    value.data = value.data.to(target)

    def extra_repr(self) -> str:
        """The adapters and what they bring."""
        return ", ".join(f"{name}: {' '.join(self.keys_of(name))}" for name in self.surgical_delta)
