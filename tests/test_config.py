"""Configs from anybody: what a field may hold, and files that are no config."""

import dataclasses
import json
import math

import pytest
import tiny
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

from peft_surgical import SurgicalConfig
from peft_surgical.config import SurgicalType, check_fields
from peft_surgical.errors import AdapterFileError, ConfigError, TargetError


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


GOOD = {"peft_type": "SURGICAL", "target": "block1"}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("target", ["block1", ["a", "b"], None], [1, [1], {}, [["a"]]]),
        ("norm_stats", ["frozen"], [None, 0, ["frozen"]]),
        ("delta_dtype", [None, "bfloat16"], [16, ["bfloat16"]]),
        ("blocks", [None, {"a": ["b"]}], [["a"], "a", 1]),
        ("target_modules", [None, "fc", ["fc"], ("fc",), {"fc"}], [1, [None], {"fc": 1}]),
        ("exclude_modules", [None, ["fc"]], [True, [1]]),
        ("modules_to_save", [None, ["fc"]], ["fc", 1, [None], {}]),
        ("selection", [None, {}], [[], "x"]),
        ("tensor_names", [None, ["a", "b"]], ["a", [1], ["a", "a"], {"a": 1}]),
        ("base_fingerprint", [None, {"a": "0"}], [{"a": 1}, {"a": None}, {1: "a"}, ["a"], "a"]),
        ("weights_sha256", [None, "0"], [0, ["0"]]),
        ("scale", [0, 1, -2.5, 1e38], [None, "1", True, math.nan, math.inf, -math.inf, 1e39, 10**400, [1.0]]),
        ("inference_mode", [True, False], [None, 1, "yes"]),
        ("base_model_name_or_path", [None, "me/base"], [1, ["me/base"]]),
        ("revision", [None, "main"], [1, {}]),
        ("auto_mapping", [None, {}], ["x", []]),
        ("task_type", [None, "SEQ_CLS"], ["seq", 1, ["SEQ_CLS"], {}]),
        ("peft_version", [None, "0.21"], [0.21]),
    ],
)
def test_every_field_has_a_type(name, good, bad):
    for value in good:
        check_fields({name: value})
    for value in bad:
        with pytest.raises(
            ConfigError, match=r"Invalid task type" if name == "task_type" else rf"^{name}=.* is not a?"
        ):
            check_fields({name: value})


def test_all_fields_are_known():
    """A new field of the config needs a type here; peft_type and strict_base are set, not read."""
    known = {"peft_type", "strict_base"}
    for field in (field.name for field in dataclasses.fields(SurgicalConfig) if field.init):
        if field not in known:
            with pytest.raises(ConfigError, match=field if field != "task_type" else "task type"):
                check_fields({field: object()})


def test_a_config_is_checked_however_it_is_made(tmp_path):
    with pytest.raises(ConfigError, match="base_fingerprint='x' is not a mapping of names to hashes"):
        SurgicalConfig(target="block1", base_fingerprint="x")
    with pytest.raises(
        ConfigError, match=r"Invalid task type: 'x'\. Must be one of the following task types: SEQ_CLS,"
    ):
        SurgicalConfig(target="block1", task_type="x")
    for blocks in ({}, {"a": None}, {"a": [1]}, {1: ["a"]}, {"a": {"b": 1}}):
        with pytest.raises(ConfigError, match="give a mapping such as"):
            SurgicalConfig(target="block1", blocks=blocks)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**GOOD, "tensor_names": [["x"]]}))
    with pytest.raises(AdapterFileError, match=rf"{tmp_path} does not hold what .*: tensor_names=\[\['x'\]\] is not a"):
        SurgicalConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**GOOD, "target": "re:("}))
    with pytest.raises(AdapterFileError, match=f"{tmp_path} does not hold what a config holds"):
        SurgicalConfig.from_pretrained(tmp_path)


def test_a_message_is_short_and_printable():
    for value in ("x" * 10**6, ["\ud800\u202e"] * 1000, 10**5000):
        with pytest.raises(ConfigError) as caught:
            check_fields({"revision": value if not isinstance(value, str) else [value]})
        text = str(caught.value)
        assert len(text) < 200
        assert text.isascii()
