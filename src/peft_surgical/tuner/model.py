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
from ..errors import AdapterError, AdapterFileError
from ..files import check_tensors
from ..keys import HOLDER
from ..norm import hold_statistics
from .attach import attach, detach, join, surgical_layers
from .combine import Combination, check_combination, check_disjoint, combine_tensor, combined_config
from .layer import SurgicalLayer
from .mixed import mixed_batch
from .plan import Plan, check_fingerprint, fingerprint_of, make_plan
from .support import check_adapter_name

PREFIX = "surgical_"


class SurgicalModel(BaseTuner):
    """Tunes the targeted tensors of any network through live deltas; everything else is frozen.

    Made by `peft.get_peft_model` and friends from a `SurgicalConfig`. Unlike PEFT's other tuners it replaces no
    module: see `layer`.

    Args:
        model: The base, changed in place until ``unload()``.
        peft_config: One config, or adapter name -> config.
        adapter_name: Name of the adapter to add.
        low_cpu_mem_usage: Make the deltas on the meta device, to be filled by loading.
        state_dict: Take the tuned tensors from the keys of this instead of the config.
    """

    prefix = PREFIX
    tuner_layer_cls = SurgicalLayer
    target_module_mapping: dict[str, list[str]] = {}

    @property
    def _given_names(self) -> dict[str, list[str]]:
        """Adapter -> tensor names that a combination has decided already, until it is injected."""
        return self.__dict__.setdefault("_names_to_inject", {})

    @property
    def _fingerprints(self) -> dict[str, dict[str, str] | None]:
        """Adapter -> fingerprint of its base, taken while that was whole; of several processes' adapters only."""
        return self.__dict__.setdefault("_fingerprints_taken", {})

    @property
    def _awaiting(self) -> set[str]:
        """Adapters whose config was read from disk and whose weights come next: refused weights take them along."""
        return self.__dict__.setdefault("_awaiting_weights", set())

    # --- adding an adapter ---

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
        tensors can be tuned too, and changes the model before all of it has been checked. The rest of what PEFT's
        method does (0.21.2) is done here or needs nothing:

        - Converting the config of a model whose architecture changed in transformers 5: by PEFT's own function.
        - `_check_new_adapter_config`, and trainability kept where other adapters exist: the same.
        - `_check_tied_modules`: one delta serves all modules that share a tensor.
        - `_prepare_adapter_config`: this method has no default targets for an architecture.
        - `target_parameters`, `rank_pattern`, `alpha_pattern`, placeholder targets: LoRA's fields.
        - Condensing long lists of ``target_modules``: the plan looks each name up once.
        - Warnings and errors about what matched: the plan's.
        - Activating, freezing, ``modules_to_save``: the same calls, in `_attach`.
        """
        config = self.peft_config[adapter_name]
        if hasattr(getattr(model, "config", None), "model_type"):
            convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
        self._check_new_adapter_config(config)
        names = _names_in(state_dict) if state_dict is not None else self._given_names.pop(adapter_name, None)
        plan = make_plan(model, config, names)
        self._check_names(model, plan, config, adapter_name)
        check_fingerprint(plan, config)
        if state_dict is not None:
            _warn_about_other_targets(model, config, plan)

        known = dict(_trainability(model)) if any(True for _ in surgical_layers(model)) else {}
        self._awaiting.discard(adapter_name)
        if config.base_fingerprint is not None:  # as in a config that was read from disk
            self._awaiting.add(adapter_name)
        config.tensor_names = list(plan.names)
        self._attach(model, adapter_name, plan, config, low_cpu_mem_usage)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not low_cpu_mem_usage:
            # They may shard the base. Trainer then lets one of them save, which could not ask the others for theirs.
            self._fingerprints[adapter_name] = fingerprint_of(model, config)
        for parameter, requires_grad in known.items():
            parameter.requires_grad = requires_grad

    def _attach(self, model: nn.Module, adapter: str, plan: Plan, config: SurgicalConfig, empty: bool) -> None:
        try:
            with init_empty_weights() if empty else nullcontext():
                for entry in plan.modules:
                    attach(entry.module, adapter, entry.parameters, entry.statistics, config.scale)
            hold_statistics(model)
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
        except BaseException:
            self._remove(model, adapter)
            raise

    def _check_names(self, model: nn.Module, plan: Plan, config: SurgicalConfig, adapter: str) -> None:
        saved = [name for other in self.peft_config.values() for name in (getattr(other, "tensor_names", None) or ())]
        whole = tuple(name for other in self.peft_config.values() for name in (other.modules_to_save or ()))
        paths = [path for path, _ in model.named_modules() if whole and path.endswith(whole)]
        check_adapter_name(adapter, self.peft_config, [*plan.names, *saved, *paths])

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

    # --- switching, scaling ---

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply an adapter's deltas by ``scale`` from now on: 0.0 is exactly the base, 1.0 exactly the tuned model.

        In between lies WiSE-FT (Wortsman et al. 2022, eq. 1). Saved with the adapter.

        Raises:
            AdapterError: For an unknown adapter, a scale that is not finite, or while the adapter is merged.
        """
        if adapter_name not in self.peft_config:
            raise AdapterError(f"No adapter {adapter_name!r}; there are {', '.join(self.peft_config)}.")
        set_scale(self.model, adapter_name, scale)
        self.peft_config[adapter_name].scale = float(scale)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        size = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if size is not None and size != len(names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {size} respectively."
            )
        beams = kwargs.get("num_beams") or 1
        with mixed_batch(self.model, names, list(self.peft_config), beams):
            yield

    # --- merging ---

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
        if merge:
            if safe_merge:
                self._check_finite(adapter_names)
            for _, layer in surgical_layers(self.model):
                layer.merge(adapter_names=adapter_names)
        else:
            for _, layer in surgical_layers(self.model):
                layer.unmerge()
        detach(self.model)
        # What is left for PEFT: the wrappers of modules_to_save, and its own bookkeeping.
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    # --- combining ---

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
        """Combine adapters into a new one. Deltas are task vectors, so this is task arithmetic on them.

        A tensor that only some of the adapters tune is combined from those. The adapters, their weights and the
        method are recorded in the new adapter's ``selection``.

        Args:
            adapters: Names of the adapters.
            weights: One factor per adapter, times its own scale; a negative one negates it.
            adapter_name: Name of the new adapter.
            combination_type: The method; see `Combination`, also for what follows.
            density: Share of the values to keep, in (0, 1]; needed by all but linear and disjoint.
            majority_sign_method: How ties elects a sign: "total" or "frequency".
            seed: Of the values that dare drops.

        Raises:
            AdapterError: For unknown names or choices, unequal lengths, a missing density, adapters with statistics,
                or a result that is not finite. The model is then as it was.
        """
        how = Combination(combination_type, density, majority_sign_method, seed)
        check_combination(self.peft_config, adapters, weights, adapter_name)
        configs = [self.peft_config[name] for name in adapters]
        check_disjoint([config.tensor_names for config in configs], how)
        names = list(dict.fromkeys(name for config in configs for name in config.tensor_names))
        rows = [
            {"adapter": name, "weight": float(weight), "scale": config.scale}
            for name, weight, config in zip(adapters, weights, configs, strict=True)
        ]
        self.peft_config[adapter_name] = combined_config(configs, names, {**how.record(), "parents": rows})
        self._given_names[adapter_name] = names
        try:
            self.inject_adapter(self.model, adapter_name)
            self._fill_combined(adapter_name, adapters, weights, how)
        except BaseException:
            self._given_names.pop(adapter_name, None)
            self._remove(self.model, adapter_name)
            raise

    @torch.no_grad()
    def _fill_combined(self, new: str, adapters: list[str], weights: list[float], how: Combination) -> None:
        for path, layer in surgical_layers(self.model):
            pairs = [(name, w) for name, w in zip(adapters, weights, strict=True) if name in layer.surgical_delta]
            for key, target in layer.surgical_delta[new].named_parameters() if pairs else ():
                present = [(name, w) for name, w in pairs if key in layer.surgical_delta[name]._parameters]
                tensors = [layer.delta(name, key).to(target.dtype) * layer.scaling[name] for name, _ in present]
                combined = combine_tensor(join(path, key), tensors, [w for _, w in present], how)
                if not bool(torch.isfinite(combined).all()):
                    raise AdapterError(f"{join(path, key)} would not be finite: choose smaller weights.")
                target.copy_(combined)

    # --- state dicts ---

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
        inner = getattr(getattr(model, "base_model", None), "model", model)
        taken = getattr(getattr(model, "base_model", None), "_fingerprints", {}).get(adapter_name)
        sharded = any(hasattr(value, "full_tensor") for value in inner.parameters())
        config.measured_fingerprint = taken if sharded and taken else fingerprint_of(inner, config)
        found = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in found.items()}
        broken = [key for key, value in found.items() if not value.is_meta and not bool(torch.isfinite(value).all())]
        if broken:
            warnings.warn(
                f"Adapter {adapter_name!r} holds NaN or Inf ({broken[0]}): the run diverged, and what is saved now "
                "will be refused on loading.",
                stacklevel=2,
            )
        if config.delta_dtype is None:
            return found
        dtype = getattr(torch, config.delta_dtype)
        deltas = f".{PREFIX}delta."
        return {key: value.to(dtype) if deltas in f".{key}" else value for key, value in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SurgicalConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        marks = (f"{HOLDER}.{PREFIX}delta.{adapter_name}.", f"{HOLDER}.{PREFIX}stats.{adapter_name}.")
        expected = {key: tuple(value.shape) for key, value in own.items() if any(mark in key for mark in marks)}
        # What belongs to modules_to_save has been given its place by PEFT already; it may be called anything.
        deltas = {key: value for key, value in remapped.items() if key not in own or key in expected}
        tuner = getattr(model, "base_model", None)
        try:
            check_tensors(deltas, expected, f"adapter {adapter_name!r}")
        except AdapterFileError:
            if isinstance(tuner, SurgicalModel) and adapter_name in tuner._awaiting:
                tuner._remove(tuner.model, adapter_name)
            raise
        if isinstance(tuner, SurgicalModel):
            tuner._awaiting.discard(adapter_name)
        return remapped


def set_scale(model: nn.Module, adapter_name: str, scale: float) -> None:
    """`SurgicalModel.set_scale` for a network that transformers' own ``load_adapter`` adapted, without a tuner."""
    if scale != scale or scale in (float("inf"), float("-inf")):
        raise AdapterError(f"scale={scale} is not a finite number: 0 is the base, 1 the tuned model.")
    layers = [layer for _, layer in surgical_layers(model) if adapter_name in layer.scaling]
    if not layers:
        raise AdapterError(f"No adapter {adapter_name!r} on this model.")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise AdapterError(f"Adapter {adapter_name!r} is merged; unmerge it, set its scale, and merge it again.")
    for layer in layers:
        layer.scaling[adapter_name] = float(scale)
        layer.forget()


def _trainability(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    for parameter in model.parameters():
        yield parameter, parameter.requires_grad


def _names_in(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The full names of the tensors for which a state dict has deltas or statistics."""
    names = []
    for key in state_dict:
        path, mark, rest = (
            key.removeprefix("base_model.model.").removeprefix("_orig_mod.").rpartition(f"{HOLDER}.{PREFIX}")
        )
        if mark:
            names.append(join(path.removesuffix("."), rest.rpartition(".")[2]))
    return names


def _warn_about_other_targets(model: nn.Module, config: SurgicalConfig, plan: Plan) -> None:
    configured = set(make_plan(model, config).names)
    if configured != set(plan.names):
        warnings.warn(
            f"The state_dict holds deltas for {len(plan.names)} tensors, the config targets {len(configured)}: the "
            "state_dict decides.",
            RuntimeWarning,
            stacklevel=2,
        )
