"""The one table of PEFT's tests that cannot pass, with the reason; nothing else may fail.

`EXPECTED` rows are run and have to fail, all of them: a row whose test starts to pass is an error too. `OUT_OF_SCOPE`
rows ask for what only LoRA has, and are not run. `ANY_BASE` rows load an adapter onto another base than it was made on
(an unseeded one, another dtype), which is refused by default, so they run with ``strict_base=False``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Tests whose name matches a pattern, and why they are listed.

    Attributes:
        module: PEFT's test module.
        pattern: Regular expression, searched in ``Class::test[parameters]``.
        reason: One line.
    """

    module: str
    pattern: str
    reason: str

    def matches(self, name: str) -> bool:
        """Whether the test ``module::Class::test[parameters]`` is among the row's."""
        module, _, rest = name.partition("::")
        return module == self.module and re.search(self.pattern, rest) is not None


# PEFT's test module -> how many of its tests have to pass at least. Only tests that touch a surgical adapter count, so
# without a floor a case that no longer reaches them would go unnoticed.
MODULES = {
    "test_custom_models": 2000,
    "test_decoder_models": 490,
    "test_encoder_decoder_models": 140,
    "test_feature_extraction_models": 115,
    "test_seq_classifier": 55,
    "test_token_classification_qa": 16,
    "test_vision_models": 2,
    "test_low_level_api": 28,
    "test_tuners_utils": 88,
    "test_initialization": 24,
    "test_other": 25,
    "test_config": 25,
    "test_auto": 14,
    "test_mapping": 3,
    "test_hub_features": 2,
    "test_mixed": 0,
}

ADAPTER_NAME = "an adapter called like a part of a tensor's path is refused: PEFT would drop tensors on saving"
BIAS = "counts LoRA's tensors: a module's bias has a delta too"
COMBINED = "combination by SVD or concatenation is of LoRA's factors; deltas are added"
EMBEDDING = "base tensors never go into the adapter file"
FLAT = "a module that sees flattened tokens cannot tell samples apart: refused, not guessed"
FSDP1 = "FSDP1 takes parameters out of their modules: not supported; FSDP2 is"
GIVEN = "target_modules stay as they were given, a list; tensor_names says what they resolved to"
IN_PLACE = "asks a module for a wrapper's attributes: nothing is wrapped, the deltas lie beside the tensors"
LORA = "about LoRA's own features, layers or numbers"
MIXED_MODEL = "PeftMixedModel takes a fixed list of methods and says so"
PICKLE = "saved as safetensors only: a pickle can run code when it is read"
READ = "asks for a tuned tensor as a Parameter: reading it gives base + delta"
STRICT = "a base with other values, shapes or dtype is refused by its fingerprint"
TIED = "PEFT's test writes a state dict with shared tensors, which safetensors refuse: the tie outlives merging"
TUNED = "wants an embedding without gradient, while the embedding is what is tuned"
REPEATS = "a tied embedding with ten times the noise repeats its input, so PEFT's two adapters generate the same"
BEAMS = "beam search of an encoder-decoder: refused, the encoder sees its samples unrepeated"
WHOLE = "modules_to_save are no deltas and are not combined"
WORDING = "raises or warns too, in other words"

