"""The criteria by which data chooses what to tune, and `BlockScores`: the scores that one gives, and how to choose.

A criterion is one function and one row of `CRITERIA`. From the gradients of the loss on target data, or from what the
blocks put out, it gives a score to a set of tensors (one tensor, or all of a block). A higher score means: tune this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import ConfigError, DataError
from .gradients import GradientStatistics, Measure, squared_norms
from .sensitivity import sensitivity

PRESERVED = 0.9
"""Share of a tensor's squared singular values in the directions that `rgn_residual` leaves out."""

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


@dataclass(frozen=True)
class BlockScores:
    """Scores of a network's blocks on some data. A higher score means: tune this.

    Attributes:
        criterion: The criterion's name.
        block_scores: Block -> score, in the order in which data flows; blocks without a scored tensor are left out.
        tensor_scores: Tensor -> score, in the model's order.
        num_parameters: Block -> number of scored scalars.
        num_samples: Inputs that were used, over all processes.
        num_batches: Minibatches that were used, over all processes.
        uses_labels: Whether the batches held labels.
        split: The part of the data, as the caller named it: ``tuning``, ``validation``, ``test``, ...
    """

    criterion: str
    block_scores: Mapping[str, float]
    tensor_scores: Mapping[str, float] = field(repr=False)
    num_parameters: Mapping[str, int] = field(repr=False)
    num_samples: int
    num_batches: int
    uses_labels: bool = True
    split: str = "tuning"

    def __post_init__(self) -> None:
        broken = [
            name for name, value in {**self.tensor_scores, **self.block_scores}.items() if not math.isfinite(value)
        ]
        if broken:
            raise DataError(
                f"the {self.criterion} score of {broken[0]} is not finite: the loss or a gradient overflowed. Check "
                "the input's scale, or score in float32 or bfloat16 instead of float16."
            )
        if not self.block_scores:
            raise DataError(f"no block has a {self.criterion} score: nothing was trainable")

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Pairs (block, score), in the order in which data flows."""
        return iter(self.block_scores.items())

    def __getitem__(self, block: str) -> float:
        return self.block_scores[block]

    @property
    def shares(self) -> dict[str, float]:
        """Block -> share of the scored parameters, fractions that add up to 1."""
        total = sum(self.num_parameters.values())
        return {name: count / total for name, count in self.num_parameters.items()}

    def without(self, block: str, tensors: Collection[str]) -> BlockScores:
        """The scores of all other blocks.

        Args:
            block: Its name.
            tensors: Names of its tensors.
        """
        return replace(
            self,
            block_scores={name: score for name, score in self if name != block},
            tensor_scores={name: score for name, score in self.tensor_scores.items() if name not in tensors},
            num_parameters={name: size for name, size in self.num_parameters.items() if name != block},
        )

    def top(self, k: int) -> tuple[str, ...]:
        """The ``k`` blocks with the highest scores, best first; of equal ones the one nearer to the input."""
        self._check(k)
        return tuple(sorted(self.block_scores, key=lambda name: -self.block_scores[name])[:k])

    def contiguous(self, k: int | None = None, budget: float | None = None) -> tuple[str, ...]:
        """The best run of neighbouring blocks, in the order in which data flows: a surgical target (paper, Sec. 2).

        Args:
            k: Number of blocks. Runs are compared by their mean score.
            budget: Instead of ``k``, the largest share of the parameters, in (0, 1]. The run with the highest sum of
                scores within it is chosen.

        Raises:
            DataError: Both or neither are given, ``k`` is out of range, or no block fits into the budget.
        """
        if (k is None) == (budget is None):
            raise DataError(f"k={k} and budget={budget}: give one of them")
        names = tuple(self.block_scores)
        if k is not None:
            self._check(k)
            runs = [names[i : i + k] for i in range(len(names) - k + 1)]
        else:
            assert budget is not None
            runs = [names[i:j] for i in range(len(names)) for j in range(i + 1, len(names) + 1)]
            runs = [run for run in runs if sum(self.shares[name] for name in run) <= budget + 1e-9]  # rounding
            if not runs:
                smallest = min(self.shares, key=lambda name: self.shares[name])
                share = self.shares[smallest]
                raise DataError(f"budget={budget}: no block is that small; the smallest, {smallest}, holds {share:.2%}")
        return max(runs, key=lambda run: sum(self.block_scores[name] for name in run))

    def _check(self, k: int) -> None:
        if not 1 <= k <= len(self.block_scores):
            raise DataError(f"k={k}: choose 1 to {len(self.block_scores)}, the number of scored blocks")

    def __str__(self) -> str:
        width = max(map(len, self.block_scores))
        largest = max(self.block_scores.values()) or 1.0
        lines = [f"{name:<{width}}  {score:>10.4g}  {score / largest:>6.1%}" for name, score in self]
        return "\n".join([f"{self.criterion} on {self.num_samples} {self.split} inputs", *lines])

    def __rich__(self) -> Table:
        """For ``rich.print(scores)``."""
        from rich.table import Table

        labels = "used" if self.uses_labels else "not used"
        caption = f"{self.num_samples} {self.split} inputs in {self.num_batches} batches, labels {labels}"
        table = Table("block", "score", "of the largest", "parameters", title=self.criterion, caption=caption)
        largest = max(self.block_scores.values()) or 1.0
        for name, score in self:
            table.add_row(name, f"{score:.4g}", f"{score / largest:.1%}", f"{self.shares[name]:.1%}")
        return table

    def plot(self, axes: Axes | None = None) -> Axes:
        """Bars of the blocks' scores, with matplotlib; ``scores.plot().figure.savefig("scores.png")`` keeps them."""
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(1.5 + 0.6 * len(self.block_scores), 3), layout="constrained").add_subplot()
        axes.bar(range(len(self.block_scores)), list(self.block_scores.values()))
        axes.set_xticks(range(len(self.block_scores)), list(self.block_scores), rotation=45, ha="right")
        axes.set_ylabel(f"{self.criterion} ({self.num_samples} inputs)")
        return axes

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` turns back into equal scores."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BlockScores:
        """The scores that :meth:`to_json` wrote.

        Raises:
            DataError: The text was not written by it.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            return cls(**content)
        except (ValueError, TypeError) as error:
            expected = ", ".join(entry.name for entry in fields(cls))
            raise DataError(f"not the JSON of block scores ({error}): expected {expected}") from error


@dataclass(frozen=True)
class Criterion:
    """One row of the registry.

    Attributes:
        name: As users write it; ``auto-<name>`` is the target that it resolves.
        score: (statistics, names of tensors of one block) -> their common score, finite and not negative.
        unit: What one gradient is taken over: scores over inputs do not depend on how they are batched. ``output``: no
            gradient is taken, and the statistics are `OutputChanges`.
        relative: Whether it divides by the weights, so that it is undefined for a tensor that is all zero (a new
            head's bias): such a tensor gets the score of its block.
        measure: What is kept of each unit's gradient.
    """

    name: str
    score: Callable[[Any, Sequence[str]], float]
    unit: Literal["batch", "input", "output"]
    relative: bool = False
    measure: Measure = squared_norms


def rgn(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """Relative gradient norm (paper, eq. 3): norm of the gradient over norm of the weights, mean over minibatches.

    Norms are taken over the entries of all the tensors together. Weights that are all zero count as 0.
    """
    columns = [statistics.names.index(name) for name in names]
    gradients = statistics.sums[:, columns].sum(1).sqrt().mean()
    weights = math.sqrt(sum(float(statistics.weights[name].double().square().sum()) for name in names))
    return float(gradients) / weights if weights > 0 else 0.0


def snr(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """Signal to noise (paper, eq. 4; Mahsereci et al. 2017): mean over entries of squared mean over variance.

    Mean and variance are those of the entry's gradient over inputs: here of all minibatches together, five by default,
    where eq. 4 speaks of one, which ``num_batches=1`` is. An entry whose gradient has no variance (that of a dead unit
    is always zero) counts as 0.
    """
    if statistics.units < 2:
        raise ConfigError("snr needs at least 2 inputs: a variance over inputs has no meaning for one")
    total, entries = 0.0, 0
    for name in names:
        variance = statistics.variance(name).double()
        ratio = torch.where(variance > 0, statistics.mean[name].double().square() / variance, 0.0)
        total, entries = total + float(ratio.sum()), entries + ratio.numel()
    return total / entries


def axis_ratios(gradients: torch.Tensor) -> torch.Tensor:
    """Sum over entries of g^2 / (variance of g along the tensor's first axis + 1e-8), for each unit; see `Measure`."""
    found = gradients.double() if gradients.ndim > 1 else gradients.double()[:, None]
    # Torch's variance of one value is NaN, which the reference code then trains; as 0 it gives a large ratio, too.
    variance = found.var(1, keepdim=True) if found.shape[1] > 1 else torch.zeros_like(found)
    return (found.square() / (variance + 1e-8)).flatten(1).sum(1)


def snr_reference(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """What the paper's reference code (``get_lr_weights`` of main.py) computes as SNR, mean over minibatches.

    The mean over entries of g^2 / (variance of g along the tensor's first axis + 1e-8), where g is the gradient of a
    minibatch. It has no variance over inputs, so it is another quantity than eq. 4. Several tensors, which the code
    does not join, count by their entries.
    """
    columns = [statistics.names.index(name) for name in names]
    entries = sum(statistics.weights[name].numel() for name in names)
    return float(statistics.sums[:, columns].sum(1).mean()) / entries


def fisher(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """Empirical Fisher information (Kirkpatrick et al. 2017): mean over inputs and entries of the squared gradient."""
    columns = [statistics.names.index(name) for name in names]
    return float(statistics.sums[:, columns].sum(1).mean()) / sum(statistics.weights[name].numel() for name in names)


def rgn_residual(statistics: GradientStatistics, names: Sequence[str]) -> float:
    """Relative norm of what the gradient asks for outside the directions that the weights use most.

    Of each tensor, as a matrix of its first axis by all others, the principal directions are the singular vectors that
    hold `PRESERVED` of its squared singular values. The mean gradient's part that lies in both of these spaces is taken
    away; the norm of the rest, over the norm of the weights, is the score: what could be learned while that is kept.
    The split of weights by SVD into what is preserved and what may learn is FMSD's, a detector of forged faces, which
    masks layers by their gradients; as one number for a tensor it is this project's own. Vectors are taken whole.
    """
    gradients, weights = 0.0, 0.0
    for name in names:
        gradient, weight = statistics.mean[name].double(), statistics.weights[name].double()
        if weight.ndim > 1:
            gradient, weight = gradient.flatten(1), weight.flatten(1)
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            energy = values.square().cumsum(0) / values.square().sum().clamp(min=1e-300)
            rank = int((energy < PRESERVED).sum()) + 1
            inside = left[:, :rank].T @ gradient @ right[:rank].T
            gradient = gradient - left[:, :rank] @ inside @ right[:rank]
        gradients += float(gradient.square().sum())
        weights += float(weight.square().sum())
    return math.sqrt(gradients / weights) if weights > 0 else 0.0


CRITERIA: dict[str, Criterion] = {
    row.name: row
    for row in (
        Criterion("rgn", rgn, "batch", relative=True),
        Criterion("snr", snr, "input"),
        Criterion("snr-reference", snr_reference, "batch", measure=axis_ratios),
        Criterion("fisher", fisher, "input"),
        Criterion("rgn-residual", rgn_residual, "batch", relative=True),
        Criterion("sensitivity", sensitivity, "output"),
    )
}


def criterion_of(name: str) -> Criterion:
    """The row of a criterion.

    Raises:
        ConfigError: No criterion has this name.
    """
    if name not in CRITERIA:
        raise ConfigError(f"criterion={name!r}: choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
