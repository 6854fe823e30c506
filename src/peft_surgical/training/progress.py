"""What is told of a run while it goes on: to whoever started it, and to a tracker such as TensorBoard or wandb."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .trainer import SELECTED_BY

if TYPE_CHECKING:
    from ..experiment.requests import Request


class Watch:
    """Receives the progress of an experiment; this one ignores it."""

    first = True  # whether this is the first of the processes that share the work

    def note(self, text: str) -> None:
        """What is about to be done, in lines; shown in the first process only."""

    def planned(self, requests: Sequence[Request], epochs: int) -> None:
        """These requests will be done; a full run takes ``epochs`` epochs."""

    def begun(self, request: Request, done: float, epochs: int) -> None:
        """A run starts, from a checkpoint after ``done`` epochs if that is not 0."""

    def step(self, request: Request, done: float, epochs: int) -> None:
        """A run has taken a step; ``done`` epochs of it are over."""

    def epoch(self, request: Request, done: int, epochs: int, measured: Mapping[str, float]) -> None:
        """An epoch is over; ``measured`` on the validation images are ``validation``, a fraction, and ``loss``."""

    def finished(self, request: Request, result: Mapping[str, Any], known: bool) -> None:
        """A request is done, or its result was found in the ledger."""

    def failed(self, row: str, error: Exception) -> None:
        """A row of a comparison has failed; the others go on."""


class DivergedError(Exception):
    """A run holds NaN after so many optimizer steps; a search catches this and goes on with its other candidates."""

    def __init__(self, steps: int) -> None:
        super().__init__(f"NaN after {steps} steps")
        self.steps = steps


class Epochs(TrainerCallback):
    """Reports a run's steps and epochs to a `Watch`, and ends the run if it holds NaN."""

    def __init__(self, watch: Watch, request: Request) -> None:
        self.watch, self.request = watch, request

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.watch.begun(self.request, state.epoch or 0.0, int(args.num_train_epochs))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.watch.step(self.request, state.epoch, int(args.num_train_epochs))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        trained = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        if not all(bool(parameter.isfinite().all()) for parameter in trained):
            raise DivergedError(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """See TrainerCallback."""
        measured = {"validation": metrics[f"eval_{SELECTED_BY}"], "loss": metrics["eval_loss"]}
        self.watch.epoch(self.request, round(state.epoch), int(args.num_train_epochs), measured)


@contextmanager
def logging_to(folder: Path | None) -> Iterator[None]:
    """Write a run's TensorBoard files into a folder, unless the environment names another, and end its run of wandb.

    Trainer would put the files beside the run's checkpoints, which are deleted when the run is over; and it would log
    all runs of a process to the first one's run of wandb.
    """
    variable = "TENSORBOARD_LOGGING_DIR"
    names, before = folder is not None and variable not in os.environ, _wandb_run()
    if names:
        os.environ[variable] = str(folder)
    try:
        yield
    finally:
        if names:
            del os.environ[variable]
        if before is None and (run := _wandb_run()) is not None:
            run.finish()


def _wandb_run() -> Any:
    """The run of wandb that is open, if that package is in use."""
    return getattr(sys.modules.get("wandb"), "run", None)
