"""BatchNorms under other statistics, against PyTorch's own training forward."""

import pytest
import torch
from peft import get_peft_model
from tiny import CASES, disturb, images, same, snapshot
from torch import nn

from peft_surgical import SurgicalConfig
from peft_surgical.adaptation.batchnorm import batch_statistics, mixed_statistics
from peft_surgical.errors import ConfigError


def network():
    return CASES["conv+BN"].network()


@torch.no_grad()
def in_training_mode(net, inputs):
    before = snapshot(net)
    net.train()
    out = net(inputs)
    net.load_state_dict(before)
    net.eval()
    return out


def test_the_batchs_statistics_are_those_of_training_mode_and_nothing_moves():
    net, inputs = network(), images()
    before, expected, usual = snapshot(net), in_training_mode(net, inputs), net(inputs)
    classes = [type(module) for module in net.modules()]
    with batch_statistics(net), torch.no_grad():
        assert torch.equal(net(inputs), expected)
        assert not torch.equal(expected, usual)
    assert torch.equal(net(inputs), usual)
    assert same(before, snapshot(net))
    assert [type(module) for module in net.modules()] == classes


@pytest.mark.parametrize("policy", ["frozen", "target", "all"])
def test_statistics_move_only_where_an_active_adapter_owns_them(policy):
    model = get_peft_model(network(), SurgicalConfig(target="stem", norm_stats=policy))
    disturb(model)
    before, modes = snapshot(model), [vars(module)["training"] for module in model.modules()]
    with batch_statistics(model), torch.no_grad():
        found = model(images())
    after = snapshot(model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert all(".surgical_stats." in f".{name}" for name in moved)
    owners = {name.partition(".surgery")[0].removeprefix("base_model.model.") for name in moved}
    assert owners == {"frozen": set(), "target": {"bn1"}, "all": {"bn1", "layer1.1", "layer2.1"}}[policy]
    assert [vars(module)["training"] for module in model.modules()] == modes
    merged = model.merge_and_unload()
    assert torch.allclose(found, in_training_mode(merged, images()), atol=1e-6)


def test_an_adapter_that_is_not_active_keeps_its_statistics():
    model = get_peft_model(network(), SurgicalConfig(target="stem", norm_stats="all"))
    model.add_adapter("other", SurgicalConfig(target="stem"))
    model.set_adapter("other")
    before = snapshot(model)
    with batch_statistics(model), torch.no_grad():
        model(images())
    assert same(before, snapshot(model))


@pytest.mark.parametrize("strength", [0, 1, 16])
def test_mixed_statistics_are_the_weighted_mean_of_source_and_batch(strength):
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5) * 2 + 1
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
    prior = strength / (strength + 1)
    mean, var = torch.zeros(3), torch.ones(3)
    nn.functional.batch_norm(x, mean, var, None, None, True, 1.0)  # as MEMO's code estimates them
    mean, var = (prior * old + (1 - prior) * new for old, new in ((norm.running_mean, mean), (norm.running_var, var)))
    expected = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    before, usual = snapshot(norm), norm(x)
    with mixed_statistics(norm, strength), torch.no_grad():
        assert torch.allclose(norm(x), expected, atol=1e-5)
    assert same(before, snapshot(norm))
    assert torch.equal(norm(x), usual)
    assert "_mixing" not in vars(norm)


def test_mixed_statistics_start_from_those_that_the_adapter_owns():
    model = get_peft_model(network(), SurgicalConfig(target="stem", norm_stats="all"))
    for name, value in model.named_buffers():
        if "surgical_stats" in name and value.is_floating_point():
            value.add_(0.3)
    with mixed_statistics(model, 1e12), torch.no_grad():
        found = model(images())
    assert torch.allclose(found, model(images()), atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(found, model(images()), atol=1e-3)


def test_other_norms_are_left_alone():
    net = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.GroupNorm(1, 3)).eval()
    with batch_statistics(net), mixed_statistics(net, 1):
        assert torch.equal(net(images()), net.eval()(images()))


@pytest.mark.parametrize("strength", [-1, float("nan")])
def test_a_strength_that_counts_no_images_is_refused(strength):
    net = network()
    with pytest.raises(ConfigError, match="prior_strength="), mixed_statistics(net, strength):
        pass
    assert type(net.bn1) is nn.BatchNorm2d
