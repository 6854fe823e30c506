"""Which runs an experiment takes: `choose` finds what to tune, `run_grid` fills a grid of methods and seeds.

`plan_of` says beforehand what they are about to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..blocks import DATA_TARGETS
from ..choosing.methods import METHODS
from ..choosing.resolve import selection_record
from ..choosing.scores import BlockScores
from ..errors import ConfigError, RowsFailedError
from ..training.auto import HALF_DECADES
from ..training.engines import Workers
from ..training.ledger import Run
from ..training.search import (
    NONE,
    RUNGS,
    SELECTION_SEED,
    Candidate,
    SearchResult,
    best_of,
    candidate_of,
    candidates_of,
    cross_val,
    greedy,
    race,
)
from .automatic import choose_by_auto, steps_of
from .experiment import Experiment
from .running import refuse_lost
from .subject import SEARCHES, SHARE

SCORED = {name: name.removeprefix("auto-") for name in DATA_TARGETS if name not in SEARCHES}
"""Targets whose blocks a criterion chooses, and the criterion."""
BATCH_SIZES = (64, 32, 16, 8)
STEPS_PER_EPOCH = 16
"""Steps per epoch that a default batch size leaves at least, if it can: 1,000 images then take batches of 64, as in
the paper, and 140 images batches of 8."""


@dataclass(frozen=True)
class Choice:
    """What is tuned in the end, and why.

    Attributes:
        asked: The target, method or search that was asked for.
        run: The chosen run, in full length.
        trials: All runs that it was selected from; of a candidate in a race one for each rung.
        cost: Cost of all of them and of scoring, in training steps.
        rule: How the choice was made, in words.
        selection: The record for the adapter's config; None where there was nothing to choose.
        scores: Scores of the blocks, where the choice depends on them.
        seconds: What the trials took, as measured; None where that of one is not known.
        saved: The part of ``cost`` that was looked up in the cached prefix instead of computed.
    """

    asked: str
    run: Run
    trials: tuple[Run, ...]
    cost: float
    rule: str
    selection: dict[str, Any] | None = None
    scores: BlockScores | None = None
    seconds: float | None = None
    saved: float = 0.0


def choose(
    experiment: Experiment,
    asked: str,
    seed: int,
    *,
    is_method: bool = False,
    num_blocks: int | None = None,
    budget: float | None = None,
) -> Choice:
    """Decide what to tune, and train it.

    Args:
        experiment: The experiment.
        asked: A target, a method, a search, or ``auto-rgn`` and the like: the neighbouring blocks that score best.
        seed: Seed of data and training.
        is_method: Take ``asked`` as a method even where a target has the same name (``auto-rgn``).
        num_blocks: With a criterion: how many neighbouring blocks; 1 unless a budget is given.
        budget: With a criterion: the largest share of the parameters instead, in (0, 1].

    Raises:
        ConfigError: Nothing of this name exists, or the arguments do not go together.
    """
    if is_method and asked.partition("@")[0] not in METHODS:
        raise ConfigError(f"{asked!r} is no method: choose one of {', '.join(METHODS)}")
    criterion = None if is_method else SCORED.get(asked)
    if criterion is None and (num_blocks is not None or budget is not None):
        raise ConfigError(
            f"num_blocks= and budget= say how much scores may choose, and {asked!r} has none: use {', '.join(SCORED)}"
        )
    if asked in SEARCHES:
        return _searched(experiment, asked, seed)
    if criterion is None:
        return _best_rate(experiment, asked, asked, seed)
    scores = experiment.scores(criterion, seed)
    blocks = scores.contiguous(num_blocks or (None if budget is not None else 1), budget)
    record = selection_record(asked, scores, num_blocks=num_blocks, budget=budget)
    return _best_rate(experiment, asked, " + ".join(blocks), seed, scores, record)


def _best_rate(
    experiment: Experiment,
    asked: str,
    method: str,
    seed: int,
    scores: BlockScores | None = None,
    record: dict[str, Any] | None = None,
) -> Choice:
    candidates = [Candidate(method, lr) for lr in experiment.rates(method)]
    settings = {**experiment.shared, "seed": seed}
    found = cross_val(candidates, experiment.train, experiment.ledger, settings, experiment.run)
    solved = method != NONE and experiment.method(method).solved
    rule = "nothing by validation images: the head is solved" if solved else "epoch by validation accuracy"
    if len(candidates) > 1:
        rule = f"learning rate and {rule}"
        record = {"asked": asked, **(record or {}), "learning_rates": found.record()["validation"]}
    if scores is not None:
        rule = f"blocks by {scores.criterion} on tuning images; {rule}"
    return _choice(experiment, asked, found, rule, record, scores)


def _searched(experiment: Experiment, asked: str, seed: int) -> Choice:
    found = search(experiment, asked, seed)
    by = "norm statistics by validation images" if asked == "auto" else "epoch by validation accuracy"
    record = {**found.record(), "asked": asked}
    return _choice(experiment, asked, found, f"{asked}: target, learning rate and {by}", record, None)


def _choice(
    experiment: Experiment,
    asked: str,
    found: SearchResult,
    rule: str,
    record: dict[str, Any] | None,
    scores: BlockScores | None,
) -> Choice:
    refuse_lost(experiment, [found.run])
    cost = found.cost + (scores.num_batches if scores is not None else 0)
    return Choice(asked, found.run, found.trials, cost, rule, record, scores, found.seconds, found.saved)


def search(experiment: Experiment, name: str, seed: int) -> SearchResult:
    """One of `SEARCHES` over the blocks, the head, all and no tuning.

    With a new head every candidate trains it, so that none of them is no tuning.
    """
    new, settings = experiment.head_is_new, {**experiment.shared, "seed": seed}
    if name == "greedy":
        blocks = [block for block in experiment.anatomy.names if not (new and block == "head")]
        return greedy(blocks, experiment.lrs, experiment.train, experiment.ledger, settings, experiment.run)
    if name == "auto":
        return choose_by_auto(experiment, settings)
    candidates = candidates_of(experiment.anatomy, experiment.lrs, experiment.head_lrs, nothing=not new)
    if name == "cross-val":
        return cross_val(candidates, experiment.train, experiment.ledger, settings, experiment.run)
    # While a new head trains alone all candidates are the same; and a short run has fewer whole epochs to stop after.
    begun, epochs = SHARE if new else 0.0, experiment.fitting.epochs
    rungs = sorted({max(1, round((begun + (1 - begun) * share) * epochs)) / epochs for share in RUNGS})
    return race(candidates, experiment.train, experiment.ledger, settings, experiment.run, rungs=rungs)


def run_grid(experiment: Experiment, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Run]]:
    """The runs to report of every method, in the order of the seeds; they alone have seen the test images.

    Those of a search carry ``chosen``, and as ``cost`` that of the whole search. A row that fails does not keep the
    others from being done, unless several processes share the runs: these end with the first failure.

    Args:
        experiment: The experiment.
        methods: ``none``, targets, methods and searches. The rate of a target or method is the one that validates best
            on `SELECTION_SEED`; a search chooses anew on each seed.
        seeds: Each once.

    Raises:
        ConfigError: A method is none of these, or a seed is given twice.
        RowsFailedError: Some rows failed; it holds those that are done.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"seeds={list(seeds)}: give each seed once, and at least one")
    methods = list(dict.fromkeys(methods))
    rates = {name: experiment.rates(name) for name in methods if name not in SEARCHES}

    def run(keys: list[dict[str, Any]]) -> list[Run]:
        return experiment.run(experiment.train, keys, experiment.ledger)

    def chosen_rate(name: str, tried: Sequence[Run]) -> float | None:
        own = [one for one in tried if one.key["method"] == name]
        rate: float | None = best_of(own).key["lr"] if own else rates[name][0]
        return rate

    def plain_rows(names: Sequence[str]) -> dict[str, list[Run]]:
        several = [name for name in names if len(rates[name]) > 1]
        done = run([experiment.key(name, lr, SELECTION_SEED) for name in several for lr in rates[name]])
        best = {name: chosen_rate(name, done) for name in names}
        wanted = {name: [experiment.key(name, best[name], seed) for seed in seeds] for name in names}
        known = [one.key for one in done]
        done += run([key for keys in wanted.values() for key in keys if key not in known])
        # From what the engine gave: of processes that train together only the first needs to see the ledger.
        found = {name: [next(one for one in done if one.key == key) for key in keys] for name, keys in wanted.items()}
        refuse_lost(experiment, [one for runs in found.values() for one in runs])
        return found

    def rows(names: Sequence[str]) -> dict[str, list[Run]]:
        found = plain_rows([name for name in names if name in rates])
        for name in names:
            if name in SEARCHES:
                found[name] = [_as_run(_searched(experiment, name, seed)) for seed in seeds]
        tested = iter(experiment.tested([one for name in names for one in found[name]]))
        return {name: [next(tested) for _ in seeds] for name in names}

    if experiment.engine != Workers():  # several at a time: the more runs are asked for at once, the better
        return rows(methods)
    done: dict[str, list[Run]] = {}
    failed: dict[str, Exception] = {}
    for name in methods:
        try:
            done |= rows([name])
        except Exception as error:
            failed[name] = error
            experiment.watch.failed(name, error)
    if failed:
        raise RowsFailedError(done, failed)
    return done