OUT_OF_SCOPE = [
    Row("test_custom_models", "TestDynamicDispatch|TestLayerRepr|TestMultiRankAdapter|TestDefaultTargetModules", LORA),
    Row("test_custom_models", "trainable_token", LORA),
    Row("test_tuners_utils", "TestRankAndAlphaPattern|target_parameters|nb_params|requires_grad.*_irregular", LORA),
    Row("test_tuners_utils", "test_module_matching_lora|test_model_status_with_mod|test_model_with_injected", LORA),
    Row("test_config", "TestLoraNestedConfig|layers_to_transform_val|runtime_config|cache_dir|regex_with_layer", LORA),
    Row("test_low_level_api", "stable_diffusion|unsharded|target_parameters", LORA),
    Row("test_hub_features", "TestModelCard|TestBaseModelRevision", LORA),
    Row("test_initialization", r"^Test(?!NoInfin|LoadAdapterOff|CustomModelConfig|LowCpu|Naming)", LORA),
]
ANY_BASE = [
    Row("test_custom_models", "TestRequiresGrad::test_loading", STRICT),
    Row("test_auto", "TestPeftAutoModel", STRICT),
]
EXPECTED = [
    Row("test_custom_models", "test_save_pretrained_pickle", PICKLE),
    Row("test_custom_models", "test_save_load_roundtrip_fsdp_wrapped", FSDP1),
    Row("test_custom_models", r"test_safe_merge\[Tied", TIED),
    Row("test_custom_models", r"rejects_duplicate_name_without_mutation\[True", MIXED_MODEL),
    Row("test_custom_models", r"to_embedding_layer(_non_transformers)?\[.*True\]|similarly_named_sibling", EMBEDDING),
    Row("test_custom_models", r"to_embedding_layer\[.*auto\]", EMBEDDING),
    Row("test_custom_models", r"with_different_scaling\[(cat|svd|\w+_svd)-", COMBINED),
    Row("test_custom_models", "modules_to_save_merging_adapters", WHOLE),
    Row("test_custom_models", "test_mixed_adapter_batches_mha_raises", WORDING),
    Row("test_custom_models", "test_ignore_mismatched_sizes|test_load_resized_embedding", STRICT),
    Row("test_custom_models", "test_mha_gradients_set_correctly", IN_PLACE),
    Row("test_custom_models", "test_loading_adapter_preserves_custom_requires_grad", READ),
    Row("test_decoder_models", "pickle", PICKLE),
    Row("test_decoder_models", "test_prepare_for_training.*config_kwargs1", TUNED),
    Row("test_decoder_models", "mixed_adapter_batches.*config_kwargs[02].*OPT", FLAT),
    Row("test_decoder_models", "generate_with_mixed_adapter_batches.*config_kwargs1.*(Gemma3|GPT2)", REPEATS),
    Row("test_decoder_models", "test_lora_embed_scale_is_applied_mixed_batch", IN_PLACE),
    Row("test_decoder_models", r"lora_to_embedding_layer\[peft_config\d-(True|auto)", EMBEDDING),
    Row("test_encoder_decoder_models", "pickle", PICKLE),
    Row("test_encoder_decoder_models", "test_prepare_for_training.*config_kwargs2", TUNED),
    Row("test_encoder_decoder_models", "test_mixed_adapter_batches.*config_kwargs[01].*T5", FLAT),
    Row("test_encoder_decoder_models", "test_generate_with_mixed_adapter_batches.*kwargs[01].*T5", BEAMS),
    Row("test_feature_extraction_models", "test_prepare_for_training.*config_kwargs1", TUNED),
    Row("test_seq_classifier", "pickle", PICKLE),
    Row("test_seq_classifier", "test_prepare_for_training.*config_kwargs1", TUNED),
    Row("test_low_level_api", "adapter_name_(when_)?same_as_module_name", ADAPTER_NAME),
    Row("test_low_level_api", "test_inject_from_state_dict_(extra|missing)_keys_warning", WORDING),
    Row("test_tuners_utils", "test_warn_for_tied_embeddings_merge", WORDING),
    Row("test_tuners_utils", "second_adapter_only_modules_to_save", WORDING),
    Row("test_tuners_utils", "test_get_peft_model_applies_find_target_modules", GIVEN),
    Row("test_tuners_utils", "test_mixed_model_raises", MIXED_MODEL),
    Row("test_tuners_utils", "test_add_second_adapter_with_all_linear_works", IN_PLACE),
    Row("test_tuners_utils", "test_prefixes_select_correct_state_dict_keys", BIAS),
    Row("test_initialization", "test_from_pretrained_missing_keys_warning", WORDING),
    Row("test_initialization", "test_mixed_model_from|PeftMixedModel", MIXED_MODEL),
    Row("test_other", "test_targeting_module_to_save_raises|targets_tuner_layer_raises", WORDING),
    Row("test_config", "test_save_pretrained_with_target_modules", GIVEN),
    Row("test_config", "test_from_pretrained_sanity_check", WORDING),
    Row("test_mixed", "", MIXED_MODEL),
]

# What runs in one process.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("test_custom_models",),
    ("test_decoder_models",),
    (
        "test_encoder_decoder_models",
        "test_feature_extraction_models",
        "test_seq_classifier",
        "test_token_classification_qa",
    ),
    (
        "test_low_level_api",
        "test_vision_models",
        "test_tuners_utils",
        "test_initialization",
        "test_other",
        "test_config",
        "test_auto",
        "test_mapping",
        "test_hub_features",
        "test_mixed",
    ),
)
