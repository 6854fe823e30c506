"""One run of one method: `fit` trains with `transformers.Trainer` and returns the model at its best epoch.

Trainer is the loop. This module decides what a run is, for the command line, the searches and the recipes: the
optimizer's parameters, the choice of the epoch by validation accuracy, the cost of a run, and how it is stopped and
continued.
"""

from __future__ import annotations

import copy
import functools
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..choosing.callback import RECORD, SurgicalCallback
from ..choosing.methods import Method, method_of
from ..choosing.models import anatomy_under
from ..config import SurgicalConfig
from ..errors import ConfigError
from ..extras import LARGEST_SEED, accelerator_or_cpu, check_range
from .averaging import MeanOfLastEpochs
from .engines import check_launch, check_sharding
from .statistics import estimate_statistics, mixed_batches
from .trainer import SELECTED_BY, ClassifierTrainer, Mark, SameStatistics, StopAt, last_checkpoint, settle
from .trainer import forget_checkpoints as forget_checkpoints

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}
"""Name of an optimizer -> its class and arguments."""
FORWARD_SHARE = 1 / 3
"""Cost of a forward pass as a share of a training step, whose backward pass is twice the work."""


@dataclass(frozen=True)
class FitSettings:
    """How a run is trained, whatever its method.

    Attributes:
        lr: Learning rate.
        epochs: Length of the run, in passes over the tuning images.
        batch_size: Images per batch and process.
        optimizer: ``adam`` (the paper's for CIFAR-10-C), ``adamw`` or ``sgd`` (momentum 0.9).
        weight_decay: Acts on the deltas, so it pulls towards the pretrained weights; `Penalty` offers the paper's.
        lr_scheduler: A name that Trainer knows: ``constant``, ``cosine``, ...
        seed: Determines the order of the images, a new head's weights, and dropout.
        precision: None (float32), ``bf16`` or ``fp16``.
        max_grad_norm: 0 for no clipping, as in the paper.
        accumulation: Batches per optimizer step.
        use_cpu: Whether to train on the CPU where there is an accelerator.
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
            raise ConfigError(f"precision={self.precision!r}: choose bf16 or fp16, or leave it out for float32")
        if not 0 < self.lr < math.inf or min(self.epochs, self.batch_size, self.accumulation) < 1:
            raise ConfigError(
                f"lr={self.lr}, epochs={self.epochs}, batch_size={self.batch_size}, accumulation={self.accumulation}: "
                "all must be positive and finite"
            )
        check_range("weight_decay", self.weight_decay, 0, sys.float_info.max)
        check_range("seed", self.seed, 0, LARGEST_SEED)


@dataclass(frozen=True)
class Fitted:
    """The result of a run.

    Attributes:
        model: The PeftModel at its best epoch. None where ``stop_epoch`` is before the last checkpoint: the metrics of
            the epochs up to it are known from there, their weights are not.
        curve: At the end of each epoch, the validation accuracy (or the ``metric`` given to `fit`), a fraction.
        losses: Cross entropy of the validation images at the same points; the largest float where it is not finite.
        best_epoch: The epoch, from 1, of the model: the first of those with the best value.
        cost: Training steps of this batch size on one process since the beginning of the run: optimizer steps x batches
            per step, batches that were scored, and forward passes over the validation images as a third each.
        record: Epoch -> factor of each tensor's rate, for schedules that need scores.
        averaged: Where the model has the mean of the last epochs' weights: its own value of what ``curve`` holds.
        logits: The same model's logits (n, classes) on the validation images.
    """

    model: nn.Module | None
    curve: tuple[float, ...]
    losses: tuple[float, ...]
    best_epoch: int
    cost: float
    record: Mapping[int, Mapping[str, float]] = field(repr=False)
    averaged: float | None = None
    logits: Tensor | None = field(default=None, repr=False)

    @property
    def validation(self) -> float:
        """The model's own value: the best of the curve, or that of averaged weights."""
        return max(self.curve) if self.averaged is None else self.averaged


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
    average: bool = False,
    collate: Callable[[Any], Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    metric: Callable[[Tensor, Tensor], float] | None = None,
    arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Fitted:
    """Train one adapter and choose its epoch by validation accuracy, or by another metric.

    Under `accelerate launch` (docs/accelerate.md) all processes train it and return the same model, bit for bit.

    Args:
        network: The base, which is changed.
        method: A row of `methods.METHODS`, or a target such as ``block1``.
        tuning: Map-style dataset of dicts with ``pixel_values`` (and other arguments of the forward) and ``labels``.
        validation: The same; chooses the epoch.
        settings: How to train.
        options: The method's own settings, such as ``{"threshold": 0.2}``.
        config: Further fields of the `SurgicalConfig`: ``norm_stats``, ``delta_dtype``, ``blocks``, ...
        folder: For checkpoints, the same in all processes; a run that was stopped or killed continues from there and
            ends as if it had not been. By default a temporary folder.
        stop_epoch: Stop after this epoch of the run, which can be continued later; needs a folder. If the folder holds
            more epochs already, nothing is trained, and the metrics up to this epoch are read from it.
        average: Take the mean of the weights at the ends of the last half of all epochs instead of choosing an epoch by
            the validation images, see `averaging`. Not with ``stop_epoch``.
        collate: Makes a batch of rows; by default Trainer's own.
        callbacks: Further callbacks of Trainer.
        metric: Logits (n, classes), which may hold NaN, and labels (n,) of the validation images, in their order ->
            the value that chooses the epoch, the larger the better. None is accuracy.
        arguments: Further fields of `TrainingArguments` that do not change the outcome of a run: ``report_to``,
            ``dataloader_num_workers``, ``logging_strategy``, ...
        progress: Show Trainer's progress bar.

    Raises:
        ConfigError: Unknown method, option or setting, ``stop_epoch`` without a folder; a launch or a checkpoint that
            does not fit this run.
    """
    row = method_of(method) if isinstance(method, str) else method
    if stop_epoch is not None and folder is None:
        raise ConfigError("stop_epoch needs a folder: a stopped run goes on from its checkpoint")
    if row.solved:
        raise ConfigError(f"{row.name} is not trained: call peft_surgical.training.logistic.solve_head")
    if average and stop_epoch is not None:
        raise ConfigError("average=True takes the mean over the end of a run, and stop_epoch= leaves that out")
    given = row.settings(options)
    torch.manual_seed(settings.seed)  # a new head must not depend on what ran before
    model = get_peft_model(network, SurgicalConfig(target=row.target, **dict(config or {})))
    anatomy = anatomy_under(model)
    if row.balanced:
        tuning = balanced(tuning, settings.seed)
    if model.active_peft_config.norm_stats == "estimated":
        model.to(accelerator_or_cpu(settings.use_cpu))
        estimate_statistics(model, mixed_batches(tuning, collate or default_data_collator))
    mean = MeanOfLastEpochs(settings.epochs)
    surgical = SurgicalCallback(
        row.schedule(anatomy, given) if row.schedule else None,
        row.penalty(given) if row.penalty else None,
        reset_moments=row.reset_moments,
        blocks=anatomy,
    )
    paced = bool(surgical.schedule or surgical.penalty or surgical.reset_moments)
    driven = surgical.schedule is not None and surgical.schedule.criterion is not None
    check_sharding(row.name, folder, paced=paced, driven=driven, clips=settings.max_grad_norm > 0)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        decided: dict[str, Any] = {
            "output_dir": place,
            "num_train_epochs": settings.epochs,
            "per_device_train_batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "lr_scheduler_type": settings.lr_scheduler,
            "max_grad_norm": settings.max_grad_norm,
            "bf16": settings.precision == "bf16",
            "fp16": settings.precision == "fp16",
            "eval_strategy": "epoch",
            "save_strategy": ("no" if average else "best") if folder is None else "epoch",
            "save_only_model": folder is None,
            "save_total_limit": 1 if folder is None else None,  # with a folder, `Mark` deletes
            "load_best_model_at_end": not average,
            "metric_for_best_model": SELECTED_BY,
            "greater_is_better": True,
            "label_names": ["labels"],
            "remove_unused_columns": False,
            "weight_decay": settings.weight_decay,
            "seed": settings.seed,
            "use_cpu": settings.use_cpu,
        }
        if clash := sorted(set(decided) & set(arguments or {})):
            raise ConfigError(f"arguments={clash}: what a run is, `fit` and FitSettings say; leave these out")
        usual = {"report_to": "none", "logging_strategy": "no", "log_level": "error", "dataloader_pin_memory": False}
        usual |= {"per_device_eval_batch_size": 500, "disable_tqdm": not progress}
        trainer_arguments = _OneDevice(**decided, **{**usual, **(arguments or {})})
        check_launch(trainer_arguments, settings.precision)
        world = trainer_arguments.world_size
        # Accelerate pads the batches of all processes to full ones, however few images there are.
        share = -(-len(validation) // world)  # type: ignore[arg-type]
        trainer_arguments.per_device_eval_batch_size = min(trainer_arguments.per_device_eval_batch_size, share)
        ((last, done),) = broadcast_object_list([(None, 0) if folder is None else last_checkpoint(folder, world)])
        batches = -(-len(tuning) // (settings.batch_size * world))  # type: ignore[arg-type]

        def outcome(trained: nn.Module | None, history: Sequence[Mapping[str, Any]], epochs: int | None) -> Fitted:
            points = [entry for entry in history if f"eval_{SELECTED_BY}" in entry][:epochs]
            record = {one["epoch"]: one[RECORD] for one in history if RECORD in one and one["epoch"] < len(points)}
            curve, losses = (tuple(point[f"eval_{name}"] for point in points) for name in (SELECTED_BY, "loss"))
            scored = len(record) * min(surgical.num_batches, batches) * world
            forwards = len(points) * len(validation) / settings.batch_size  # type: ignore[arg-type]
            return Fitted(
                model=trained,
                curve=curve,
                losses=tuple(loss if math.isfinite(loss) else sys.float_info.max for loss in losses),
                best_epoch=1 + curve.index(max(curve)),
                cost=points[-1]["step"] * settings.accumulation * world + scored + FORWARD_SHARE * forwards,
                record=record,
            )

        if last is not None and stop_epoch is not None and done > stop_epoch:
            state = TrainerState.load_from_json(str(Path(last, TRAINER_STATE_NAME)))
            return outcome(None, broadcast_object_list([state.log_history])[0], stop_epoch)
        if stop_epoch is not None and done == stop_epoch:
            trainer_arguments.num_train_epochs = done  # or else Trainer would begin the next epoch
        if folder is not None and trainer_arguments.should_save:
            for scratch in Path(folder).glob(f".{PREFIX_CHECKPOINT_DIR}-*"):  # left by a killed process
                shutil.rmtree(scratch, ignore_errors=True)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        optimizer, how = OPTIMIZERS[row.optimizer or settings.optimizer]
        trainer = ClassifierTrainer(
            model=model,
            args=trainer_arguments,
            train_dataset=tuning,
            eval_dataset=validation,
            data_collator=collate,
            compute_metrics=functools.partial(_evaluated, metric=metric),
            optimizer_cls_and_kwargs=(optimizer, {"lr": settings.lr, **how}),
            callbacks=[
                *([surgical] if paced else []),  # which DeepSpeed's optimizers do not work with
                *([] if stop_epoch is None else [StopAt(stop_epoch)]),
                *([mean] if average else []),
                *([] if folder is None else [Mark()]),
                SameStatistics(),
                *callbacks,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        if average and trainer.is_fsdp_enabled:
            raise ConfigError("average=True reads whole weights, which FSDP shards: launch with DDP, or without it")
        whole = copy.deepcopy(model) if trainer.is_fsdp_enabled else model
        trainer.train(resume_from_checkpoint=last)
        if average:
            mean.put(trainer.model)
            predicted = trainer.predict(validation, metric_key_prefix="mean")
        settle(whole, trainer.model, names)
        # With mixed precision, Accelerate has replaced the forward by one that casts.
        trained = extract_model_from_parallel(whole, keep_fp32_wrapper=False)
        found = outcome(trained, trainer.state.log_history, None)
        if not average:
            return found
        logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        value = predicted.metrics[f"mean_{SELECTED_BY}"]
        return replace(found, averaged=value, logits=torch.from_numpy(logits), best_epoch=settings.epochs)


class _OneDevice(TrainingArguments):
    """One process uses one device: where it sees several GPUs, Trainer would spread its batches over them."""

    @property
    def n_gpu(self) -> int:
        """See TrainingArguments."""
        return min(super().n_gpu, 1)


def balanced(dataset: Dataset[Any], seed: int) -> Dataset[Any]:
    """As many images of every class as the rarest one has, drawn with a seed, in the order of the data."""
    known, count = getattr(dataset, "labels", None), len(dataset)  # type: ignore[arg-type]
    labels = torch.as_tensor([dataset[i]["labels"] for i in range(count)] if known is None else known)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
    chosen = [found[torch.randperm(len(found), generator=generator)[: min(map(len, rows))]] for found in rows]
    return Subset(dataset, torch.cat(chosen).sort().values.tolist())


def _evaluated(predicted: Any, metric: Callable[[Tensor, Tensor], float] | None = None) -> dict[str, float]:
    """The metrics that Trainer logs; its own loss would count the images that pad the last batch twice."""
    given = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    logits, labels = torch.from_numpy(given), torch.from_numpy(predicted.label_ids)
    # NaN counts as wrong, so that an epoch or a candidate that diverged loses to the others.
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    accuracy = int(right.sum()) / len(labels)
    selected = accuracy if metric is None else metric(logits, labels)
    return {"accuracy": accuracy, SELECTED_BY: selected, "loss": F.cross_entropy(logits.double(), labels).item()}
