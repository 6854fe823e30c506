"""An adapter made of two networks computes what the tuned one computes, bit for bit; what is left out is named."""

import copy
import re
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from tiny import CASES, ConvNet, outputs, same, snapshot, used_batchnorm
from torch import nn

from peft_surgical import SurgicalConfig, combine_adapters, extract_adapter, read_adapter
from peft_surgical.adapters.knockout import knock_out
from peft_surgical.errors import AdapterError, AnatomyError, BaseMismatchError, UnknownTargetError
from peft_surgical.evaluation import paired_difference, wilson_interval


def walked(network, steps=200, size=1e-3, seed=5):
    """The network after so many small steps of every floating-point tensor, each rounded: as training leaves it."""
    tuned = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in {**dict(tuned.named_parameters()), **dict(tuned.named_buffers())}.items():
            if not tensor.is_floating_point():
                tensor.add_(3 if name.endswith("num_batches_tracked") else 0)
                continue
            for _ in range(steps):
                tensor.mul_(1 - 1e-5).add_(size * torch.randn(tensor.shape, generator=generator).to(tensor))
            if name.endswith("running_var"):
                tensor.clamp_(min=0.1)
    return tuned


def plain(model):
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_the_base_with_the_adapter_is_the_tuned_network_bit_for_bit(case, tmp_path):
    made = CASES[case]
    base = made.network()
    tuned = walked(base)
    before = snapshot(base)
    found = extract_adapter(base, tuned, blocks=made.blocks, output=tmp_path / "site")
    assert found.exact
    assert found.adapter.config.delta_dtype == "float64"  # what 200 steps leave does not round-trip in float32
    assert found.adapter.config.norm_stats == ("target" if made.moves else "frozen")
    assert same(snapshot(base), before)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "site").eval()
    assert torch.equal(outputs(model, made.inputs()), outputs(tuned, made.inputs()))
    assert not torch.equal(outputs(tuned, made.inputs()), outputs(base, made.inputs()))
    assert same(plain(model), tuned.state_dict())


def test_what_round_trips_in_float32_stays_in_float32(tmp_path):
    base = used_batchnorm()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "surgical_delta" in name:
                parameter.add_(torch.randint(-4, 5, parameter.shape) * 2.0**-24)
    tuned = model.merge_and_unload()
    found = extract_adapter(base, tuned, output=tmp_path / "site")
    assert found.exact
    assert (found.adapter.config.delta_dtype, found.adapter.config.target) == (None, "block1")
    assert set(found.adapter.deltas) < set(tuned.state_dict())
    assert not found.adapter.statistics
    assert (tmp_path / "site" / "adapter_model.safetensors").stat().st_size < 4096


def test_float32_on_request_halves_the_file_and_says_what_it_misses(tmp_path):
    base = used_batchnorm()
    tuned = walked(base)
    found = extract_adapter(base, tuned, delta_dtype="float32", output=tmp_path / "site")
    assert not found.exact
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "site")
    reached = plain(model)
    misses = {n: float((reached[n].double() - v.double()).abs().max()) for n, v in tuned.state_dict().items()}
    assert found.inexact == {name: by for name, by in misses.items() if by}
    assert max(misses.values()) < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_needs_no_more_than_float32(dtype, tmp_path):
    base = ConvNet(nn.BatchNorm2d).to(dtype)
    tuned = walked(base, steps=3, size=1e-2)
    found = extract_adapter(base, tuned, output=tmp_path / "site")
    assert found.exact
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "site")
    assert same(plain(model), tuned.state_dict())


def test_a_tuned_state_dict_in_a_smaller_dtype_is_widened_and_never_rounded():
    base = used_batchnorm()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in snapshot(base).items()}
    assert extract_adapter(base, half).exact
    with pytest.raises(
        BaseMismatchError, match=r"conv1.weight is torch.float32 .* rounded to the base's torch.bfloat16"
    ):
        extract_adapter(copy.deepcopy(base).bfloat16(), walked(base))


