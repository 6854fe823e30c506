"""Files of adapters: fingerprints, what is refused in a file, and files that hold no config."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterFileError, BaseMismatchError
from peft_surgical.files import MAX_BYTES, check_base, check_tensors, file_sha256, fingerprint, read_object, verify_file
from peft_surgical.keys import file_key


def test_a_fingerprint_depends_on_name_shape_dtype_and_every_byte():
    base = torch.arange(6.0)
    variants = {
        "same": ("w", base.clone()),
        "name": ("v", base),
        "shape": ("w", base.view(2, 3)),
        "dtype": ("w", base.double()),
        "bytes": ("w", torch.nextafter(base, base + 1)),
    }
    found = {kind: fingerprint({name: tensor})[name] for kind, (name, tensor) in variants.items()}
    assert found["same"] == fingerprint({"w": base})["w"]
    assert len(set(found.values())) == 5
    by_hand = hashlib.sha256(b"w|(6,)|torch.float32|" + base.numpy().tobytes()).hexdigest()[:16]
    assert found["same"] == by_hand


@pytest.mark.parametrize(
    "tensor", [torch.tensor(1.0), torch.ones(2, 2).bfloat16(), torch.ones(4, 4)[:, ::2], torch.ones(0)]
)
def test_a_fingerprint_of_any_tensor(tensor):
    assert len(fingerprint({"w": tensor})["w"]) == 16


def test_a_mismatch_names_tensors_and_the_expected_base():
    base = {f"w{i}": torch.full((2,), float(i)) for i in range(6)}
    expected = fingerprint(base)
    check_base(expected, base, "some/base")
    other = {name: tensor + 1 for name, tensor in base.items()}
    with pytest.raises(BaseMismatchError, match=r"another base \(some/base\): 6 of 6 .* first w0, w1, w2 and 3 more"):
        check_base(expected, other, "some/base")


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
