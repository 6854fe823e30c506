"""Penalties that keep tuned weights near the pretrained ones, as terms of the loss and as their gradients."""

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
        found = [tensor for tensor in tensors if tensor.is_delta or self.kind == "l2"]
        if not found:
            raise AdapterError(
                f"{self.kind} measures the distance from the pretrained weights, and nothing here is trained as a "
                "delta: tune with SurgicalConfig(target='all')"
            )
        return found
