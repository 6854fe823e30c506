"""Choosing among candidates by training them: `cross_val`, `race` and `greedy`, over any fit function.

A search knows nothing of networks or images. It calls a fit function for runs and reads the validation accuracy and the
cost of each. Runs are looked up in a ledger first, so a search that was killed can be continued, and processes that
share a ledger share the work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..blocks import Anatomy
from ..errors import ConfigError
from ..evaluation.selected import Gain
from .engines import Engine, Fit, workers
from .ledger import Ledger, Run, canonical

NONE = "none"
"""The method that leaves the network as it is."""
RUNGS, KEEP = (1 / 15, 1 / 5, 1.0), 1 / 3
"""Shares of a run at which a race stops candidates, and the share of them that goes on: with 15 epochs after 1, 3 and
15. With ten candidates the whole race then costs 10 x 1 + 4 x 2 + 12 = 30 epochs, which is two runs."""
Settings = Mapping[str, Any] | None
"""The part of the keys that all runs of a search share, such as network, data and seed."""
HOW = "how"
"""Where a key says how its candidate is trained, see `Variant`."""
SELECTION_SEED = 0
"""The seed whose validation images choose among a method's learning rates in a comparison."""


@dataclass(frozen=True)
class Variant:
    """How a candidate is trained, where a search decides about more than its target and rate.

    Attributes:
        norm_stats: Its norm policy; None for the experiment's.
        average: Whether it takes the mean of its last epochs' weights, not the epoch that validates best.
        refit: Whether it is trained on the validation images, too, after everything was chosen.
    """

    norm_stats: str | None = None
    average: bool = False
    refit: bool = False

    def record(self) -> dict[str, Any]:
        """What differs from the usual, for a key."""
        return {name: value for name, value in asdict(self).items() if value}


USUAL = Variant()


@dataclass(frozen=True)
class Candidate:
    """A method or target with a learning rate; ``none`` and what is solved have no rate."""

    method: str
    lr: float | None = None
    how: Variant = USUAL

    def __str__(self) -> str:
        text = self.method if self.lr is None else f"{self.method} at {self.lr:g}"
        text += ", estimated statistics" if self.how.norm_stats == "estimated" else ""
        return f"{text}, all labels" if self.how.refit else text


@dataclass(frozen=True)
class SearchResult:
    """What a search chose, and why.

    Attributes:
        search: Name of the search.
        chosen: The chosen candidate.
        run: Its run, in full length.
        validation: Its validation accuracy, a fraction. As the best of several it is optimistically biased.
        cost: Cost of all runs together, in the unit of the fit function's costs.
        trials: All runs that were compared, in order; in a race each candidate has one for every rung that it reached.
        gain: Over the base, on validation images and without the optimism of the choice; None where it is not measured.
    """

    search: str
    chosen: Candidate
    run: Run
    validation: float
    cost: float
    trials: tuple[Run, ...] = field(repr=False)
    gain: Gain | None = None

    @property
    def relative_cost(self) -> float:
        """Cost of the search in multiples of the chosen run alone; NaN where that is ``none``."""
        own = self.run.result["cost"]
        return self.cost / own if own else math.nan

    @property
    def seconds(self) -> float | None:
        """What all runs together took; None where that of one is not known."""
        return noted(self.trials)[0]

    @property
    def saved(self) -> float:
        """The part of ``cost`` that was looked up instead of computed, see `Fitted`."""
        return noted(self.trials)[1]

    def record(self) -> dict[str, Any]:
        """For the ``selection`` of an adapter's config: plain JSON."""
        best: dict[str, float] = {}
        for run in self.trials:
            name = str(candidate_of(run))
            best[name] = max(best.get(name, 0.0), run.result["validation"])
        found: dict[str, Any] = {"asked": self.search, "chosen": str(self.chosen), "validation": best}
        found["split"] = "validation"
        if large := {str(candidate_of(run)) for run in self.trials if run.result.get("out_of_memory")}:
            found |= {"validation": {name: value for name, value in best.items() if name not in large}}
            found["out_of_memory"] = sorted(large)
        return found if self.gain is None else {**found, "gain": self.gain.record()}


def candidates_of(
    anatomy: Anatomy,
    lrs: Sequence[float],
    head_lrs: Sequence[float] | None = None,
    *,
    pairs: bool = False,
    everything: bool = True,
    nothing: bool = True,
) -> list[Candidate]:
    """Every block, as in the paper's Cross-Val, `all` and no tuning, each with every rate.

    Args:
        anatomy: The network's blocks.
        lrs: Learning rates.
        head_lrs: Learning rates of the head, by default ``lrs``; the paper's are a hundred times larger.
        pairs: Also every pair of neighbouring blocks.
        everything: Whether tuning all is a candidate.
        nothing: Whether no tuning is a candidate.
    """
    names = list(anatomy.names)
    targets = names + ([f"{a} + {b}" for a, b in itertools.pairwise(names)] if pairs else [])
    found = [Candidate(NONE)] if nothing else []
    for target in [*targets, *(["all"] if everything else [])]:
        found += [Candidate(target, lr) for lr in (head_lrs if target == "head" and head_lrs else lrs)]
    return found


def cross_val(
    candidates: Sequence[Candidate], fit: Fit, ledger: Ledger, settings: Settings = None, engine: Engine | None = None
) -> SearchResult:
    """Train every candidate in full and keep the best on validation data (paper, Sec. 4.1, Cross-Val).

    Args:
        candidates: At least one; of equal ones the first wins.
        fit: Does one run; see `engines.Fit`.
        ledger: Where runs are looked up and kept.
        settings: See `Settings`.
        engine: Does the runs; by default `workers`, which is this process alone unless others were launched.

    Raises:
        ConfigError: No candidates.
    """
    runs = run_candidates(candidates, fit, ledger, settings, engine)
    return result_of("cross-val", runs, runs)


