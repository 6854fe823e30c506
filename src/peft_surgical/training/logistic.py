"""The head alone, solved rather than trained: multinomial logistic regression on the frozen features.

The problem is convex, so that there is no learning rate, no epoch and no seed to choose, and the features are computed
once. With few labels it is a strong baseline (Kumar et al. 2022 begin with it), and its losses on held-out folds tell
which normalisation statistics fit the new images before anything else is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..blocks import Anatomy
from ..choosing.methods import LOGISTIC
from ..choosing.models import anatomy_under, forward_loss, logits_of
from ..config import SurgicalConfig
from ..errors import ConfigError
from ..tuner.attach import link_of
from .statistics import estimate_statistics, mixed_batches

PENALTIES = (1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Factors of |W - W of the base|^2, in units of the mean squared length of a feature vector."""
_FOLDS = 5
_STEPS = 40  # of L-BFGS, from the solution for the penalty before


def solve_head(
    network: nn.Module,
    tuning: Dataset[Any],
    validation: Dataset[Any],
    *,
    config: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    collate: Callable[[Any], Any] | None = None,
) -> tuple[nn.Module, Tensor, dict[str, float]]:
    """Fit the head as the minimum of cross entropy + penalty x squared distance from the base's head.

    The penalty is that of `PENALTIES` with the lowest cross entropy on the held-out parts of five folds of the
    tuning images, drawn within classes.

    Args:
        network: The base, which is changed. Its head is one linear layer whose outputs are the logits.
        tuning: Map-style dataset of dicts with ``pixel_values`` and ``labels``.
        validation: The same.
        config: Further fields of the `SurgicalConfig`: ``norm_stats``, ...
        batch_size: Images per forward pass.
        collate: Makes a batch of rows; by default PyTorch's own.

    Returns:
        The PeftModel; its logits (n, classes) on the validation images; and the held-out ``fold_loss`` (nats) and
        ``fold_accuracy`` (a fraction) of the chosen ``penalty``.

    Raises:
        ConfigError: The head is something else.
    """
    model = get_peft_model(network, SurgicalConfig(target="head", **dict(config or {})))
    if (config or {}).get("norm_stats") == "estimated":
        estimate_statistics(model, mixed_batches(tuning, collate))
    head = linear_head(model)
    features, labels = head_features(model, head, DataLoader(tuning, batch_size, collate_fn=collate))
    weight, bias = head.weight.detach().double().cpu(), head.bias.detach().double().cpu()
    penalty, loss, accuracy = _penalty(features, labels, weight, bias)
    moved = _solved(features, labels, weight, bias, penalty)
    moved_by(model, head, *moved)
    shown, _ = head_features(model, head, DataLoader(validation, batch_size, collate_fn=collate))
    return (
        model,
        logits_from(head, shown, batch_size),
        {"fold_loss": loss, "fold_accuracy": accuracy, "penalty": penalty},
    )


@torch.no_grad()
def can_solve(network: nn.Module, anatomy: Anatomy, batch: Any) -> bool:
    """Whether the head is one linear layer whose outputs are the network's logits.

    Args:
        network: Without adapters.
        anatomy: Its blocks.
        batch: A batch, to look.
    """
    paths = anatomy["head"].modules if "head" in anatomy else ()
    head = network.get_submodule(paths[0]) if len(paths) == 1 else None
    if not isinstance(head, nn.Linear) or head.bias is None:
        return False
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))

    def keep(outputs: Any, labels: Any) -> Tensor:
        seen.append((logits_of(outputs),) * 2)
        return torch.zeros(())

    try:
        forward_loss(network, batch, keep)
    finally:
        hook.remove()
    return len(seen) == 2 and seen[0][0].ndim == 2 and torch.equal(seen[0][1], seen[1][0])


