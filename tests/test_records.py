"""Records of bases: what is written is read, and whatever else lies there is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterFileError, ConfigError, DataError
from peft_surgical.evaluation import Report
from peft_surgical.hub.pulling import rebuild
from peft_surgical.hub.records import (
    FORMAT,
    BaseRecord,
    completed,
    is_whole,
    read_record,
    record_of,
    recorded,
    split_name,
    write_record,
)

FULL = BaseRecord(
    "timm/resnet18.a1_in1k",
    "c" * 40,
    "timm",
    "resnet18",
    "float32",
    2,
    ("cat", "dog"),
    "zero",
    {"conv1.weight": "0" * 16},
    "ab" * 32,
    160,
)
PLAIN = SurgicalConfig(target="block1")


@pytest.mark.parametrize("record", [FULL, BaseRecord("owner/name"), BaseRecord("/a/folder", num_classes=3)])
def test_what_is_written_is_read(tmp_path, record):
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert read_record(tmp_path, record.weights_sha256) == record
    assert [file.name for file in tmp_path.iterdir()] == ["base.json"]


def test_a_record_from_before_image_sizes_is_read(tmp_path):
    write_record(tmp_path, FULL)
    file = tmp_path / "base.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "image_size"}))
    assert read_record(tmp_path) == replace(FULL, image_size=None)


def test_no_record(tmp_path):
    assert read_record(tmp_path) is None


def test_a_record_of_another_adapter(tmp_path):
    write_record(tmp_path, FULL)
    with pytest.raises(AdapterFileError, match=r"belongs to another adapter file \(SHA-256 abababababab\.\.\.\)"):
        read_record(tmp_path, "cd" * 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": 3}, "id is 3, not a repository"),
        ({"id": ""}, "id is '', not a repository"),
        ({"library": "tensorflow"}, "library is 'tensorflow', not one of timm, transformers"),
        ({"library": ["timm"]}, r"library is \['timm'\], not one of"),
        ({"revision": "main"}, "revision is 'main', not a commit of 40"),
        ({"head": "random"}, "head is 'random', not one of keep, new, zero"),
        ({"dtype": "int8"}, "dtype is 'int8', not one of float64"),
        ({"num_classes": 10**12}, "num_classes is 1000000000000, not a number from 1 to 1,000,000"),
        ({"image_size": 4097}, "image_size is 4097, not a number from 1 to 4,096"),
        ({"num_classes": True}, "num_classes is True, not a number"),
        ({"num_classes": 2.0}, r"num_classes is 2\.0, not a number"),
        ({"label_names": ["cat"]}, "label_names is .*, not a name for each class"),
        ({"label_names": [1, 2]}, "label_names is .*, not a name for each class"),
        ({"label_names": 5}, "is no record of a base"),
        ({"fingerprint": ["x"]}, "fingerprint is .*, not tensor -> hash"),
        ({"fingerprint": {"x": 1}}, "fingerprint is .*, not tensor -> hash"),
        ({"code": "import os"}, "is no record of a base .*'code'"),
        ({"format": FORMAT + 1}, "was written by a later version"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path, change, said):
    write_record(tmp_path, FULL)
    file = tmp_path / "base.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(AdapterFileError, match=rf"base\.json.*{said}"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": 1}', "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(AdapterFileError, match=r"base\.json is no record of a base"):
        read_record(tmp_path)


def test_a_huge_file_is_not_even_read(tmp_path):
    with open(tmp_path / "base.json", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(AdapterFileError, match="1,073,741,824 bytes: no record of a base is that large"):
        read_record(tmp_path)


# Names


def test_names_of_bases(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    assert split_name("owner/name") == ("owner/name", None)
    assert split_name("hf-hub:owner/name@v1") == split_name("hf_hub:owner/name@v1") == ("owner/name", "v1")
    assert split_name("resnet18.a1_in1k") == ("timm/resnet18.a1_in1k", None)
    assert split_name(str(tmp_path)) == split_name(f"local-dir:{tmp_path}") == (str(tmp_path), None)
    assert split_name("/nowhere/at/all") == ("/nowhere/at/all", None)
    monkeypatch.chdir(tmp_path.parent)
    assert split_name(tmp_path.name) == (str(tmp_path), None)
    with pytest.raises(DataError, match="the base 'resnet' is no repository of the Hub"):
        split_name("resnet")


def test_what_an_adapter_holds_whole():
    config = SurgicalConfig(target="block1", modules_to_save=["fc", "head.norm"])
    names = ("fc.weight", "fc.bias", "a.fc.weight", "head.norm.bias", "head.weight", "fcs.weight", "fc")
    assert [name for name in names if is_whole(name, config)] == [
        "fc.weight",
        "fc.bias",
        "a.fc.weight",
        "head.norm.bias",
    ]
    assert not is_whole("fc.weight", PLAIN)


# Live networks


def vit(**kwargs):
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        **kwargs,
    )
    return transformers.ViTForImageClassification(config)


def test_a_live_network_of_transformers():
    network = vit(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    network.name_or_path = "owner/vit"
    found = record_of(network, PLAIN)
    assert found == BaseRecord("owner/vit", dtype="float32", num_classes=2, label_names=("cat", "dog"))
    network = vit(num_labels=3).to(torch.bfloat16)
    network.name_or_path = "owner/vit"
    whole = record_of(network, SurgicalConfig(target="block1", modules_to_save=["classifier"], revision="v2"))
    assert (whole.head, whole.label_names, whole.dtype, whole.revision) == ("new", None, "bfloat16", "v2")
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.zero_()
    assert record_of(network, PLAIN).head == "zero"


def test_a_live_network_of_timm():
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_resnet", num_classes=5)
    found = record_of(network, PLAIN)
    assert (found.id, found.num_classes, found.head) == ("timm/test_resnet.r160_in1k", 5, "keep")
    named = SurgicalConfig(target="block1", base_model_name_or_path="hf-hub:me/mine@v1")
    assert (record_of(network, named).id, record_of(network, named).revision) == ("me/mine", "v1")


def test_live_networks_that_say_nothing():
    assert record_of(nn.Linear(2, 2), PLAIN) is None
    assert record_of(vit(), PLAIN) is None


# What is said beside


OPENED = {"label_names": ["cat", "dog"], "head": "zero", "weights": "pretrained", "seed": 0}


def report(**opened):
    return Report("timm/resnet18.a1_in1k", "block1", (), {"open": {**OPENED, **opened}})


def test_a_report_tells_how_the_base_was_opened():
    found = completed(None, None, report())
    assert found == BaseRecord("timm/resnet18.a1_in1k", label_names=("cat", "dog"), head="zero")
    # The head of a live network is known; only the names of its classes may not be.
    live = BaseRecord("owner/name", num_classes=2, head="new", fingerprint={})
    assert completed(live, None, report()) == BaseRecord(
        "owner/name", num_classes=2, head="new", fingerprint={}, label_names=("cat", "dog")
    )
    assert completed(FULL, None, report(head="keep")) is FULL
    assert completed(None, None, report(image_size=64)).image_size == 64
    with pytest.raises(ConfigError, match="with image_size='large', not a number from 1 to 4,096"):
        completed(None, None, report(image_size="large"))
    with pytest.raises(ConfigError, match="is random"):
        completed(None, None, report(weights="random"))


def test_the_user_has_the_last_word():
    assert completed(FULL, "other/name", None).id == "other/name"
    assert completed(FULL, "other/name", None).fingerprint == FULL.fingerprint
    found = completed(
        None, {"name": "other/name", "revision": "v1", "label_names": ["a", "b", "c"], "head": "new"}, None
    )
    assert found == BaseRecord("other/name", "v1", label_names=("a", "b", "c"), head="new")
    with pytest.raises(ConfigError, match="give name=, and revision="):
        completed(None, {"name": "other/name", "trust_remote_code": True}, None)
    with pytest.raises(ConfigError, match="nothing says which base"):
        completed(None, None, None)


def test_the_record_beside_an_adapter_comes_before_its_config(tmp_path):
    config = SurgicalConfig(target="block1", base_model_name_or_path="owner/config", revision="v3")
    assert recorded(tmp_path, config) == BaseRecord("owner/config", "v3")
    assert recorded(tmp_path, SurgicalConfig(target="block1", base_model_name_or_path="my network")) is None
    assert recorded(tmp_path, PLAIN) is None
    write_record(tmp_path, FULL)
    assert recorded(tmp_path, config) == FULL


# Opening


def test_a_folder_that_is_not_here():
    with pytest.raises(DataError, match=r"the folder /nowhere/at/all, which is not on this machine: say base="):
        rebuild(BaseRecord("/nowhere/at/all"), PLAIN)
