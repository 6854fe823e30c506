"""`SurgicalModel`: the tuner that PEFT's front door drives."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import init_empty_weights
from peft.utils.other import set_additional_trainable_modules
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn

from ..config import SurgicalConfig
from ..errors import AdapterError, SurgicalError
from ..keys import BASE_MARKS, PREFIX, tensor_name
from .attach import attach, detach, surgical_layers, without_base_layer
from .base import recorded_base, warn_of_unfrozen
from .by_name import KnownByName
from .combine import Combination, config_of_combination, fill_combined
from .layer import SurgicalLayer
from .loading import checked_state, set_scale
from .mixed import mixed_batch
from .plan import Plan, check_fingerprint, fingerprint_of, make_plan
from .saving import whole_state
from .specialise import hold_buffers
from .support import check_adapter_name
from .switch import Switching, alone


class SurgicalModel(KnownByName, Switching, BaseTuner):
    """Tunes the targeted tensors of any network through live deltas; everything else is frozen.

    Made by `peft.get_peft_model` and friends from a `SurgicalConfig`. It changes the base in place until ``unload()``
    and, unlike PEFT's other tuners, replaces no module: see `layer`. A ``state_dict`` says by its keys which tensors
    are tuned, in place of the config.
    """

    prefix, tuner_layer_cls = PREFIX, SurgicalLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # PEFT's __init__ adds the first adapter, so these are needed before it.
        # Adapter -> fingerprint of its base, taken while that was whole; of several processes' adapters only.
        self._fingerprints: dict[str, dict[str, str] | None] = {}
        # Adapters whose config was read from disk and whose weights come next: refused weights take them along.
        self._awaiting: set[str] = set()
        # Whether a training forward has looked for what was unfrozen by hand.
        self._looked = False
        super().__init__(*args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Plan, check, then attach; see BaseTuner. A refused adapter leaves the model as it was.

        Takes the place of PEFT's method, whose loop replaces modules by their paths: it passes over the root, whose
        tensors can be tuned too, and changes the model before all of it has been checked. What else PEFT's method does
        (0.21.2) is done by the same calls here and in `_attach`: converting configs for transformers 5, checking new
        configs, activating, freezing, ``modules_to_save``, and keeping trainability where other adapters exist. Not
        needed are LoRA's fields, default targets of an architecture, the check of tied modules (one delta serves all
        that share a tensor), and messages about what matched, which are the plan's.
        """
        config = self.peft_config[adapter_name]
        if hasattr(getattr(model, "config", None), "model_type"):
            convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
        self._check_new_adapter_config(config)
        if state_dict is None:
            with alone(model):
                self._inject(model, adapter_name, make_plan(model, config), low_cpu_mem_usage)
            return
        configured = {*make_plan(model, config).names}
        plan = make_plan(model, config, [name for key in state_dict if (name := tensor_name(key)) is not None])
        self._inject(model, adapter_name, plan, low_cpu_mem_usage)
        if configured != {*plan.names}:
            warnings.warn(
                f"The state_dict holds deltas for {len(plan.names)} tensors, the config targets {len(configured)}: the "
                "state_dict decides.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _inject(self, model: nn.Module, adapter: str, plan: Plan, empty: bool = False) -> None:
        config = self.peft_config[adapter]
        check_adapter_name(adapter, self.peft_config, model, plan.names)
        marks = recorded_base(model)
        check_fingerprint(plan, config, marks)
        tuned_already = any(True for _ in surgical_layers(model))
        known = {parameter: parameter.requires_grad for parameter in model.parameters()} if tuned_already else {}
        self._awaiting.discard(adapter)
        if config.base_fingerprint is not None:  # as in a config that was read from disk
            self._awaiting.add(adapter)
        config.tensor_names = list(plan.names)
        try:
            self._attach(model, adapter, plan, config, empty)
        except BaseException:
            self._remove(model, adapter)
            raise
        model.__dict__[BASE_MARKS] = marks
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not empty:
            # They may shard the base. Trainer then lets one of them save, which could not ask the others for theirs.
            self._fingerprints[adapter] = fingerprint_of(model, config)
        for parameter, requires_grad in known.items():
            parameter.requires_grad = requires_grad

    def _attach(self, model: nn.Module, adapter: str, plan: Plan, config: SurgicalConfig, empty: bool) -> None:
        with init_empty_weights() if empty else nullcontext():
            hold, double = config.norm_stats == "estimated", config.delta_dtype == "float64"
            for e in plan.modules:
                attach(e.module, adapter, e.parameters, e.statistics, config.scale, hold, double)
        hold_buffers(model)
        paths = [entry.path for entry in plan.modules if entry.path]
        self.targeted_module_names.extend(path for path in paths if path not in self.targeted_module_names)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter,
            activate_adapter=adapter in self.active_adapters,
        )

    def _remove(self, model: nn.Module, adapter: str) -> None:
        """Take an adapter out again, and with the last one every trace of the tuner."""
        self.peft_config.pop(adapter, None)
        for _, layer in list(surgical_layers(model)):
            layer.delete_adapter(adapter)
        if not self.peft_config:
            detach(model)
            if hasattr(model, "peft_config"):
                del model.peft_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("inject_adapter replaces no module")

    def _check_tied_modules(self, model: nn.Module, peft_config: SurgicalConfig) -> None:
        # A tied tensor has one delta, which all its modules read: there is nothing to warn about.
        return

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in surgical_layers(self.model):
            if adapter_name in layer.surgical_delta:
                for key, delta in layer.surgical_delta[adapter_name].named_parameters():
                    delta.data = delta.data.to(layer.base_tensor(key).dtype)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply an adapter's deltas by ``scale`` from now on: 0.0 is exactly the base, 1.0 exactly the tuned model.

        In between lies WiSE-FT (Wortsman et al. 2022, eq. 1). Saved with the adapter.

        Raises:
            AdapterError: For an unknown or merged adapter, or a scale that is not finite or gives tensors that are not.
        """
        if adapter_name not in self.peft_config:
            raise AdapterError(f"No adapter {adapter_name!r}; there are {', '.join(self.peft_config)}.")
        set_scale(self.model, adapter_name, scale)
        self.peft_config[adapter_name].scale = float(scale)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.model.training and not self._looked and not torch.compiler.is_compiling():
            self._looked = True
            warn_of_unfrozen(self.model)
        names = kwargs.pop("adapter_names", None)
        routed = nullcontext() if names is None else mixed_batch(self.model, names, [*self.peft_config], args, kwargs)
        with routed:
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base; see BaseTuner. ``safe_merge`` checks all tensors before it changes one."""
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=False)

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        for _, layer in surgical_layers(self.model):
            layer.check_finite(adapter_names or list(layer._active_adapter))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_finite(adapter_names)
        for _, layer in surgical_layers(self.model):
            layer.merge(adapter_names=adapter_names) if merge else layer.unmerge()
        detach(self.model)
        # What is left for PEFT: the wrappers of modules_to_save, and its own bookkeeping.
        with without_base_layer(self.model):
            return super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Combine adapters into a new one, by arithmetic on their deltas.

        A tensor that only some of the adapters tune is combined from those. The adapters, their weights and the
        method are recorded in the new adapter's ``selection``.

        Args:
            adapters: Names of the adapters.
            weights: One factor per adapter, times its own scale; a negative one negates it.
            adapter_name: Name of the new adapter.
            combination_type: The method; see `Combination` for it and for the arguments below.
            density: Share of the values to keep, in (0, 1]; needed by all but linear and disjoint.
            majority_sign_method: How ties elects a sign: "total" or "frequency".
            seed: Seed of the draw of what dare drops.

        Raises:
            AdapterError: For unknown names or choices, unequal lengths, a missing density, adapters with statistics,
                or a result that is not finite. The model is then as it was.
        """
        how = Combination(combination_type, density, majority_sign_method, seed)
        config = config_of_combination(self.peft_config, adapters, weights, adapter_name, how)
        self.peft_config[adapter_name] = config
        try:
            self._inject(self.model, adapter_name, make_plan(self.model, config, config.tensor_names))
            fill_combined(surgical_layers(self.model), adapter_name, adapters, weights, how)
        except BaseException:
            self._remove(self.model, adapter_name)
            raise

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT maps both ways through this, so an adapter made on a compiled network loads onto a plain one and back.
        return super()._remove_adapter_name_from_key(key, adapter_name).replace("_orig_mod.", "")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SurgicalConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        tuner = getattr(model, "base_model", None)
        inner, taken = getattr(tuner, "model", model), getattr(tuner, "_fingerprints", {}).get(adapter_name)
        sharded = any(hasattr(value, "full_tensor") for value in inner.parameters())
        config.measured_fingerprint = taken if sharded and taken else fingerprint_of(inner, config)
        return whole_state(found, config, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SurgicalConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        try:
            found = checked_state(remapped, model, adapter_name, config)
        except SurgicalError:
            if isinstance(tuner, SurgicalModel) and adapter_name in tuner._awaiting:
                tuner._remove(tuner.model, adapter_name)
            raise
        getattr(tuner, "_awaiting", set()).discard(adapter_name)
        return found
