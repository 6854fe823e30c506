"""What a run is asked for, and what it gives."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..extras import LARGEST_SEED, check_range

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}
"""Name of an optimizer -> its class and arguments."""
FORWARD_SHARE = 1 / 3
"""Cost of a forward pass as a share of a training step, whose backward pass is twice the work."""


@dataclass(frozen=True)
class FitSettings:
    """How a run is trained, whatever its method.

    Attributes:
        lr: Learning rate.
        epochs: Length of the run, in passes over the tuning images.
        batch_size: Images per batch and process.
        optimizer: ``adam`` (the paper's for CIFAR-10-C), ``adamw`` or ``sgd`` (momentum 0.9).
        weight_decay: Acts on the deltas, so it pulls towards the pretrained weights; `Penalty` offers the paper's.
        lr_scheduler: A name that Trainer knows: ``constant``, ``cosine``, ...
        seed: Determines the order of the images, a new head's weights, and dropout.
        precision: None (float32), ``bf16`` or ``fp16``.
        max_grad_norm: 0 for no clipping, as in the paper.
        accumulation: Batches per optimizer step.
        use_cpu: Whether to train on the CPU where there is an accelerator.
    """

    lr: float
    epochs: int = 15
    batch_size: int = 64
    optimizer: str = "adam"
    weight_decay: float = 1e-4
    lr_scheduler: str = "constant"
    seed: int = 0
    precision: str | None = None
    max_grad_norm: float = 0.0
    accumulation: int = 1
    use_cpu: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer={self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.precision not in (None, "bf16", "fp16"):
            raise ConfigError(f"precision={self.precision!r}: choose bf16 or fp16, or leave it out for float32")
        if not 0 < self.lr < math.inf or min(self.epochs, self.batch_size, self.accumulation) < 1:
            raise ConfigError(
                f"lr={self.lr}, epochs={self.epochs}, batch_size={self.batch_size}, accumulation={self.accumulation}: "
                "all must be positive and finite"
            )
        check_range("weight_decay", self.weight_decay, 0, sys.float_info.max)
        check_range("seed", self.seed, 0, LARGEST_SEED)


@dataclass(frozen=True)
class Fitted:
    """The result of a run.

    Attributes:
        model: The PeftModel at its best epoch. None where ``stop_epoch`` is before the last checkpoint: the metrics of
            the epochs up to it are known from there, their weights are not.
        curve: At the end of each epoch, the validation accuracy (or the ``metric`` given to `fit`), a fraction.
        losses: Cross entropy of the validation images at the same points; the largest float where it is not finite.
        best_epoch: The epoch, from 1, of the model: the first of those with the best value.
        cost: Training steps of this batch size on one process since the beginning of the run: optimizer steps x batches
            per step, batches that were scored, and forward passes over the validation images as a third each.
        record: Epoch -> factor of each tensor's rate, for schedules that need scores.
        prefix: What of the network was computed once for each image, or why nothing was, in one line.
        seconds: How long the call took.
        saved: What looking up the prefix saved in this call, in the unit of ``cost``: passes through it that were not
            computed, less those that were recorded.
        averaged: Where the model has the mean of the last epochs' weights: its own value of what ``curve`` holds.
        logits: The same model's logits (n, classes) on the validation images.
    """

    model: nn.Module | None
    curve: tuple[float, ...]
    losses: tuple[float, ...]
    best_epoch: int
    cost: float
    record: Mapping[int, Mapping[str, float]] = field(repr=False)
    prefix: str = ""
    seconds: float = 0.0
    saved: float = 0.0
    averaged: float | None = None
    logits: Tensor | None = field(default=None, repr=False)

    @property
    def validation(self) -> float:
        """The model's own value: the best of the curve, or that of averaged weights."""
        return max(self.curve) if self.averaged is None else self.averaged
