"""A grid of runs as cells that differ in learning rate and seed: what is trained, what is chosen, what is reported."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .ledger import Ledger, Run, canonical

SELECTION_SEED = 0
"""The seed whose validation images choose among a cell's candidates."""


@dataclass(frozen=True)
class Cell:
    """One entry of a results table: the runs that differ only in learning rate and seed.

    Every candidate runs on :data:`SELECTION_SEED`, the one with the best validation accuracy on the other seeds as
    well. Test results have no say. A result holds its ``validation`` accuracy, a fraction; where there is one candidate
    nothing is chosen and none is needed.

    Attributes:
        settings: What the runs share, plain JSON.
        candidates: Learning rates, the first of equals wins; ``(None,)`` where nothing is trained.
        seeds: The seeds to report.
    """

    settings: Mapping[str, Any]
    candidates: tuple[float | None, ...]
    seeds: tuple[int, ...]

    def fill(self, ledger: Ledger, train: Callable[[dict[str, Any]], Mapping[str, Any]]) -> list[Run]:
        """Train what is missing; the runs to report, in the order of the seeds."""

        def run(lr: float | None, seed: int) -> Run:
            return ledger.run({**self.settings, "lr": lr, "seed": seed}, train)

        chosen = self.candidates[0]
        if len(self.candidates) > 1:
            chosen = best_of([run(lr, SELECTION_SEED) for lr in self.candidates]).key["lr"]
        return [run(chosen, seed) for seed in self.seeds]

    def reported(self, ledger: Ledger) -> list[Run]:
        """The same runs from the ledger alone, or nothing if one is missing: a choice among some would be no choice.

        ``settings`` may leave out parts of the runs' keys here.

        Raises:
            DataError: If what is left out differs between runs.
        """
        runs = [run for run in ledger.runs(**self.settings) if run.key["lr"] in self.candidates]
        found = {(run.key["lr"], run.key["seed"]): run for run in runs}
        if len({canonical({**run.key, "lr": None, "seed": None}) for run in runs}) > 1:
            raise DataError(
                f"{ledger.file} holds runs for {dict(self.settings)} that differ in more than lr and seed, such as the "
                "data: name that setting, or use one ledger for each"
            )
        chosen = self.candidates[0]
        if len(self.candidates) > 1:
            candidates = [found[lr, SELECTION_SEED] for lr in self.candidates if (lr, SELECTION_SEED) in found]
            if len(candidates) < len(self.candidates):
                return []
            chosen = best_of(candidates).key["lr"]
        reported = [found[chosen, seed] for seed in self.seeds if (chosen, seed) in found]
        return reported if len(reported) == len(self.seeds) else []

    def read_by(self, ledger: Ledger) -> list[Run]:
        """Every run that :meth:`reported` looks at, the candidates among which it chooses before the others."""
        reported = self.reported(ledger)
        if len(self.candidates) < 2 or not reported:
            return reported
        runs = {run.key["lr"]: run for run in ledger.runs(**self.settings, seed=SELECTION_SEED)}
        return [*(runs[lr] for lr in self.candidates), *(r for r in reported if r.key["seed"] != SELECTION_SEED)]


def best_of(candidates: Sequence[Run]) -> Run:
    """The run with the best validation accuracy, of equals the first."""
    return max(candidates, key=lambda run: run.result["validation"])


def shard(cells: Sequence[Cell], part: int, parts: int) -> list[Cell]:
    """The ``part``-th of ``parts`` (from 1) of a grid: disjoint, together everything, the same in every process.

    Shuffled with a fixed seed before it is dealt out: dealt in order, one process would get all the expensive targets.

    Raises:
        DataError: If ``part`` is not within 1..parts.
    """
    if not 1 <= part <= parts:
        raise DataError(f"part {part} of {parts} does not exist: parts are counted from 1")
    order = random.Random(0).sample(range(len(cells)), len(cells))
    return [cells[i] for i in sorted(order[part - 1 :: parts])]


def export(cells: Sequence[Cell], ledger: Ledger, target: Ledger) -> list[Cell]:
    """Add the runs that these cells read to another ledger, and no others; the cells that are not finished."""
    known, unfinished = target.runs(), []
    for cell in cells:
        runs = cell.read_by(ledger)
        if not runs:
            unfinished.append(cell)
        for run in runs:
            if run not in known:
                target.append(run.key, run.result)
                known.append(run)
    return unfinished