def race(
    candidates: Sequence[Candidate],
    fit: Fit,
    ledger: Ledger,
    settings: Settings = None,
    engine: Engine | None = None,
    *,
    rungs: Sequence[float] = RUNGS,
    keep: float = KEEP,
) -> SearchResult:
    """Successive halving (Jamieson & Talwalkar 2016): all start, at each rung most stop, one runs in full.

    Learning rates race as well. The survivors go on from where they stopped, so the winner's run costs what it would
    alone. A candidate's score is its best validation accuracy so far; of equal ones the lower validation loss at the
    rung. Arguments are those of `cross_val`, and in the key ``stop`` is the share of the run to reach; ``none`` takes
    part without cost. ``rungs`` are shares of the run that ascend to 1, ``keep`` is the share of the candidates that
    survives a rung, rounded up; before the last rung all but one stop.

    Raises:
        ConfigError: No candidates, rungs that do not ascend to 1, or ``keep`` outside (0, 1).
    """
    if list(rungs) != sorted(set(rungs)) or not rungs or rungs[-1] != 1 or rungs[0] <= 0:
        raise ConfigError(f"rungs={tuple(rungs)}: give ascending shares of the run that end with 1, such as {RUNGS}")
    if not 0 < keep < 1:
        raise ConfigError(f"keep={keep}: give the share that survives a rung, between 0 and 1")
    alive, trials = list(candidates), []
    for rung, following in zip(rungs, [*rungs[1:], None], strict=True):
        runs = run_candidates(alive, fit, ledger, settings, engine, stop=rung)
        trials += runs
        ranked = sorted(runs, key=_rank)
        if following is None or (len(ranked) == 1 and candidate_of(ranked[0]).method == NONE):
            return result_of("race", runs, trials)
        count = 1 if following == 1 else math.ceil(len(ranked) * keep)
        survivors = {candidate_of(run) for run in ranked[:count]}
        alive = [candidate for candidate in alive if candidate in survivors]
    raise AssertionError("the last rung returns")


def greedy(
    blocks: Sequence[str],
    lrs: Sequence[float],
    fit: Fit,
    ledger: Ledger,
    settings: Settings = None,
    engine: Engine | None = None,
    *,
    gain: float = 0.0,
    most: int | None = None,
) -> SearchResult:
    """Greedy forward selection of blocks, contiguous or not (SubTuning, Kaplun et al. 2023).

    Every round trains the chosen blocks together with each of the others, at each of the rates ``lrs``, and adds the
    best one, as long as validation accuracy (a fraction) grows by more than ``gain``, up to ``most`` blocks. The other
    arguments are those of `cross_val`.
    """
    trials = run_candidates([Candidate(NONE)], fit, ledger, settings, engine)
    chosen: list[str] = []
    best = trials[0]
    while len(chosen) < min(len(blocks), len(blocks) if most is None else most):
        grown = [[name for name in blocks if name in {*chosen, more}] for more in blocks if more not in chosen]
        candidates = [Candidate(" + ".join(names), lr) for names in grown for lr in lrs]
        runs = run_candidates(candidates, fit, ledger, settings, engine)
        trials += runs
        leader = min(runs, key=_rank)
        if leader.result["validation"] <= best.result["validation"] + gain:
            break
        best, chosen = leader, leader.key["method"].split(" + ")
    return result_of("greedy", [best], trials)


def noted(runs: Sequence[Run]) -> tuple[float | None, float]:
    """Seconds of runs, each counted once, and the training steps that the cached prefix saved; see `ledger.NOTES`."""
    each = list({canonical(run.key): run for run in runs}.values())
    known = all("seconds" in run.notes for run in each)
    seconds = sum(run.notes["seconds"] for run in each) if known else None
    return seconds, sum(run.notes.get("saved", 0.0) for run in each)


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the best validation accuracy, of equal ones the first."""
    return max(runs, key=lambda run: run.result["validation"])


def run_candidates(
    candidates: Sequence[Candidate],
    fit: Fit,
    ledger: Ledger,
    settings: Settings,
    engine: Engine | None,
    stop: float | None = None,
) -> list[Run]:
    """The runs of these candidates, each once, in their order.

    Raises:
        ConfigError: No candidates.
    """
    if not candidates:
        raise ConfigError("no candidates: give at least one, see candidates_of")
    keys = []
    for candidate in dict.fromkeys(candidates):
        key = {**(settings or {}), "method": candidate.method, "lr": candidate.lr}
        if candidate.how != USUAL:
            key[HOW] = candidate.how.record()
        # A full run has the same key in every search, and a run that does not train cannot be stopped.
        keys.append(key if stop in (None, 1) or candidate.method == NONE else {**key, "stop": stop})
    return (engine or workers())(fit, keys, ledger)


def candidate_of(run: Run) -> Candidate:
    """What a run was a run of."""
    return Candidate(run.key["method"], run.key["lr"], Variant(**run.key.get(HOW, {})))


def _rank(run: Run) -> tuple[float, float]:
    return -run.result["validation"], run.result.get("validation_loss", 0.0)


def result_of(search: str, finalists: Sequence[Run], trials: Sequence[Run]) -> SearchResult:
    """A result from the runs that finished and all that were compared."""
    best = min(finalists, key=_rank)
    spent: dict[Any, float] = {}
    for run in trials:
        # A run that was stopped goes on from there, unless it is averaged, which needs its end.
        what = candidate_of(run), run.key.get("stop") if candidate_of(run).how.average else None
        spent[what] = max(spent.get(what, 0.0), run.result["cost"])
    return SearchResult(search, candidate_of(best), best, best.result["validation"], sum(spent.values()), tuple(trials))
