"""Loading refuses what it should, names it, and leaves the model as it was."""

import copy
import json
import os
import shutil
import struct

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import CASES, disturb, outputs, same, snapshot, vit

from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterError, AdapterFileError, BaseMismatchError, UnknownTargetError
from peft_surgical.folders import commit

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tmp_path):
    """(untouched base, folder with a disturbed block1 adapter for it)."""
    base = CASES["conv+BN"].network()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", norm_stats="target"))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def refused(base, folder, error, match, **kwargs):
    """Loading raises, and the network is what it was: classes, keys, values, training flags, gradients."""
    network = copy.deepcopy(base)
    before, classes = snapshot(network), [type(module) for module in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    with pytest.raises(error, match=match):
        PeftModel.from_pretrained(network, folder, **kwargs)
    assert [type(module) for module in network.modules()] == classes
    assert same(snapshot(network), before)
    assert not hasattr(network, "peft_config")
    return flags


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    # As somebody would who knows of the hash; the checks behind it must hold by themselves.
    config = json.loads((folder / CONFIG).read_text())
    config["weights_sha256"] = None
    (folder / CONFIG).write_text(json.dumps(config))


def test_a_truncated_file(saved):
    base, folder = saved
    whole = (folder / WEIGHTS).read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:size])
        refused(base, folder, AdapterFileError, "truncated or damaged")


def test_an_altered_file(saved):
    base, folder = saved
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[-3] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(whole))
    refused(base, folder, AdapterFileError, "altered or replaced")


def test_a_header_that_claims_too_much(saved):
    base, folder = saved
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + whole[8:])
    refused(base, folder, AdapterFileError, "truncated or damaged")


def test_a_missing_tensor(saved):
    base, folder = saved
    rewrite(folder, lambda tensors: tensors.pop(next(key for key in tensors if "conv1" in key)))
    refused(base, folder, AdapterFileError, "misses conv1.surgery.weight")


def test_a_surplus_tensor(saved):
    base, folder = saved
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.fc.weight": torch.zeros(3)}))
    refused(base, folder, AdapterFileError, "has besides base_model.model.fc.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(saved, value):
    base, folder = saved
    rewrite(folder, lambda tensors: next(t for k, t in tensors.items() if "delta" in k).fill_(value))
    refused(base, folder, AdapterFileError, "NaN or Inf")


def test_an_integer_delta(saved):
    base, folder = saved

    def change(tensors):
        key = next(key for key in tensors if "delta" in key)
        tensors[key] = tensors[key].to(torch.int32)

    rewrite(folder, change)
    refused(base, folder, AdapterFileError, "floating point")


def test_a_wrong_shape_is_refused_after_attaching_and_taken_off_again(saved):
    base, folder = saved

    def change(tensors):
        key = next(key for key in tensors if "conv1" in key)
        tensors[key] = torch.zeros(2, 3)

    rewrite(folder, change)
    refused(base, folder, AdapterFileError, r"shape \(2, 3\)")


def test_a_pickle_alone(saved):
    base, folder = saved
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(base, folder, AdapterFileError, "pickle")


def test_another_base_with_the_same_shapes(saved):
    base, folder = saved
    other = copy.deepcopy(base)
    other.layer1[0].weight.data[0, 0, 0, 0] += 1e-6
    refused(other, folder, BaseMismatchError, r"1 of \d+ tuned tensors differ there, first layer1.0.weight")
    with pytest.warns(UserWarning, match="strict_base=False"):
        model = PeftModel.from_pretrained(copy.deepcopy(other), folder, strict_base=False)
    assert model.peft_config["default"].strict_base is False


def test_another_architecture(saved):
    _, folder = saved
    refused(vit(), folder, UnknownTargetError, "no tensor .*conv1.weight")


def test_a_second_adapter_that_is_refused_leaves_the_first(saved):
    base, folder = saved
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1"))
    disturb(model)
    inputs = CASES["conv+BN"].inputs()
    before, kept = outputs(model, inputs), snapshot(model)
    rewrite(folder, lambda tensors: next(t for k, t in tensors.items() if "delta" in k).fill_(float("nan")))
    with pytest.raises(AdapterFileError, match="NaN"):
        model.load_adapter(folder, "other")
    assert same(snapshot(model), kept)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(outputs(model, inputs), before)


def test_a_state_dict_that_does_not_fit_an_adapter_in_use_leaves_it(saved):
    base, folder = saved
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1"))
    disturb(model)
    kept = snapshot(model)
    with pytest.raises(AdapterFileError, match="has besides"):  # it has statistics, this adapter has none
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    assert same(snapshot(model), kept)


def test_a_config_given_by_hand_is_checked_as_well(saved):
    base, folder = saved
    config = SurgicalConfig.from_pretrained(folder)
    rewrite(folder, lambda tensors: next(t for k, t in tensors.items() if "delta" in k).fill_(float("nan")))
    refused(base, folder, AdapterFileError, "was replaced while it was being loaded", config=config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_saving_a_diverged_adapter_is_an_error_and_the_old_one_stays(saved, value):
    base, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="head"))
    next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = value
    with pytest.raises(AdapterError, match=r"'default' was not saved, .*weight holds NaN or Inf: the run diverged"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    PeftModel.from_pretrained(copy.deepcopy(base), folder)


def test_what_is_written_is_checked_as_it_is_written(saved):
    base, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="head", delta_dtype="float16"))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(1e5)
    with pytest.raises(AdapterError, match=r"values that float16 cannot hold. Leave delta_dtype out"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    model.peft_config["default"].delta_dtype = "bfloat16"
    model.save_pretrained(folder)


def test_modules_that_are_saved_whole_are_checked_too(saved):
    base, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", modules_to_save=["fc"]))
    model.base_model.model.fc.modules_to_save["default"].bias.data[0] = float("nan")
    with pytest.raises(AdapterError, match=r"was not saved: .*fc.bias, which modules_to_save names, holds NaN or Inf"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_a_variance_below_zero(saved):
    base, folder = saved
    rewrite(folder, lambda tensors: next(t for k, t in tensors.items() if k.endswith("running_var")).fill_(-1))
    refused(base, folder, AdapterFileError, r"would be a variance below zero. Choose a scale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scale_with_which_nothing_is_computed(saved, tmp_path, dtype):
    base = copy.deepcopy(saved[0]).to(dtype)
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1"))
    disturb(model)
    model.save_pretrained(tmp_path / "x")
    text = (tmp_path / "x" / CONFIG).read_text()
    scale = 3e38 if dtype == torch.float32 else 1e9
    (tmp_path / "x" / CONFIG).write_text(text.replace('"scale": 1.0', f'"scale": {scale}'))
    name = str(dtype).removeprefix("torch.")
    refused(base, tmp_path / "x", AdapterFileError, rf"With scale=.* conv1.weight would be too large for {name}")
    with pytest.raises(AdapterError, match=f"would be too large for {name}"):
        model.set_scale("default", scale)
    assert model.peft_config["default"].scale == 1.0


def test_a_scale_that_turns_a_variance_negative(saved):
    base, folder = saved
    rewrite(folder, lambda tensors: next(t for k, t in tensors.items() if k.endswith("running_var")).fill_(1e-3))
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    with pytest.raises(AdapterError, match="would be a variance below zero"):
        model.set_scale("default", 2.0)
    model.set_scale("default", 0.5)


def test_a_pickle_is_never_written(saved, tmp_path):
    base, _ = saved
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="head"))
    with pytest.raises(AdapterError, match="safetensors only"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_delta_dtype_halves_the_file_and_rounds_the_deltas(saved, tmp_path, dtype):
    base, _ = saved
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="all", delta_dtype=dtype))
    disturb(model)
    model.save_pretrained(tmp_path / "small")
    held = load_file(tmp_path / "small" / WEIGHTS)
    assert {str(t.dtype) for t in held.values()} == {f"torch.{dtype}"}
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small", is_trainable=True)
    for (name, delta), (_, loaded) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if "surgical_delta" in name:
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, delta.to(getattr(torch, dtype)).float())


