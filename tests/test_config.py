import dataclasses
import json

import pytest
import tiny
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

from peft_surgical import SurgicalConfig
from peft_surgical.config import SurgicalType
from peft_surgical.errors import ConfigError, TargetError


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target": "block1", "target_modules": ["fc"]}, "Give one"),
        ({"target": "block1", "norm_stats": "moving"}, "norm_stats='moving' is not a policy: choose one of frozen"),
        ({"target": "block1", "delta_dtype": "int8"}, "delta_dtype='int8': choose one of float32"),
        ({"target": "block1", "scale": "big"}, "scale='big' is not a number"),
        ({"target": "block1", "blocks": {}}, "blocks=.*give a mapping such as"),
    ],
)
def test_contradictions_are_refused_without_a_model(settings, match):
    with pytest.raises(ConfigError, match=match):
        SurgicalConfig(**settings)


def test_a_target_that_does_not_parse_is_refused_without_a_model():
    with pytest.raises(TargetError, match="block4-2"):
        SurgicalConfig(target="block4-2")


def test_a_config_without_a_target_can_be_made_and_saved(tmp_path):
    config = SurgicalConfig()
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_targets_that_need_data_are_accepted():
    assert SurgicalConfig(target="auto-rgn").target == "auto-rgn"


def test_json_round_trip(tmp_path):
    config = SurgicalConfig(
        target=["block1", "- *.bn*"],
        norm_stats="target",
        delta_dtype="bfloat16",
        blocks={"block1": "conv1", "head": ("fc",)},
        modules_to_save={"fc"},
        scale=0.5,
        task_type="FEATURE_EXTRACTION",
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert again == config
    assert type(again) is SurgicalConfig
    assert again.peft_type is SurgicalType.SURGICAL
    assert again.blocks == {"block1": ["conv1"], "head": ["fc"]}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SURGICAL"


def test_strict_base_is_a_choice_of_whoever_loads(tmp_path):
    SurgicalConfig(target="block1", strict_base=False).save_pretrained(tmp_path)
    assert SurgicalConfig.from_pretrained(tmp_path).strict_base is True
    assert SurgicalConfig.from_pretrained(tmp_path, strict_base=False).strict_base is False


def test_unknown_future_fields_follow_pefts_rule(tmp_path):
    SurgicalConfig(target="block1").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        config = SurgicalConfig.from_pretrained(tmp_path)
    assert config.target == "block1"


def test_sets_become_sorted_lists():
    assert SurgicalConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]


def test_what_is_not_saved_cannot_come_from_a_file(tmp_path):
    SurgicalConfig(target="block1").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    assert not {"strict_base", "held", "measured_fingerprint"} & set(plain)
    path.write_text(json.dumps({**plain, "held": {}, "measured_fingerprint": {"a": "b"}}))
    with pytest.warns(UserWarning, match="'held', 'measured_fingerprint'"):
        config = SurgicalConfig.from_pretrained(tmp_path)
    assert (config.held, config.measured_fingerprint) == (None, None)


def test_a_config_carries_nothing_but_its_fields():
    """No function leaves a private attribute on a config for another function to read."""
    network = tiny.vit()
    model = get_peft_model(network, SurgicalConfig(target="block1"))
    get_peft_model_state_dict(model)
    fields = {field.name for field in dataclasses.fields(SurgicalConfig)}
    assert set(vars(model.peft_config["default"])) <= fields
