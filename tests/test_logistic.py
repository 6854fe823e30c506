"""The solved head against gradient descent of another hand; its folds, and the heads that it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import ConvNet, Rows, used_batchnorm, vit
from torch import nn
from torch.utils.data import default_collate

from peft_surgical import anatomy_of
from peft_surgical.errors import ConfigError
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.logistic import _FOLDS, PENALTIES, _penalty, _solved, can_solve, solve_head

TUNING, VALIDATION = Rows(60, 1), Rows(30, 2)


def groupnorm():
    torch.manual_seed(0)
    return ConvNet(lambda width: nn.GroupNorm(2, width))


def features_of(net, rows):
    kept = []
    hook = net.fc.register_forward_pre_hook(lambda module, given: kept.append(given[0].detach().double()))
    with torch.no_grad():
        net.eval()(rows.images)
    hook.remove()
    return kept[0]


def objective(moves, features, labels, weight, bias, penalty):
    """Mean cross entropy + penalty x mean squared length of a feature x squared length of the moves."""
    logits = features @ (weight + moves[0]).T + bias + moves[1]
    loss = (logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]).mean()
    return loss + penalty * (features**2).sum(1).mean() * sum((move**2).sum() for move in moves)


@pytest.mark.parametrize("penalty", [1.0, 1e-2])
def test_it_is_the_minimum_that_gradient_descent_finds(penalty):
    net = groupnorm()
    features, labels = features_of(net, TUNING), TUNING.classes
    weight, bias = net.fc.weight.detach().double(), net.fc.bias.detach().double()
    moves = [torch.zeros_like(weight), torch.zeros_like(bias)]
    # The gradient changes by at most (1 / 2 + 2 penalty) times the mean squared length, and 1 for the bias.
    step = 1 / (float((features**2).sum(1).mean()) * (0.5 + 2 * penalty) + 1)
    for _ in range(4000):
        logits = features @ (weight + moves[0]).T + bias + moves[1]
        error = (logits.softmax(1) - F.one_hot(labels, 5)) / len(labels)
        pull = 2 * penalty * (features**2).sum(1).mean()
        moves = [
            moves[0] - step * (error.T @ features + pull * moves[0]),
            moves[1] - step * (error.sum(0) + pull * moves[1]),
        ]
    given = (features, labels, weight, bias, penalty)
    solved = _solved(*given)
    assert float(objective(solved, *given)) == pytest.approx(float(objective(moves, *given)), abs=1e-6)
    again = _solved(*given, start=_solved(features, labels, weight, bias, 10 * penalty))
    assert float(objective(again, *given)) == pytest.approx(float(objective(moves, *given)), abs=1e-6)


@pytest.mark.parametrize("make", [used_batchnorm, groupnorm])
def test_the_model_is_the_base_with_a_head_that_moved(make):
    base = make()
    model, logits, folds = solve_head(copy.deepcopy(base), TUNING, VALIDATION, batch_size=16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(VALIDATION.images), logits)
        with model.disable_adapter():
            assert torch.equal(model(VALIDATION.images), base.eval()(VALIDATION.images))
    assert model.peft_config["default"].tensor_names == ["fc.weight", "fc.bias"]
    assert folds["penalty"] in PENALTIES
    before = F.cross_entropy(base(TUNING.images), TUNING.classes)
    assert folds["fold_loss"] < before
    assert 0 < folds["fold_accuracy"] <= 1
    # The same as by hand from features and penalty.
    features = features_of(base, TUNING)
    weight, bias = base.fc.weight.detach().double(), base.fc.bias.detach().double()
    moves = _solved(features, TUNING.classes, weight, bias, folds["penalty"])
    wanted = features_of(base, VALIDATION) @ (weight + moves[0]).T + bias + moves[1]
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_on_the_model_and_its_mode_is_kept():
    model, _, _ = solve_head(groupnorm().train(), TUNING, VALIDATION)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    again, _, _ = solve_head(groupnorm(), TUNING, VALIDATION, batch_size=7)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name, rtol=1e-3, atol=1e-4)


def test_a_new_head_begins_at_zero():
    net = groupnorm()
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    model, logits, folds = solve_head(net, TUNING, VALIDATION)
    assert folds["fold_loss"] < torch.log(torch.tensor(5.0))
    assert (logits.argmax(1) == VALIDATION.classes).float().mean() > 0.3  # of five classes
    assert model.get_nb_trainable_parameters()[0] == 5 * 8 + 5


def test_statistics_that_fit_the_images_give_a_lower_loss_on_the_folds():
    base = used_batchnorm()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 3 * torch.randn(module.running_mean.shape, generator=generator)
                module.running_var *= 30
    found = {
        policy: solve_head(copy.deepcopy(base), TUNING, VALIDATION, config={"norm_stats": policy})[2]["fold_loss"]
        for policy in ("frozen", "estimated")
    }
    assert found["estimated"] < found["frozen"]


def test_the_folds_are_those_of_a_cross_validation():
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(40) % 4
    features = torch.randn(40, 3, generator=generator, dtype=torch.float64) + F.one_hot(labels, 4)[:, :3]
    weight, bias = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    penalty, loss, accuracy = _penalty(features, labels, weight, bias)
    assert penalty in PENALTIES
    assert PENALTIES[0] != penalty != PENALTIES[-1]
    assert loss < torch.log(torch.tensor(4.0))
    assert accuracy * 40 == pytest.approx(round(accuracy * 40))
    # Labels that have nothing to do with the features: the strongest penalty, which leaves the base as it is.
    noise = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    penalty, loss, _ = _penalty(noise, labels, weight, bias)
    assert penalty == PENALTIES[0]
    assert loss == pytest.approx(torch.log(torch.tensor(4.0)).item(), abs=0.02)


@pytest.mark.parametrize("images", [1, 3])
def test_fewer_images_than_folds(images):
    labels = torch.arange(images) % 2
    features = torch.randn(images, 3, dtype=torch.float64)
    penalty, loss, _ = _penalty(features, labels, torch.zeros(2, 3).double(), torch.zeros(2).double())
    assert images < _FOLDS
    assert penalty in PENALTIES
    assert loss >= 0


def test_one_image_of_each_class_is_held_out_where_the_others_are_seen():
    labels = torch.arange(7)
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, loss, right = _penalty(features, labels, torch.zeros(7, 3).double(), torch.zeros(7).double())
    assert loss > 1  # nothing was seen of a class that is held out
    assert right == 0


class Scaled(ConvNet):
    """Its logits are not the head's outputs."""

    def forward(self, pixel_values):
        return 2 * super().forward(pixel_values)


def scaled():
    return Scaled(lambda width: nn.GroupNorm(2, width))


def without_bias():
    net = groupnorm()
    net.fc = nn.Linear(8, 5, bias=False)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (scaled, "solves a head whose outputs are the logits, and here more follows: use head"),
        (without_bias, "solves a linear layer with a bias, and this network's head is Linear: use head"),
    ],
)
def test_other_heads_are_refused_and_recognised(make, message):
    with pytest.raises(ConfigError, match=message):
        solve_head(make(), TUNING, VALIDATION)
    net = make().eval()
    assert not can_solve(net, anatomy_of(net), default_collate([TUNING[0]]))


@pytest.mark.parametrize("make", [used_batchnorm, groupnorm, vit])
def test_a_linear_head_can_be_solved_and_looking_changes_nothing(make):
    net = make().eval()
    before = copy.deepcopy(net.state_dict())
    assert can_solve(net, anatomy_of(net), default_collate([TUNING[0]]))
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_fit_sends_to_the_function_that_solves():
    with pytest.raises(ConfigError, match=r"logistic-head is not trained: call \S+\.logistic\.solve_head"):
        fit(groupnorm(), "logistic-head", TUNING, VALIDATION, FitSettings(1e-2))
