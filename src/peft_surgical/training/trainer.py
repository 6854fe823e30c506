"""`transformers.Trainer` for image classifiers of any origin."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..choosing.models import forward_loss, logits_of
from ..errors import ConfigError
from ..files import write_atomically


class ClassifierTrainer(Trainer):
    """Trainer for any image classifier: also those that return bare logits.

    Args:
        *args: As for Trainer.
        optimizer_of: Makes the optimizer. Unlike one that is handed over ready made, FSDP can do with it.
        **kwargs: As for Trainer.
    """

    def __init__(
        self, *args: Any, optimizer_of: Callable[[], torch.optim.Optimizer] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer_of = optimizer_of
        # The loss below is the mean over one batch, also of a network whose forward takes any keyword: Trainer is to
        # divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model=None):  # type: ignore[no-untyped-def]
        """See Trainer."""
        if self.optimizer is None and self.optimizer_of is not None:
            self.optimizer = self.optimizer_of()
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See Trainer, which lets the first process save alone: with FSDP the others must give their shards."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self.model.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.args.should_save)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """The model's own loss, or cross entropy; mean over the batch."""
        outputs: list[Any] = []

        def keep(given: Any, labels: Any) -> torch.Tensor:
            outputs.append(given)
            own = getattr(given, "loss", None)
            return own if own is not None else F.cross_entropy(logits_of(given).float(), labels)

        loss = forward_loss(model, inputs, keep)
        return (loss, {"logits": logits_of(outputs[0])}) if return_outputs else loss


class StopAt(TrainerCallback):
    """Stops after so many epochs of the run, at whose end Trainer evaluates and saves."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """See TrainerCallback."""
        control.should_training_stop = round(state.epoch) >= self.epoch


# --- Which checkpoint of a run to go on from: the last that every process has written in full. ---


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


# --- Looking at runs while they go on: the progress of an experiment, and the end of a run that diverged. ---


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


# --- What the processes of one run must agree on: how they were launched, statistics that move by themselves, the outcome. ---


_T = TypeVar("_T")


def told(value: _T) -> _T:
    """What the first process has; all must ask."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def wait() -> None:
    """Go on when all processes have come here."""
    if _several():
        torch.distributed.barrier()


class SameStatistics(TrainerCallback):
    """Gives all processes the buffers of the first at the end of each epoch, before they are evaluated and saved.

    With a norm policy that moves statistics each process has seen other images. DDP hands the first one's on at the
    next training step only, FSDP never: a process would evaluate a network that is not the one that is saved.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        _broadcast(kwargs["model"].buffers())


@torch.no_grad()
def settle(model: nn.Module, trained: nn.Module, names: Iterable[str]) -> None:
    """Give ``model`` what the first process has trained, in all processes, bit for bit.

    Args:
        model: Whole; may be ``trained`` itself.
        trained: Whole or sharded by FSDP2.
        names: Parameters that were trained.
    """
    if not _several():
        return
    goals, values = dict(model.named_parameters()), dict(trained.named_parameters())
    for name in names:
        value = values[name].detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        _broadcast([value])
        goals[name].data.copy_(value)
    _broadcast(trained.buffers())
    for goal, moved in zip(model.buffers(), trained.buffers(), strict=True):
        goal.copy_(moved)


def _broadcast(tensors: Iterable[torch.Tensor]) -> None:
    if _several():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def _several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