def _as_run(choice: Choice) -> Run:
    chosen = str(candidate_of(choice.run))
    notes = {"saved": choice.saved} | ({} if choice.seconds is None else {"seconds": choice.seconds})
    return Run(choice.run.key, {**choice.run.result, "cost": choice.cost, "chosen": chosen}, notes)


# --- the plan ---


def batch_size_for(images: int) -> int:
    """The largest of `BATCH_SIZES` with at least `STEPS_PER_EPOCH` steps an epoch, or else the smallest."""
    return next((size for size in BATCH_SIZES if math.ceil(images / size) >= STEPS_PER_EPOCH), BATCH_SIZES[-1])


def uses_rates(experiment: Experiment, asked: Sequence[str], is_method: bool = False) -> tuple[bool, bool]:
    """Whether any of these targets, methods and searches trains at ``lrs``, and whether any at ``head_lrs``.

    Args:
        experiment: The experiment.
        asked: As for `choose` and `run_grid`.
        is_method: As for `choose`.

    Raises:
        ConfigError: Nothing of this name exists.
    """
    both = [name for name in asked if name in SEARCHES or (name in SCORED and not is_method)]  # these may take the head
    head = [experiment.head_only(name) for name in asked if name not in both and name != NONE]
    return bool(both) or not all(head), any(name not in ("auto", "greedy") for name in both) or any(head)


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def plan_of(experiment: Experiment, asked: Sequence[str], is_method: bool = False) -> str:
    """What is about to be done, in lines: how each part of the data came about, what becomes of the head, and the rest.

    The last line has the numbers of images, the batch size, epochs, training steps and learning rates.

    Args:
        experiment: The experiment.
        asked: Targets, methods and searches.
        is_method: As for `choose`.
    """
    data, fitting = experiment.data(experiment.seed), experiment.fitting
    lines = [f"{part}: {len(images)} images, {data.origin[part]}" for part, images in data.parts.items()]
    lines.append(f"head: {experiment.base(experiment.seed).head_note}")
    purposes = {"tuning": "to tune on", "validation": "to choose with", "test": "to test on"}
    counts = {part: len(rows) for part, rows in data.parts.items()}
    images = ", ".join(f"{counts.get(part) or 'none'} {purpose}" for part, purpose in purposes.items())
    steps = steps_of(experiment)
    epochs = "1 epoch" if fitting.epochs == 1 else f"{fitting.epochs} epochs"
    others, head = uses_rates(experiment, asked, is_method)
    rates = [_listed(experiment.lrs)] if others else []
    rates += [f"{_listed(experiment.head_lrs)} for the head alone"] if head else []
    if {*asked} - {NONE} == {"auto"}:
        tried = experiment.asked.lrs
        rates = [f"between {HALF_DECADES[0]:g} and {HALF_DECADES[-1]:g}" if tried is None else _listed(tried)]
    at = f"; learning rates {' and '.join(rates)}" if rates else ""
    lines.append(f"images: {images}; batches of {fitting.batch_size}, {epochs}: {steps} steps for a whole run{at}")
    return "\n".join(lines)
