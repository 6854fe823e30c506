"""Mixed batches compute what lies in front of the first tuned tensor once, and only where that is right."""

import pytest
import torch
from peft import get_peft_model
from tiny import ConvNet, disturb
from torch import nn

from peft_surgical import SurgicalConfig
from peft_surgical.tuner.sharing import may_share

NAMES = ["one", "two", "__base__", "two", "one", "one"]
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def norm(channels):
    return nn.GroupNorm(1, channels)


def two(network, first, second, **kwargs):
    """A network with the adapters one and two, and the output of each row by its own adapter."""
    torch.manual_seed(0)
    model = get_peft_model(network, SurgicalConfig(target=first, **kwargs), adapter_name="one")
    model.add_adapter("two", SurgicalConfig(target=second, **kwargs))
    disturb(model)
    model.eval()
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        with torch.no_grad():
            alone[name] = model(IMAGES)
    with torch.no_grad(), model.disable_adapter():
        alone["__base__"] = model(IMAGES)
    return model, torch.stack([alone[name][row] for row, name in enumerate(NAMES)])


def mixed(model):
    with torch.no_grad():
        return model(IMAGES, adapter_names=NAMES)


def counted(module):
    """Rows of every forward of a module from now on."""
    rows, forward = [], module.forward

    def count(x):
        rows.append(len(x))
        return forward(x)

    module.forward = count
    return rows


def nothing_is_left(model):
    return not any({"forward", "effective"} & {*vars(module)} for module in model.modules())


@pytest.mark.parametrize(("first", "second"), [("head", "head"), ("head", "block2"), ("layer2.0.bias", "block2")])
def test_the_modules_in_front_of_the_first_tuned_tensor_run_once(first, second):
    model, expected = two(ConvNet(norm), first, second)
    assert torch.allclose(mixed(model), expected, atol=1e-6)
    assert nothing_is_left(model)
    rows = counted(model.get_base_model().layer1)
    assert torch.allclose(mixed(model), expected, atol=1e-6)
    assert rows == [6]  # it was tried with the first batch


def test_a_first_block_leaves_nothing_to_share():
    model, expected = two(ConvNet(norm), "block1", "head")
    rows = counted(model.get_base_model().layer1)
    assert torch.allclose(mixed(model), expected, atol=1e-6)
    assert sorted(rows) == [1, 2, 3]


def test_the_active_adapter_has_no_part_in_what_is_shared():
    model, expected = two(ConvNet(norm), "head", "head")
    model.add_adapter("early", SurgicalConfig(target="block1"))
    disturb(model, seed=5)
    model.set_adapter("one")
    with torch.no_grad():
        expected = dict.fromkeys(("one", "two"))
        for name in expected:
            model.set_adapter(name)
            expected[name] = model(IMAGES)
    model.set_adapter("early")
    found = mixed(model)
    for row, name in enumerate(NAMES):
        if name in expected:
            assert torch.allclose(found[row], expected[name][row], atol=1e-6)


def test_a_network_that_mixes_its_rows_is_computed_row_by_row():
    model, _ = two(ConvNet(lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)), "head", "head")
    for _ in range(2):
        found = mixed(model)
        rows = [i for i, name in enumerate(NAMES) if name == "one"]
        model.set_adapter("one")
        with torch.no_grad():
            assert torch.allclose(found[rows], model(IMAGES[rows]), atol=1e-6)
        assert not may_share(model.get_base_model())


class Residual(ConvNet):
    """Adds to a module's output in place, and calls one module on both sides of what is tuned."""

    def forward(self, x):
        x = self.conv1(x)
        x += 1
        x = self.layer1[2](self.layer1[1](self.layer1[0](x))) + x
        return self.fc(self.layer1[2](self.layer2(x)).mean((2, 3)))


def test_an_output_that_is_changed_in_place_is_not_shared():
    model, expected = two(Residual(norm), "layer2", "layer2")
    for _ in range(2):
        assert torch.allclose(mixed(model), expected, atol=1e-6)
    assert not may_share(model.get_base_model())


def test_an_error_leaves_nothing_behind():
    model, _ = two(ConvNet(norm), "head", "head")
    with pytest.raises(RuntimeError, match="channels"), torch.no_grad():
        model(IMAGES[:, :2], adapter_names=NAMES)
    assert nothing_is_left(model)
