"""The head alone under differential privacy: noisy gradient descent on the frozen features.

Every step takes the gradient of each tuning image, clips it to a length, and adds Gaussian noise to the sum, so that
the adapter says next to nothing about any single image (Abadi et al. 2016). All images are in every step, as in the
NoisyGD of Wang et al. 2024 (ICML, "Neural Collapse Meets Differential Privacy"), who find that reducing the features
by PCA, and normalising them, makes this more robust. Clipping, noise and the accountant are those of Opacus (extra
``dp``).

What is private, and what is not: the guarantee is about the tuning images, for the deltas of the head, with an image
that is added or left out. It holds for one run. Validation images, and what a report tells of a run, such as the
outcome of a choice among several runs, are outside of it. A seed for the noise makes a run repeatable, and voids the
guarantee for whoever knows the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..config import SurgicalConfig
from ..errors import ConfigError
from ..extras import check_range, require
from .logistic import head_features, linear_head, logits_from, moved_by

PRIVACY_DELTA = 1e-5
"""Default of the probability with which the bound by epsilon may fail; it should be well below 1 / images."""
STEPS = 100
REACH = 3.0
"""Default of how far all steps together could move the head, in units of its own norm."""

ORDERS = [1 + tenth / 10 for tenth in range(1, 110)] + [*range(12, 64), 64, 96, 128, 192, 256, 384, 512, 768, 1024]
"""Orders among which the accountant looks for the tightest bound: Opacus's own, and larger ones for a small epsilon."""


@dataclass(frozen=True)
class Basis:
    """Coordinates z = (x - mean) @ directions of features x in which a private head is trained.

    Attributes:
        mean: (width,).
        directions: (width, k).
    """

    mean: Tensor
    directions: Tensor


def plain_basis(width: int) -> Basis:
    """The features over the square root of their number, near a length of 1 for features near 1; needs no images."""
    return Basis(torch.zeros(width).double(), torch.eye(width).double() / math.sqrt(width))


def public_basis(features: Tensor, components: int | None = None, normalise: bool = False) -> Basis:
    """Coordinates from features of public images, which the guarantee does not cover: those of the source, say.

    Args:
        features: (n, width), float64.
        components: Keep so many principal components of these; None keeps all directions.
        normalise: Subtract the mean and divide every coordinate by its standard deviation, in place of scaling alone.

    Raises:
        ConfigError: More components than there are.
    """
    count, width = features.shape
    largest = min(count, width)
    if components is not None and not 1 <= components <= largest:
        raise ConfigError(f"components={components}: {count} public features of {width} numbers have 1 to {largest}")
    mean = features.mean(0)
    directions = torch.eye(width, dtype=features.dtype)
    if components is not None:
        directions = torch.linalg.svd(features - mean, full_matrices=False)[2][:components].T
    if normalise:
        spread = ((features - mean) @ directions).std(0)
        directions = directions / torch.where(spread > 0, spread, 1.0)
    else:
        mean = torch.zeros_like(mean)
    lengths = ((features - mean) @ directions).norm(dim=1)
    return Basis(mean, directions / lengths.mean())


