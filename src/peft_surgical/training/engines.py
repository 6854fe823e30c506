"""Who does the runs of a search: this process, several that share a ledger, all of them together, or a Ray cluster.

`check_launch` and `check_sharding` refuse what a launch of several processes cannot do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env

from accelerate import PartialState

from ..errors import ConfigError
from .ledger import Ledger, Run

if TYPE_CHECKING:
    from transformers import TrainingArguments

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_VISIBLE = "CUDA_VISIBLE_DEVICES"

Fit = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Key -> result. A key holds the search's settings and the candidate's ``method`` and ``lr``; in a race also ``stop``,
the share of the run after which to stop. A result holds ``validation`` (accuracy, a fraction), ``cost`` (of the whole
run up to there), and may hold ``validation_loss``, which decides between equal accuracies, and anything else."""
Engine = Callable[[Fit, Sequence[dict[str, Any]], Ledger], list[Run]]
"""(fit, keys, ledger) -> the runs of all keys, in order; those that the ledger does not hold are done."""


@dataclass(frozen=True)
class Workers:
    """Processes that share a ledger: each does every ``world``-th run and waits for the others' to be in the ledger.

    Attributes:
        rank: This process's number, from 0.
        world: Number of processes.
        poll: Seconds between two readings of the ledger.
    """

    rank: int = 0
    world: int = 1
    poll: float = 1.0

    def __call__(self, fit: Fit, keys: Sequence[dict[str, Any]], ledger: Ledger) -> list[Run]:
        """See `Engine`."""
        missing = [key for key in keys if ledger.find(key) is None]
        # Dealt by place among all keys, not among the missing: another process may find fewer of them missing.
        for place, key in enumerate(keys):
            if place % self.world == self.rank and key in missing:
                with separated():  # has no effect where the program has entered it already
                    ledger.run(key, fit)
        while any(ledger.find(key) is None for key in keys):
            time.sleep(self.poll)
        return [ledger.run(key, fit) for key in keys]


class Together:
    """All processes of ``accelerate launch`` train each run together, one run after the other.

    Only the first process reads and writes the ledger; its results are broadcast to the others.
    """

    def __call__(self, fit: Fit, keys: Sequence[dict[str, Any]], ledger: Ledger) -> list[Run]:
        """See `Engine`."""
        first = PartialState().is_main_process
        runs = []
        for key in keys:
            (run,) = broadcast_object_list([ledger.find_run(key) if first else None])
            if run is None:
                own = fit(dict(key))
                if first:
                    ledger.append(key, own)
                (run,) = broadcast_object_list([ledger.find_run(key) if first else None])
            runs.append(run or Run(dict(key), {}))
        return runs


def workers() -> Workers:
    """The processes that ``accelerate launch --num_processes N`` started, as independent workers."""
    return Workers(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def separated() -> Iterator[Workers]:
    """Make this process an independent worker while the block runs; yields what `workers` found before.

    Each run is too small to be spread over processes, so each process trains its own runs: the variables by which
    Accelerate and Trainer join processes are taken out of the environment, and only this process's GPU is visible.
    Enter it before anything uses Accelerate's state. Afterwards the environment is what it was.
    """
    found = workers()
    if found.world == 1:
        yield found
        return
    before = {name: os.environ.get(name) for name in (*_LAUNCH, _VISIBLE)}
    local, visible = os.environ.get("LOCAL_RANK", "0"), os.environ.get(_VISIBLE)
    try:
        # An empty list hides all GPUs, and stays empty.
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
    """An engine that does each run as a task of a Ray cluster. Needs ``ray`` (the extra ``ray``).

    Call ``ray.init()`` before: without an address it starts Ray on this machine. On a cluster, start Ray with
    ``ray start --head`` on one machine and ``ray start --address=HEAD:6379`` on the others, and run the program on one
    of them with ``ray.init(address="auto")``. All machines need this package, and the data, models and output folder at
    the same paths (a shared file system). Only the program itself reads and writes the ledger::

        ray.init(address="auto")
        cross_val(candidates, fit, Ledger("runs.jsonl"), engine=on_ray(num_cpus=4, num_gpus=1))

    Args:
        **resources: What one run needs, as ``ray.remote`` takes it: ``num_cpus=1``, ``num_gpus=0.5``, ...
    """

    def run(fit: Fit, keys: Sequence[dict[str, Any]], ledger: Ledger) -> list[Run]:
        import ray

        task = ray.remote(**resources)(fit) if resources else ray.remote(fit)
        waiting = {task.remote(key): key for key in keys if ledger.find(key) is None}
        failures: list[Exception] = []
        while waiting:
            done, _ = ray.wait(list(waiting))
            for reference in done:  # written at once: finished runs survive the loss of the driver
                key = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except Exception as error:  # raised after the results of the runs under way are kept
                    failures.append(error)
                else:
                    ledger.append(key, result)
        if failures:
            raise failures[0]
        return [ledger.run(key, fit) for key in keys]

    return run


# --- launches of several processes ---


def sharding() -> str | None:
    """``FSDP`` or ``DeepSpeed`` if `accelerate launch` uses it; else None."""
    flags = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, flag in flags.items() if parse_flag_from_env(flag)), None)


