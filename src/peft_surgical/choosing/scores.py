"""`BlockScores`: what a criterion says about each block and tensor, and the choices that follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import DataError

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
        num_samples: Inputs seen, over all processes.
        num_batches: Minibatches seen, over all processes.
        uses_labels: Whether labels had a say.
        split: Which part of the data: ``tuning``, ``validation``, ``test``, ... as the caller named it.
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
    def uses_test_data(self) -> bool:
        """Whether test data had a say: what is chosen by such scores must be reported as an oracle's choice."""
        return self.split == "test"

    @property
    def shares(self) -> dict[str, float]:
        """Block -> share of the scored parameters, fractions that add up to 1."""
        total = sum(self.num_parameters.values())
        return {name: count / total for name, count in self.num_parameters.items()}

    def top(self, k: int) -> tuple[str, ...]:
        """The ``k`` blocks with the highest scores, best first; of equals the one nearer to the input.

        Raises:
            DataError: ``k`` is not within 1 and the number of blocks.
        """
        self._check(k)
        return tuple(sorted(self.block_scores, key=lambda name: -self.block_scores[name])[:k])

    def contiguous(self, k: int | None = None, budget: float | None = None) -> tuple[str, ...]:
        """The best run of neighbouring blocks, in the order in which data flows: a surgical target (paper, Sec. 2).

        Args:
            k: Number of blocks. Runs are compared by their mean score.
            budget: Instead of ``k``: the largest share of the parameters, in (0, 1]. Among all runs within it, the
                one with the highest sum of scores.

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

    # --- showing ---

    def __str__(self) -> str:
        width = max(map(len, self.block_scores))
        largest = max(self.block_scores.values()) or 1.0
        lines = [f"{name:<{width}}  {score:>10.4g}  {score / largest:>6.1%}" for name, score in self]
        return "\n".join([f"{self.criterion} on {self.num_samples} {self.split} inputs", *lines])

    def __rich__(self) -> Table:
        """For ``rich.print(scores)``."""
        from rich.table import Table

        table = Table(
            "block",
            "score",
            "of the largest",
            "parameters",
            title=f"{self.criterion}",
            caption=f"{self.num_samples} {self.split} inputs in {self.num_batches} batches, "
            f"labels {'used' if self.uses_labels else 'not used'}",
        )
        largest = max(self.block_scores.values()) or 1.0
        for name, score in self:
            table.add_row(name, f"{score:.4g}", f"{score / largest:.1%}", f"{self.shares[name]:.1%}")
        return table

    def plot(self, axes: Axes | None = None) -> Axes:
        """Bars of the blocks' scores; needs matplotlib. Returns the axes, for titles and ``axes.figure.savefig``."""
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(1.5 + 0.6 * len(self.block_scores), 3), layout="constrained").add_subplot()
        axes.bar(range(len(self.block_scores)), list(self.block_scores.values()))
        axes.set_xticks(range(len(self.block_scores)), list(self.block_scores), rotation=45, ha="right")
        axes.set_ylabel(f"{self.criterion} ({self.num_samples} inputs)")
        return axes

    # --- storing ---

    def to_json(self) -> str:
        """JSON text that :meth:`from_json` turns back into equal scores."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BlockScores:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: The text is not that.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            return cls(**content)
        except (ValueError, TypeError) as error:
            expected = ", ".join(entry.name for entry in fields(cls))
            raise DataError(f"not the JSON of block scores ({error}): expected {expected}") from error
