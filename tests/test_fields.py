"""Configs from anybody: what a field may hold, and files that are no config."""

import dataclasses
import json
import math

import pytest

from peft_surgical import SurgicalConfig
from peft_surgical.config import MAX_BYTES, check_fields, read_object
from peft_surgical.errors import AdapterFileError, ConfigError

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


BROKEN = {
    "empty": (b"", "cannot be read as JSON"),
    "cut": (b'{"peft_type": "SURG', "cannot be read as JSON .Unterminated string"),
    "no text": (b"\xff\xfe\x00", "cannot be read as JSON .'utf-8' codec"),
    "a mark": (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
    "deep": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "long": (b'{"scale": ' + b"9" * 5000 + b"}", "integer string conversion"),
    "a list": (b"[]", r"holds \[\], not the fields"),
    "nothing": (b"null", "holds None, not the fields"),
    "no type": (b"{}", "peft_type=None is no method that PEFT knows"),
    "unknown": (b'{"peft_type": "SURGICA"}', "peft_type='SURGICA' is no method that PEFT knows here; .* 'SURGICAL'"),
    "not hashable": (b'{"peft_type": ["SURGICAL"]}', r"peft_type=\['SURGICAL'\] is no method"),
    "self": (b'{"peft_type": "SURGICAL", "self": 1}', "has a field 'self'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_config(tmp_path, kind):
    content, match = BROKEN[kind]
    file = tmp_path / "adapter_config.json"
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match=match):
        read_object(file)
    with pytest.raises(AdapterFileError, match=match):
        SurgicalConfig.from_pretrained(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "adapter_config.json"
    with open(file, "wb") as out:
        out.truncate(MAX_BYTES + 1)
    with pytest.raises(AdapterFileError, match=r"16,777,217 bytes, where a config has at most 16,777,216"):
        read_object(file)
    file.write_text(json.dumps(GOOD) + " " * 100_000)
    assert read_object(file) == GOOD
