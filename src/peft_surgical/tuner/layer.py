"""Live deltas: a module that reads base + delta, and the place where its deltas are kept.

A tuned module keeps its ``forward``, tensors and state-dict keys (see `specialise`); a property adds the active
adapters' deltas to each of its tuned tensors. They live in a child ``surgery``, which PEFT finds, saves and merges::

    conv1                                    nn.Conv2d, read through `ReadsDeltas`
    conv1.weight                             the base's parameter, frozen, where it always was
    conv1.surgery                            SurgicalLayer
    conv1.surgery.surgical_delta.default     Deltas with the trainable parameter `weight`
This serves every kind of tensor, also root parameters and tensors that are read from outside the module.
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
from .specialise import stored


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
        self._held: set[str] = set()
        self._trainable: set[str] = set()  # adapters whose deltas were made trainable here
        self._backup: dict[str, torch.Tensor] = {}
        self._owner = weakref.ref(owner)
        self._sites: dict[str, list[tuple[weakref.ref[nn.Module], str]]] = {}

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
            if (module := reference()) is not None:
                yield module, name

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
            way = "Activate one of them, or train them with norm_stats='frozen'."
            both = f"The active adapters {', '.join(owners)} each carry their own {key}: statistics do not add up."
            raise AdapterError(f"{both} {way}")
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

    def let_move(self, move: bool) -> bool:
        """Let training move the statistics that active adapters hold, or hold them again; False if there are none."""
        held = {*self._active_adapter} & self._held
        self._movable = self._movable | held if move else self._movable - held
        return bool(held)

    def base_tensor(self, key: str) -> torch.Tensor:
        """The base's value of ``key``, also while adapters are merged into it."""
        return self._backup[key] if key in self._backup else stored(*next(self.sites(key)))

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
        if (owner := self._owner()) is None:
            raise AssertionError("a SurgicalLayer outlived its module")
        return owner

    @property
    def in_features(self) -> int | None:
        """The owner's number of inputs, where PEFT knows its kind; None otherwise."""
        return _get_in_out_features(self.get_base_layer())[0]

    @property
    def out_features(self) -> int | None:
        """The owner's number of outputs, where PEFT knows its kind; None otherwise."""
        return _get_in_out_features(self.get_base_layer())[1]

    def update_layer(
        self,
        adapter: str,
        parameters: Iterable[str],
        statistics: Iterable[str],
        scale: float,
        hold: bool = False,
        double: bool = False,
    ) -> None:
        """Add ``adapter`` with zero deltas, float64 if ``double``, and statistics of its own, still if ``hold``."""
        deltas, own = Deltas(), Deltas()
        for key in parameters:
            base = self.base_tensor(key)
            # fp32 for a half-precision base: a step of a small learning rate would vanish in its 8 or 11 bits.
            narrow = torch.float32 if base.dtype in (torch.float16, torch.bfloat16) else base.dtype
            dtype = torch.float64 if double else narrow
            # -0.0, not 0.0: x + -0.0 is x for every x, while 0.0 would turn a weight of -0.0 into 0.0.
            deltas.register_parameter(key, nn.Parameter(torch.full_like(base, -0.0, dtype=dtype)))
        self.surgical_delta[adapter] = deltas
        for key in statistics:
            own.register_buffer(key, self.base_tensor(key).clone())
        if own._buffers:
            self.surgical_stats[adapter] = own
            self._held = self._held | {adapter} if hold else self._held - {adapter}
        self.scaling[adapter] = scale
        self._trainable.add(adapter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; see BaseTunerLayer. Their statistics move unless ``inference_mode`` freezes them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        trained = set() if inference_mode else {*names}
        self._train(self._trainable - trained, False)
        self._train(trained, True)
        self.forget()
        own = {*self.surgical_stats._modules}  # what `alone` hides stays as it is
        movable = (self._movable - own) | ((trained & own) - self._held)
        self.__dict__.update(_active_adapter=names, _movable=movable)  # nn.Module's own way takes most of the time

    def _train(self, adapters: Iterable[str], trainable: bool) -> None:
        """Set ``requires_grad`` of the deltas of those adapters that this layer has."""
        for name in adapters:
            if (deltas := self.surgical_delta._modules.get(name)) is not None:
                for delta in deltas._parameters.values():
                    if delta is not None and delta.is_leaf:  # FSDP's views are none
                        delta.requires_grad_(trainable)
                self._trainable = self._trainable | {name} if trainable else self._trainable - {name}

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Enable or disable training of adapters, their statistics included."""
        names = {adapter_names} if isinstance(adapter_names, str) else {*adapter_names}
        self._train(names, requires_grad)
        names = names & {*self.surgical_stats} - self._held
        self._movable = self._movable | names if requires_grad else self._movable - names

    def enable_adapters(self, enabled: bool) -> None:
        """Toggle all adapters. Disabling shows the base, so a merged adapter is taken out first, as in PEFT."""
        if enabled:
            self.set_adapter(self._active_adapter)
        else:
            self.unmerge()
            self._train(self._trainable, False)
            self.forget()
        self._disable_adapters = not enabled

    def forget(self) -> None:
        """Empty what the owners computed from their tensors and kept, as timm's LeViT does with its biases."""
        for module in [module for key in self._sites for module, _ in self.sites(key)]:
            for attribute, kept in vars(module).items():
                if attribute.endswith("_cache") and isinstance(kept, dict):
                    kept.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this module."""
        super().delete_adapter(adapter_name)
        self._movable, self._trainable = self._movable - {adapter_name}, self._trainable - {adapter_name}

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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The base class looks for one `weight`; here each tensor follows its own base.
        for container in (self.surgical_delta, self.surgical_stats):
            if adapter_name not in container:
                continue
            for key, value in (*container[adapter_name]._parameters.items(), *container[adapter_name]._buffers.items()):
                target = self.base_tensor(key).device if device is None else device
                if value is not None and not value.is_meta and value.device != target:
                    value.data = value.data.to(target)

    def extra_repr(self) -> str:
        """The adapters and what they bring."""
        return ", ".join(f"{name}: {' '.join(self.keys_of(name))}" for name in self.surgical_delta)
