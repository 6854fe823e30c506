"""A head for new classes: trained alone at first and then together with the target, and saved whole with the adapter.

A head whose values are a random draw has nothing to be a delta of, and its first gradients would disturb what was
pretrained (Kumar et al. 2022). `with_new_head` turns any method into one that knows this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..blocks import Anatomy
from ..choosing.methods import HeadFirst, Method, Progress, Schedule
from ..choosing.scores import BlockScores

SHARE = 1 / 3
"""Share of a run during which a new head trains alone."""


@dataclass(frozen=True)
class NewHeadFirst:
    """The head alone, then the head at the full rate and all others by a schedule of their own.

    That schedule sees the rest of the run as if it were the whole, and scores without the head's: that a random head
    has large gradients says nothing about the data.

    Attributes:
        others: All tensors but the head's.
        inner: Their schedule after the first ``share`` of the run; None trains them at the full rate.
        share: Share of the run for the head alone. A schedule that data drives begins with the next whole epoch.
    """

    others: tuple[str, ...]
    inner: Schedule | None = None
    share: float = SHARE

    @property
    def criterion(self) -> str | None:
        """See `Schedule`."""
        return None if self.inner is None else self.inner.criterion

    def factors(self, progress: Progress, scores: BlockScores | None = None) -> Mapping[str, float]:
        """See `Schedule`."""
        if progress.share < self.share:
            return dict.fromkeys(self.others, 0.0)
        if self.inner is None:
            return {}
        begun = math.ceil(self.share * progress.total_steps)
        rest = Progress(progress.step - begun, progress.total_steps - begun, progress.epoch)
        others = set(self.others)
        if scores is not None:
            own = {name: score for name, score in scores.tensor_scores.items() if name in others}
            scores = replace(scores, tensor_scores=own)
        return {name: factor for name, factor in self.inner.factors(rest, scores).items() if name in others}


def with_new_head(row: Method) -> Method:
    """The method with the head trained first. LP-FT trains it first anyway and stays as it is."""
    schedule = row.schedule

    def first(anatomy: Anatomy, options: dict[str, Any]) -> Schedule:
        inner = None if schedule is None else schedule(anatomy, options)
        if isinstance(inner, HeadFirst):
            return inner
        head = set(anatomy["head"].tensors)
        return NewHeadFirst(tuple(name for name in anatomy.tensors if name not in head), inner)

    return replace(row, schedule=first)


def modules_of_head(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """What to name in ``modules_to_save`` so that exactly the head is saved whole; nothing where that cannot be said.

    PEFT takes every module whose path *ends* in such a name, and no tensors beside modules.
    """
    head = anatomy["head"]
    inside = all(any(name.startswith(f"{path}.") for path in head.modules) for name in head.tensors)
    ends = tuple(head.modules)
    meant = {path for path, _ in model.named_modules() if path and path.endswith(ends)}
    return list(head.modules) if inside and meant == set(ends) else []
