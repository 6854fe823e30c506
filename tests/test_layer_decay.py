"""timm's layer-wise learning rates for an adapter's parameters: those of the network tuned by hand."""

import pytest
import torch
from peft import get_peft_model
from tiny import ConvNet, RootTokens
from torch import nn

from peft_surgical import SurgicalConfig, with_base_names
from peft_surgical.errors import AdapterError

timm = pytest.importorskip("timm")
optim = pytest.importorskip("timm.optim")
OPTIONS = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}


def small(name):
    options = {"vit_tiny_patch16_224": {"depth": 3}, "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)}}
    return timm.create_model(name, num_classes=5, **options.get(name, {}))


def settings(model, names):
    """Name -> (lr_scale, weight decay) of each parameter that the optimizer holds."""
    optimizer = optim.create_optimizer_v2(model, **OPTIONS, layer_decay=0.5)
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("target", ["all", "embedding", "block2 + head"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_resnet"])
def test_groups_are_those_of_the_network_tuned_by_hand(name, target):
    target = target.replace("embedding", "stem" if name == "test_resnet" else "embedding")
    torch.manual_seed(0)
    by_hand, model = small(name), get_peft_model(small(name), SurgicalConfig(target=target))
    tuned = set(model.peft_config["default"].tensor_names)
    for own, parameter in by_hand.named_parameters():
        parameter.requires_grad_(own in tuned)
    wanted = settings(by_hand, {id(parameter): own for own, parameter in by_hand.named_parameters()})
    view = with_base_names(model)
    assert settings(view, {id(parameter): own for own, parameter in view.named_parameters()}) == wanted
    assert set(wanted) == tuned
    held = {id(parameter) for parameter in view.parameters() if parameter.requires_grad}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_resnet"])
def test_the_adapted_model_itself_gives_the_same_groups(name):
    torch.manual_seed(0)
    by_hand, model = small(name), get_peft_model(small(name), SurgicalConfig(target="all"))
    wanted = settings(by_hand, {id(parameter): own for own, parameter in by_hand.named_parameters()})
    view = {id(parameter): own for own, parameter in with_base_names(model).named_parameters()}
    assert settings(model, view) == wanted
    assert settings(model.base_model, view) == wanted
    assert set(wanted) == set(model.peft_config["default"].tensor_names)


def test_networks_that_timm_cannot_ask_stay_so():
    model = get_peft_model(ConvNet(nn.BatchNorm2d), SurgicalConfig(target="head"))
    assert not hasattr(model, "group_matcher")
    assert not hasattr(model, "no_weight_decay")
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
    model = get_peft_model(network, SurgicalConfig(target="cls_token", modules_to_save=["head"]))
    group_of = model.group_matcher()
    assert group_of("base_model.model.surgery.surgical_delta.default.cls_token") == 0
    head = group_of("base_model.model.head.modules_to_save.default.weight")
    assert head == group_of("base_model.model.head.original_module.weight") == group_of("norm.weight") + 1
    assert "base_model.model.surgery.surgical_delta.default.cls_token" in model.no_weight_decay()


def test_root_tokens_and_modules_saved_whole():
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
    model = get_peft_model(network, SurgicalConfig(target="embedding", modules_to_save=["head"]))
    view = with_base_names(model)
    found = settings(view, {id(parameter): own for own, parameter in view.named_parameters()})
    assert found["cls_token"] == (0.5**3, 0.0)
    assert found["pos_embed"] == (0.5**3, 0.0)
    assert found["head.weight"] == (1.0, 0.05)
    assert found["head.bias"] == (1.0, 0.0)
    assert list(dict(view.named_parameters())) == list(
        dict(timm.create_model("vit_tiny_patch16_224", depth=2).named_parameters())
    )
    assert view.training is True


def test_a_network_without_a_matcher_keeps_the_order_of_its_parameters():
    base = RootTokens()

    model = get_peft_model(base, SurgicalConfig(target=["blocks.1", "head"]))
    assert [name for name, _ in with_base_names(model).named_parameters()] == [
        name for name, _ in RootTokens().named_parameters()
    ]


def test_nothing_to_train():
    model = get_peft_model(ConvNet(nn.BatchNorm2d), SurgicalConfig(target="head", inference_mode=True))
    with pytest.raises(AdapterError, match="has no trainable parameter"):
        with_base_names(model)
