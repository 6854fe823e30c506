"""`transformers.Trainer` for image classifiers of any origin, and its callbacks.

Trainer writes a checkpoint file by file, and of several processes each writes its own part. A run that is killed in
between leaves a folder that looks finished to some of them. So the first process puts a mark into a checkpoint when all
processes have written theirs, and a checkpoint without the mark is not resumed from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from accelerate import PartialState

from ..choosing.models import forward_loss, logits_of
from ..errors import ConfigError
from ..folders import write_atomically
from ..keys import PRIVATE

if TYPE_CHECKING:
    from ..prefix.cached import CachedPrefix

SELECTED_BY = "selected_by"
"""Name of the logged metric that chooses the epoch; ``accuracy`` is logged beside it."""
MARK = "complete.json"
"""File in a checkpoint's folder that says that the checkpoint is complete."""
KEPT = 2
"""Number of checkpoints that are kept: the last and the best."""


class ClassifierTrainer(Trainer):
    """Trainer for any image classifier, also for those that return bare logits; all parameters get weight decay."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss below is the mean over one batch, also for a network whose forward takes any keyword: Trainer has to
        # divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See Trainer, which leaves out biases and norms."""
        return [name for name, _ in model.named_parameters()]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:  # what torch says of a full disk names neither the disk nor the file
            if not re.search("inline_container|PytorchStreamWriter", str(error)):
                raise
            raise ConfigError(
                f"no checkpoint can be written to {self.args.output_dir}: free space on the disk, and start it again"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See Trainer, which saves in the first process alone: with FSDP all of them have to give their shards."""
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


class OneDevice(TrainingArguments):
    """One process uses one device: where it sees several GPUs, Trainer would spread its batches over them."""

    @property
    def n_gpu(self) -> int:
        """See TrainingArguments."""
        return min(super().n_gpu, 1)


def evaluated(predicted: Any, metric: Callable[[Tensor, Tensor], float] | None = None) -> dict[str, float]:
    """The metrics that Trainer logs; its own loss would count the images that pad the last batch twice."""
    given = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    logits, labels = torch.from_numpy(given), torch.from_numpy(predicted.label_ids)
    # NaN counts as wrong, so that an epoch or a candidate that diverged loses to the others.
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    accuracy = int(right.sum()) / len(labels)
    selected = accuracy if metric is None else metric(logits, labels)
    return {"accuracy": accuracy, SELECTED_BY: selected, "loss": F.cross_entropy(logits.double(), labels).item()}


class StopAt(TrainerCallback):
    """Stops after so many epochs of the run; Trainer evaluates and saves at their end."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """See TrainerCallback."""
        control.should_training_stop = round(state.epoch) >= self.epoch


class ViewOfEpoch(TrainerCallback):
    """Tells a cached prefix which of several fixed views of the images an epoch uses."""

    def __init__(self, cached: CachedPrefix) -> None:
        self.cached = cached

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.cached.set_epoch(round(state.epoch or 0))


class Mark(TrainerCallback):
    """Marks each checkpoint when all processes have written theirs, and only then deletes older ones.

    Trainer would delete first: a run that is killed there would have neither the old nor the new one. It would also not
    find the best checkpoint of a folder that was moved.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        if state.is_world_process_zero:  # from now on, checkpoints in this folder are ours to remove
            Path(args.output_dir, PRIVATE).mkdir(parents=True, exist_ok=True)
        if state.best_global_step:  # Trainer keeps the path, and ignores one that does not exist
            state.best_model_checkpoint = str(_place(args.output_dir, state.best_global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            place = _place(args.output_dir, state.global_step)
            write_atomically(place / MARK, json.dumps({"processes": args.world_size}))
            rotate_checkpoints(args.output_dir, KEPT, state.best_model_checkpoint)


def last_checkpoint(folder: str | Path, processes: int) -> tuple[str | None, int]:
    """The last complete checkpoint in the folder of one run and its number of epochs; None and 0 if there is none.

    Raises:
        ConfigError: The checkpoint was written by another number of processes than there are now, or by something else.
    """
    found = {path: path.name.rpartition("-")[2] for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    numbered = [path for path, number in found.items() if number.isascii() and number.isdigit()]
    if numbered and not Path(folder, PRIVATE).is_dir():
        raise ConfigError(
            f"{folder} holds checkpoints of something else, and a run would remove older ones: name another folder"
        )
    for place in sorted(numbered, key=lambda path: int(found[path]), reverse=True):
        try:
            state = json.loads((place / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            wrote = json.loads((place / MARK).read_text(encoding="utf-8"))["processes"]
            epochs = round(state["epoch"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # the run was killed while it was written
            continue
        if wrote != processes:
            raise ConfigError(
                f"{place} was written by {wrote} process(es) and cannot be continued by {processes}, whose steps "
                f"are others: launch {wrote}, or delete {folder} to start again"
            )
        return str(place), epochs
    return None, 0


def forget_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints that `fitting.fit` keeps in a folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _place(folder: str, step: int) -> Path:
    return Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")


class SameStatistics(TrainerCallback):
    """Gives all processes the buffers of the first at the end of each epoch, before they are evaluated and saved.

    With a norm policy that updates statistics, each process has seen other images. DDP broadcasts the first one's only
    at the next training step, FSDP never: a process would evaluate a network that is not the one that is saved.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        broadcast(list(kwargs["model"].buffers()))


@torch.no_grad()
def settle(model: nn.Module, trained: nn.Module, names: Iterable[str]) -> None:
    """Copy the parameters ``names`` and the buffers of the first process's ``trained`` to ``model`` in all processes.

    ``trained`` may be sharded by FSDP2, or be ``model`` itself.
    """
    if PartialState().num_processes == 1:
        return
    goals, values = dict(model.named_parameters()), dict(trained.named_parameters())
    for name in names:
        value = values[name].detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        goals[name].data.copy_(broadcast(value))
    for goal, moved in zip(model.buffers(), broadcast(list(trained.buffers())), strict=True):
        goal.copy_(moved)
