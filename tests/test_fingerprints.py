"""Which base an adapter was made on: the whole base, by marks of its tensors."""

import copy
import hashlib
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import CASES, ConvNet, Tied, disturb, images, outputs, same, snapshot, train
from torch import nn

from peft_surgical import SurgicalConfig, combine_adapters
from peft_surgical.errors import AdapterError, BaseMismatchError
from peft_surgical.fingerprints import TensorMark, check_base, differing, fingerprint, joined, mark_of, with_all_bytes

CONFIG = "adapter_config.json"


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


def marks(base):
    return {name: with_all_bytes(mark_of(name, value), name, value) for name, value in base.items()}


def test_a_mark_is_read_as_it_is_written():
    value = torch.randn(3, 2)
    short, long = mark_of("w", value), with_all_bytes(mark_of("w", value), "w", value)
    assert (short.dtype, short.shape, mark_of("w", torch.tensor(1.0)).shape) == ("float32", "3x2", "scalar")
    assert TensorMark.parse(str(short)) == short
    assert TensorMark.parse(str(long)) == long
    assert str(TensorMark.parse("cb537399a3320d92")) == "cb537399a3320d92"  # of an early version
    assert long.all_bytes == fingerprint({"w": value})["w"]
    # What one of them does not know tells nothing.
    assert not short.differs(long)
    assert not short.differs(TensorMark.parse("cb537399a3320d92"))
    assert long.differs(TensorMark.parse("cb537399a3320d92"))
    assert long.differs(TensorMark.parse("nonsense of a damaged file, which is no mark"))


def test_a_sample_sees_small_tensors_whole_and_large_ones_in_part():
    small, large = torch.zeros(1024), torch.zeros(100_000)
    for index in (0, 511, 1023):
        other = small.clone()
        other[index] = 1e-30
        assert mark_of("w", other).sample != mark_of("w", small).sample
    assert mark_of("w", large + 1e-30).sample != mark_of("w", large).sample
    large[1] = 1.0  # between two values of the sample
    assert mark_of("w", large) == mark_of("w", torch.zeros(100_000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_told_from_another_tensor(dtype):
    value = torch.randn(50)
    there, here, other = mark_of("w", value), mark_of("w", value.to(dtype)), mark_of("w", (value + 0.1).to(dtype))
    assert here.is_cast_of(there)
    assert there.is_cast_of(here)
    assert not other.is_cast_of(there)
    assert not there.is_cast_of(there)


def test_fingerprints_are_compared_and_joined_as_far_as_they_are_known():
    value = {"a": torch.ones(2), "b": torch.zeros(2)}
    early, late = fingerprint(value), {name: str(mark_of(name, tensor)) for name, tensor in value.items()}
    other = {name: str(mark_of(name, tensor + 1)) for name, tensor in value.items()}
    assert differing(early, late) == []
    assert differing(late, other) == ["a", "b"]
    assert joined([{"a": early["a"]}, late]) == late


def test_a_mismatch_names_tensors_and_the_expected_base():
    base = {f"w{i}": torch.full((2,), float(i)) for i in range(6)}
    expected = fingerprint(base)
    check_base(expected, marks(base), {}, "some/base")
    other = {name: tensor + 1 for name, tensor in base.items()}
    with pytest.raises(BaseMismatchError, match=r"another base \(some/base\): 6 of 6 .* first w0, w1, w2 and 3 more"):
        check_base(expected, marks(other), {}, "some/base")


# --- loading ---


@pytest.fixture
def saved(tmp_path):
    """(untouched base, folder with an adapter of its head)."""
    base = CASES["conv+BN"].network()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="head"))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


