"""Adapters that an earlier state of this package saved load today, and give what they gave then.

``tests/fixtures/adapters`` holds a base, an adapter for each way of saving, and what each was when merged.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import ConvNet
from torch import nn

import peft_surgical  # noqa: F401 (registers the method)
from peft_surgical import read_adapter

SAVED = Path(__file__).parent / "fixtures" / "adapters"
NAMES = sorted(folder.name for folder in SAVED.iterdir() if folder.is_dir())


def base():
    made = ConvNet(nn.BatchNorm2d)
    state = load_file(SAVED / "base.safetensors")
    del state["images"]
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_saved_earlier_loads_and_merges_to_the_same_bits(name):
    merged = PeftModel.from_pretrained(base(), SAVED / name).merge_and_unload().state_dict()
    kept = {
        key.partition("|")[2]: value
        for key, value in load_file(SAVED / "merged.safetensors").items()
        if key.partition("|")[0] == name
    }
    assert merged.keys() == kept.keys()
    assert all(torch.equal(merged[key], kept[key]) for key in kept)
    plain = base().state_dict()
    assert any(not torch.equal(merged[key], plain[key]) for key in kept)  # the adapter does something


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_saved_earlier_is_read_as_data(name):
    adapter = read_adapter(SAVED / name)
    assert sorted([*adapter.deltas, *adapter.statistics]) == sorted(adapter.config.tensor_names)
    assert bool(adapter.statistics) == (name == "statistics")
    assert bool(adapter.whole) == (name == "new_head")
