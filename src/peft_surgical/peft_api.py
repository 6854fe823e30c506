"""What this package relies on inside PEFT, compared with the installed PEFT before anything of it is used.

PEFT has no public interface for a method that lives outside its own tree: the tuner overrides hooks and calls helpers
that PEFT may change in any minor version. A PEFT that differs is refused while this package is imported, in words,
instead of failing later inside PEFT or saving something else in silence.

A new minor version of PEFT needs three steps: change `SUPPORTED` and the same bound in pyproject.toml, run
``make test-all``, and correct what the tests find.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping

import peft

SUPPORTED = "peft>=0.21.1,<0.22"
"""The versions of PEFT that this package is tested with, as an installer takes them."""

_TABLE = """
# The mappings from the name of a method to its classes, into which `register` writes.
peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING
peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING
peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING
# Helpers and classes.
peft.tuners.tuners_utils:BaseTuner(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
peft.tuners.tuners_utils:BaseTunerLayer
peft.tuners.tuners_utils:_get_in_out_features(module)
peft.tuners.tuners_utils:_maybe_include_all_linear_layers(peft_config, model)
peft.tuners.tuners_utils:check_adapters_to_merge(module, adapter_names)
peft.utils:INCLUDE_LINEAR_LAYERS_SHORTHAND
peft.utils:SAFETENSORS_WEIGHTS_NAME
peft.utils:TaskType
peft.utils:merge_utils
peft.utils.error:NoMatchingPeftModuleError
peft.utils.integrations:init_empty_weights(include_buffers)
peft.utils.merge_utils:calculate_majority_sign_mask(tensor, method)
peft.utils.merge_utils:disjoint_merge(task_tensors, majority_sign_mask)
peft.utils.merge_utils:prune(tensor, density, method, rescale)
peft.utils.merge_utils:reshape_weight_task_tensors(task_tensors, weights)
peft.utils.merge_utils:task_arithmetic(task_tensors, weights)
peft.utils.transformers_weight_conversion:get_model_conversion_mapping
peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers
peft.utils.other:AuxiliaryTrainingWrapper
peft.utils.other:AuxiliaryTrainingWrapper.set_adapter(self, adapter_names, inference_mode)
peft.utils.other:ModulesToSaveWrapper
peft.utils.other:_set_adapter(model, adapter_name, inference_mode)
peft.utils.other:set_additional_trainable_modules(model, peft_config, model_config, adapter_name, activate_adapter)
# Methods of BaseTuner that `SurgicalModel` overrides.
{tuner}.inject_adapter(self, model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
{tuner}._cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype)
{tuner}._check_tied_modules(self, model, peft_config)
{tuner}._enable_adapter_layers(self, enabled)
{tuner}._create_and_replace()
{tuner}._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
{tuner}._get_tied_target_modules(self, model)
{tuner}._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
{tuner}._remove_adapter_name_from_key(key, adapter_name)
{tuner}._unload_and_optionally_merge(self, merge, progressbar, safe_merge, adapter_names)
{tuner}.merge_adapter(self, adapter_names, safe_merge)
{tuner}.set_adapter(self, adapter_name, inference_mode)
# Methods of BaseTuner that it calls.
{tuner}._check_new_adapter_config(self, config)
{tuner}._mark_only_adapters_as_trainable(self, model)
{tuner}.active_adapters
{tuner}.get_model_config(model)
{tuner}.disable_adapter_layers(self)
{tuner}.enable_adapter_layers(self)
# What PeftModel calls around every forward; a tuner that defines it may route samples to adapters.
peft:PeftModel._enable_peft_forward_hooks(self, args, kwargs)
# Methods of BaseTunerLayer that `SurgicalLayer` overrides.
{layer}._move_adapter_to_device_of_base_layer(self, adapter_name, device)
{layer}.adapter_layer_names
{layer}.delete_adapter(self, adapter_name)
{layer}.enable_adapters(self, enabled)
{layer}.get_base_layer(self)
{layer}.merge(self, safe_merge, adapter_names)
{layer}.other_param_names
{layer}.set_adapter(self, adapter_names, inference_mode)
{layer}.set_requires_grad(self, adapter_names, requires_grad)
{layer}.unmerge(self)
# Methods of PeftConfig that `SurgicalConfig` overrides, and methods of PeftModel that `register` wraps.
peft:PeftConfig.from_json_file(path_json_file, kwargs)
peft:PeftConfig.from_pretrained(pretrained_model_name_or_path, subfolder, kwargs)
peft:PeftConfig.save_pretrained(self, save_directory, kwargs)
peft:PeftConfig.to_dict(self)
peft:PeftModel.create_or_update_model_card(self, output_dir)
peft:PeftModel.disable_adapter(self)
peft:PeftModel.load_adapter(self, model_id, adapter_name)
peft:PeftModel.push_to_hub(self, repo_id, commit_message, private, token, revision, create_pr)
peft:PeftModel.save_pretrained(self, save_directory, safe_serialization, save_embedding_layers, is_main_process, kwargs)
""".format(tuner="peft.tuners.tuners_utils:BaseTuner", layer="peft.tuners.tuners_utils:BaseTunerLayer")


def _rows(table: str) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    for line in table.split("\n"):
        name, call, parameters = line.removesuffix(")").partition("(")
        if name and not name.startswith("#"):
            yield name, tuple(parameters.split(", ") if parameters else ()) if call else None


RELIED_ON: Mapping[str, tuple[str, ...] | None] = dict(_rows(_TABLE))
"""``module:name`` -> the parameters that this package passes or takes; None for what is not called."""


def check_peft() -> None:
    """Compare the installed PEFT with what this package relies on.

    Raises:
        ImportError: Something is missing, or takes other parameters. Names it, and the versions to install.
    """
    differences = [text for name, wanted in RELIED_ON.items() if (text := _difference(name, wanted))]
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise ImportError(
            f"peft_surgical does not work with the installed peft {peft.__version__}: {differences[0]}{more}. Install "
            f"a version that it is tested with: pip install '{SUPPORTED}'"
        )


def _difference(name: str, wanted: tuple[str, ...] | None) -> str:
    """How the installed PEFT differs in the thing called ``name``, or "" where it does not."""
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return f"{module} has no {path}"
    if wanted is None:
        return ""
    parameters = inspect.signature(found).parameters  # type: ignore[arg-type]
    if missing := [parameter for parameter in wanted if parameter not in parameters]:
        return f"{path} takes no {' and no '.join(missing)}"
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    new = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in optional]
    if wanted and (unknown := [parameter for parameter in new if parameter not in wanted]):
        return f"{path} requires {' and '.join(unknown)}"
    return ""
