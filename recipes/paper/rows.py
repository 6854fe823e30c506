"""Rows: the results of a study's runs, in a file of their own from which tables are drawn without training anything.

A row is a `Run` of a `Ledger`: its key holds the settings that determine it, with ``lr`` and ``seed``; its result holds
``validation`` (accuracy, a fraction), ``cost`` in training steps, and, where the run is reported, ``test``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_surgical.errors import DataError
from peft_surgical.evaluation.evaluate_metrics import judge_with_evaluate
from peft_surgical.experiment.choosing import SELECTION_SEED
from peft_surgical.experiment.experiment import Experiment
from peft_surgical.experiment.subject import SEARCHES
from peft_surgical.training.ledger import Ledger, Run, canonical

_Candidate = TypeVar("_Candidate")


def write_rows(
    file: Ledger,
    experiment: Experiment,
    found: Mapping[str, Sequence[Run]],
    settings: Callable[[str], Mapping[str, Any]],
    measure: Callable[[Run], Mapping[str, Any]],
) -> None:
    """Write the runs behind a study's table: those that chose a learning rate, and those that are reported.

    Args:
        file: Rows; those that it has already are left as they are.
        experiment: Whose ledger has the runs.
        found: Method -> runs to report, as `choosing.compare` gives them.
        settings: Method -> what the keys of its rows have in common.
        measure: Further results of a run that is reported.
    """
    for method, runs in found.items():
        shared, searched = settings(method), method in SEARCHES
        rates = () if searched else experiment.rates(method)
        for rate in rates if len(rates) > 1 else ():
            key = {**shared, "lr": rate, "seed": SELECTION_SEED}
            result = experiment.ledger.find(experiment.key(method, rate, SELECTION_SEED))
            if result is not None and file.find(key) is None:
                file.append(key, result)
        for run in runs:
            key = {**shared, "lr": None if searched else run.key["lr"], "seed": run.key["seed"]}
            if "test" not in (file.find(key) or {}):
                file.append(key, {**run.result, **run.notes, **measure(run)})


def reported(
    rows: Sequence[Run], settings: Mapping[str, Any], rates: Sequence[float | None], seeds: Sequence[int]
) -> list[Run]:
    """The rows of one cell of a table, in the order of the seeds; none if one is missing.

    Where there are several learning rates, the one with the best validation accuracy on `SELECTION_SEED` is taken, of
    equals the first; a rate without a row there leaves no choice, and no rows.

    Args:
        rows: To choose from.
        settings: What the keys have in common; parts of them may be left out.
        rates: Learning rates; ``(None,)`` where none is chosen.
        seeds: To report.

    Raises:
        DataError: What is left out of ``settings`` differs between rows.
    """
    own = [row for row in rows if row.key["lr"] in rates and settings.items() <= row.key.items()]
    if len({canonical({**row.key, "lr": None, "seed": None}) for row in own}) > 1:
        raise DataError(
            f"there are rows for {dict(settings)} that differ in more than lr and seed, such as the data: name that "
            "setting, or use one file for each"
        )
    found = {(row.key["lr"], row.key["seed"]): row for row in own}

    def one(rate: float | None, part: str, seed: int) -> Run | None:
        row = found.get((rate, seed))
        return row if row is not None and part in row.result else None

    return best_validated(rates, seeds, one, "validation")


def best_validated(
    candidates: Sequence[_Candidate],
    seeds: Sequence[int],
    run: Callable[[_Candidate, str, int], Run | None],
    score: str = "accuracy",
) -> list[Run]:
    """The test runs, one for each seed, of the candidate that is most accurate in validation; none if one is missing.

    Validation is on `SELECTION_SEED`, and left out where there is a single candidate. Among equals the first is taken.

    Args:
        candidates: Settings to choose among.
        seeds: To report.
        run: Candidate, ``"validation"`` or ``"test"``, and seed -> the run; None where it is not to be had.
        score: Which result of a run in validation is compared, a fraction.
    """
    best = candidates[0]
    if len(candidates) > 1:
        validated = [run(one, "validation", SELECTION_SEED) for one in candidates]
        shares = [one.result[score] for one in validated if one]
        if len(shares) < len(candidates):
            return []
        best = candidates[shares.index(max(shares))]
    tested = [one for seed in seeds if (one := run(best, "test", seed))]
    return tested if len(tested) == len(seeds) else []


def judged(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """The ``accuracy`` of a stream's predictions, a fraction, and which were ``right``: a digit, 0 or 1, for each.

    A prediction whose logits are not finite is wrong.

    Args:
        logits: (n, classes).
        labels: int64 (n,).
    """
    classes = torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)
    right = "".join(map(str, (classes == labels).int().tolist()))
    return {"right": right, **judge_with_evaluate(["accuracy"], classes, labels, None)}
