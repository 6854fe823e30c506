"""Who does the runs of a search: this process, several that share a ledger, all of them together, or a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from .ledger import Ledger, Run
from .trainer import told

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_VISIBLE = "CUDA_VISIBLE_DEVICES"

Fit = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Key -> result. A key holds the search's settings and the candidate's ``method`` and ``lr``; in a race also ``stop``,
the share of the run after which to stop. A result holds ``validation`` (accuracy, a fraction), ``cost`` (of the whole
run up to there), and may hold ``validation_loss``, which decides between equal accuracies, and anything else."""
Engine = Callable[[Fit, Sequence[dict[str, Any]], Ledger], list[Run]]
"""Runs all keys that the ledger does not have and returns all of them, in order."""


@dataclass(frozen=True)
class Workers:
    """Processes that share a ledger: each takes every n-th run and waits for the others' through the ledger.

    Attributes:
        rank: This process's number, from 0.
        world: Number of processes.
        poll: Seconds between two looks at the ledger.
    """

    rank: int = 0
    world: int = 1
    poll: float = 1.0

    def __call__(self, fit: Fit, keys: Sequence[dict[str, Any]], ledger: Ledger) -> list[Run]:
        """See `Engine`."""
        missing = [key for key in keys if ledger.find(key) is None]
        # Dealt out by place among all, not among the missing: another process may see fewer of them.
        for place, key in enumerate(keys):
            if place % self.world == self.rank and key in missing:
                with separated():  # one of its own, where the program has not entered it around everything
                    ledger.run(key, fit)
        while any(ledger.find(key) is None for key in keys):
            time.sleep(self.poll)
        return [ledger.run(key, fit) for key in keys]


@dataclass(frozen=True)
class Together:
    """All processes of ``accelerate launch`` train each run together, one after the other; the first keeps the ledger.

    What a run is worth is what the first process says, and so is what is in the ledger: the others need not see its
    file.
    """

    def __call__(self, fit: Fit, keys: Sequence[dict[str, Any]], ledger: Ledger) -> list[Run]:
        """See `Engine`."""
        first = PartialState().is_main_process
        runs = []
        for key in keys:
            result = told(ledger.find(key) if first else None)
            if result is None:
                own = fit(dict(key))
                if first:
                    ledger.append(key, own)
                result = told(ledger.find(key) if first else None)
            runs.append(Run(dict(key), result or {}))
        return runs


def workers() -> Workers:
    """The processes that ``accelerate launch --num_processes N`` started, as independent workers."""
    return Workers(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def separated() -> Iterator[Workers]:
    """Make this process an independent worker while the block runs; gives what `workers` found before.

    Each run is too small to be spread over processes, so each process trains its own runs: what tells Accelerate and
    Trainer that they belong together is taken out of this process's environment, and it sees its own GPU alone. To be
    entered before anything has asked Accelerate for its state. Afterwards the environment is what it was.
    """
    found = workers()
    if found.world == 1:
        yield found
        return
    before = {name: os.environ.get(name) for name in (*_LAUNCH, _VISIBLE)}
    local, visible = os.environ.get("LOCAL_RANK", "0"), os.environ.get(_VISIBLE)
    try:
        # An empty list hides all GPUs, and goes on doing so.
        os.environ[_VISIBLE] = local if visible is None else visible and visible.split(",")[int(local)]
        for name in _LAUNCH:
            os.environ.pop(name, None)
        yield found
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def on_ray(**resources: Any) -> Engine:
    """Runs on a Ray cluster, one task each; Ray schedules them. Needs ``ray`` (extra ``ray``) and ``ray.init()``.

    Args:
        **resources: Of one run, as ``ray.remote`` takes them: ``num_cpus=1``, ``num_gpus=0.5``, ...
    """

    def run(fit: Fit, keys: Sequence[dict[str, Any]], ledger: Ledger) -> list[Run]:
        import ray

        task = ray.remote(**resources)(fit) if resources else ray.remote(fit)
        waiting = {task.remote(key): key for key in keys if ledger.find(key) is None}
        failures: list[Exception] = []
        while waiting:
            done, _ = ray.wait(list(waiting))
            for reference in done:  # kept at once: what is finished survives the loss of the driver
                key = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except Exception as error:  # the others are under way: their work is kept before this is reported
                    failures.append(error)
                else:
                    ledger.append(key, result)
        if failures:
            raise failures[0]
        return [ledger.run(key, fit) for key in keys]

    return run
