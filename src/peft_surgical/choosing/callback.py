"""`SurgicalCallback`: schedules and penalties in `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..blocks import Anatomy
from ..errors import ConfigError
from .methods import Schedule
from .models import LossFunction
from .pace import Pace
from .penalties import Penalty, SelectiveDecay

RECORD = "surgical_factors"
"""Key of the entries of ``trainer.state.log_history`` that hold the factors of an epoch."""


class SurgicalCallback(TrainerCallback):
    """Runs a schedule and a penalty in Trainer, with its schedulers, accumulation, mixed precision and resuming.

    ::

        Trainer(..., callbacks=[SurgicalCallback(AutoRGN())])

    The factors of every epoch are entries of ``trainer.state.log_history``, which Trainer saves in each checkpoint: a
    run that resumes in the middle of an epoch continues with the factors that this epoch began with.

    Args:
        schedule: See `methods`.
        penalty: See `methods`.
        reset_moments: As for `Pace`.
        num_batches: Batches to score on per process and epoch.
        scoring_data: A loader for the scores. By default they are taken on training images, drawn anew for each epoch
            with Trainer's seed, without touching the training loader.
        blocks: A block specification, as for `anatomy_of`.
        loss_fn: As for `score_blocks`; Trainer's own ``compute_loss`` is not used.

    Attributes:
        pace: The running `Pace`, from the beginning of training on.
    """

    pace: Pace

    def __init__(
        self,
        schedule: Schedule | None = None,
        penalty: Penalty | SelectiveDecay | None = None,
        *,
        reset_moments: bool = False,
        num_batches: int = 5,
        scoring_data: Iterable[Any] | None = None,
        blocks: Mapping[str, str | Sequence[str]] | Anatomy | None = None,
        loss_fn: LossFunction | None = None,
    ) -> None:
        self.schedule, self.penalty = schedule, penalty
        self.reset_moments, self.num_batches = reset_moments, num_batches
        self.scoring_data, self.blocks, self.loss_fn = scoring_data, blocks, loss_fn

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer, with the factors of a resumed run."""
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.pace = Pace(
            kwargs["model"],
            kwargs["optimizer"],
            self.schedule,
            self.penalty,
            total_steps=state.max_steps,
            reset_moments=self.reset_moments,
            num_batches=self.num_batches,
            blocks=self.blocks,
            loss_fn=self.loss_fn,
            autocast=precision,
        )
        record = {entry["epoch"]: entry[RECORD] for entry in state.log_history if RECORD in entry}
        epoch = _epoch(state)
        begun = epoch if (state.epoch or 0.0) - epoch > 1e-6 else None  # resumed in the middle
        self.pace.load_state_dict({"step": state.global_step, "epoch": epoch, "begun": begun, "record": record})

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take new scores if the schedule needs them."""
        epoch = _epoch(state)
        known = epoch in self.pace.record
        needs_data = self.schedule is not None and self.schedule.criterion is not None
        data = self.scoring_data
        if needs_data and not known and data is None:
            data = scoring_loader(kwargs["train_dataloader"], args.train_batch_size, self.num_batches, args.seed, epoch)
        self.pace.start_epoch(epoch, data)
        if epoch in self.pace.record and not known:
            state.log_history.append({"epoch": epoch, "step": state.global_step, RECORD: self.pace.record[epoch]})

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Use Trainer's count, which includes steps that a gradient scaler skips."""
        self.pace.step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Detach from the optimizer."""
        self.pace.close()


def scoring_loader(
    dataloader: DataLoader[Any], batch_size: int, num_batches: int, seed: int, epoch: int
) -> DataLoader[Any]:
    """``num_batches`` batches of a loader's dataset, drawn by seed and epoch, different ones in each process.

    Raises:
        ConfigError: The data is a stream, which cannot be drawn from.
    """
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError("the training data is a stream: pass SurgicalCallback(scoring_data=loader) for the scores")
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()
    own = order[rank::world][: batch_size * num_batches]
    return DataLoader(Subset(dataset, own), batch_size, collate_fn=dataloader.collate_fn)


def _epoch(state: TrainerState) -> int:
    # Fractional where a checkpoint was taken in the middle; full epochs may be off by rounding.
    return int((state.epoch or 0.0) + 1e-6)
