"""What the search `auto` looks among on a network and its data."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from ..blocks import Anatomy
from ..choosing.methods import LOGISTIC
from ..data.labelled import collate
from ..training.auto import auto
from ..training.logistic import can_solve
from ..training.search import SearchResult
from ..tuner.specialise import has_statistics
from .experiment import Experiment


def choose_by_auto(experiment: Experiment, settings: dict[str, Any]) -> SearchResult:
    """`training.auto.auto` on an experiment.

    Args:
        experiment: Its network and data.
        settings: What the keys of all runs have in common, with the seed.
    """
    seed = settings["seed"]
    base = copy.deepcopy(experiment.base(seed).model).cpu().eval()  # scoring may have left it on an accelerator
    asked, policy = experiment.asked, experiment.config.get("norm_stats", "frozen")
    if policy not in asked.policies or not any(has_statistics(module) for module in base.modules()):
        asked = replace(asked, policies=(policy,))
    look = collate([experiment.rows("validation", seed)[0]])
    solved = LOGISTIC if can_solve(base, experiment.anatomy, look) else None
    return auto(
        parts_of(experiment.anatomy),
        experiment.train,
        experiment.ledger,
        settings,
        experiment.run,
        asked=asked,
        steps=steps_of(experiment),
        solved=solved,
        nothing=not experiment.head_is_new,
    )


def steps_of(experiment: Experiment) -> int:
    """Optimizer steps of a whole run."""
    fitting, images = experiment.fitting, len(experiment.data(experiment.seed).tuning)
    return math.ceil(images / (fitting.batch_size * fitting.accumulation)) * fitting.epochs


def parts_of(anatomy: Anatomy) -> list[str]:
    """What `auto` compares: the first, middle and last third of the blocks before the head, and everything.

    They stand for shifts of the input, of features, and of what is made of these. With a remainder the middle third is
    the longest; fewer than three blocks are each a part.
    """
    names = [name for name in anatomy.names if name != "head"]
    size, rest = divmod(len(names), 3)
    first = size + (rest == 2 and size == 0)
    last = size + (rest == 2)
    cuts = [names[:first], names[first : len(names) - last], names[len(names) - last :]]
    return [*(" + ".join(part) for part in cuts if part), "all"]
