"""Combining adapters: the arithmetic by hand and against peft.utils.merge_utils, files, live models."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from tiny import CASES, bits, disturb, outputs, same, snapshot, train, vit

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.adapters.combination import combine_adapters
from peft_surgical.errors import AdapterError, AdapterFileError, BaseMismatchError, ConfigError
from peft_surgical.fingerprints import joined
from peft_surgical.tuner.combine import COMBINATIONS, Combination, combine_deltas, combine_tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INPUTS = CASES["conv+BN"].inputs()
ALL = [Combination(method, None if method in ("linear", "disjoint") else 0.5) for method in COMBINATIONS]
overlapping = pytest.mark.parametrize(
    "how", [how for how in ALL if how.method != "disjoint"], ids=lambda how: how.method
)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)


@pytest.fixture(scope="module")
def base():
    return CASES["conv+BN"].network()


def adapted(base, target="block1", seed=3, **kwargs):
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target, **kwargs))
    disturb(model, seed=seed)
    return model.eval()


def saved(base, folder, target="block1", seed=3, **kwargs):
    """The folder of a disturbed adapter."""
    adapted(base, target, seed, **kwargs).save_pretrained(folder)
    return folder


def loaded(base, folder, **kwargs):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder, **kwargs).eval()


def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


# --- the arithmetic ---


def test_by_hand():
    a, b, c = values(3, -1, 0.5, 4), values(2, 2, 0.4, -1), values(-1, 3, 0.1, -1)
    three, weights = [{"w": a}, {"w": b}, {"w": c}], [1.0, 1.0, 1.0]
    assert torch.equal(combine_deltas(three, weights, Combination())["w"], values(4, 4, 1, 2))
    # The larger half of a is (3, 0, 0, 4), of b (2, 2, 0, 0).
    pruned = combine_deltas(three[:2], [1.0, -2.0], Combination("magnitude_prune", 0.5))["w"]
    assert torch.equal(pruned, values(-1, -4, 0, 4))
    # Three quarters of each: (3, -1, 0, 4), (2, 2, 0, -1), (-1, 3, 0, -1), in sum (4, 4, 0, 2); means of what is > 0.
    by_sum = combine_deltas(three, weights, Combination("ties", 0.75))["w"]
    assert torch.equal(by_sum, values(2.5, 2.5, 0, 4))
    # By number, the last entry has two votes against one.
    by_number = combine_deltas(three, weights, Combination("ties", 0.75, "frequency"))["w"]
    assert torch.equal(by_number, values(2.5, 2.5, 0, -1))


@overlapping
@pytest.mark.parametrize("n", [1, 2, 5])
def test_as_in_peft(how, n):
    generator = torch.Generator().manual_seed(n)
    tensors = [torch.randn(6, 3, 2, generator=generator) for _ in range(n)]
    weights = [0.3 + i for i in range(n)]
    found = combine_tensor("name", tensors, weights, how)
    arguments = (tensors, torch.tensor(weights), *(() if how.method == "linear" else (how.density,)))
    digest = hashlib.sha256(b"0|name").digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    function = merge_utils.task_arithmetic if how.method == "linear" else getattr(merge_utils, how.method)
    assert torch.equal(found, function(*arguments))
    assert found.any()


@overlapping
def test_a_negative_weight_is_the_negated_adapter(how):
    tensors = [torch.randn(40) for _ in range(3)]
    found = combine_tensor("w", tensors, [1.0, -0.5, -2.0], how)
    assert torch.equal(found, combine_tensor("w", [tensors[0], -tensors[1], -tensors[2]], [1.0, 0.5, 2.0], how))


@overlapping
def test_with_density_one_nothing_is_dropped_and_nobody_warns(how):
    tensors, full = [torch.randn(5), torch.randn(5)], Combination(how.method, 1.0)
    found = combine_tensor("w", tensors, [1.0, 1.0], full)
    if "ties" in how.method:
        agree = torch.sign(tensors[0]) == torch.sign(tensors[1])
        larger = torch.where(tensors[0].abs() > tensors[1].abs(), *tensors)
        assert torch.equal(found, torch.where(agree, (tensors[0] + tensors[1]) / 2, larger))
    else:
        assert torch.equal(found, tensors[0] + tensors[1])


def test_a_small_tensor_keeps_its_largest_value():
    for n in (1, 2, 3, 49, 1000):
        tensor = torch.arange(1.0, n + 1)
        found = combine_tensor("w", [tensor], [1.0], Combination("magnitude_prune", 1e-9))
        assert found.nonzero().flatten().tolist() == [n - 1]
    assert combine_tensor("w", [torch.ones(0)], [1.0], Combination("ties", 0.5)).shape == (0,)


def test_what_is_dropped_at_random_depends_on_seed_and_name_alone():
    tensors, how = {"a": torch.ones(64), "b": torch.ones(64)}, Combination("dare_linear", 0.5)
    state = torch.get_rng_state()
    first = combine_deltas([tensors], [1.0], how)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    second = combine_deltas([dict(reversed(tensors.items()))], [1.0], how)
    assert all(torch.equal(first[name], second[name]) for name in tensors)
    assert not torch.equal(first["a"], first["b"])
    other = combine_deltas([tensors], [1.0], Combination("dare_linear", 0.5, seed=1))
    assert not torch.equal(first["a"], other["a"])
    assert set(first["a"].tolist()) == {0.0, 2.0}  # rescaled by 1 / density


def test_a_tensor_that_some_have_is_combined_from_those():
    a, b = {"both": values(1, 2), "a": values(3)}, {"both": values(1, 1), "b": values(5)}
    found = combine_deltas([a, b], [2.0, -1.0], Combination())
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"both": [1, 3], "a": [6], "b": [-5]}
    with pytest.raises(AdapterError, match="tune both: they are not disjoint"):
        combine_deltas([a, b], [1.0, 1.0], Combination("disjoint"))
    assert list(combine_deltas([{"a": a["a"]}, b], [1.0, 1.0], Combination("disjoint"))) == ["a", "both", "b"]


def test_one_adapter_with_weight_one_is_itself_to_the_sign_of_zero():
    tensor = values(-0.0, 0.0, -1.5)
    for method in ("linear", "disjoint"):
        assert torch.equal(bits(combine_deltas([{"w": tensor}], [1.0], Combination(method))["w"]), bits(tensor))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("svd",), "No method 'svd' of combining: choose one of linear, disjoint"),
        (("ties",), r"needs a density in \(0, 1\], got None"),
        (("ties", 0.0), "got 0.0"),
        (("dare_linear", 1.5), "got 1.5"),
        (("ties", float("nan")), "got nan"),
        (("ties", 0.5, "vote"), "majority_sign='vote' elects no sign: choose total or frequency"),
    ],
)
def test_unknown_choices(arguments, match):
    with pytest.raises(AdapterError, match=match):
        Combination(*arguments)


def test_the_record_says_what_had_a_say():
    assert Combination("linear", 0.5, "frequency", 7).record() == {"method": "linear"}
    record = {"method": "dare_ties", "density": 0.5, "majority_sign": "frequency", "seed": 7}
    assert Combination("dare_ties", 0.5, "frequency", 7).record() == record
    assert Combination("magnitude_prune", 0.5).record() == {"method": "magnitude_prune", "density": 0.5}


# --- folders ---


def test_disjoint_blocks_equal_both_adapters_active_and_reload_bit_for_bit(base, tmp_path):
    first, second = saved(base, tmp_path / "a", "block1"), saved(base, tmp_path / "b", "head", 4, scale=0.5)
    live = loaded(base, first)
    live.load_adapter(second, "second")
    live.base_model.set_adapter(["default", "second"])
    combined = combine_adapters([first, second], method="disjoint", output=tmp_path / "both")
    again = loaded(base, tmp_path / "both")
    assert torch.equal(bits(outputs(again, INPUTS)), bits(outputs(live, INPUTS)))
    config = again.peft_config["default"]
    assert config.target == "block1 + head"
    assert config.scale == 1.0
    parents = [SurgicalConfig.from_pretrained(folder) for folder in (first, second)]
    assert set(config.tensor_names) == {name for parent in parents for name in parent.tensor_names}
    assert config.base_fingerprint == joined(parent.base_fingerprint for parent in parents)
    # An ordinary adapter: saved again it is the same file, and it reads as what was returned.
    again.save_pretrained(tmp_path / "saved")
    held, kept = load_file(tmp_path / "both" / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert same(held, kept)
    assert same(dict(read_adapter(tmp_path / "both").deltas), dict(combined.deltas))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "both", "saved"]


@overlapping
def test_folders_and_live_models_combine_alike(base, tmp_path, how):
    model = adapted(base, "block1")
    model.add_adapter("other", SurgicalConfig(target="layer1 + head"))
    disturb(model, seed=4)
    model.set_scale("other", 2.0)
    model.save_pretrained(tmp_path)
    folders, weights = [tmp_path, tmp_path / "other"], [0.7, -0.3]
    combined = combine_adapters(folders, weights, how.method, density=how.density, output=tmp_path / "new")
    model.add_weighted_adapter(["default", "other"], weights, "combined", how.method, how.density)
    live = read_adapter((model, "combined"))
    assert same(dict(live.deltas), {name: combined.deltas[name] for name in live.deltas})
    assert len(live.deltas) == len(combined.deltas)
    model.set_adapter("combined")
    assert torch.equal(outputs(loaded(base, tmp_path / "new"), INPUTS), outputs(model, INPUTS))
    for config in (live.config, combined.config):
        record = config.selection["combined"]
        assert record | {"parents": ...} == how.record() | {"parents": ...}
        assert [row["weight"] for row in record["parents"]] == weights
        assert [row["scale"] for row in record["parents"]] == [1.0, 2.0]


def test_negation_takes_away_what_was_added(base, tmp_path):
    folder = saved(base, tmp_path / "a", scale=0.5)
    combine_adapters([folder], [-1.0], output=tmp_path / "minus")
    live = loaded(base, folder)
    live.load_adapter(tmp_path / "minus", "minus")
    live.base_model.set_adapter(["default", "minus"])
    assert torch.allclose(outputs(live, INPUTS), outputs(base, INPUTS), atol=1e-6)
    live.set_adapter("minus")
    negated = outputs(live, INPUTS)
    live.set_adapter("default")
    assert not torch.allclose(outputs(live, INPUTS), outputs(base, INPUTS), atol=1e-3)
    live.set_scale("default", -0.5)
    assert torch.equal(outputs(live, INPUTS), negated)


def test_parents_are_named_without_the_path_on_this_machine(base, tmp_path):
    folder = saved(base, tmp_path / "site-a", "head")
    config = combine_adapters([folder, adapted(base, seed=4)], [1, 2], output=tmp_path / "out").config
    parents = json.loads((tmp_path / "out" / CONFIG).read_text())["selection"]["combined"]["parents"]
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert parents == [
        {"adapter": "site-a", "weight": 1.0, "scale": 1.0, "sha256": digest},
        {"adapter": "default", "weight": 2.0, "scale": 1.0, "sha256": None},
    ]
    assert config.selection["combined"]["parents"] == parents
    assert str(tmp_path) not in (tmp_path / "out" / CONFIG).read_text()


@pytest.mark.parametrize(
    ("first", "second", "target"),
    [
        ({"target": "block1"}, {"target": "block1"}, "block1"),
        ({"target": ["stem", "head"]}, {"target": "block2"}, "stem + head + block2"),
        ({"target": "all - head"}, {"target": "all - head"}, "all - head"),
        ({"target": "all - head"}, {"target": "block2"}, None),
        ({"target": "block1", "exclude_modules": ["bn1"]}, {"target": "head"}, None),
        (
            {"target": "block1", "blocks": {"block1": ["conv1", "layer1"], "rest": ["bn1", "layer2", "fc"]}},
            {"target": "head"},
            None,
        ),
        ({"target_modules": ["conv1"]}, {"target_modules": ["fc"]}, ["conv1", "fc"]),
        ({"target_modules": ["conv1"]}, {"target": "head"}, None),
    ],
)
def test_the_target_is_the_sum_where_that_says_the_same(base, tmp_path, first, second, target):
    for name, settings in (("a", first), ("b", second)):
        model = get_peft_model(copy.deepcopy(base), SurgicalConfig(**settings))
        disturb(model)
        model.save_pretrained(tmp_path / name)
    combine_adapters([tmp_path / "a", tmp_path / "b"], output=tmp_path / "both")
    config = loaded(base, tmp_path / "both").peft_config["default"]
    assert (config.target_modules if isinstance(target, list) else config.target) == target
    assert len(config.tensor_names) == len(set(config.tensor_names))
    if target is not None:  # a fresh adapter with this target tunes the same tensors
        again = SurgicalConfig(target=config.target, target_modules=config.target_modules, blocks=config.blocks)
        fresh = get_peft_model(copy.deepcopy(base), again)
        assert fresh.peft_config["default"].tensor_names == config.tensor_names


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_common_smaller_dtype_is_kept(base, tmp_path, dtype):
    half = [saved(base, tmp_path / str(seed), seed=seed, delta_dtype=dtype) for seed in (3, 4)]
    combined = combine_adapters(half, output=tmp_path / "half")
    assert {str(tensor.dtype) for tensor in combined.deltas.values()} == {f"torch.{dtype}"}
    held = load_file(tmp_path / "half" / WEIGHTS)
    assert {str(tensor.dtype) for tensor in held.values()} == {f"torch.{dtype}"}
    one, two = (read_adapter(folder).deltas for folder in half)
    for name, delta in combined.deltas.items():
        assert torch.equal(delta, (one[name].float() + two[name].float()).to(delta.dtype))
    full = combine_adapters([half[0], saved(base, tmp_path / "full")])
    assert {tensor.dtype for tensor in full.deltas.values()} == {torch.float32}


def test_double_precision_stays(tmp_path):
    base = CASES["conv+BN"].network().double()
    combined = combine_adapters([saved(base, tmp_path / "a"), saved(base, tmp_path / "b", seed=4)])
    assert {tensor.dtype for tensor in combined.deltas.values()} == {torch.float64}


# --- one base ---


def test_different_bases_are_refused_by_their_common_tensors(base, tmp_path):
    other = copy.deepcopy(base)
    other.layer1[0].weight.data += 1
    folders = [saved(base, tmp_path / "a"), saved(other, tmp_path / "b")]
    with pytest.raises(
        BaseMismatchError, match=r"a and b were .* 1 of their \d+ common tensors .* first layer1.0.weight"
    ):
        combine_adapters(folders, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    combine_adapters(folders, strict_base=False, output=tmp_path / "out")
    loaded(base, tmp_path / "out")
    with pytest.raises(BaseMismatchError, match=r"first layer1.0.weight"):
        loaded(other, tmp_path / "out")


def test_without_a_common_tensor_the_bases_names_tell(base, tmp_path):
    first, second = saved(base, tmp_path / "a", "block1"), saved(base, tmp_path / "b", "head")
    for folder in (first, second):  # as early versions saved them: a mark of the tuned tensors alone
        config = SurgicalConfig.from_pretrained(folder)
        edit(folder, base_fingerprint={n: config.base_fingerprint[n].split()[-1] for n in config.tensor_names})
    edit(first, base_model_name_or_path="timm/one")
    combine_adapters([first, second])  # one of them does not say
    edit(second, base_model_name_or_path="timm/two")
    with pytest.raises(
        BaseMismatchError, match=r"a was trained on timm/one and b on timm/two, and they have no tensor"
    ):
        combine_adapters([first, second])
    combine_adapters([first, second], strict_base=False)
    # A common tensor decides, whatever the base is called.
    edit(saved(base, tmp_path / "c", "block1"), base_model_name_or_path="elsewhere/one")
    combine_adapters([first, tmp_path / "c"])


def test_an_adapter_that_does_not_say_what_its_base_is(base, tmp_path):
    first, second = saved(base, tmp_path / "a"), read_adapter(saved(base, tmp_path / "b"))
    second.config.base_fingerprint.pop("conv1.weight")
    with pytest.raises(BaseMismatchError, match=r"b does not say what its base is at conv1.weight"):
        combine_adapters([first, second])


def test_other_shapes_are_refused_whatever_the_base_is(base, tmp_path):
    first = saved(base, tmp_path / "a", "head")
    wider = copy.deepcopy(base)
    wider.fc = torch.nn.Linear(8, 7)
    second = saved(wider, tmp_path / "b", "head")
    with pytest.raises(AdapterError, match=r"fc.weight has the shape \(5, 8\) in a, \(7, 8\) in b"):
        combine_adapters([first, second], strict_base=False)


# --- values, which do not add up ---


def moved(base, folder, target, policy, seed=3, **kwargs):
    """An adapter whose statistics have moved."""
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target, norm_stats=policy, **kwargs))
    torch.manual_seed(seed)
    train(model, torch.randn(6, 3, 8, 8))
    model.save_pretrained(folder)
    return folder


def test_statistics_of_disjoint_blocks_are_both_kept(base, tmp_path):
    first = moved(base, tmp_path / "a", "block1", "target")
    second = moved(base, tmp_path / "b", "block2", "target", seed=4)
    live = loaded(base, first)
    live.load_adapter(second, "second")
    live.base_model.set_adapter(["default", "second"])
    combined = combine_adapters([first, second], method="disjoint", output=tmp_path / "both")
    again = loaded(base, tmp_path / "both")
    assert torch.equal(outputs(again, INPUTS), outputs(live, INPUTS))
    assert {name.rpartition(".")[0] for name in combined.statistics} == {"bn1", "layer1.1", "layer2.1"}
    assert again.peft_config["default"].norm_stats == "target"
    assert set(combined.config.base_fingerprint) >= set(combined.deltas)


def test_statistics_of_one_stay_beside_an_adapter_without(base, tmp_path):
    first = moved(base, tmp_path / "a", "block1", "all")
    combine_adapters([first, saved(base, tmp_path / "b", "head")], output=tmp_path / "both")
    again = loaded(base, tmp_path / "both")
    assert again.peft_config["default"].norm_stats == "all"
    live = loaded(base, first)
    live.load_adapter(tmp_path / "b", "second")
    live.base_model.set_adapter(["default", "second"])
    assert torch.equal(outputs(again, INPUTS), outputs(live, INPUTS))


def test_statistics_that_both_carry_are_taken_from_the_one_that_is_named(base, tmp_path):
    folders = [moved(base, tmp_path / name, "block1", "target", seed) for seed, name in enumerate("ab")]
    with pytest.raises(AdapterError, match=r"a and b both carry bn1.running_mean, .* Say values_from=POSITION"):
        combine_adapters(folders, [0.5, 0.5])
    combined = combine_adapters(folders, [0.5, 0.5], values_from=1, output=tmp_path / "both")
    assert same(dict(combined.statistics), dict(read_adapter(folders[1]).statistics))
    again = loaded(base, tmp_path / "both")
    assert torch.equal(again.get_base_model().bn1.running_mean, combined.statistics["bn1.running_mean"])
    assert combined.config.selection["combined"]["values_from"] == 1
    none = combine_adapters(
        [*folders, saved(base, tmp_path / "frozen")], [1, 1, 1], values_from=2, output=tmp_path / "n"
    )
    assert not none.statistics
    assert loaded(base, tmp_path / "n").peft_config["default"].norm_stats == "frozen"
    with pytest.raises(AdapterError, match="values_from=2: give a position from 0 to 1"):
        combine_adapters(folders, values_from=2)


def test_half_of_a_statistic_is_not_in_the_file(base, tmp_path):
    first, second = moved(base, tmp_path / "a", "block1", "target"), saved(base, tmp_path / "b", "head")
    with pytest.raises(AdapterError, match=r"a carries bn1.running_mean, a value, and enters with the factor 0.5"):
        combine_adapters([first, second], [0.5, 1.0])
    half = moved(base, tmp_path / "half", "block1", "target", scale=0.5)
    with pytest.raises(AdapterError, match=r"factor 0.5"):
        combine_adapters([half, second])
    with pytest.raises(AdapterError, match=r"half has the scale 0.5, which shows statistics between the base's"):
        combine_adapters([half, second], values_from=0)
    combine_adapters([half, second], [2.0, 1.0])  # together 1: all of it


def test_a_head_that_is_saved_whole(base, tmp_path):
    first = saved(base, tmp_path / "a", "block1", modules_to_save=["fc"])
    second = saved(base, tmp_path / "b", "block2")
    model = loaded(base, first)
    model.get_base_model().fc.modules_to_save["default"].weight.data += 1
    model.save_pretrained(tmp_path / "new-head")
    combined = combine_adapters([tmp_path / "new-head", second], output=tmp_path / "both")
    assert set(combined.whole) == {"fc.weight", "fc.bias"}
    again = loaded(base, tmp_path / "both")
    assert again.peft_config["default"].modules_to_save == ["fc"]
    assert torch.equal(again.get_base_model().fc.modules_to_save["default"].weight, base.fc.weight + 1)
    live = loaded(base, tmp_path / "new-head")
    live.load_adapter(second, "second")
    live.base_model.set_adapter(["default", "second"])
    plain = copy.deepcopy(live.get_base_model())
    assert torch.equal(outputs(again, INPUTS), outputs(plain, INPUTS))
    with pytest.raises(AdapterError, match=r"both carry fc.bias, fc.weight|both carry fc.weight, fc.bias"):
        combine_adapters([first, tmp_path / "new-head"])
    with pytest.raises(AdapterError, match=r"fc.weight, fc.bias is tuned by one adapter and saved whole by another"):
        combine_adapters([first, saved(base, tmp_path / "c", "head")])
    taken = combine_adapters([first, tmp_path / "c"], values_from=1)
    assert not taken.whole
    assert taken.config.modules_to_save is None


# --- live models ---


def test_a_combination_on_a_live_model_saves_and_reloads(base, tmp_path):
    model = adapted(base, ["stem", "head"])
    model.add_adapter("other", SurgicalConfig(target="all - head"))
    disturb(model, seed=4)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = loaded(base, tmp_path / "both")
    assert torch.equal(outputs(again, INPUTS), outputs(model, INPUTS))
    # The sum of a list and of a difference does not say which tensors: their names do.
    assert again.peft_config["default"].target is None
    assert len(again.peft_config["default"].tensor_names) == len(list(base.parameters()))


def test_a_combination_does_not_inherit_what_chose_one_parent(base):
    model = adapted(base, "block1", selection={"asked": "auto-rgn"})
    model.add_adapter("other", SurgicalConfig(target="head"))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "disjoint")
    assert "asked" not in model.peft_config["both"].selection
    assert model.peft_config["both"].target == "block1 + head"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weights": [1e38, 1e38]}, "conv1.weight would not be finite: choose smaller weights"),
        ({"weights": [float("nan"), 1.0]}, "The weight nan is not finite"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "loud"}, "elects no sign"),
        ({"combination_type": "disjoint"}, "tune conv1.weight, bn1.weight, bn1.bias and 4 more: they are not disjoint"),
        ({"adapter_name": "bn1"}, "The adapter name 'bn1' is also a part"),
    ],
)
def test_a_refused_combination_leaves_the_model_as_it_was(base, settings, match):
    model = adapted(base)
    model.add_adapter("other", SurgicalConfig(target="block1"))
    disturb(model, 100.0, seed=4)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    arguments = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "new"} | settings
    with pytest.raises(AdapterError, match=match):
        model.add_weighted_adapter(**arguments)
    assert same(snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.peft_config) == ["default", "other"]
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new")  # and nothing is in the way of another


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"norm_stats": "all"}, "carry statistics"), ({"modules_to_save": ["fc"]}, "carry modules_to_save")],
)
def test_live_values_are_refused_with_the_way_out(base, kwargs, match):
    model = adapted(base, **kwargs)
    with pytest.raises(AdapterError, match=f"{match}.*combine_adapters"):
        model.add_weighted_adapter(["default"], [1.0], "new")


# --- reading ---


@pytest.mark.parametrize("case", ["conv+BN", "root tokens", "tied", "CLIP"])
def test_a_live_adapter_reads_as_the_one_that_is_saved(case, tmp_path):
    network = CASES[case].network()
    model = get_peft_model(
        network, SurgicalConfig(target="all", blocks=CASES[case].blocks if case != "tied" else None, scale=0.5)
    )
    disturb(model)
    model.save_pretrained(tmp_path)
    live, held = read_adapter(model), read_adapter(tmp_path)
    assert same(dict(live.deltas), dict(held.deltas))
    assert set(live.deltas) == set(held.config.tensor_names)
    assert live.config.base_fingerprint == held.config.base_fingerprint
    wide = held.scaled()
    assert all(torch.equal(wide[name], delta * 0.5) for name, delta in held.deltas.items())
    again = load_file(tmp_path / WEIGHTS)
    assert same(held.state_dict(), again)
    assert read_adapter(held) is held


def test_what_is_no_adapter(base, tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path / "nothing")):
        read_adapter(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path / "empty")
    folder = saved(base, tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"only adapter_model\.bin, a pickle"):
        read_adapter(folder)
    lora = get_peft_model(vit(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="is a LORA adapter: only surgical ones are read"):
        read_adapter(tmp_path / "lora")
    with pytest.raises(AdapterError, match="The model has no surgical adapter 'default'; it has none"):
        read_adapter(lora)
    model = adapted(base)
    model.add_adapter("other", SurgicalConfig(target="head"))
    with pytest.raises(AdapterError, match="no surgical adapter 'x'; it has default, other"):
        read_adapter((model, "x"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match=r"2 adapters are active: pass \(model, name\)"):
        read_adapter(model)


def test_an_altered_parent_is_refused(base, tmp_path):
    folder = saved(base, tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match="altered or replaced"):
        combine_adapters([folder], output=tmp_path / "out")


def test_nothing_is_overwritten(base, tmp_path):
    folder = saved(base, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for output in (folder, folder / WEIGHTS):
        with pytest.raises(AdapterError, match="exists and is not empty"):
            combine_adapters([folder], [0.5], output=output)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_in_the_hubs_cache(base, tmp_path, monkeypatch):
    """The layout of huggingface_hub's cache, which is what can be read offline."""
    repo, commit = tmp_path / "models--me--frost", "0123456789abcdef0123456789abcdef01234567"
    saved(base, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = read_adapter("me/frost")
    assert adapter.name == adapter.label == "me/frost"
    assert adapter.deltas


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([],), "No adapter to combine"),
        ((["a"], [1.0, 2.0]), "1 adapters but 2 weights"),
        ((["a"], [float("inf")]), "The weight inf is not finite"),
        ((["a"], [1.0], "svd"), "No method 'svd'"),
    ],
)
def test_mistakes_are_found_before_a_file_is_read(arguments, match):
    with pytest.raises(AdapterError, match=match):
        combine_adapters(*arguments)


def test_the_page_runs(base, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "combining.md").read_text(encoding="utf-8")
    for name, target, seed in (("frost", "block1", 3), ("fog", "block1", 4), ("head-b", "head", 5)):
        saved(base, tmp_path / name, target, seed)
    monkeypatch.chdir(tmp_path)
    fresh = {"network": copy.deepcopy(base), "images": INPUTS}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    for block in blocks[:2]:  # of one model
        exec(block, fresh)
    assert fresh["model"].active_adapters == ["frost", "fog"]
    for block in blocks[2:]:  # each of a base of its own
        own = {"network": copy.deepcopy(base), "images": INPUTS}
        exec(block, own)
    assert own["network"].conv1.weight.equal(base.conv1.weight)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "both",
        "mean",
        "merged",
        "minus-frost",
        "round-1",
        "frost-lora",
    }
