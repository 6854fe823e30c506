"""One run of one method: `fit` trains with `transformers.Trainer` and returns the model at its best epoch.

Trainer is the loop; this module only says what a run of this project is, once, for the command line, the searches and
the recipes: the optimizer's parameters, the choice of the epoch by validation accuracy, what a run costs, and how one
is stopped and continued.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from .callback import SurgicalCallback
from .config import SurgicalConfig
from .errors import ConfigError
from .gradients import forward_loss, logits_of
from .methods import Method, method_of
from .tensors import anatomy_under

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **how: torch.optim.SGD(parameters, momentum=0.9, **how),
}
FORWARD_SHARE = 1 / 3
"""Cost of a forward pass as a share of a training step, which runs forward once and backward twice its work."""


@dataclass(frozen=True)
class FitSettings:
    """How a run is trained, whatever its method.

    Attributes:
        lr: Learning rate.
        epochs: Length of the run, in passes over the tuning images.
        batch_size: Per process.
        optimizer: ``adam`` (the paper's for CIFAR-10-C), ``adamw`` or ``sgd`` (momentum 0.9).
        weight_decay: Acts on the deltas, so it pulls towards the pretrained weights; see `penalties` for the paper's.
        lr_scheduler: A name that Trainer knows: ``constant``, ``cosine``, ...
        seed: Of the order of the images, of new heads, and of dropout.
        precision: None, ``bf16`` or ``fp16``.
        max_grad_norm: 0 for no clipping, as in the paper.
        accumulation: Batches per optimizer step.
        use_cpu: Leave an accelerator alone.
    """

    lr: float
    epochs: int = 15
    batch_size: int = 64
    optimizer: str = "adam"
    weight_decay: float = 1e-4
    lr_scheduler: str = "constant"
    seed: int = 0
    precision: str | None = None
    max_grad_norm: float = 0.0
    accumulation: int = 1
    use_cpu: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer={self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.precision not in (None, "bf16", "fp16"):
            raise ConfigError(f"precision={self.precision!r}: choose None, 'bf16' or 'fp16'")
        if not self.lr > 0 or min(self.epochs, self.batch_size, self.accumulation) < 1:
            raise ConfigError(
                f"lr={self.lr}, epochs={self.epochs}, batch_size={self.batch_size}, accumulation={self.accumulation}: "
                "all must be positive"
            )


@dataclass(frozen=True)
class Fitted:
    """What a run gave.

    Attributes:
        model: The PeftModel at its best epoch.
        curve: Validation accuracy, a fraction, at the end of each epoch.
        losses: Validation loss at the same points; the largest float where it is not finite.
        best_epoch: The epoch, from 1, whose model this is: of equal accuracies the first.
        cost: In training steps of this batch size, counted from the beginning of the run: optimizer steps x batches
            per step, batches that were scored, and forward passes over the validation images as a third each.
        record: Epoch -> factor of each tensor's rate, of schedules that data drives.
    """

    model: nn.Module
    curve: tuple[float, ...]
    losses: tuple[float, ...]
    best_epoch: int
    cost: float
    record: Mapping[int, Mapping[str, float]] = field(repr=False)

    @property
    def validation(self) -> float:
        """Accuracy at the best point."""
        return max(self.curve)


class ClassifierTrainer(Trainer):
    """Trainer for any image classifier: also those that return bare logits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss below is the mean over one batch, also of a network whose forward takes any keyword: Trainer is to
        # divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """The model's own loss, or cross entropy; mean over the batch."""
        outputs: list[Any] = []

        def keep(given: Any, labels: Any) -> torch.Tensor:
            outputs.append(given)
            own = getattr(given, "loss", None)
            return own if own is not None else F.cross_entropy(logits_of(given).float(), labels)

        loss = forward_loss(model, inputs, keep)
        return (loss, {"logits": logits_of(outputs[0])}) if return_outputs else loss


class _StopAt(TrainerCallback):
    """Stops after so many epochs of the run, at whose end Trainer evaluates and saves."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """See TrainerCallback."""
        control.should_training_stop = round(state.epoch) >= self.epoch


def fit(
    network: nn.Module,
    method: Method | str,
    tuning: Dataset[Any],
    validation: Dataset[Any],
    settings: FitSettings,
    *,
    options: dict[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    stop_epoch: int | None = None,
    collate: Callable[[Any], Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
) -> Fitted:
    """Train one adapter and choose its epoch by validation accuracy.

    Args:
        network: A fresh base; it is changed.
        method: A row of `methods.METHODS`, or a target such as ``block1``.
        tuning: Map-style, of dicts with ``pixel_values`` (and what else the network's forward names) and ``labels``.
        validation: The same; chooses the epoch.
        settings: How to train.
        options: The method's own settings, such as ``{"threshold": 0.2}``.
        config: Further fields of the `SurgicalConfig`: ``norm_stats``, ``delta_dtype``, ``blocks``, ...
        folder: Where checkpoints lie; a run that was stopped or killed goes on from there, and ends as if it had not
            been. Without one the run leaves nothing behind.
        stop_epoch: Stop after so many epochs of the run, so that it can go on later. Needs a folder.
        collate: Makes a batch of rows; by default Trainer's own.
        callbacks: Further ones.
        progress: Show Trainer's progress bar.

    Raises:
        ConfigError: Unknown method, option or setting, ``stop_epoch`` without a folder, or with one that holds more
            epochs than that.
    """
    row = method_of(method) if isinstance(method, str) else method
    if stop_epoch is not None and folder is None:
        raise ConfigError("stop_epoch needs a folder: a stopped run goes on from its checkpoint")
    given = row.settings(options)
    torch.manual_seed(settings.seed)  # a new head must not depend on what ran before
    model = get_peft_model(network, SurgicalConfig(target=row.target, **dict(config or {})))
    anatomy = anatomy_under(model)
    if row.balanced:
        tuning = balanced(tuning, settings.seed)
    surgical = SurgicalCallback(
        row.schedule(anatomy, given) if row.schedule else None,
        row.penalty(given) if row.penalty else None,
        reset_moments=row.reset_moments,
        blocks=anatomy,
    )
    last, done = (None, 0) if folder is None else _last_checkpoint(Path(folder))
    if stop_epoch is not None and done > stop_epoch:
        raise ConfigError(
            f"{folder} holds {done} epochs of a run that is to stop after {stop_epoch}: name another folder, or call "
            "forget_checkpoints(folder) to start again"
        )
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        arguments = TrainingArguments(
            output_dir=place,
            # Trainer always begins the next epoch of a run that has one; what is finished is only to be read.
            num_train_epochs=settings.epochs if stop_epoch is None or done < stop_epoch else done,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=500,
            gradient_accumulation_steps=settings.accumulation,
            lr_scheduler_type=settings.lr_scheduler,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            eval_strategy="epoch",
            save_strategy="best" if folder is None else "epoch",
            save_only_model=folder is None,
            save_total_limit=1 if folder is None else 2,  # of 1, Trainer would keep the best and not the last
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=settings.seed,
            report_to="none",
            logging_strategy="no",
            log_level="error",
            disable_tqdm=not progress,
            use_cpu=settings.use_cpu,
        )
        # Handed over ready made: Trainer's own parameter groups would spare biases and norms from weight decay.
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        make = OPTIMIZERS[row.optimizer or settings.optimizer]
        optimizer = make(trainable, lr=settings.lr, weight_decay=settings.weight_decay)
        trainer = ClassifierTrainer(
            model=model,
            args=arguments,
            train_dataset=tuning,
            eval_dataset=validation,
            data_collator=collate,
            compute_metrics=_metrics,
            optimizers=(optimizer, None),
            callbacks=[surgical, *([] if stop_epoch is None else [_StopAt(stop_epoch)]), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last)
    points = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    curve = tuple(point["eval_accuracy"] for point in points)
    batches = -(-len(tuning) // settings.batch_size)  # type: ignore[arg-type]
    scored = len(surgical.pace.record) * min(surgical.num_batches, batches)
    forwards = len(points) * len(validation) / settings.batch_size  # type: ignore[arg-type]
    return Fitted(
        model=model,
        curve=curve,
        losses=tuple(_finite(point["eval_loss"]) for point in points),
        best_epoch=1 + curve.index(max(curve)),
        cost=trainer.state.global_step * settings.accumulation + scored + FORWARD_SHARE * forwards,
        record=surgical.pace.record,
    )


def _last_checkpoint(folder: Path) -> tuple[str | None, int]:
    """The last whole checkpoint, of which Trainer writes the state at the very end, and its number of epochs."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    for step in sorted(found, reverse=True):
        try:
            state = json.loads((found[step] / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):  # killed while it was written
            continue
        return str(found[step]), round(state["epoch"])
    return None, 0


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else sys.float_info.max


def forget_checkpoints(folder: str | Path) -> None:
    """Remove what `fit` keeps to go on from."""
    shutil.rmtree(folder, ignore_errors=True)


def balanced(dataset: Dataset[Any], seed: int) -> Dataset[Any]:
    """As many images of every class as the rarest has, drawn with a seed, in the order of the data."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        labels = [dataset[i]["labels"] for i in range(len(dataset))]  # type: ignore[arg-type]
    labels = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique()
    count = min(int((labels == c).sum()) for c in classes)
    rows = [torch.nonzero(labels == c).flatten() for c in classes]
    chosen = [found[torch.randperm(len(found), generator=generator)[:count]] for found in rows]
    return Subset(dataset, torch.cat(chosen).sort().values.tolist())


def _metrics(predicted: Any) -> dict[str, float]:
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    logits, labels = torch.from_numpy(logits), torch.from_numpy(predicted.label_ids)
    # NaN is wrong rather than an error: an epoch that diverged loses to those before it, and a candidate to the others.
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    return {"accuracy": int(right.sum()) / len(labels)}
