"""Code that replaces, resets or rewrites what an adapted network holds: refused in words, or without effect."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import ConvNet, disturb, images, outputs, same, snapshot, train, used_batchnorm
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, spectral_norm
from torch.optim.swa_utils import update_bn

from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterError, UnsupportedModelError


def adapted(target="block1", policy="frozen"):
    model = get_peft_model(used_batchnorm(), SurgicalConfig(target=target, norm_stats=policy))
    disturb(model)
    return model


# --- FSDP2 ---


def test_fsdp2_puts_its_shards_in_place_of_a_tuned_tensor():
    """Its own function for that, without processes: a second shard must not be added to the delta on the way."""
    place = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_param")
    model = adapted("head")
    module = model.base_model.model.fc
    for _ in range(2):
        shard = nn.Parameter(torch.zeros(2, module._parameters["weight"].shape[1]))
        place.unsafe_setattr_param(module, "weight", shard)
        assert module._parameters["weight"] is shard


# --- norm modules ---


@pytest.mark.parametrize("target", ["head", "block1", "all"])
@pytest.mark.parametrize("library", ["torch", "timm"])
def test_converting_to_sync_batchnorm_is_refused_before_anything_changes(target, library):
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if library == "timm":
        convert = pytest.importorskip("timm").layers.convert_sync_batchnorm
    model = adapted(target)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"convert_sync_batchnorm would replace .* before get_peft_model"):
        convert(model)
    assert same(snapshot(model), before)
    merged = convert(model.merge_and_unload())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in merged.modules())


def test_so_is_freezing_by_another_class():
    timm = pytest.importorskip("timm")
    with pytest.raises(AdapterError, match="freeze_batch_norm_2d would replace"):
        timm.layers.freeze_batch_norm_2d(adapted().get_base_model())


def test_a_norm_module_still_says_whether_it_is_affine():
    network = adapted().get_base_model()
    assert network.bn1.affine is True
    network.bn1.affine = False
    assert network.bn1.affine is False
    del network.bn1.__dict__["affine"]
    with pytest.raises(AttributeError, match="'BatchNorm2d' object has no attribute 'affine'"):
        network.bn1.affine  # noqa: B018


def test_update_bn_leaves_frozen_statistics():
    model = adapted()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="BatchNorm2d keeps its statistics: they are frozen"):
        update_bn([images()], model)
    assert same(snapshot(model), before)


def test_update_bn_moves_what_the_policy_lets_move():
    model = adapted(policy="target")
    base = copy.deepcopy(used_batchnorm())
    with pytest.warns(UserWarning, match="keeps its statistics"):  # layer2's
        update_bn([images()], model)
    network = model.get_base_model()
    assert not torch.equal(network.bn1.running_mean, base.bn1.running_mean)
    assert torch.equal(network.bn1._buffers["running_mean"], base.bn1.running_mean)
    assert torch.equal(network.layer2[1].running_mean, base.layer2[1].running_mean)


def test_a_module_that_something_replaced_is_noticed_on_saving(tmp_path):
    model = adapted("conv1 + head")
    model.get_base_model().fc = nn.Linear(8, 5)
    with pytest.raises(AdapterError, match=r"^fc.weight, fc.bias of the base changed"):
        model.save_pretrained(tmp_path)
    model.peft_config["default"].strict_base = False
    with (
        pytest.warns(UserWarning, match=r"strict_base=False: fc.weight"),
        pytest.raises(AdapterError, match=r"was not saved: fc.weight, fc.bias of it is no longer in the model"),
    ):
        model.save_pretrained(tmp_path)


# --- other buffers ---


class Codebook(nn.Module):
    """A vector quantiser's: a mean that moves in training, by assignment and in place; it sees its own update."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean = self.mean + x.detach().mean((0, 2, 3))
            self.mean.mul_(0.9)
            self.steps += 1
        return x - self.mean[:, None, None]


def moving(kind):
    net = ConvNet(nn.BatchNorm2d)
    if kind == "codebook":
        net.layer1.add_module("code", Codebook())
    elif kind == "hooks":
        spectral_norm(net.layer1[0])
    else:
        parametrizations.spectral_norm(net.layer1[0])
    return net.eval()


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.* is deprecated")
@pytest.mark.parametrize("policy", ["frozen", "all"])
@pytest.mark.parametrize("kind", ["codebook", "hooks", "parametrized"])
def test_buffers_that_move_in_training_are_held(kind, policy, tmp_path):
    base = moving(kind)
    plain, model = copy.deepcopy(base).train(), get_peft_model(copy.deepcopy(base), SurgicalConfig(target="fc"))
    kept = {name: value.clone() for name, value in base.named_buffers()}
    first = model.train()(images())
    if kind == "codebook":  # the forward itself sees what it would see
        plain.bn1.eval(), plain.layer1[1].eval(), plain.layer2[1].eval()
        assert torch.equal(first, plain(images()))
        assert plain.layer1.code.steps == 1
    train(model, images())
    now = dict(model.get_base_model().named_buffers())
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    tuned = outputs(model, images())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(again, images()), tuned)
    assert [type(module) for module in model.unload().modules()] == [type(module) for module in base.modules()]


