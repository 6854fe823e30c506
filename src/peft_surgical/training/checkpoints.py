"""Which checkpoint of a run to go on from: the last that every process has written in full.

Trainer writes a checkpoint file by file, and of several processes each writes its own part. A run that is killed in
between leaves a folder that looks finished to some of them. So the first process puts a mark into a checkpoint once all
have left it, and what has no mark does not count.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from ..files import write_atomically
from .processes import wait

MARK = "complete.json"
"""Name of the mark in a checkpoint's folder."""
KEPT = 2
"""Checkpoints that are kept: the last to go on from, and the best."""


class Mark(TrainerCallback):
    """Marks each checkpoint when all processes have written theirs, and only then deletes older ones.

    Trainer would delete first: of a run that is killed there, neither the old one nor the new one would count. It would
    also not find the best one again in a folder that was moved.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        if state.best_global_step:  # Trainer keeps the path, and passes over one that is not there
            state.best_model_checkpoint = str(_place(args.output_dir, state.best_global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        wait()
        if state.is_world_process_zero:
            place = _place(args.output_dir, state.global_step)
            write_atomically(place / MARK, json.dumps({"processes": args.world_size}))
            found = _checkpoints(args.output_dir)
            older = [step for step in sorted(found) if step not in (state.global_step, state.best_global_step)]
            for step in older[: max(0, len(found) - KEPT)]:
                shutil.rmtree(found[step], ignore_errors=True)


def last_checkpoint(folder: str | Path, processes: int) -> tuple[str | None, int]:
    """The last whole checkpoint and its number of epochs; None and 0 where there is none.

    Args:
        folder: Where the checkpoints of one run lie.
        processes: How many there are now.

    Raises:
        ConfigError: The checkpoint is that of another number of processes.
    """
    found = _checkpoints(folder)
    for step in sorted(found, reverse=True):
        try:
            state = json.loads((found[step] / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            wrote = json.loads((found[step] / MARK).read_text(encoding="utf-8"))["processes"]
        except (OSError, ValueError):  # killed while it was written
            continue
        if wrote != processes:
            raise ConfigError(
                f"{found[step]} was written by {wrote} process(es) and cannot be continued by {processes}, whose steps "
                f"are others: launch {wrote}, or delete {folder} to start again"
            )
        return str(found[step]), round(state["epoch"])
    return None, 0


def log_of(checkpoint: str | Path) -> list[dict[str, Any]]:
    """What Trainer has logged up to a checkpoint: ``log_history`` of its state."""
    state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return list(state["log_history"])


def drop_scratch(folder: str | Path) -> None:
    """Remove what a killed process left of an adapter that it was just writing."""
    for path in Path(folder).glob(f".{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


def forget_checkpoints(folder: str | Path) -> None:
    """Remove what `fitting.fit` keeps to go on from."""
    shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(folder: str | Path) -> dict[int, Path]:
    return {int(path.name.rpartition("-")[2]): path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}


def _place(folder: str, step: int) -> Path:
    return Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
