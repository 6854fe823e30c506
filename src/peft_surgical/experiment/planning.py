"""What an experiment is about to do: which learning rates it will use, in how many steps, and all of it in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..blocks import DATA_TARGETS
from ..training.search import NONE
from .experiment import Experiment
from .subject import SEARCHES

BATCH_SIZES = (64, 32, 16, 8)
STEPS_PER_EPOCH = 16
"""What a batch size that nobody gave leaves at least, if it can: 1,000 images then take batches of 64, as in the
paper, and 140 images batches of 8."""


def batch_size_for(images: int) -> int:
    """The largest of `BATCH_SIZES` with at least `STEPS_PER_EPOCH` steps an epoch, or else the smallest."""
    return next((size for size in BATCH_SIZES if math.ceil(images / size) >= STEPS_PER_EPOCH), BATCH_SIZES[-1])


def uses_rates(experiment: Experiment, asked: str, is_method: bool = False) -> tuple[bool, bool]:
    """Whether a target, method or search trains at ``lrs``, and whether at ``head_lrs``.

    Args:
        experiment: The experiment.
        asked: As for `choosing.choose` and `choosing.compare`.
        is_method: As for `choosing.choose`: ``auto-rgn`` and the like are methods here, not choices of a block.

    Raises:
        ConfigError: Nothing of this name exists.
    """
    if asked == NONE:
        return False, False
    if asked == "greedy":
        return True, False
    if asked in SEARCHES or (asked in DATA_TARGETS and not is_method):  # scores may choose the head
        return True, True
    head_only = experiment.head_only(asked)
    return not head_only, head_only


def plan_of(experiment: Experiment, asked: Sequence[str], is_method: bool = False) -> str:
    """Images, batches, epochs, steps and learning rates, in one line.

    Args:
        experiment: The experiment.
        asked: Targets, methods and searches.
        is_method: As for `uses_rates`.
    """
    data, fitting = experiment.data(experiment.seed), experiment.fitting
    purposes = {"tuning": "to tune on", "validation": "to choose with", "test": "to test on"}
    counts = {part: len(rows) for part, rows in data.parts.items()}
    images = ", ".join(f"{counts.get(part) or 'none'} {purpose}" for part, purpose in purposes.items())
    steps = math.ceil(counts["tuning"] / (fitting.batch_size * fitting.accumulation)) * fitting.epochs
    epochs = "1 epoch" if fitting.epochs == 1 else f"{fitting.epochs} epochs"
    used = [uses_rates(experiment, one, is_method) for one in asked]
    rates = []
    if any(others for others, _ in used):
        rates.append(", ".join(f"{rate:g}" for rate in experiment.lrs))
    if any(head for _, head in used):
        rates.append(", ".join(f"{rate:g}" for rate in experiment.head_lrs) + " for the head alone")
    at = f"; learning rates {' and '.join(rates)}" if rates else ""
    return f"images: {images}; batches of {fitting.batch_size}, {epochs}: {steps} steps for a whole run{at}"
