"""The check of whole zoos (`benchmarks/zoo.py`): what it finds wrong, and networks that were cut wrongly once."""

import dataclasses
import json
import warnings

import pytest
import torch
import transformers
from scripts import script
from tiny import ConvNet
from torch import nn

from peft_surgical import anatomy_of

zoo = script("benchmarks", "zoo.py")
# Class -> the blocks that hold certain tensors.
TEXT = {
    # The classifier is registered before the trunk, and what precedes it inside the head is no part of it.
    "XLMRobertaForSequenceClassification": {"head": "classifier.out_proj", "block2": "classifier.dense"},
    "XLMRobertaForCausalLM": {"head": "lm_head.bias", "block2": "lm_head.dense", "embedding": "lm_head.decoder"},
    # Tables behind the layers that feed all of them.
    "MPNetForSequenceClassification": {"embedding": "mpnet.encoder.relative_attention_bias"},
    # Lists of parts, of which one layer has one each; a token of another name.
    "XLMForSequenceClassification": {"block1": "transformer.attentions.0", "block2": "transformer.ffns.1"},
    "XLNetForSequenceClassification": {"embedding": "transformer.mask_emb", "head": "logits_proj"},
    # A head of its own behind two towers.
    "BartForSequenceClassification": {
        "head": "classification_head.out_proj",
        "decoder.block2": "classification_head.dense",
    },
    # A bias of its own behind a tied weight.
    "CTRLLMHeadModel": {"head": "lm_head.bias", "embedding": "transformer.w"},
    # Pooling by attention is called a head, and is none.
    "SiglipVisionModel": {"block2": "head"},
    "Aimv2VisionModel": {"block2": "head"},
    # Classifiers side by side.
    "MusicgenForCausalLM": {"head": "lm_heads"},
    # A network in front of two towers.
    "DetrModel": {
        "backbone.block1": "backbone.model.conv1",
        "backbone.block4": "input_projection",
        "encoder.block1": "encoder.layers.0",
        "decoder.embedding": "query_position_embeddings",
    },
    "ElectraForCausalLM": {"head": "generator_lm_head.bias", "block2": "generator_predictions.dense"},
}
SIZES = {"num_labels": 5, "n_layers": 2, "n_layer": 2, "encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEXT)
def test_networks_that_were_cut_wrongly_once(name):
    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, name)
    config = cls.config_class()
    for key, value in SIZES.items():
        if hasattr(config, key):
            setattr(config, key, value)
    with torch.device("meta"):
        model = cls(config)
    assert zoo.problems(model, None, zoo._run) == ("right", [])
    anatomy = anatomy_of(model)
    for block, path in TEXT[name].items():
        held = [tensor for tensor in anatomy.tensors if f"{tensor}.".startswith(f"{path}.")]
        assert held, path
        assert {anatomy.block_of(tensor).name for tensor in held} == {block}


def test_a_model_inside_another_is_cut_like_that():
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {**small, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
    vision = {**small, "image_size": 56, "patch_size": 14}
    config = transformers.ShieldGemma2Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        anatomy = anatomy_of(transformers.ShieldGemma2ForImageClassification(config))
    towers = [f"{tower}.{block}" for tower in ("vision", "language") for block in ("embedding", "block1", "block2")]
    assert list(anatomy.names) == towers
    (projector, *_) = [name for name in anatomy.tensors if "multi_modal_projector" in name]
    assert anatomy.block_of(projector).name == "vision.block2"


class Swapped(ConvNet):
    """Registers its stages in another order than it runs them in."""

    def forward(self, x):
        return self.fc(self.layer1(self.layer2(x)).mean((2, 3)))


def test_what_is_wrong_is_found(monkeypatch):
    model = ConvNet(nn.BatchNorm2d)
    run = lambda network: network(torch.zeros(1, 3, 8, 8))  # noqa: E731
    assert zoo.problems(model, {"fc.weight", "fc.bias"}, run) == ("right", [])
    assert zoo.problems(model, {"fc.weight"}, run) == ("wrong", ["head: surplus ['fc.bias'], missing []"])
    swapped = Swapped(nn.BatchNorm2d)
    swapped.layer2[0], swapped.layer1[0] = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 8, 3)
    swapped.layer2 = nn.Sequential(nn.Conv2d(3, 4, 3))
    swapped.layer1 = nn.Sequential(nn.Conv2d(4, 8, 3))
    assert zoo.problems(swapped, None, run) == ("wrong", ["order: block2 is reached before block1"])
    assert zoo.problems(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), None, None)[0] == "clear error"
    monkeypatch.setattr(zoo, "anatomy_of", lambda _: 1 / 0)
    assert zoo.problems(model, None, run) == ("wrong", ["ZeroDivisionError: division by zero"])


def test_the_table_names_what_is_not_right_and_fails(capsys, tmp_path):
    pytest.importorskip("timm")
    with warnings.catch_warnings():
        assert zoo.main(["timm", "--only", "test_[rv]*t", "--rows", str(tmp_path / "rows")]) == 0
    assert "right (100.0%), 0 clear errors, 0 wrong" in capsys.readouterr().out
    rows = (tmp_path / "rows").read_text().splitlines()
    assert len(rows) >= 2
    # Whoever starts it again goes on, and the table is made of all that is known.
    (tmp_path / "rows").write_text("\n".join(rows[1:]) + "\n")
    strange = zoo.Row("transformers", "text", "text: Odd", "clear error", ["Cannot tell the blocks. blocks={"])
    (tmp_path / "rows").open("a").write(json.dumps(dataclasses.asdict(strange)) + "\n")
    again = ["timm", "--only", "test_[rv]*t", "--rows", str(tmp_path / "rows"), "--markdown", str(tmp_path / "t.md")]
    assert zoo.main(again) == 0
    assert len((tmp_path / "rows").read_text().splitlines()) == len(rows) + 1
    text = (tmp_path / "t.md").read_text()
    assert f"| all | {len(rows)} | {len(rows)} | 0 | 0 | 0 | {len(rows)} | 100.0% |" in text
    assert "| transformers | text: Odd | clear error | Cannot tell the blocks. |" in text