def private_moves(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    epsilon: float,
    delta: float = PRIVACY_DELTA,
    steps: int = STEPS,
    reach: float = REACH,
    max_norm: float = 1.0,
    basis: Basis | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """How weight and bias of a head move under (epsilon, delta) differential privacy.

    Args:
        features: The head's inputs (n, width), float64.
        labels: int64 (n,).
        weight: The base's (classes, width), float64.
        bias: The base's (classes,), float64.
        epsilon: Bound of the privacy loss; infinity is without noise and without a guarantee.
        delta: Probability with which the bound may fail.
        steps: Gradient steps, each on all images.
        reach: How far all steps together could move the head without noise, in units of the base's head in ``basis``;
            of a freshly drawn one where that is zero.
        max_norm: Length to which the gradient of an image is clipped, in the units of ``basis``.
        basis: In which to train; None is `plain_basis`.
        seed: Seed of the noise; None draws it from the operating system.

    Returns:
        The moves of weight and bias, float64, and ``noise``, the standard deviation of the noise over ``max_norm``,
        with ``delta`` and the ``epsilon`` that the accountant gives for the steps that were taken, where there is
        noise.

    Raises:
        ConfigError: An argument is out of range.
        DataError: Opacus is not installed.
    """
    if not epsilon > 0 or math.isnan(epsilon):
        raise ConfigError(f"epsilon={epsilon!r}: give a number above 0; infinity is without noise")
    check_range("delta", delta, 1e-300, 0.5)
    check_range("steps", steps, 1, 1e6)
    wrapper = require("opacus.grad_sample", "tuning under differential privacy", "dp").GradSampleModule
    optimizers = require("opacus.optimizers", "tuning under differential privacy", "dp")
    accountants = require("opacus.accountants", "tuning under differential privacy", "dp")
    noise_for = require("opacus.accountants.utils", "tuning under differential privacy", "dp").get_noise_multiplier
    basis = basis or plain_basis(features.shape[1])
    # Opacus's backward hooks warn where no input of the module needs a gradient.
    inputs = ((features - basis.mean) @ basis.directions).requires_grad_()
    base = F.linear(features, weight, bias)
    noise = 0.0
    if math.isfinite(epsilon):
        asked = {"target_epsilon": epsilon, "target_delta": delta, "sample_rate": 1.0, "steps": steps}
        noise = float(noise_for(**asked, accountant="rdp", alphas=ORDERS))
    size = float((weight @ torch.linalg.pinv(basis.directions).T).norm())
    rate = reach * (size or math.sqrt(len(weight) / 3)) / (steps * max_norm)
    head = wrapper(nn.Linear(inputs.shape[1], len(weight)).double())
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    optimizer = optimizers.DPOptimizer(
        torch.optim.SGD(head.parameters(), rate),
        noise_multiplier=noise,
        max_grad_norm=max_norm,
        expected_batch_size=len(labels),
        generator=generator,
    )
    accountant = accountants.RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=1.0))
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(base + head(inputs), labels).backward()
            optimizer.step()
    told = {"noise": noise} | ({"epsilon": accountant.get_epsilon(delta, ORDERS), "delta": delta} if noise else {})
    moved, shift = (parameter.detach() for parameter in head.parameters())
    moved = moved @ basis.directions.T
    return moved, shift - moved @ basis.mean, told


def private_head(
    network: nn.Module,
    tuning: Dataset[Any],
    validation: Dataset[Any],
    *,
    epsilon: float,
    public: Dataset[Any] | None = None,
    components: int | None = None,
    normalise: bool = False,
    config: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    collate: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> tuple[nn.Module, Tensor, dict[str, float]]:
    """Tune the head under differential privacy of the tuning images; the result is an adapter like any other.

    Args:
        network: The base, which is changed. Its head is one linear layer whose outputs are the logits.
        tuning: Map-style dataset of dicts with ``pixel_values`` and ``labels``: the images that are kept private.
        validation: The same, of other images, which the guarantee does not cover.
        epsilon: Bound of the privacy loss.
        public: Images of `public_basis`, with or without labels that mean anything; needed by the next two.
        components: See `public_basis`.
        normalise: See `public_basis`.
        config: Further fields of the `SurgicalConfig`.
        batch_size: Images per forward pass.
        collate: Makes a batch of rows; by default PyTorch's own.
        **settings: Further arguments of `private_moves`.

    Returns:
        The PeftModel; its logits (n, classes) on the validation images; and what `private_moves` says of the noise.

    Raises:
        ConfigError: The head is something else; normalisation statistics of the tuning images are asked for; or PCA or
            normalisation without public images.
    """
    fields = dict(config or {})
    if (policy := fields.get("norm_stats", "frozen")) != "frozen":
        raise ConfigError(f"norm_stats={policy!r} would keep statistics of private images: dp-head needs 'frozen'")
    if public is None and (components is not None or normalise):
        raise ConfigError("components and normalise are computed from public images, and there are none: give public")
    model = get_peft_model(network, SurgicalConfig(target="head", **fields))
    head = linear_head(model, "dp-head")

    def of(images: Dataset[Any]) -> tuple[Tensor, Tensor]:
        return head_features(model, head, DataLoader(images, batch_size, collate_fn=collate), "dp-head")

    basis = None if public is None else public_basis(of(public)[0], components, normalise)
    features, labels = of(tuning)
    weight, bias = head.weight.detach().double().cpu(), head.bias.detach().double().cpu()
    *moves, told = private_moves(features, labels, weight, bias, epsilon=epsilon, basis=basis, **settings)
    moved_by(model, head, *moves)
    return model, logits_from(head, of(validation)[0], batch_size), told