def check_launch(arguments: TrainingArguments, precision: str | None) -> None:
    """Refuse a launch that would silently train otherwise than ``arguments`` and ``precision`` ask for.

    Raises:
        ConfigError: The processes would not train together, are sharded in a way that is not supported, or
            `accelerate launch` has another precision.
    """
    launched, together = int(os.environ.get("WORLD_SIZE", "1")), arguments.world_size
    if launched > together:
        raise ConfigError(
            f"{launched} processes were launched and each would train alone, into one folder: no accelerator was "
            "found. Set ACCELERATE_USE_CPU=true to train together on the CPU, or launch one process"
        )
    if arguments.mixed_precision != (precision or "no"):
        raise ConfigError(
            f"`accelerate launch` says mixed_precision={arguments.mixed_precision}, and the run precision={precision}: "
            "the run's own counts. Give it there, or launch with --mixed_precision no"
        )
    if arguments.fsdp or arguments.deepspeed:
        raise ConfigError("fsdp and deepspeed are not for TrainingArguments here: tell `accelerate launch`")
    kind = sharding()
    if kind and arguments.distributed_state.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        raise ConfigError(
            f"Accelerate has no {kind} on the CPU, or for one process alone: it would leave it out without a word. "
            "Launch with recipes/accelerate/cpu.yaml, which trains with DDP"
        )
    if kind == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP1 cannot give back the deltas of tuned tensors: launch with --fsdp_version 2, or with "
            "recipes/accelerate/fsdp2.yaml"
        )
    if kind == "DeepSpeed" and int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) > 2:
        raise ConfigError(
            "ZeRO-3 cuts up the parameters that deltas are added to: launch with --zero_stage 2, or with "
            "recipes/accelerate/zero2.yaml"
        )


def check_sharding(method: str, folder: Any, *, paced: bool, driven: bool, clips: bool) -> None:
    """Refuse a method that does not work with sharded gradients.

    ``paced`` says whether the method has a schedule or a penalty, ``driven`` whether its schedule needs scores, and
    ``clips`` whether gradients are clipped; ``folder`` is that of the checkpoints.

    Raises:
        ConfigError: Names the method, and what to launch instead.
    """
    kind = sharding()
    if kind is None:
        return
    if folder is None:
        raise ConfigError(f"with {kind} the best epoch can only be found again in a whole checkpoint: give a folder")
    if driven:
        raise ConfigError(f"{method} scores whole gradients, and {kind} leaves none: launch with DDP (multi_gpu.yaml)")
    if paced and kind == "DeepSpeed":
        raise ConfigError(f"{method} paces torch's optimizers, not DeepSpeed's: launch with DDP (multi_gpu.yaml)")
    if paced and clips:
        raise ConfigError(
            f"with {kind} what {method} has frozen would count in max_grad_norm: use 0, or launch with DDP"
        )
