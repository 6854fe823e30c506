"""One run of one method: `fit` trains with `transformers.Trainer` and returns the model at its best epoch.

Trainer is the loop; this module only says what a run of this project is, once, for the command line, the searches and
the recipes: the optimizer's parameters, the choice of the epoch by validation accuracy, what a run costs, and how one
is stopped and continued.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, extract_model_from_parallel, parse_flag_from_env
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..choosing.callback import RECORD, SurgicalCallback
from ..choosing.methods import Method, method_of
from ..choosing.models import anatomy_under
from ..config import SurgicalConfig
from ..errors import ConfigError
from .trainer import SELECTED_BY as SELECTED_BY
from .trainer import ClassifierTrainer as ClassifierTrainer
from .trainer import Mark, SameStatistics, StopAt, drop_scratch, last_checkpoint, log_of, settle, told
from .trainer import forget_checkpoints as forget_checkpoints

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
            raise ConfigError(f"precision={self.precision!r}: choose bf16 or fp16, or leave it out for float32")
        if not self.lr > 0 or min(self.epochs, self.batch_size, self.accumulation) < 1:
            raise ConfigError(
                f"lr={self.lr}, epochs={self.epochs}, batch_size={self.batch_size}, accumulation={self.accumulation}: "
                "all must be positive"
            )


@dataclass(frozen=True)
class Fitted:
    """What a run gave.

    Attributes:
        model: The PeftModel at its best epoch. None where the run was asked to stop at an epoch that its checkpoints
            are past: what the epochs up to there gave is known from them, their weights are not.
        curve: Validation accuracy (or what `fit` was told to choose by), a fraction, at the end of each epoch.
        losses: Cross entropy of the validation images at the same points; the largest float where it is not finite.
        best_epoch: The epoch, from 1, whose model this is: of equal accuracies the first.
        cost: In training steps of this batch size on one process, counted from the beginning of the run: optimizer
            steps x batches per step, batches that were scored, and forward passes over the validation images as a
            third each.
        record: Epoch -> factor of each tensor's rate, of schedules that data drives.
    """

    model: nn.Module | None
    curve: tuple[float, ...]
    losses: tuple[float, ...]
    best_epoch: int
    cost: float
    record: Mapping[int, Mapping[str, float]] = field(repr=False)

    @property
    def validation(self) -> float:
        """The curve at its best point."""
        return max(self.curve)


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
    metric: Callable[[Tensor, Tensor], float] | None = None,
    arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Fitted:
    """Train one adapter and choose its epoch by validation accuracy, or by another metric.

    Under `accelerate launch` all processes train it together and return the same model, bit for bit; see
    docs/accelerate.md.

    Args:
        network: A fresh base; it is changed.
        method: A row of `methods.METHODS`, or a target such as ``block1``.
        tuning: Map-style, of dicts with ``pixel_values`` (and what else the network's forward names) and ``labels``.
        validation: The same; chooses the epoch.
        settings: How to train.
        options: The method's own settings, such as ``{"threshold": 0.2}``.
        config: Further fields of the `SurgicalConfig`: ``norm_stats``, ``delta_dtype``, ``blocks``, ...
        folder: Where checkpoints lie, for all processes the same; a run that was stopped or killed goes on from there,
            and ends as if it had not been. Without one the run leaves nothing behind.
        stop_epoch: Stop after so many epochs of the run, so that it can go on later. Needs a folder. Where the folder
            holds more epochs already, nothing is trained, and what the first of them gave is read from there.
        collate: Makes a batch of rows; by default Trainer's own.
        callbacks: Further ones.
        metric: Logits (n, classes) and labels (n,) of the validation images, in their order -> what chooses the epoch,
            the larger the better. None is accuracy. Logits may hold NaN.
        arguments: Further fields of `TrainingArguments` that change how a run is carried out, not what comes of it:
            ``report_to``, ``dataloader_num_workers``, ``logging_strategy``, ...
        progress: Show Trainer's progress bar.

    Raises:
        ConfigError: Unknown method, option or setting, ``stop_epoch`` without a folder; a launch or a checkpoint that
            does not go with this run.
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
            "save_strategy": "best" if folder is None else "epoch",
            "save_only_model": folder is None,
            "save_total_limit": 1 if folder is None else None,  # with a folder, `Mark` deletes
            "load_best_model_at_end": True,
            "metric_for_best_model": SELECTED_BY,
            "greater_is_better": True,
            "label_names": ["labels"],
            "remove_unused_columns": False,
            "seed": settings.seed,
            "use_cpu": settings.use_cpu,
        }
        if clash := sorted(set(decided) & set(arguments or {})):
            raise ConfigError(f"arguments={clash}: what a run is, `fit` and FitSettings say; leave these out")
        usual = {"report_to": "none", "logging_strategy": "no", "log_level": "error", "dataloader_pin_memory": False}
        usual |= {"per_device_eval_batch_size": 500, "disable_tqdm": not progress}
        trainer_arguments = TrainingArguments(**decided, **{**usual, **(arguments or {})})
        check_launch(trainer_arguments, settings.precision)
        world = trainer_arguments.world_size
        # One process is one device: where it sees several GPUs, Trainer would spread its batches over nn.DataParallel.
        trainer_arguments._n_gpu = min(trainer_arguments.n_gpu, 1)
        # Accelerate fills the batches of all processes up, however few images there are.
        share = -(-len(validation) // world)  # type: ignore[arg-type]
        trainer_arguments.per_device_eval_batch_size = min(trainer_arguments.per_device_eval_batch_size, share)
        last, done = (None, 0) if folder is None else told(last_checkpoint(folder, world))
        batches = -(-len(tuning) // (settings.batch_size * world))  # type: ignore[arg-type]

        def outcome(trained: nn.Module | None, history: Sequence[Mapping[str, Any]], epochs: int | None) -> Fitted:
            points = [entry for entry in history if f"eval_{SELECTED_BY}" in entry][:epochs]
            record = {entry["epoch"]: entry[RECORD] for entry in history if RECORD in entry}
            record = {epoch: factors for epoch, factors in record.items() if epoch < len(points)}
            curve = tuple(point[f"eval_{SELECTED_BY}"] for point in points)
            scored = len(record) * min(surgical.num_batches, batches) * world
            forwards = len(points) * len(validation) / settings.batch_size  # type: ignore[arg-type]
            return Fitted(
                model=trained,
                curve=curve,
                losses=tuple(_finite(point["eval_loss"]) for point in points),
                best_epoch=1 + curve.index(max(curve)),
                cost=points[-1]["step"] * settings.accumulation * world + scored + FORWARD_SHARE * forwards,
                record=record,
            )

        if last is not None and stop_epoch is not None and done > stop_epoch:
            return outcome(None, told(log_of(last)), stop_epoch)
        if stop_epoch is not None and done == stop_epoch:
            # Trainer always begins the next epoch of a run that has one; what is finished is only to be read.
            trainer_arguments.num_train_epochs = done
        if folder is not None and trainer_arguments.should_save:
            drop_scratch(folder)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        make = OPTIMIZERS[row.optimizer or settings.optimizer]
        trainer = ClassifierTrainer(
            model=model,
            args=trainer_arguments,
            train_dataset=tuning,
            eval_dataset=validation,
            data_collator=collate,
            compute_metrics=functools.partial(_evaluated, metric=metric),
            # Trainer's own parameter groups would spare biases and norms from weight decay.
            optimizer_of=lambda: make(
                [parameter for parameter in model.parameters() if parameter.requires_grad],
                lr=settings.lr,
                weight_decay=settings.weight_decay,
            ),
            callbacks=[
                *([surgical] if paced else []),  # DeepSpeed's optimizers can do without a pace only
                *([] if stop_epoch is None else [StopAt(stop_epoch)]),
                *([] if folder is None else [Mark()]),
                SameStatistics(),
                *callbacks,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        whole = copy.deepcopy(model) if trainer.is_fsdp_enabled else model
        trainer.train(resume_from_checkpoint=last)
        settle(whole, trainer.model, names)
        # With mixed precision, Accelerate has replaced the forward by one that casts.
        return outcome(
            extract_model_from_parallel(whole, keep_fp32_wrapper=False), trainer.state.log_history, epochs=None
        )


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else sys.float_info.max


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


def _evaluated(predicted: Any, metric: Callable[[Tensor, Tensor], float] | None = None) -> dict[str, float]:
    """`_metrics`, and the loss of every image once: Trainer's own counts those that fill up the last batch."""
    logits, labels = _logits_and_labels(predicted)
    return {**_metrics(predicted, metric), "loss": F.cross_entropy(logits.double(), labels).item()}


def _metrics(predicted: Any, metric: Callable[[Tensor, Tensor], float] | None = None) -> dict[str, float]:
    logits, labels = _logits_and_labels(predicted)
    # NaN is wrong rather than an error: an epoch that diverged loses to those before it, and a candidate to the others.
    right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
    accuracy = int(right.sum()) / len(labels)
    return {"accuracy": accuracy, SELECTED_BY: accuracy if metric is None else metric(logits, labels)}


def _logits_and_labels(predicted: Any) -> tuple[Tensor, Tensor]:
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return torch.from_numpy(logits), torch.from_numpy(predicted.label_ids)


def sharding() -> str | None:
    """``FSDP`` or ``DeepSpeed``, where `accelerate launch` was told to shard; else None."""
    flags = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, flag in flags.items() if parse_flag_from_env(flag)), None)


def check_launch(arguments: TrainingArguments, precision: str | None) -> None:
    """Refuse a launch that would train otherwise than was asked for, without a word.

    Args:
        arguments: Whose making has set up the process group.
        precision: What the run is to be trained in: None, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: The processes do not know of each other, are to be sharded in a way that is not supported, or
            `accelerate launch` was told another precision.
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
    """Refuse what cannot be done on sharded gradients.

    Args:
        method: Its name.
        folder: That of the checkpoints, or None.
        paced: Whether it has a schedule or a penalty.
        driven: Whether data drives its schedule.
        clips: Whether gradients are clipped.

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
