"""A grid of runs of the CIFAR networks, filled by processes that share a ledger: its command line, and its cells."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from peft_surgical.errors import DataError
from peft_surgical.training.ledger import Ledger, Run, canonical
from peft_surgical.training.search import SELECTION_SEED, best_of

from .cifar_networks import NETWORKS


def grid_parser(description: str | None, *, output: str, data: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """A parser with the options that all of these recipes have; a recipe adds its own.

    Args:
        description: The recipe's docstring.
        output: Default folder of what the recipe leaves.
        data: What ``--data`` is.
        seeds: Default seeds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=list(NETWORKS), default="resnet26")
    add("--models", help="folder with the networks' weights (default: PEFT_SURGICAL_SHARED)")
    add("--data", help=data)
    add("--seeds", type=int, nargs="+", default=list(seeds), help="seed 0 also chooses among candidates")
    add("--output", default=output, help=f"what is left there (default: {output})")
    add("--ledger", help="finished runs, may be shared by processes (default: OUTPUT/ledger.jsonl)")
    add("--shard", default="1/1", help="i/n: only the i-th of n parts of the grid")
    add("--threads", type=int, help="torch threads; 1 where several processes share the machine")
    add("--table", action="store_true", help="only draw from the ledger, train nothing")
    add("--markdown", help="also write the table to this file")
    return parser


def parse_grid(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; ``ledger`` becomes a path, ``shard`` a pair of numbers. Sets torch's threads, and transformers silent."""
    args = parser.parse_args(argv)
    args.ledger = Path(args.ledger or Path(args.output, "ledger.jsonl"))
    if not args.data and not args.table:
        parser.error("--data is needed to train; without it --table draws what the ledger holds")
    parts = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.shard)
    if not parts or int(parts[1]) > int(parts[2]):
        parser.error(f"--shard {args.shard}: write i/n with i from 1 to n, such as 1/2 and 2/2")
    args.shard = int(parts[1]), int(parts[2])
    transformers.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


@dataclass(frozen=True)
class Cell:
    """One entry of a results table: the runs that differ only in learning rate and seed.

    Every candidate runs on :data:`SELECTION_SEED`, the one with the best validation accuracy on the other seeds as
    well. Test results are not used. A result holds its ``validation`` accuracy, a fraction, which is not needed where
    there is only one candidate.

    Attributes:
        settings: What the runs share, plain JSON.
        candidates: Learning rates, of equal ones the first wins; ``(None,)`` where nothing is trained.
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
            DataError: What is left out differs between runs.
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