def test_a_target_keeps_these_blocks_and_names_what_is_left_out(tmp_path):
    base = used_batchnorm()
    tuned = walked(base)
    found = extract_adapter(base, tuned, target="block1", output=tmp_path / "site")
    assert not found.exact
    assert not found.inexact
    assert {name.split(".")[0] for name in found.left_out} == {"layer2", "fc"}
    assert [(row.name, row.kept) for row in found.blocks] == [("block1", True), ("block2", False), ("head", False)]
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "site")
    expected = {
        n: v if n.split(".")[0] in ("layer2", "fc") else tuned.state_dict()[n] for n, v in snapshot(base).items()
    }
    assert same(plain(model), expected)


def test_energy_keeps_the_fewest_blocks_that_hold_it():
    base, tuned = used_batchnorm(), used_batchnorm()
    moves = {"conv1.weight": 1.0, "layer2.0.weight": 3.0, "fc.bias": 2.0}
    with torch.no_grad():
        for name, size in moves.items():
            value = dict(tuned.named_parameters())[name]
            value.view(-1)[0] += size
    by = {row.name: row for row in extract_adapter(base, tuned).blocks}
    assert [round(by[n].share, 5) for n in ("block1", "block2", "head")] == [round(x / 14, 5) for x in (1, 9, 4)]
    assert by["block2"].norm == pytest.approx(3)
    own = torch.cat([value.detach().flatten() for value in base.layer2.parameters()]).norm().item()
    assert by["block2"].relative == pytest.approx(3 / own)
    for energy, target in ((0.6, "block2"), (0.642, "block2"), (0.7, "block2 + head"), (1.0, "all")):
        assert extract_adapter(base, tuned, energy=energy).adapter.config.target == target


def test_a_head_of_zeros_is_new_always_kept_and_not_counted():
    base = used_batchnorm()
    with torch.no_grad():
        base.fc.weight.zero_()
        base.fc.bias.zero_()
    tuned = used_batchnorm()
    with torch.no_grad():
        tuned.conv1.weight.add_(0.01)
    found = extract_adapter(base, tuned, energy=0.5)
    assert found.exact
    assert {row.name: (row.kept, round(row.share, 6)) for row in found.blocks} == {
        "block1": (True, 1.0),
        "block2": (False, 0.0),
        "head": (True, 0.0),
    }


