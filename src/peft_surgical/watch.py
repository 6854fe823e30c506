"""Looking at runs while they go on: what an experiment tells of its progress, and the end of a run that diverged."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class Watch:
    """What an experiment tells while it runs; this one listens to nothing."""

    def planned(self, runs: int) -> None:
        """So many more runs are to come, or are found in the ledger."""

    def epoch(self, key: Mapping[str, Any], done: float, epochs: int) -> None:
        """A run goes on."""

    def finished(self, key: Mapping[str, Any], result: Mapping[str, Any], known: bool) -> None:
        """A run is done, or was known from the ledger."""


class DivergedError(Exception):
    """A run holds NaN: caught where other candidates go on.

    Args:
        steps: Optimizer steps that it took.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(f"NaN after {steps} steps")
        self.steps = steps


class Epochs(TrainerCallback):
    """Tells of each epoch, before it is evaluated, and ends a run that holds NaN.

    Args:
        tell: Called with the epochs that are done and those of the whole run.
    """

    def __init__(self, tell: Callable[[float, int], None]) -> None:
        self.tell = tell

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        trained = [parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad]
        if not all(bool(parameter.isfinite().all()) for parameter in trained):
            raise DivergedError(state.global_step)
        self.tell(state.epoch, int(args.num_train_epochs))


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