class Wider(ConvNet):
    """The same head under another trunk."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d)
        self.layer0 = nn.Conv2d(3, 3, 1)


def test_an_adapter_of_the_head_alone_is_refused_by_another_trunk(saved):
    base, folder = saved
    PeftModel.from_pretrained(copy.deepcopy(base), folder)
    other, wider, statistics = copy.deepcopy(base), Wider(), copy.deepcopy(base)
    other.layer1[0].weight.data[0, 0, 0, 0] += 1e-6
    wider.load_state_dict(base.state_dict(), strict=False)
    wider.eval()
    statistics.bn1.running_mean += 1
    for network, what in (
        (other, r"1 of \d+ tensors that it does not tune differ there, first layer1.0.weight"),
        (wider, r"2 of \d+ .* first layer0.weight \(only here\), layer0.bias \(only here\)"),
        (statistics, r"1 of \d+ .* first bn1.running_mean\. Load that base.*it has a new head, say"),
    ):
        before = snapshot(network)
        with pytest.raises(BaseMismatchError, match=what):
            PeftModel.from_pretrained(network, folder)
        assert same(snapshot(network), before)
        assert "surgery_base" not in vars(network)
        with pytest.warns(UserWarning, match="strict_base=False: "):
            PeftModel.from_pretrained(network, folder, strict_base=False)


def test_another_shape_is_named(saved):
    base, folder = saved
    other = copy.deepcopy(base)
    other.conv1 = nn.Conv2d(3, 4, 5, padding=2, bias=False)
    with pytest.raises(BaseMismatchError, match=r"first conv1.weight \(4x3x3x3 there, 4x3x5x5 here\)"):
        PeftModel.from_pretrained(other, folder)


def test_a_module_that_the_adapter_holds_whole_may_differ(tmp_path):
    base = CASES["conv+BN"].network()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", modules_to_save=["fc"]))
    train(model, images())
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    other.fc = nn.Linear(8, 5)
    again = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(outputs(again, images()), outputs(model, images()))


@pytest.mark.parametrize("policy", ["target", "all"])
def test_statistics_that_the_adapter_brings_may_differ(policy, tmp_path):
    base = CASES["conv+BN"].network()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", norm_stats=policy))
    train(model, images())
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    other.bn1.running_mean += 1
    again = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(outputs(again, images()), outputs(model, images()))


@pytest.mark.parametrize("target", ["head", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_named(target, dtype, tmp_path):
    base, name = CASES["conv+BN"].network(), str(dtype).removeprefix("torch.")
    get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target)).save_pretrained(tmp_path / "wide")
    get_peft_model(copy.deepcopy(base).to(dtype), SurgicalConfig(target=target)).save_pretrained(tmp_path / "narrow")
    for folder, network, was, now in (
        ("wide", copy.deepcopy(base).to(dtype), "float32", name),
        ("narrow", base, name, "float32"),
    ):
        with pytest.raises(BaseMismatchError, match=rf"on this base in {was}, and the base is here in {now} .* cast"):
            PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / folder)
        with pytest.warns(UserWarning, match=f"Load the base in {was}"):
            PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / folder, strict_base=False)


def test_a_tied_tensor_is_one_tensor(tmp_path):
    torch.manual_seed(0)
    base = Tied()
    get_peft_model(copy.deepcopy(base), SurgicalConfig(target="mid")).save_pretrained(tmp_path)
    held = json.loads((tmp_path / CONFIG).read_text())["base_fingerprint"]
    assert sorted(held) == ["embed.weight", "mid.bias", "mid.weight"]
    assert [len(mark.split()) for mark in held.values()] == [5, 6, 6]
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_an_adapter_of_an_early_version_is_compared_by_what_it_has(saved):
    base, folder = saved
    config = json.loads((folder / CONFIG).read_text())
    marks = {name: TensorMark.parse(config["base_fingerprint"][name]) for name in config["tensor_names"]}
    config["base_fingerprint"] = {name: mark.all_bytes for name, mark in marks.items()}
    (folder / CONFIG).write_text(json.dumps(config))
    other = copy.deepcopy(base)
    other.layer1[0].weight.data += 1
    PeftModel.from_pretrained(other, folder)
    other = copy.deepcopy(base)
    other.fc.weight.data += 1
    with pytest.raises(BaseMismatchError, match=r"1 of 2 tuned tensors differ there, first fc.weight"):
        PeftModel.from_pretrained(other, folder)


def test_a_combination_knows_the_base_of_its_parents(tmp_path):
    base = CASES["conv+BN"].network()
    for target in ("block1", "head"):
        get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target)).save_pretrained(tmp_path / target)
    combine_adapters([tmp_path / "block1", tmp_path / "head"], method="disjoint", output=tmp_path / "both")
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")
    other = copy.deepcopy(base)
    other.layer2[0].weight.data += 1
    with pytest.raises(BaseMismatchError, match=r"does not tune differ there, first layer2.0.weight"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "both")
    get_peft_model(copy.deepcopy(other), SurgicalConfig(target="head")).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"trained on different bases .* first layer2.0.weight"):
        combine_adapters([tmp_path / "block1", tmp_path / "other"], method="disjoint")


# --- saving ---


def test_what_was_unfrozen_by_hand_is_named_before_it_is_lost(saved):
    base, folder = saved
    before = (folder / "adapter_model.safetensors").read_bytes()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1"))
    model.get_base_model().fc.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"^fc.weight, fc.bias of the base will be trained, and no adapter holds"):
        train(model, images())
    train(model, images())  # once is enough
    with pytest.raises(AdapterError, match=r"fc.weight, fc.bias of the base changed .* modules_to_save"):
        model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    model.peft_config["default"].strict_base = False
    with pytest.warns(UserWarning, match="strict_base=False: fc.weight, fc.bias of the base changed"):
        model.save_pretrained(folder)
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), folder)
    assert torch.equal(outputs(again, images()), outputs(model, images()))


@pytest.mark.parametrize("way", ["merge", "disable", "second adapter", "nothing"])
def test_what_adapters_do_changes_no_base(way, tmp_path):
    model = get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target="all", norm_stats="all"))
    train(model, images())
    if way == "merge":
        model.merge_adapter()
    if way == "second adapter":
        model.add_adapter("other", SurgicalConfig(target="head"))
        model.set_adapter("other")
        train(model, images())
    if way == "disable":
        with model.disable_adapter():
            model(images())
    model.save_pretrained(tmp_path)


def test_a_buffer_that_somebody_wrote_to_is_named(tmp_path):
    model = get_peft_model(CASES["conv+BN"].network(), SurgicalConfig(target="head"))
    model.get_base_model().bn1.running_mean.zero_()
    with pytest.raises(AdapterError, match=r"bn1.running_mean of the base changed"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [False, True], ids=["cast", "and back"])
@pytest.mark.parametrize("target", ["head", "all"])
def test_an_adapter_of_a_base_that_was_cast_since_loads_onto_the_base_as_it_was(dtype, back, target, tmp_path):
    base = CASES["conv+BN"].network()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target))
    disturb(model)
    model.to(dtype)
    if back:
        model.float()
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"The base was cast to {name} after the adapter was attached"):
        model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    other = copy.deepcopy(base)
    other.fc.weight.data += 1
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        PeftModel.from_pretrained(other, tmp_path)


def test_taking_the_last_adapter_off_forgets_the_base():
    base = CASES["conv+BN"].network()
    model = get_peft_model(base, SurgicalConfig(target="head"))
    assert "surgery_base" in vars(base)
    model.unload()
    assert "surgery_base" not in vars(base)
