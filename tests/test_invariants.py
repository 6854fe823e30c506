"""The seven invariants of the design, over tiny networks x targets x norm policies."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import CASES, bits, disturb, outputs, same, snapshot, train

from peft_surgical import SurgicalConfig
from peft_surgical.tuner.specialise import statistics_of

GRID = [
    pytest.param(name, target, policy, id=f"{name}-{target}-{policy}")
    for name, case in CASES.items()
    for target in case.targets
    for policy in (("frozen", "target", "all") if case.moves else ("frozen",))
]
every_case = pytest.mark.parametrize(("name", "target", "policy"), GRID)


def build(name, target, policy="frozen", dtype=torch.float32, **kwargs):
    """(case, untouched copy of the base, the base's output, adapted model, inputs)."""
    case = CASES[name]
    network = case.network().to(dtype)
    base = copy.deepcopy(network)
    inputs = case.inputs()
    if isinstance(inputs, dict):
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    elif inputs.is_floating_point():
        inputs = inputs.to(dtype)
    # A target that is a path needs no blocks; one that is a block takes the explicit ones where there are some.
    blocks = case.blocks if name != "tied" else None
    config = SurgicalConfig(target=target, norm_stats=policy, blocks=blocks, **kwargs)
    before = outputs(network, inputs)
    return base, before, get_peft_model(network, config), inputs


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_1_a_fresh_adapter_is_the_identity(name, target, policy, dtype):
    _, before, model, inputs = build(name, target, policy, dtype)
    assert torch.equal(bits(outputs(model, inputs)), bits(before))


def test_1_also_for_a_weight_of_negative_zero():
    network = torch.nn.Linear(2, 2)
    network.weight.data.fill_(-0.0)
    model = get_peft_model(torch.nn.Sequential(network), SurgicalConfig(target=["0"]))
    assert torch.signbit(model.base_model.model[0].weight).all()


@every_case
def test_1_disabled_is_the_base_also_after_training_merging_and_unmerging(name, target, policy):
    _, before, model, inputs = build(name, target, policy)
    train(model, inputs)
    disturb(model)
    tuned = outputs(model, inputs)
    assert not torch.equal(tuned, before)
    with model.disable_adapter():
        assert torch.equal(bits(outputs(model, inputs)), bits(before))
    model.merge_adapter()
    assert torch.equal(bits(outputs(model, inputs)), bits(tuned))
    with model.disable_adapter():
        assert torch.equal(bits(outputs(model, inputs)), bits(before))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(bits(outputs(model, inputs)), bits(tuned))
    with model.disable_adapter():
        assert torch.equal(bits(outputs(model, inputs)), bits(before))


@every_case
def test_2_and_7_training_changes_the_deltas_and_nothing_else(name, target, policy):
    base, _, model, inputs = build(name, target, policy)
    network = model.get_base_model()
    frozen = snapshot(base)
    assert all(p.grad is None for p in model.parameters())
    train(model, inputs)
    now = {key: value for key, value in snapshot(network).items() if "surgery" not in key}
    assert same(now, frozen)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".surgical_delta.default." in name for name in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_case
def test_2_every_parameter_that_is_targeted_moves(name, target, policy):
    _, _, model, inputs = build(name, target, policy)
    train(model, inputs)
    still = [n for n, p in model.named_parameters() if p.requires_grad and not p.any()]
    # Parameters that these networks never use in a gradient-carrying way stay where they are.
    assert all(
        n.endswith(
            (
                "post_layernorm.surgery.surgical_delta.default.weight",
                "post_layernorm.surgery.surgical_delta.default.bias",
                "k_proj.surgery.surgical_delta.default.bias",
            )
        )
        for n in still
    ), still


@every_case
def test_3_what_is_reloaded_is_what_was_evaluated(name, target, policy, tmp_path):
    base, _, model, inputs = build(name, target, policy)
    train(model, inputs)
    disturb(model)
    tuned = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(bits(outputs(again, inputs)), bits(tuned))
    meta = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(bits(outputs(meta, inputs)), bits(tuned))
    merged = again.merge_and_unload()
    assert torch.equal(bits(outputs(merged, inputs)), bits(tuned))
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert list(merged.state_dict()) == list(base.state_dict())


@every_case
def test_5_it_is_the_base_with_other_values(name, target, policy):
    """The independent implementation: a plain copy of the network whose tensors are overwritten."""
    base, _, model, inputs = build(name, target, policy)
    train(model, inputs)
    disturb(model)
    plain = copy.deepcopy(base).requires_grad_(False)
    tensors = dict(plain.named_parameters()) | dict(plain.named_buffers())
    with torch.no_grad():
        for key, value in model.get_base_model().state_dict().items():
            path, mark, rest = key.rpartition("surgery.surgical_")
            if mark:
                own = tensors[path + rest.rpartition(".")[2]]
                own.copy_(own + value if rest.startswith("delta") else value)
    assert torch.equal(bits(outputs(plain, inputs)), bits(outputs(model, inputs)))


@every_case
def test_6_the_file_holds_the_deltas_and_nothing_else(name, target, policy, tmp_path):
    _, _, model, inputs = build(name, target, policy)
    train(model, inputs)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    config = model.peft_config["default"]
    assert len(held) == len(config.tensor_names)
    assert not any("default" in key for key in held)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    owned = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if ".surgical_stats." in n)
    assert sum(t.numel() * t.element_size() for t in held.values()) == trained + owned
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= trained + owned + 16 * 1024


@pytest.mark.parametrize("policy", ["frozen", "target", "all"])
def test_7_statistics_move_only_where_the_policy_says(policy):
    base, _, model, inputs = build("conv+BN", "block1", policy)
    train(model, inputs)
    moved = set()
    for name, module in model.get_base_model().named_modules():
        if not statistics_of(module) or "surgery" in name:
            continue
        if not torch.equal(module.running_mean, base.get_submodule(name).running_mean):
            moved.add(name)
    assert moved == {"frozen": set(), "target": {"bn1", "layer1.1"}, "all": {"bn1", "layer1.1", "layer2.1"}}[policy]


def test_7_a_trained_statistic_equals_batchnorm_itself():
    base, _, model, inputs = build("conv+BN", "bn1", "target")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = None
        model.train()
        for _ in range(3):
            model(inputs)
        plain = copy.deepcopy(base)
        plain.bn1.train()
        for _ in range(3):
            plain(inputs)
    assert torch.equal(model.get_base_model().bn1.running_var, plain.bn1.running_var)
    assert model.get_base_model().bn1.num_batches_tracked == plain.bn1.num_batches_tracked
