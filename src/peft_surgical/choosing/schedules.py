"""Who is trained when, and how fast: each tensor's factor of the learning rate as a pure function of progress.

A factor of 0 freezes a tensor for the step, 1 trains it at the optimizer's own rate. A schedule holds no state: what it
says depends on where training is and, for those that data drives, on the scores taken at the start of the epoch. So a
run that is resumed in the middle does what the uninterrupted one does. `pace.Pace` applies a schedule to an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..blocks import Anatomy
from ..errors import ConfigError
from .scores import BlockScores


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Attributes:
        step: Optimizer steps done, from 0.
        total_steps: Optimizer steps of the whole run.
        epoch: Passes over the data done, from 0.
    """

    step: int
    total_steps: int
    epoch: int = 0

    @property
    def share(self) -> float:
        """Share of the run that is done, in [0, 1)."""
        return min(self.step / max(self.total_steps, 1), 1.0)


class Schedule(Protocol):
    """What `pace.Pace` and the callback run."""

    @property
    def criterion(self) -> str | None:
        """The criterion whose scores it wants at the start of each epoch, or None."""

    def factors(self, progress: Progress, scores: BlockScores | None) -> Mapping[str, float]:
        """Tensor -> factor of the learning rate, in [0, 1]; tensors that are left out keep the full rate."""


@dataclass(frozen=True)
class GradualUnfreezing:
    """Blocks join one after the other, each after an equal share of the run; what has joined stays (paper, Sec. 3.1).

    Attributes:
        blocks: The tensors of each block, in the order in which they join.
    """

    blocks: tuple[tuple[str, ...], ...]
    criterion: None = None

    def factors(self, progress: Progress, scores: BlockScores | None = None) -> dict[str, float]:
        """See `Schedule`."""
        joined = int(progress.share * len(self.blocks)) + 1
        return {name: float(i < joined) for i, block in enumerate(self.blocks) for name in block}


def gradual_unfreezing(
    anatomy: Anatomy, order: Literal["first-to-last", "last-to-first"] = "last-to-first"
) -> GradualUnfreezing:
    """Gradual unfreezing of all blocks of a network; last-to-first is Howard & Ruder 2018's.

    Raises:
        ConfigError: Unknown order.
    """
    if order not in ("first-to-last", "last-to-first"):
        raise ConfigError(f"order={order!r}: choose first-to-last or last-to-first")
    blocks = tuple(block.tensors for block in anatomy)
    return GradualUnfreezing(blocks if order == "first-to-last" else blocks[::-1])


@dataclass(frozen=True)
class HeadFirst:
    """LP-FT (Kumar et al. 2022): linear probing, then everything.

    Attributes:
        others: All tensors but the head's: frozen during the first ``share`` of the run.
        share: Share of the run for the head alone, in (0, 1).
    """

    others: tuple[str, ...]
    share: float = 0.5
    criterion: None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share}: the head trains alone for a share of the run between 0 and 1")

    def factors(self, progress: Progress, scores: BlockScores | None = None) -> dict[str, float]:
        """See `Schedule`."""
        return dict.fromkeys(self.others, float(progress.share >= self.share))


def lp_ft(anatomy: Anatomy, share: float = 0.5) -> HeadFirst:
    """LP-FT for a network with a head.

    Raises:
        UnknownTargetError: The network has none.
        ConfigError: ``share`` is not within (0, 1).
    """
    head = set(anatomy["head"].tensors)
    return HeadFirst(tuple(name for name in anatomy.tensors if name not in head), share)


@dataclass(frozen=True)
class AutoRGN:
    """Auto-RGN (paper, Sec. 4.1): each tensor's rate is the base rate times its RGN over the largest RGN.

    Attributes:
        left_out: Tensors that are not trained at all; the reference code leaves BatchNorm's parameters out.
    """

    left_out: frozenset[str] = frozenset()
    criterion: str = "rgn"

    def factors(self, progress: Progress, scores: BlockScores | None) -> dict[str, float]:
        """See `Schedule`."""
        assert scores is not None
        return normalised({name: 0.0 if name in self.left_out else s for name, s in scores.tensor_scores.items()})


@dataclass(frozen=True)
class AutoSNR:
    """Auto-SNR (paper, Sec. 4.1): tensors whose SNR over the largest is below a threshold are frozen for the epoch.

    Attributes:
        threshold: In [0, 1]; the paper tunes it like a learning rate.
        criterion: ``snr``, or ``snr-reference`` for what the reference code computes.
    """

    threshold: float = 0.5
    criterion: str = "snr"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold}: SNRs are compared after scaling to [0, 1]")

    def factors(self, progress: Progress, scores: BlockScores | None) -> dict[str, float]:
        """See `Schedule`."""
        assert scores is not None
        return {name: float(s >= self.threshold) for name, s in normalised(scores.tensor_scores).items()}


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores divided by the largest, so that they lie in [0, 1]; all 1 where every score is 0."""
    largest = max(scores.values(), default=0.0)
    return {name: score / largest if largest > 0 else 1.0 for name, score in scores.items()}


def block_means(factors: Mapping[str, float], anatomy: Anatomy) -> dict[str, float]:
    """Block -> mean factor of its tensors: what the paper's Figure 6 shows."""
    members: dict[str, list[float]] = {block.name: [] for block in anatomy}
    for name, factor in factors.items():
        members[anatomy.block_of(name).name].append(factor)
    return {block: sum(values) / len(values) for block, values in members.items() if values}


def sequence(names: Sequence[str], anatomy: Anatomy) -> GradualUnfreezing:
    """Gradual unfreezing in an order of one's own, by block names.

    Raises:
        UnknownTargetError: The network has no such block.
    """
    return GradualUnfreezing(tuple(anatomy[name].tensors for name in names))