def test_they_come_back_when_a_forward_fails():
    model = get_peft_model(moving("codebook"), SurgicalConfig(target="fc")).train()
    code = model.get_base_model().layer1.code
    mean = code.mean
    with pytest.raises(RuntimeError):
        code(torch.zeros(1, 3, 2, 2))
    assert code.mean is mean


# --- tuned tensors ---


def test_assigning_to_a_tuned_tensor_names_merge():
    network = adapted("head").get_base_model()
    before = snapshot(network)
    with pytest.raises(AdapterError, match=r"weight of Linear is tuned: .* a second time. Call merge_and_unload"):
        network.fc.weight = nn.Parameter(network.fc.weight.detach() * 2)
    with pytest.raises(AdapterError, match="bias of Linear is tuned"):
        del network.fc.bias
    assert same(snapshot(network), before)
    network.layer2[0].bias = nn.Parameter(torch.zeros(8))  # not tuned: the user's own affair, until it is saved
    network.fc.note = "anything else"


def test_fusing_convolution_and_norm_names_merge():
    model = adapted("block1").eval()
    network = model.get_base_model()
    with pytest.raises(AdapterError, match="Call merge_and_unload"):
        fuse_conv_bn_eval(network.conv1, network.bn1)
    merged = model.merge_and_unload()
    x = images()
    fused = fuse_conv_bn_eval(merged.conv1, merged.bn1)(x)
    assert torch.allclose(fused, merged.bn1(merged.conv1(x)), atol=1e-5)


def test_parametrizing_a_tuned_tensor_names_merge():
    network = adapted("head").get_base_model()
    with pytest.raises(AdapterError, match="Call merge_and_unload"):
        parametrizations.weight_norm(network.fc)
    assert list(network.fc._parameters) == ["weight", "bias"]


def test_a_state_dict_of_the_base_may_be_assigned():
    base = used_batchnorm()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="head"))
    missing, unexpected = model.get_base_model().load_state_dict(base.state_dict(), strict=False, assign=True)
    assert not unexpected
    assert all(".surgical_delta." in name for name in missing)


def test_scripting_names_what_to_call():
    model = adapted("head").eval()
    for one in (model, model.get_base_model()):
        with pytest.raises(UnsupportedModelError, match=r"torch.jit.trace or torch.export, .* merge_and_unload"):
            torch.jit.script(one)
    traced = torch.jit.trace(model.get_base_model(), images())
    assert torch.equal(traced(images()), outputs(model, images()))
    torch.jit.script(model.merge_and_unload())


# --- networks with names or methods that PEFT or torch stumble over ---


class BaseLayer(nn.Module):
    """timm's DLA has a stage of this name, by which PEFT knows its own layers."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.base_layer(x).mean((2, 3)))


@pytest.mark.parametrize("target", ["base_layer", "fc"])
def test_a_child_called_base_layer(target):
    for whole in (None, ["fc"]):
        if whole == [target]:
            continue
        network = BaseLayer()
        before, order = snapshot(network), list(network._modules)
        model = get_peft_model(network, SurgicalConfig(target=[target], modules_to_save=whole))
        assert model.unload() is network
        assert same(snapshot(network), before)
        assert list(network._modules) == order
        assert not any("surgery" in name for name, _ in network.named_modules())


class Versioned(ConvNet):
    """Asks for a version when it is loaded, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be set to 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Stubborn(ConvNet):
    """Loads nothing but whole checkpoints."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if f"{prefix}fc.weight" not in state_dict:
            raise KeyError("fc.weight")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_network_that_asks_for_the_version_of_a_state_dict(tmp_path):
    base = Versioned(nn.BatchNorm2d).eval()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1"))
    disturb(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(again, images()), outputs(model, images()))


def test_a_network_that_refuses_an_adapters_tensors_is_left_as_it_was(tmp_path):
    base = Stubborn(nn.BatchNorm2d).eval()
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1"))
    model.save_pretrained(tmp_path)
    network = copy.deepcopy(base)
    with pytest.raises(UnsupportedModelError, match=r"Stubborn does not load .*KeyError: 'fc.weight'"):
        PeftModel.from_pretrained(network, tmp_path)
    assert same(snapshot(network), snapshot(base))
    assert [type(module) for module in network.modules()] == [type(module) for module in base.modules()]
