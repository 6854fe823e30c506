"""Which runs an experiment takes: `choose` finds what to tune, `compare` fills a grid of methods and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..blocks import DATA_TARGETS
from ..choosing.methods import METHODS
from ..choosing.resolve import selection_record
from ..choosing.scores import BlockScores
from ..errors import ConfigError, RowsFailedError
from ..training.engines import Workers
from ..training.ledger import Run
from ..training.search import (
    AUTO_RUNGS,
    RUNGS,
    SELECTION_SEED,
    Candidate,
    SearchResult,
    auto,
    best_of,
    candidates_of,
    cross_val,
    greedy,
    race,
)
from .experiment import Experiment
from .newhead import SHARE
from .subject import SEARCHES

SCORED = tuple(name for name in DATA_TARGETS if name.startswith("auto-"))
"""Targets whose blocks a criterion chooses."""


@dataclass(frozen=True)
class Choice:
    """What is tuned in the end, and why.

    Attributes:
        asked: As the user said it.
        run: The chosen run, in full length.
        trials: All runs that had a say; of a candidate in a race one for each rung.
        cost: Of all of them and of scoring, in training steps.
        rule: How the choice was made, in words.
        selection: For the adapter's config; None where there was nothing to choose.
        scores: Of the blocks, where they had a say.
    """

    asked: str
    run: Run
    trials: tuple[Run, ...]
    cost: float
    rule: str
    selection: dict[str, Any] | None = None
    scores: BlockScores | None = None


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
        seed: Of data and training.
        is_method: Take ``asked`` as a method even where a target has the same name (``auto-rgn``).
        num_blocks: With a criterion: how many neighbouring blocks; 1 unless a budget is given.
        budget: With a criterion: the largest share of the parameters instead, in (0, 1].

    Raises:
        ConfigError: Nothing of this name exists, or the arguments do not go together.
    """
    if is_method and asked not in METHODS:
        raise ConfigError(f"{asked!r} is no method: choose one of {', '.join(METHODS)}")
    scored = not is_method and asked in SCORED
    if not scored and (num_blocks is not None or budget is not None):
        raise ConfigError(
            f"num_blocks= and budget= say how much scores may choose, and {asked!r} has none: use {', '.join(SCORED)}"
        )
    if asked in SEARCHES:
        return _searched(experiment, asked, seed)
    if not scored:
        return _best_rate(experiment, asked, asked, seed)
    criterion = asked.removeprefix("auto-")
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
    _refuse_diverged([found.run])
    rule = "epoch by validation accuracy"
    if len(candidates) > 1:
        rule = f"learning rate and {rule}"
        record = {"asked": asked, **(record or {}), "learning_rates": found.record()["validation"]}
    if scores is not None:
        rule = f"blocks by {scores.criterion} on tuning images; {rule}"
    cost = found.cost + (scores.num_batches if scores is not None else 0)
    return Choice(asked, found.run, found.trials, cost, rule, record, scores)


def _searched(experiment: Experiment, asked: str, seed: int) -> Choice:
    found, scores = search(experiment, asked, seed)
    _refuse_diverged([found.run])
    record = {**found.record(), "asked": asked}
    if scores is not None:
        record["scores"] = selection_record("rgn", scores)
    cost = found.cost + (scores.num_batches if scores is not None else 0)
    rule = f"{asked}: target, learning rate and epoch by validation accuracy"
    return Choice(asked, found.run, found.trials, cost, rule, record, scores)


def search(experiment: Experiment, name: str, seed: int) -> tuple[SearchResult, BlockScores | None]:
    """One of `SEARCHES` over the blocks, the head, all and no tuning; and the scores that nominated candidates.

    With a new head every candidate trains it, so that none of them is no tuning.
    """
    new, settings = experiment.head_is_new, {**experiment.shared, "seed": seed}
    if name == "greedy":
        blocks = [block for block in experiment.anatomy.names if not (new and block == "head")]
        found = greedy(blocks, experiment.lrs, experiment.train, experiment.ledger, settings, experiment.run)
        return found, None
    candidates = candidates_of(experiment.anatomy, experiment.lrs, experiment.head_lrs, nothing=not new)
    if name == "cross-val":
        return cross_val(candidates, experiment.train, experiment.ledger, settings, experiment.run), None
    # While a new head trains alone all candidates are the same; and a short run has fewer whole epochs to stop after.
    begun, epochs = SHARE if new else 0.0, experiment.fitting.epochs
    shares = AUTO_RUNGS if name == "auto" else RUNGS
    rungs = sorted({max(1, round((begun + (1 - begun) * share) * epochs)) / epochs for share in shares})
    if name == "race":
        return race(candidates, experiment.train, experiment.ledger, settings, experiment.run, rungs=rungs), None
    scores = experiment.scores("rgn", seed)
    given = experiment.train, experiment.ledger, settings, experiment.run
    return auto(candidates, scores.block_scores, *given, rungs=rungs), scores


def compare(experiment: Experiment, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Run]]:
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

    def tried(name: str) -> list[dict[str, Any]]:
        """The runs that choose a row's learning rate."""
        return [experiment.key(name, lr, SELECTION_SEED) for lr in rates[name]] if len(rates[name]) > 1 else []

    def reported(name: str, done: Sequence[Run]) -> list[dict[str, Any]]:
        runs = [one for one in done if one.key["method"] == name]
        lr = best_of(runs).key["lr"] if runs else rates[name][0]
        return [experiment.key(name, lr, seed) for seed in seeds]

    def plain_rows(names: Sequence[str]) -> dict[str, list[Run]]:
        done = run([key for name in names for key in tried(name)])
        wanted = {name: reported(name, done) for name in names}
        known = [one.key for one in done]
        done += run([key for keys in wanted.values() for key in keys if key not in known])
        # From what the engine gave: of processes that train together only the first needs to see the ledger.
        found = {name: [next(one for one in done if one.key == key) for key in keys] for name, keys in wanted.items()}
        _refuse_diverged([one for runs in found.values() for one in runs])
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


def _refuse_diverged(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.result.get("diverged"):
            raise ConfigError(
                f"{run.key['method']} with learning rate {run.key['lr']:g} and seed {run.key['seed']} ended in NaN, "
                "and no other rate did better: give a smaller one"
            )


def _as_run(choice: Choice) -> Run:
    chosen = str(Candidate(choice.run.key["method"], choice.run.key["lr"]))
    return Run(choice.run.key, {**choice.run.result, "cost": choice.cost, "chosen": chosen})
