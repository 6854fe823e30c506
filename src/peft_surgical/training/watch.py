"""Looking at runs while they go on: the progress of an experiment, and the end of a run that diverged."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from ..experiment.requests import Request

SELECTED_BY = "selected_by"
"""What Trainer logs the metric as that chooses the epoch; ``accuracy`` is logged beside it."""


class Watch:
    """What an experiment reports its progress to; this one does nothing with it."""

    def planned(self, requests: Sequence[Request], epochs: int) -> None:
        """These are about to be done; a full run takes so many epochs."""

    def begun(self, request: Request, done: float, epochs: int) -> None:
        """A run starts, from an earlier checkpoint where ``done`` epochs are not 0."""

    def step(self, request: Request, done: float, epochs: int) -> None:
        """A run has taken a step; ``done`` epochs of it are over."""

    def epoch(self, request: Request, done: int, epochs: int, measured: Mapping[str, float]) -> None:
        """An epoch is over, and gave this on the validation images: ``validation``, a fraction, and ``loss``."""

    def finished(self, request: Request, result: Mapping[str, Any], known: bool) -> None:
        """A request is done, or its result was found in the ledger."""

    def failed(self, row: str, error: Exception) -> None:
        """A row of a comparison cannot be done; the others go on."""


class DivergedError(Exception):
    """A run holds NaN: caught where other candidates go on.

    Args:
        steps: Optimizer steps that it took.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(f"NaN after {steps} steps")
        self.steps = steps


class Epochs(TrainerCallback):
    """Reports a run's steps and epochs, and ends one that holds NaN.

    Args:
        watch: Receives them.
        request: The run.
    """

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
    """Where TensorBoard's files of a run go, unless the user has said so in the environment.

    Trainer would put them beside the run's checkpoints, which are forgotten once it is over.
    """
    variable = "TENSORBOARD_LOGGING_DIR"
    if folder is None or variable in os.environ:
        yield
        return
    os.environ[variable] = str(folder)
    try:
        yield
    finally:
        del os.environ[variable]


def file_name(text: str) -> str:
    """A text as a file's name: a target may hold colons, stars, slashes and spaces."""
    return re.sub(r"[^\w.+-]+", "_", text)