@torch.no_grad()
def moved_by(model: Any, head: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Set the deltas of the head's weight (classes, width) and bias (classes,) in the active adapter."""
    for name, value in (("weight", weight), ("bias", bias)):
        layer, key = link_of(head, name)
        layer.delta(str(model.active_adapter), key).copy_(value)


@torch.no_grad()
def logits_from(head: nn.Linear, features: Tensor, batch_size: int) -> Tensor:
    """The head's logits (n, classes) on the CPU of features (n, width)."""
    device, dtype = head.weight.device, head.weight.dtype
    return torch.cat([head(part.to(device, dtype)).float().cpu() for part in features.split(batch_size)])


def linear_head(model: nn.Module, method: str = LOGISTIC) -> nn.Linear:
    """The head of a PeftModel, one linear layer with a bias.

    Raises:
        ConfigError: It is something else; ``method`` is what the message says needs it.
    """
    blocks = anatomy_under(model)
    paths = blocks["head"].modules if "head" in blocks else ()
    inner: Any = model
    found = inner.base_model.model.get_submodule(paths[0]) if len(paths) == 1 else None
    if not isinstance(found, nn.Linear) or found.bias is None:
        kind = "no head" if not paths else type(found).__name__ if found is not None else "several modules"
        raise ConfigError(f"{method} solves a linear layer with a bias, and this network's head is {kind}: use head")
    return found


@torch.no_grad()
def head_features(
    model: nn.Module, head: nn.Linear, batches: DataLoader[Any], method: str = LOGISTIC
) -> tuple[Tensor, Tensor]:
    """The head's inputs (n, width), float64 on the CPU, and the labels (n,).

    Raises:
        ConfigError: The head's outputs are not the logits; ``method`` is what the message says needs them.
    """
    kept: list[Tensor] = []
    labels: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.append(given[0].detach())

    def check(outputs: Any, given: Any) -> Tensor:
        logits = logits_of(outputs)
        if kept[-1].ndim != 2 or not torch.allclose(head(kept[-1]), logits, rtol=1e-3, atol=1e-4):
            raise ConfigError(f"{method} solves a head whose outputs are the logits, and here more follows: use head")
        labels.append(torch.as_tensor(given).cpu())
        return torch.zeros(())

    training = model.training
    model.eval()
    device = next(model.parameters()).device
    hook = head.register_forward_pre_hook(keep)
    try:
        for batch in batches:
            count = len(kept)
            forward_loss(model, send_to_device(batch, device), check)
            del kept[count + 1 :]  # of the call in `check`
    finally:
        hook.remove()
        model.train(training)
    return torch.cat(kept).double().cpu(), torch.cat(labels).long()


def _solved(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float, start: Any = None
) -> tuple[Tensor, Tensor]:
    """How weight and bias move: the minimum of mean cross entropy + penalty x mean |feature|^2 x |moves|^2."""
    moves = [torch.zeros_like(t) if start is None else start[i].clone() for i, t in enumerate((weight, bias))]
    moves = [move.requires_grad_() for move in moves]
    strength = penalty * features.square().sum(1).mean()
    optimizer = torch.optim.LBFGS(moves, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(features, weight + moves[0], bias + moves[1])
        loss = F.cross_entropy(logits, labels) + strength * (moves[0].square().sum() + moves[1].square().sum())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return moves[0].detach(), moves[1].detach()


def _penalty(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[float, float, float]:
    """The penalty with the lowest cross entropy on held-out folds, that cross entropy, and the accuracy there."""
    folds = torch.zeros_like(labels)
    generator = torch.Generator().manual_seed(0)
    single = int(labels.bincount().max()) == 1  # then each class is held out where the others are seen
    for number, label in enumerate(labels.unique()):
        rows = torch.nonzero(labels == label).flatten()
        places = torch.arange(len(rows)) + (number if single else 0)
        folds[rows[torch.randperm(len(rows), generator=generator)]] = places % _FOLDS
    losses, right = dict.fromkeys(PENALTIES, 0.0), dict.fromkeys(PENALTIES, 0)
    for fold in range(_FOLDS):
        out = folds == fold
        if not out.any() or out.all():
            continue
        moves = None
        for penalty in PENALTIES:
            moves = _solved(features[~out], labels[~out], weight, bias, penalty, moves)
            logits = F.linear(features[out], weight + moves[0], bias + moves[1])
            losses[penalty] += F.cross_entropy(logits, labels[out], reduction="sum").item()
            right[penalty] += int((logits.argmax(1) == labels[out]).sum())
    best = min(PENALTIES, key=lambda penalty: losses[penalty])
    return best, losses[best] / len(labels), right[best] / len(labels)
