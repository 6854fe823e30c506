"""`auto`, the default choice of what to tune, at which rate and with which norm statistics.

The search of `search` that is meant for a first try on one's own data: it costs a few runs, is not misled by one lucky
epoch, and uses every label in the end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigError
from ..evaluation.selected import Gain, gain_of_best
from .engines import Engine, Fit
from .ledger import Ledger, Run
from .search import NONE, Candidate, SearchResult, Settings, Variant, candidate_of, result_of, run_candidates

HALF_DECADES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""The learning rates among which `auto` looks."""
START = {"all": 3e-4}
"""Where it begins to look; at 1e-3 for a part of the network."""
RUNG = 1 / 5
"""Share of a run that each candidate of `auto` trains, times its effort."""
LEAST_STEPS = 45
"""Steps that a candidate trains at least, if a run has as many: after fewer, what needs no training looks best."""


@dataclass(frozen=True)
class AutoSettings:
    """What `auto` looks among.

    Attributes:
        lrs: Learning rates to try for every part; None looks for them among `HALF_DECADES`.
        policies: Norm policies to choose between.
        effort: Every candidate trains this many fifths of a run, at most all of it.
    """

    lrs: tuple[float, ...] | None = None
    policies: tuple[str, ...] = ("frozen", "estimated")
    effort: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.effort <= 5:
            raise ConfigError(f"effort={self.effort}: give 1 to 5, the fifths of a run that each candidate trains")


def auto(
    parts: Sequence[str],
    fit: Fit,
    ledger: Ledger,
    settings: Settings = None,
    engine: Engine | None = None,
    *,
    asked: AutoSettings | None = None,
    steps: int = 1000,
    solved: str | None = None,
    nothing: bool = True,
) -> SearchResult:
    """The default choice; docs/selection.md describes it.

    The solved head says which norm statistics fit the new images. Every part trains for a fifth of a run; around the
    rate of the best, and of a second that is not clearly behind, others are tried until the best lies between worse
    ones. Where the solved head leads, or no gain over the base is shown, the best of the others trains to the end
    before they are compared again. The winner is trained on all labelled images. Results need, beside ``validation``:
    ``score``, which is compared; ``scores`` and ``right`` for every validation image; and of the solved head
    ``fold_loss``.

    Args:
        parts: Targets.
        fit: Does one run; see `engines.Fit`.
        ledger: Where runs are looked up and kept.
        settings: See `Settings`.
        engine: Does the runs.
        asked: What to look among.
        steps: Optimizer steps of a whole run.
        solved: The method that solves the head; None where the head cannot be solved.
        nothing: Whether no tuning is a candidate.
    """
    asked = asked or AutoSettings()
    run = functools.partial(run_candidates, fit=fit, ledger=ledger, settings=settings, engine=engine)
    stop = min(1.0, max(RUNG * asked.effort, LEAST_STEPS / steps))
    (base,) = run([Candidate(NONE, None, Variant(asked.policies[0]))])
    policy, heads = asked.policies[0], []
    if solved is not None:
        heads = run([Candidate(solved, None, Variant(one)) for one in asked.policies])
        best_head = min(heads, key=lambda one: one.result["fold_loss"])
        policy = candidate_of(best_head).how.norm_stats or policy
        heads = [best_head, *(one for one in heads if one is not best_head)]
    how = Variant(policy, average=True)
    begun = [(part, rate) for part in parts for rate in asked.lrs or (START.get(part, 1e-3),)]
    tried = run([Candidate(part, rate, how) for part, rate in begun], stop=stop)
    while asked.lrs is None and (more := _neighbours(tried)):
        tried += run([Candidate(part, rate, how) for part, rate in more], stop=stop)
    compared, trials = [*heads[:1], *tried], [base, *heads, *tried]
    leader = _largest_rate(tried)
    best = max([*heads[:1], leader], key=_score)
    gain = _gain(compared, best, base)
    if stop < 1 and (best in heads or not gain.is_shown):
        # The solved head is as good as it gets, and what a part of a run does not show the whole may.
        (leader,) = run([candidate_of(leader)])
        trials.append(leader)
        compared = [*heads[:1], leader]
        best = max([leader, *heads[:1]], key=_score)
        gain = _gain(compared, best, base)
    if nothing and _score(base) >= _score(best):
        return replace(result_of("auto", [base], trials), gain=gain)
    chosen = candidate_of(best)
    (final,) = run([replace(chosen, how=replace(chosen.how, refit=True))])
    measured = {name: best.result[name] for name in ("validation", "validation_loss")}
    final = Run(final.key, {**final.result, **measured}, final.notes)  # it has seen the validation images
    found = result_of("auto", [final], [*trials, final])
    return replace(found, gain=gain)


def _is_behind(run: Run, best: Run) -> bool:
    """Whether the paired difference of the scores of the images has a 95% interval above zero."""
    less = np.subtract(best.result["scores"], run.result["scores"])
    return bool(less.mean() > 1.96 * less.std() / np.sqrt(len(less)))


def _largest_rate(tried: Sequence[Run]) -> Run:
    """The best run; or one of the same part at a larger rate, if the scores of its images hardly differ.

    What has trained for a part of a run only looks better at small rates than it is in the end. Hardly: by at most one
    standard error of the paired difference.
    """
    best = max(tried, key=_score)
    leader = best
    for run in tried:
        if run.key["method"] == best.key["method"] and run.key["lr"] > leader.key["lr"]:
            less = np.subtract(best.result["scores"], run.result["scores"])
            if less.mean() <= less.std() / np.sqrt(len(less)):
                leader = run
    return leader


def _neighbours(tried: Sequence[Run]) -> list[tuple[str, float]]:
    """For the best part, the rates beside its best one that were not tried; and for the second, unless it is behind."""
    best: dict[str, Run] = {}
    for run in sorted(tried, key=_score, reverse=True):
        best.setdefault(run.key["method"], run)
    known = {(run.key["method"], run.key["lr"]) for run in tried}
    found = []
    first, *others = best.values()
    for run in [first, *(one for one in others[:1] if not _is_behind(one, first))]:
        part = run.key["method"]
        at = HALF_DECADES.index(run.key["lr"])
        beside = HALF_DECADES[max(at - 1, 0) : at + 2]
        found += [(part, rate) for rate in beside if (part, rate) not in known]
    return found


def _score(run: Run) -> float:
    score: float = run.result["score"]
    return score


def _gain(compared: Sequence[Run], best: Run, base: Run) -> Gain:
    right = [[mark == "1" for mark in run.result["right"]] for run in [*compared, base]]
    scores = [run.result["scores"] for run in compared]
    return gain_of_best(scores, right[:-1], right[-1], compared.index(best))
