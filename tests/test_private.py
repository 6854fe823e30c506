"""The head under differential privacy: clipping and noise by hand, the accountant by theory, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from tiny import ConvNet, Rows
from torch import nn

from peft_surgical.choosing.methods import METHODS, method_of
from peft_surgical.errors import ConfigError
from peft_surgical.experiment.running import SOLVERS
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.private import Basis, plain_basis, private_head, private_moves, public_basis

pytest.importorskip("opacus")

TUNING, VALIDATION, PUBLIC = Rows(40, 1), Rows(20, 2), Rows(50, 3)


def problem(n=30, width=6, classes=4):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, width, generator=generator).double() * 3 + 1
    labels = torch.randint(classes, (n,), generator=generator)
    weight, bias = torch.randn(classes, width, generator=generator).double(), torch.zeros(classes).double()
    return features, labels, weight, bias


def by_hand(features, labels, weight, bias, basis, steps, rate, max_norm):
    """Clipped gradient descent on the moves, image by image."""
    inputs = (features - basis.mean) @ basis.directions
    base = features @ weight.T + bias
    moved = torch.zeros(len(weight), inputs.shape[1]).double()
    shift = torch.zeros(len(weight)).double()
    for _ in range(steps):
        totals = [torch.zeros_like(moved), torch.zeros_like(shift)]
        for z, y, logits in zip(inputs, labels, base, strict=True):
            error = (logits + moved @ z + shift).softmax(0) - F.one_hot(y, len(weight))
            gradients = torch.outer(error, z), error
            length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient * min(1.0, max_norm / length)
        moved, shift = moved - rate * totals[0] / len(labels), shift - rate * totals[1] / len(labels)
    return moved, shift


@pytest.mark.parametrize("basis", ["plain", "public", "components"])
def test_without_noise_it_is_clipped_gradient_descent(basis):
    features, labels, weight, bias = problem()
    chosen = {
        "plain": plain_basis(6),
        "public": public_basis(problem(50)[0] + 1, normalise=True),
        "components": public_basis(problem(50)[0], components=2, normalise=True),
    }[basis]
    given = {"steps": 7, "reach": 3.0, "max_norm": 0.4}
    moves = private_moves(features, labels, weight, bias, epsilon=math.inf, basis=chosen, **given)
    assert moves[2] == {"noise": 0.0}
    # The head's size in the basis: the smallest matrix that gives the same logits on what the directions span.
    size = float((weight @ torch.linalg.pinv(chosen.directions).T).norm())
    moved, shift = by_hand(features, labels, weight, bias, chosen, 7, 3.0 * size / (7 * 0.4), 0.4)
    inputs = (features - chosen.mean) @ chosen.directions
    expected = features @ weight.T + bias + inputs @ moved.T + shift
    # Opacus divides by the length + 1e-6.
    torch.testing.assert_close(features @ (weight + moves[0]).T + bias + moves[1], expected, rtol=0, atol=2e-5)


def test_the_bases_by_hand():
    features = problem(50)[0]
    scaled = public_basis(features)
    assert not scaled.mean.any()
    assert float((features @ scaled.directions).norm(dim=1).mean()) == pytest.approx(1)
    normal = public_basis(features, normalise=True)
    inputs = (features - normal.mean) @ normal.directions
    torch.testing.assert_close(inputs.mean(0), torch.zeros(6).double(), atol=1e-12, rtol=0)
    spread = inputs.std(0)
    torch.testing.assert_close(spread / spread[0], torch.ones(6).double())
    _, vectors = torch.linalg.eigh(torch.cov(features.T))
    kept = public_basis(features, components=2)
    for i in range(2):
        direction = kept.directions[:, i] / kept.directions[:, i].norm()
        assert abs(float(direction @ vectors[:, -1 - i])) == pytest.approx(1)


@pytest.mark.parametrize(("epsilon", "steps"), [(1.0, 10), (8.0, 100)])
def test_the_accountant_bounds_what_the_gaussian_mechanism_spends(epsilon, steps):
    told = private_moves(*problem(), epsilon=epsilon, delta=1e-4, steps=steps, seed=0)[2]
    assert 0.9 * epsilon < told["epsilon"] <= epsilon
    # Dong, Roth & Su 2022: so many Gaussian mechanisms are one with mu = sqrt(steps) / noise.
    mu = math.sqrt(steps) / told["noise"]
    spent = norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
    assert 1e-6 < spent <= 1e-4


def test_the_noise_has_the_width_that_was_accounted_for():
    features, labels, weight, bias = problem()
    given = {"steps": 1, "reach": 1.0, "max_norm": 0.5, "basis": plain_basis(6)}
    clean = private_moves(features, labels, weight, bias, epsilon=math.inf, **given)
    found, noise = [], 0.0
    for seed in range(30):
        weights, biases, told = private_moves(features, labels, weight, bias, epsilon=2.0, seed=seed, **given)
        noise = told["noise"]
        found.append(torch.cat([((weights - clean[0]) * math.sqrt(6)).flatten(), biases - clean[1]]))
    rate = float(weight.norm()) * math.sqrt(6) / 0.5
    assert float(torch.stack(found).std()) == pytest.approx(rate * noise * 0.5 / len(labels), rel=0.08)
    assert abs(float(torch.stack(found).mean())) < 0.05 * rate * noise


def test_no_image_moves_the_head_further_than_its_clipped_gradient():
    features, labels, weight, bias = problem()
    given = {"epsilon": math.inf, "steps": 1, "reach": 1.0, "max_norm": 0.5, "basis": plain_basis(6)}
    other = features.clone()
    other[0] *= 1e6
    one, two = (private_moves(f, labels, weight, bias, **given) for f in (features, other))
    rate = float(weight.norm()) * math.sqrt(6) / 0.5
    apart = torch.cat([((one[0] - two[0]) * math.sqrt(6)).flatten(), one[1] - two[1]]).norm()
    assert 0 < float(apart) <= 2 * rate * 0.5 / len(labels)


def groupnorm():
    torch.manual_seed(0)
    return ConvNet(lambda width: nn.GroupNorm(2, width))


def test_a_private_adapter_is_an_adapter_of_the_head():
    base = groupnorm()
    model, logits, told = private_head(
        copy.deepcopy(base), TUNING, VALIDATION, epsilon=3.0, public=PUBLIC, components=3, normalise=True, seed=1
    )
    assert told["epsilon"] <= 3.0
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(VALIDATION.images), logits)
        with model.disable_adapter():
            assert torch.equal(model(VALIDATION.images), base.eval()(VALIDATION.images))
    moved = {name for name, value in model.named_parameters() if value.requires_grad and value.any()}
    assert len(moved) == 2
    # Without a seed the noise is another one every time.
    again = [private_head(copy.deepcopy(base), TUNING, VALIDATION, epsilon=3.0)[1] for _ in range(2)]
    assert not torch.equal(*again)


def test_every_method_that_is_solved_has_a_solver():
    assert set(SOLVERS) == {row.name for row in METHODS.values() if row.solved}
    assert SOLVERS["dp-head"] is private_head


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"norm_stats='all' would keep statistics of private images"):
        private_head(groupnorm(), TUNING, VALIDATION, epsilon=1.0, config={"norm_stats": "all"})
    with pytest.raises(ConfigError, match=r"computed from public images, and there are none: give public"):
        private_head(groupnorm(), TUNING, VALIDATION, epsilon=1.0, components=2)
    with pytest.raises(ConfigError, match=r"epsilon=0: give a number above 0"):
        private_moves(*problem(), epsilon=0)
    with pytest.raises(ConfigError, match=r"components=9: 50 public features of 6 numbers have 1 to 6"):
        public_basis(problem(50)[0], components=9)
    with pytest.raises(ConfigError, match=r"dp-head@2 is not trained: call \S+\.private\.private_head"):
        fit(groupnorm(), "dp-head@2", TUNING, VALIDATION, FitSettings(1e-2))
    assert method_of("dp-head@2").settings() == {"epsilon": 2.0}
    assert isinstance(plain_basis(3), Basis)
