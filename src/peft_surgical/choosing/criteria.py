"""The criteria by which data chooses what to tune: each is one function and one row of `CRITERIA`.

A criterion gives a score to a set of tensors (one tensor, or all of a block) from the gradients of the loss on target
data, in the network as it is. A higher score means: tune this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError
from .gradients import GradientStatistics


@dataclass(frozen=True)
class Criterion:
    """One row of the registry.

    Attributes:
        name: As users write it; ``auto-<name>`` is the target that it resolves.
        score: Statistics and names of tensors -> their common score, finite and not negative.
        unit: What one gradient is taken over. Scores over inputs do not depend on how they are batched.
        relative: Whether it divides by the weights, and so has nothing to say on a tensor that is all zero (a new
            head's bias): such a tensor is given the score of its block.
        source: Where it is defined.
    """

    name: str
    score: Callable[[GradientStatistics, Sequence[str]], float]
    unit: Literal["batch", "input"]
    source: str
    relative: bool = False


def rgn(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """Relative gradient norm: norm of the gradient over norm of the weights, mean over minibatches.

    Of several tensors, the norms are those of all their entries together. Weights that are all zero count as 0.
    """
    columns = [statistics.names.index(name) for name in names]
    gradients = statistics.squares[:, columns].sum(1).sqrt().mean()
    weights = math.sqrt(sum(float(statistics.weights[name].double().square().sum()) for name in names))
    return float(gradients) / weights if weights > 0 else 0.0


def snr(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """Signal to noise: squared mean of the gradient over its variance, both over inputs; mean over entries.

    An entry whose gradient is the same for all inputs (a dead unit's is zero for all) has no noise to compare with: it
    counts as 0.
    """
    if statistics.units < 2:
        raise ConfigError("snr needs at least 2 inputs: a variance over inputs has no meaning for one")
    total, entries = 0.0, 0
    for name in names:
        variance = statistics.variance(name).double()
        ratio = torch.where(variance > 0, statistics.mean[name].double().square() / variance, 0.0)
        total, entries = total + float(ratio.sum()), entries + ratio.numel()
    return total / entries


def snr_reference(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """What the paper's reference code computes as SNR: mean and variance along the first axis of the mean gradient.

    No variance over inputs enters, so it is another quantity than eq. 4. Tensors whose first axis has one entry count
    as 0. Several tensors: mean over all of them, weighted by their columns.
    """
    total, entries = 0.0, 0
    for name in names:
        gradient = statistics.mean[name].double()
        columns = gradient.reshape(len(gradient), -1) if gradient.ndim else gradient.reshape(1, 1)
        entries += columns.shape[1]
        if len(columns) > 1:
            variance = columns.var(0)
            total += float(torch.where(variance > 0, columns.mean(0).square() / variance, 0.0).sum())
    return total / entries


def fisher(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """Diagonal of the empirical Fisher information: mean over inputs of the squared gradient; mean over entries."""
    columns = [statistics.names.index(name) for name in names]
    return float(statistics.squares[:, columns].sum(1).mean()) / sum(statistics.weights[name].numel() for name in names)


CRITERIA: dict[str, Criterion] = {
    row.name: row
    for row in (
        Criterion("rgn", rgn, "batch", "Lee et al. 2023, Sec. 4.1, eq. 3", relative=True),
        Criterion("snr", snr, "input", "Lee et al. 2023, Sec. 4.1, eq. 4; Mahsereci et al. 2017"),
        Criterion("snr-reference", snr_reference, "batch", "reference code of Lee et al. 2023"),
        Criterion("fisher", fisher, "input", "Kirkpatrick et al. 2017; the empirical Fisher, with the data's labels"),
    )
}


def criterion_of(name: str) -> Criterion:
    """The row of a criterion.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in CRITERIA:
        raise ConfigError(f"criterion={name!r}: choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
