"""What a file has to hold for a base is compared before anything is attached."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CASES, disturb, same, snapshot

from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterError, AdapterFileError, BaseMismatchError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
DELTA, STATS = "surgery.surgical_delta.", "surgery.surgical_stats."


@pytest.fixture
def saved(tmp_path):
    base = CASES["conv+BN"].network()
    config = SurgicalConfig(target="block1", norm_stats="target", modules_to_save=["fc"])
    model = get_peft_model(copy.deepcopy(base), config)
    disturb(model)
    model.save_pretrained(tmp_path)
    return base, tmp_path


def change(folder, tensors=None, **fields):
    """As somebody would who knows of the hash."""
    if tensors is not None:
        held = load_file(folder / WEIGHTS)
        tensors(held)
        save_file(held, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text()) | {"weights_sha256": None} | fields
    (folder / CONFIG).write_text(json.dumps(config))


def refused(base, folder, error, match):
    """Alone and beside another adapter, which leaves nothing behind: no key, class, flag or adapter."""
    for beside in (False, True):
        network = copy.deepcopy(base)
        model = get_peft_model(network, SurgicalConfig(target="head + layer2")) if beside else None
        state, classes = snapshot(network), [type(module) for module in network.modules()]
        flags, adapters = [p.requires_grad for p in network.parameters()], list(getattr(network, "peft_config", ()))
        with pytest.raises(error, match=match):
            PeftModel.from_pretrained(network, folder) if model is None else model.load_adapter(folder, "new")
        assert same(snapshot(network), state)
        assert [type(module) for module in network.modules()] == classes
        assert [p.requires_grad for p in network.parameters()] == flags
        assert list(getattr(network, "peft_config", ())) == adapters


def renamed(old, new):
    def rename(tensors):
        tensors[new] = tensors.pop(old)

    return rename


def put(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


CONV, BIAS, MEAN = f"{PREFIX}conv1.{DELTA}weight", f"{PREFIX}bn1.{DELTA}bias", f"{PREFIX}bn1.{STATS}running_mean"


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        (put(CONV, torch.zeros(2, 3)), AdapterFileError, r"shape \(2, 3\), the base's .* \(4, 3, 3, 3\)"),
        (put(MEAN, torch.zeros(5)), AdapterFileError, r"running_mean has shape \(5,\)"),
        (renamed(BIAS, BIAS.replace(DELTA, STATS)), AdapterFileError, r"misses .*surgical_delta.bias and has besides"),
        (renamed(CONV, CONV.removeprefix(PREFIX)), AdapterFileError, "misses base_model.*conv1.*has besides conv1"),
        (put(f"{PREFIX}fc.weight", torch.zeros(7, 8)), AdapterError, r"fc.weight has shape \(7, 8\).*open the base"),
        (put(f"{PREFIX}fc.bias", torch.zeros(5, dtype=torch.int64)), AdapterError, r"fc.bias is integer in the file"),
        (put(BIAS, torch.zeros(4, dtype=torch.int32)), AdapterFileError, "deltas are floating point"),
        (put(BIAS, torch.full((4,), 1e300, dtype=torch.float64)), AdapterFileError, "NaN or Inf"),
        (lambda tensors: tensors.pop(f"{PREFIX}fc.weight"), AdapterFileError, r"misses base_model.model.fc.weight"),
        (put(f"{PREFIX}layer2.0.weight", torch.zeros(1)), AdapterFileError, "has besides .*layer2"),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else(saved, tensors, error, match):
    base, folder = saved
    change(folder, tensors)
    refused(base, folder, error, match)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"modules_to_save": [""]}, AdapterFileError, "modules_to_save='' names parts of every adapter"),
        ({"modules_to_save": ["y"]}, AdapterFileError, "names parts of every adapter"),
        ({"modules_to_save": ["fc", "conv1"]}, AdapterFileError, "names conv1, and the config also tunes conv1"),
        ({"modules_to_save": ["fc", "layer2", "layer2.0"]}, AdapterFileError, r"layer2, .* also names layer2\.0"),
        ({"modules_to_save": None}, AdapterFileError, r"has besides base_model\.model\.fc\.bias"),
        ({"task_type": "CAUSAL_LM"}, BaseMismatchError, "for CAUSAL_LM, and ConvNet generates nothing"),
        ({"norm_stats": "frozen"}, AdapterFileError, "has besides .*num_batches_tracked"),
        ({"tensor_names": None}, AdapterFileError, "does not say which tensors its file is for"),
        ({"base_fingerprint": None}, BaseMismatchError, "does not say what its base is .* say strict_base=False"),
    ],
)
@pytest.mark.filterwarnings("ignore:Unexpected keyword")
def test_a_config_that_says_something_else(saved, fields, error, match):
    base, folder = saved
    change(folder, **fields)
    refused(base, folder, error, match)


def test_a_container_has_no_forward(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    network.add_module("parts", torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}))
    network.forward = lambda x: network[0](x)
    get_peft_model(copy.deepcopy(network[0:1]), SurgicalConfig(target=["0"])).save_pretrained(tmp_path)
    change(tmp_path, modules_to_save=["parts"])
    with pytest.raises(AdapterFileError, match="names parts, a ModuleDict, which has no forward"):
        PeftModel.from_pretrained(network, tmp_path)


def test_a_folder_without_its_file_leaves_the_model(saved):
    base, folder = saved
    (folder / WEIGHTS).unlink()
    refused(base, folder, AdapterFileError, rf"{folder} has an adapter's config, but no {WEIGHTS}")
    (folder / WEIGHTS).mkdir()
    refused(base, folder, AdapterFileError, "but no")


def test_without_a_fingerprint_it_loads_if_that_is_what_is_wanted(saved):
    base, folder = saved
    change(folder, base_fingerprint=None, target="re:[xy]+z")  # never asked: the names of the tensors decide
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, strict_base=False)
    held = load_file(folder / WEIGHTS)
    assert torch.equal(model.get_base_model().conv1.surgery.delta("default", "weight"), held[CONV])


def test_what_is_saved_loads_again_and_trains_on(saved, tmp_path_factory):
    base, folder = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    disturb(model, seed=8)
    again = tmp_path_factory.mktemp("again")
    model.save_pretrained(again)
    other = PeftModel.from_pretrained(copy.deepcopy(base), again)
    assert same(
        {key: value for key, value in snapshot(model).items() if "surgical" in key},
        {key: value for key, value in snapshot(other).items() if "surgical" in key},
    )
