"""Statistics that are estimated once and held: against plain PyTorch, and through all that an adapter goes through."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import ConvNet, Rows, used_batchnorm
from torch import nn

from peft_surgical import SurgicalConfig
from peft_surgical.errors import AdapterError, DataError
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.statistics import estimate_statistics, mixed_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*no accelerator is found.*")
IMAGES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1 for seed in range(3)]
SHOWN = IMAGES[0]


def adapted(target="head", policy="estimated", images=IMAGES):
    model = get_peft_model(used_batchnorm(), SurgicalConfig(target=target, norm_stats=policy)).eval()
    if images is not None:
        estimate_statistics(model, [{"pixel_values": one} for one in images])
    return model


def plain(images=IMAGES):
    """The base with the averages over these batches of each norm's own, with PyTorch's means alone."""
    net = used_batchnorm()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    net.train()
    with torch.no_grad():
        for one in images:
            net(one)
    return net.eval()


@torch.no_grad()
def logits(model, images=SHOWN):
    return model(images)


@pytest.mark.parametrize("target", ["head", "block1", "all"])
def test_statistics_are_the_averages_of_the_batches(target):
    torch.testing.assert_close(logits(adapted(target)), logits(plain()))
    assert not torch.allclose(logits(plain()), logits(used_batchnorm().eval()), atol=0.01)


def test_until_they_are_estimated_they_are_the_bases():
    assert torch.equal(logits(adapted(images=None)), logits(used_batchnorm().eval()))


def test_estimating_again_begins_anew():
    model = adapted()
    estimate_statistics(model, [{"pixel_values": IMAGES[1]}])
    torch.testing.assert_close(logits(model), logits(plain(IMAGES[1:2])))


def test_training_does_not_move_them():
    model = adapted("block1")
    wanted = logits(model)
    model.train()
    assert torch.equal(logits(model, SHOWN), wanted)
    assert torch.equal(logits(model, SHOWN), wanted)
    assert model.training


def test_modes_momenta_and_random_numbers_are_left_as_they_were():
    model = adapted(images=None)
    net = model.base_model.model
    net.layer1.train()
    net.bn1.momentum = 0.3
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    estimate_statistics(model, [{"pixel_values": SHOWN}])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert net.bn1.momentum == 0.3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_disabled_adapter_is_the_base_bit_for_bit():
    model = adapted("all")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(used_batchnorm().eval()))
    torch.testing.assert_close(logits(model), logits(plain()))
    assert torch.equal(logits(model.unload().eval()), logits(used_batchnorm().eval()))


def test_they_are_saved_and_reloaded(tmp_path):
    model = adapted("block1")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(used_batchnorm(), tmp_path)
    assert torch.equal(logits(again.train()), logits(model))
    assert torch.equal(logits(again.eval()), logits(model))
    assert again.active_peft_config.norm_stats == "estimated"


def test_they_are_merged_and_come_out_again():
    model = adapted("block1")
    wanted = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), wanted)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(used_batchnorm().eval()))
    merged = model.merge_and_unload().eval()
    assert torch.equal(logits(merged), wanted)
    assert type(merged.bn1) is nn.BatchNorm2d


def test_a_second_adapter_has_statistics_of_its_own():
    model = adapted("head")
    first = logits(model)
    model.add_adapter("other", SurgicalConfig(target="head", norm_stats="estimated"))
    model.set_adapter("other")
    assert torch.equal(logits(model.eval()), logits(used_batchnorm().eval()))
    estimate_statistics(model, [{"pixel_values": IMAGES[2]}])
    torch.testing.assert_close(logits(model), logits(plain(IMAGES[2:])))
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), first)


def test_an_adapter_that_moves_its_statistics_still_does_beside_one_that_holds_them():
    model = adapted("head")
    model.add_adapter("moving", SurgicalConfig(target="head", norm_stats="all"))
    held = logits(model)
    model.set_adapter("moving")
    model.train()
    logits(model)
    model.eval()
    assert not torch.equal(logits(model), logits(used_batchnorm().eval()))
    model.set_adapter("default")
    assert torch.equal(logits(model), held)


@pytest.mark.parametrize(
    ("model", "images", "error", "message"),
    [
        (lambda: adapted(policy="frozen", images=None), IMAGES, AdapterError, "no active adapter has statistics"),
        (
            lambda: adapted(policy="all", images=None),
            IMAGES,
            AdapterError,
            "give SurgicalConfig norm_stats='estimated'",
        ),
        (lambda: adapted(images=None), [], DataError, "no images to estimate statistics of: give at least one batch"),
    ],
)
def test_what_cannot_be_estimated_is_refused(model, images, error, message):
    with pytest.raises(error, match=message):
        estimate_statistics(model(), [{"pixel_values": one} for one in images])


def test_a_network_without_statistics_has_none_to_estimate():
    net, settings = ConvNet(lambda width: nn.GroupNorm(2, width)), FitSettings(1e-2, epochs=1, use_cpu=True)
    with pytest.raises(AdapterError, match="norm_stats='estimated', for a network with BatchNorms"):
        fit(net, "block1", Rows(16, 1), Rows(8, 2), settings, config={"norm_stats": "estimated"})


@pytest.mark.parametrize("method", ["block1", "head"])
def test_remembered_features_change_nothing(method):
    settings = FitSettings(1e-2, epochs=2, batch_size=8, use_cpu=True)
    tuning, validation = Rows(20, 1), Rows(10, 2)
    one, other = (
        fit(used_batchnorm(), method, tuning, validation, settings, config={"norm_stats": "estimated"}, cache=cache)
        for cache in (True, False)
    )
    wanted = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert (one.curve, one.losses) == (other.curve, other.losses)
    model = copy.deepcopy(one.model)
    with torch.no_grad():  # and training began from the averages over the tuning images
        estimate_statistics(model, mixed_batches(tuning))
    if method == "head":  # which lies behind all norms
        for name, value in model.state_dict().items():
            assert torch.equal(value, wanted[name]), name


def test_batches_are_mixed_and_of_about_equal_size():
    sizes = [len(batch["labels"]) for batch in mixed_batches(Rows(130))]
    assert sizes == [44, 44, 42]
    first = next(iter(mixed_batches(Rows(130))))["labels"]
    assert torch.equal(first, next(iter(mixed_batches(Rows(130))))["labels"])
    assert not torch.equal(first, Rows(130).classes[:44])