# --- atomic saving ---


def adapters(base, tmp_path):
    """An old and a new adapter that differ in target, policy and scale, and what each of them gives."""
    inputs, found = CASES["conv+BN"].inputs(), {}
    for seed, (name, settings) in enumerate(
        {"old": {"target": "block1"}, "new": {"target": "head + block2", "norm_stats": "all", "scale": 0.5}}.items()
    ):
        model = get_peft_model(copy.deepcopy(base), SurgicalConfig(**settings))
        disturb(model, seed=seed)
        model.save_pretrained(tmp_path / name)
        found[name] = outputs(model, inputs)
    return inputs, found


def test_a_save_killed_between_any_two_steps_leaves_one_whole_adapter(saved, tmp_path, monkeypatch):
    base, _ = saved
    inputs, found = adapters(base, tmp_path)
    seen = []
    for steps in range(5):
        folder, stage = tmp_path / f"target{steps}", tmp_path / f"stage{steps}"
        shutil.copytree(tmp_path / "old", folder)
        shutil.copytree(tmp_path / "new", stage)
        (stage / "README.md").unlink()
        left = steps

        def killed(source, goal, original=os.replace):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            original(source, goal)

        monkeypatch.setattr("os.replace", killed)
        try:
            commit(stage, folder)
            seen.append("finished")
        except KeyboardInterrupt:
            seen.append("killed")
        monkeypatch.undo()
        result = outputs(PeftModel.from_pretrained(copy.deepcopy(base), folder), inputs)
        expected = "old" if steps < 2 else "new"
        assert torch.equal(result, found[expected]), steps
        # And a later save goes through as if nothing had happened.
        shutil.rmtree(stage, ignore_errors=True)
        shutil.copytree(tmp_path / "new", stage)
        commit(stage, folder)
        again = outputs(PeftModel.from_pretrained(copy.deepcopy(base), folder), inputs)
        assert torch.equal(again, found["new"])
        assert "superseded" not in (folder / CONFIG).read_text()
    assert seen == ["killed"] * 3 + ["finished"] * 2


def test_nothing_is_left_beside_the_folder(saved):
    _, folder = saved
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
