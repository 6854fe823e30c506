"""Files of adapters: fingerprints, what is refused in a file, and files that hold no config."""

import json

import pytest
import torch
from safetensors.torch import save_file

from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterFileError
from peft_surgical.files import MAX_BYTES, check_tensors, file_sha256, read_object, verify_file
from peft_surgical.keys import file_key


def test_check_tensors_names_what_is_wrong():
    good = {"a": torch.zeros(2), "b": torch.zeros(3)}
    shapes = {"a": (2,), "b": (3,)}
    check_tensors(good, shapes, "x")
    with pytest.raises(AdapterFileError, match="x: the file misses b and has besides c"):
        check_tensors({"a": good["a"], "c": good["b"]}, shapes, "x")
    with pytest.raises(AdapterFileError, match=r"b has shape \(4,\)"):
        check_tensors({**good, "b": torch.zeros(4)}, shapes, "x")
    with pytest.raises(AdapterFileError, match="a holds NaN or Inf"):
        check_tensors({**good, "a": torch.tensor([0.0, float("-inf")])}, shapes, "x")


def test_verify_file(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {
            "base_model.model.conv1.surgery.surgical_delta.weight": torch.zeros(2),
            "base_model.model.surgery.surgical_delta.cls_token": torch.zeros(2),
        },
        path,
    )
    keys = {file_key("conv1.weight"), file_key("cls_token")}
    verify_file(path, file_sha256(path), keys)
    verify_file(path, None, keys)
    with pytest.raises(AdapterFileError, match="altered or replaced"):
        verify_file(path, "0" * 64, keys)
    with pytest.raises(AdapterFileError, match=r"misses fc\.surgery\.weight"):
        verify_file(path, None, {*keys, file_key("fc.weight")})


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
    file.write_text(json.dumps({"peft_type": "SURGICAL"}) + " " * 100_000)
    assert read_object(file) == {"peft_type": "SURGICAL"}