def test_statistics_alone_are_an_adapter_too(tmp_path):
    base, tuned = used_batchnorm(), used_batchnorm()
    with torch.no_grad():
        tuned.layer1[1].running_mean.add_(0.5)
    found = extract_adapter(base, tuned, output=tmp_path / "site")
    assert (found.adapter.config.target, found.adapter.config.norm_stats) == ("block1", "target")
    assert set(found.adapter.statistics) == {
        f"layer1.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "site")
    assert same(plain(model), tuned.state_dict())


def test_extracted_adapters_combine_and_save_again(tmp_path):
    base = CASES["conv+GN"].network()
    tuned = walked(base)
    for part in ("block1", "block2 + head"):
        extract_adapter(base, tuned, target=part, output=tmp_path / part[:6])
    combine_adapters([tmp_path / "block1", tmp_path / "block2"], method="disjoint", output=tmp_path / "both")
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")
    model.save_pretrained(tmp_path / "again")
    assert all(delta.dtype == torch.float64 for delta in read_adapter(tmp_path / "again").deltas.values())
    assert same(plain(model), tuned.state_dict())


def test_other_architectures_are_named_by_their_tensors():
    base = used_batchnorm()
    wider = copy.deepcopy(base)
    wider.fc = nn.Linear(8, 7)
    with pytest.raises(
        BaseMismatchError, match=r"fc.weight \(5, 8\) in the base, \(7, 8\) in the tuned.*head=\"zero\""
    ):
        extract_adapter(base, wider)
    renamed = {name.replace("layer2", "stage2"): value for name, value in snapshot(base).items()}
    with pytest.raises(BaseMismatchError, match=r"lacks layer2.0.weight.* and 4 more; it has besides stage2.0.weight"):
        extract_adapter(base, renamed)
    tied = tiny.Tied()
    apart = {**snapshot(tied), "head.weight": torch.zeros(11, 8)}
    with pytest.raises(BaseMismatchError, match=r"embed.weight and head.weight are one tensor in the base and differ"):
        extract_adapter(tied, apart)


def test_what_cannot_be_extracted_is_refused():
    base = used_batchnorm()
    tuned = walked(base, 1)
    with pytest.raises(AdapterError, match="equal: there is nothing to extract"):
        extract_adapter(base, copy.deepcopy(base))
    with pytest.raises(AdapterError, match=r"target='head' and energy=0.5 both say what to keep"):
        extract_adapter(base, tuned, target="head", energy=0.5)
    with pytest.raises(AdapterError, match=r"energy=1.5: give a share of the squared norm in \(0, 1\]"):
        extract_adapter(base, tuned, energy=1.5)
    with pytest.raises(AdapterError, match="delta_dtype='int8': choose one of float32, bfloat16"):
        extract_adapter(base, tuned, delta_dtype="int8")
    with pytest.raises(UnknownTargetError, match="block9"):
        extract_adapter(base, tuned, target="block9")
    with pytest.raises(AdapterError, match="carries an adapter: merge it"):
        extract_adapter(base, get_peft_model(tuned, SurgicalConfig(target="head")))
    broken = {**snapshot(base), "fc.bias": torch.full((5,), float("nan"))}
    with pytest.raises(AdapterError, match=r"fc.bias of the tuned network holds NaN or Inf"):
        extract_adapter(base, broken)
    with pytest.raises(AnatomyError):
        extract_adapter(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), energy=0.5)
    odd = nn.Sequential(nn.Linear(2, 2))
    odd.register_buffer("table", torch.zeros(2))
    other = copy.deepcopy(odd)
    other.table += 1
    with pytest.raises(AdapterError, match="table differs, a buffer or an integer that no adapter holds"):
        extract_adapter(odd, other)


def test_knocking_out_a_block_is_the_network_with_that_block_of_the_base():
    base = used_batchnorm()
    tuned = walked(base, size=5e-3)
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = outputs(tuned.eval(), images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 5

    def correct(network):
        return outputs(network, images).argmax(1) == labels

    adapter = extract_adapter(base, tuned).adapter
    rows = {row.without: row for row in knock_out(base, adapter, correct)}
    assert list(rows) == ["", "block1", "block2", "head", "all"]
    assert rows[""].accuracy == wilson_interval(30, 40)
    assert rows["all"].accuracy.value == float(correct(base.eval()).float().mean())
    half = copy.deepcopy(tuned)
    half.layer2.load_state_dict(base.layer2.state_dict())
    assert rows["block2"].accuracy.value == pytest.approx(float(correct(half).float().mean()))
    assert rows["block2"].change == paired_difference(correct(half), correct(tuned))
    assert rows[""].change.value == 0


def test_the_paired_interval_covers_the_difference_and_turns_around_with_its_arguments():
    """400 draws of 60 images, on which one network is right in 80%, the other in 70%, and mostly on the same ones."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        draw = torch.rand(60, generator=generator)
        first, second = draw < 0.8, (draw < 0.65) | (draw > 0.95)
        found = paired_difference(first, second)
        held += found.low <= 0.1 <= found.high
    assert 0.93 < held / 400 <= 1
    back = paired_difference(second, first)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    same_images = paired_difference(first, first)
    assert same_images.value == 0
    assert -0.1 < same_images.low < 1e-9
    assert -1e-9 < same_images.high < 0.1


def test_the_page_on_extracting_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "extract.md").read_text(encoding="utf-8")
    block, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    base = used_batchnorm()
    tuned = walked(base)
    monkeypatch.chdir(tmp_path)
    scope = {"network": base, "tuned": tuned}
    exec(block, scope)
    assert same(plain(scope["model"]), tuned.state_dict())
