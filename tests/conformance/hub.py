"""A stand-in for the Hub: tiny random models under the ids that PEFT's tests load, in a local cache.

The ids are PEFT's; the networks are made here from configs, with random weights, so nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from transformers import PretrainedConfig

from peft_surgical import SurgicalConfig

COMMIT = "0" * 40
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _config(name: str, **values: object) -> PretrainedConfig:
    return getattr(transformers, name)(**values)


def _opt(layers: int = 5) -> PretrainedConfig:
    return _config(
        "OPTConfig",
        vocab_size=128,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=100,
        init_std=0.1,
        **TOKENS,
    )


def _gpt2() -> PretrainedConfig:
    return _config(
        "GPT2Config", vocab_size=128, n_embd=32, n_layer=5, n_head=4, n_positions=100, initializer_range=0.1, **TOKENS
    )


def _llama(name: str = "LlamaConfig", **values: object) -> PretrainedConfig:
    tokens = {**SMALL, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 100, "initializer_range": 0.1}
    return _config(name, **{**tokens, **values})


def _bert(name: str = "BertConfig", **values: object) -> PretrainedConfig:
    return _config(name, **SMALL, max_position_embeddings=100, initializer_range=0.1, pad_token_id=0, **values)


def _bart() -> PretrainedConfig:
    return _config(
        "BartConfig",
        vocab_size=128,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4,
        decoder_ffn_dim=4,
        max_position_embeddings=100,
        init_std=0.2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **TOKENS,
    )


def _t5() -> PretrainedConfig:
    return _config(
        "T5Config",
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=3,
        num_heads=4,
        initializer_factor=0.5,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


def _resnet() -> PretrainedConfig:
    return _config("ResNetConfig", embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3)


def _clip_text() -> PretrainedConfig:
    return _config("CLIPTextConfig", **SMALL, max_position_embeddings=77, **TOKENS)


def _whisper() -> PretrainedConfig:
    return _config(
        "WhisperConfig",
        vocab_size=128,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=60,
        max_target_positions=40,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **TOKENS,
    )


MODELS: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _opt),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", lambda: _opt(12)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _gpt2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _gpt2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _gpt2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        lambda: _config(
            "GPTJConfig",
            vocab_size=128,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=100,
            rotary_dim=4,
            initializer_range=0.1,
            **TOKENS,
        ),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _llama),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _llama),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _llama),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", lambda: _llama("Qwen2Config")),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", lambda: _llama("Qwen3Config", head_dim=8)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", lambda: _llama("MistralConfig")),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        lambda: _llama("Gemma3TextConfig", head_dim=8),
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        lambda: _config("BloomConfig", vocab_size=128, hidden_size=32, n_layer=5, n_head=4, **TOKENS),
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        lambda: _config("GPTNeoXConfig", **SMALL, max_position_embeddings=100, **TOKENS),
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _bert),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", _bert),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", lambda: _bert("RobertaConfig")),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        lambda: _bert("DebertaConfig", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", lambda: _bert("DebertaV2Config")),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _bert),
    "bert-base-uncased": ("BertForSequenceClassification", _bert),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        lambda: _bert("RobertaConfig"),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _bart),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _t5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _t5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _t5),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": ("ResNetForImageClassification", _resnet),
    "peft-internal-testing/tiny-OPTForSequenceClassification": ("OPTForSequenceClassification", _opt),
    "peft-internal-testing/tiny-OPTForQuestionAnswering": ("OPTForQuestionAnswering", _opt),
    "peft-internal-testing/tiny-OPTModel": ("OPTModel", _opt),
    "peft-internal-testing/tiny-GPT2ForTokenClassification": ("GPT2ForTokenClassification", _gpt2),
    "peft-internal-testing/tiny-Whisper": ("WhisperForConditionalGeneration", _whisper),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModel", _clip_text),
}

# Adapters of PEFT's tests -> (base, task, target); on the Hub they are LoRA, here surgical.
ADAPTERS: dict[str, tuple[str, str | None, str]] = {
    "peft-internal-testing/tiny-opt-lora-revision": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "CAUSAL_LM",
        "block1",
    ),
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "CAUSAL_LM",
        "block1",
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        "peft-internal-testing/tiny-random-t5",
        "SEQ_2_SEQ_LM",
        "encoder.block1",
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "peft-internal-testing/tiny-OPTForSequenceClassification",
        "SEQ_CLS",
        "block1",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "peft-internal-testing/tiny-GPT2ForTokenClassification",
        "TOKEN_CLS",
        "block1",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        "peft-internal-testing/tiny-OPTForQuestionAnswering",
        "QUESTION_ANS",
        "block1",
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        "peft-internal-testing/tiny-OPTModel",
        "FEATURE_EXTRACTION",
        "block1",
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "peft-internal-testing/tiny-Whisper",
        None,
        "encoder.block1",
    ),
}


def make_hub(home: Path) -> None:
    """Write all of `MODELS` and `ADAPTERS` below ``home``, to be used as HF_HOME."""
    folders = {model_id: _snapshot(home, model_id) for model_id in (*MODELS, *ADAPTERS)}
    for model_id, (architecture, config) in MODELS.items():
        torch.manual_seed(0)
        getattr(transformers, architecture)(config()).save_pretrained(folders[model_id])
        if architecture == "ResNetForImageClassification":
            transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folders[model_id])
    for adapter_id, (base_id, task, target) in ADAPTERS.items():
        base = getattr(transformers, MODELS[base_id][0]).from_pretrained(folders[base_id])
        base.name_or_path = base.config._name_or_path = base_id
        config = SurgicalConfig(target=target, task_type=task, base_model_name_or_path=base_id)
        get_peft_model(base, config).save_pretrained(folders[adapter_id])


def _snapshot(home: Path, model_id: str) -> Path:
    """An empty snapshot of a repository, under the revisions that PEFT's tests ask for."""
    root = home / "hub" / f"models--{model_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    for revision in ("main", "test"):
        (root / "refs" / revision).write_text(COMMIT)
    return root / "snapshots" / COMMIT
