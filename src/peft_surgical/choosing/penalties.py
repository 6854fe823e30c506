"""What keeps tuned weights near the pretrained ones: terms of the loss, with their gradients, and a selective decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ..errors import AdapterError, ConfigError
from .models import TrainedTensor, trained_tensors

PenaltyKind = Literal["l1-sp", "l2-sp", "l2"]


@dataclass(frozen=True)
class Penalty:
    """A penalty on the trained tensors (Xuhong et al. 2018).

    Attributes:
        kind: ``l1-sp``: sum of |delta|. ``l2-sp``: half the sum of delta^2. ``l2``: half the sum of (base + delta)^2,
            the paper's own weight decay, which pulls towards zero.
        strength: The factor, at least 0.
    """

    kind: PenaltyKind
    strength: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(PenaltyKind):
            raise ConfigError(f"penalty {self.kind!r}: choose one of {', '.join(get_args(PenaltyKind))}")
        if not self.strength >= 0:
            raise ConfigError(f"penalty {self.kind} with strength={self.strength}: give a factor of at least 0")

    def loss(self, model: nn.Module) -> torch.Tensor:
        """The penalty as a differentiable term of the loss, for a training loop of your own."""
        values = []
        for tensor in self.applies_to(trained_tensors(model).values()):
            value = getattr(tensor.owner, tensor.attribute) if self.kind == "l2" else tensor.parameter
            values.append(value.abs().sum() if self.kind == "l1-sp" else 0.5 * value.square().sum())
        return self.strength * torch.stack(values).sum()

    def gradient(self, tensor: TrainedTensor) -> torch.Tensor:
        """The gradient of that term with respect to one parameter; that of |x| at 0 is taken as 0."""
        if self.kind == "l1-sp":
            return self.strength * tensor.parameter.detach().sign()
        return self.strength * (tensor.value if self.kind == "l2" else tensor.parameter.detach())

    def applies_to(self, tensors: Iterable[TrainedTensor]) -> list[TrainedTensor]:
        """The penalised tensors; for ``-sp`` those with a pretrained value, so not a new head's.

        Raises:
            AdapterError: There is none.
        """
        return list(tensors) if self.kind == "l2" else _deltas(tensors, self.kind)


@dataclass(frozen=True)
class SelectiveDecay:
    """Selective projection decay (SPD; Tian, Huang and Kira 2024, NeurIPS), after each step of the optimizer.

    A tensor that got further from its pretrained value, although before the step the loss fell towards that value (the
    gradient times the delta, summed over its entries, was above zero), is pulled back: its delta is multiplied by
    ``1 - strength * (new norm - old norm) / new norm``. All other tensors move freely.

    Attributes:
        strength: Lambda, at least 0. At 1 such a tensor keeps the distance that it had before the step.
    """

    strength: float

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ConfigError(f"selective decay with strength={self.strength}: give a factor of at least 0")

    def applies_to(self, tensors: Iterable[TrainedTensor]) -> list[TrainedTensor]:
        """The tensors that can be pulled back: those with a pretrained value, so not a new head's.

        Raises:
            AdapterError: There is none.
        """
        return _deltas(tensors, "selective decay")

    @torch.no_grad()
    def before(self, tensor: TrainedTensor) -> torch.Tensor:
        """The L2 norm above which `pull` acts after the coming step, (): the delta's own, or infinite.

        Infinite where the gradient does not point back to the pretrained value, so that the tensor moves freely.
        """
        delta, gradient = tensor.parameter, tensor.parameter.grad
        assert gradient is not None
        is_held = (gradient.to(delta.dtype) * delta).sum() > 0
        return torch.where(is_held, delta.norm(), torch.inf)

    @torch.no_grad()
    def pull(self, tensor: TrainedTensor, limit: torch.Tensor) -> None:
        """Pull a tensor back after the step, with the limit that `before` gave."""
        norm = tensor.parameter.norm()
        beyond = (norm - limit).clamp(min=0) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        tensor.parameter.mul_((1 - self.strength * beyond).clamp(min=0))


def _deltas(tensors: Iterable[TrainedTensor], what: str) -> list[TrainedTensor]:
    found = [tensor for tensor in tensors if tensor.is_delta]
    if not found:
        raise AdapterError(
            f"{what} measures the distance from the pretrained weights, and nothing here is trained as a delta: tune "
            "with SurgicalConfig(target='all')"
        )
    return found
