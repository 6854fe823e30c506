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
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..choosing.callback import RECORD, SurgicalCallback
from ..choosing.methods import PRIVATE_HEAD, Method, method_of
from ..choosing.models import anatomy_under
from ..config import SurgicalConfig
from ..errors import ConfigError
from ..extras import accelerator_or_cpu
from ..prefix.cached import CachedPrefix
from ..prefix.storage import FeatureStore
from .averaging import MeanOfLastEpochs
from .engines import check_launch, check_sharding, sharding
from .run import FORWARD_SHARE, OPTIMIZERS, Fitted
from .run import FitSettings as FitSettings
from .statistics import estimate_statistics, mixed_batches
from .trainer import (
    SELECTED_BY,
    ClassifierTrainer,
    Mark,
    OneDevice,
    SameStatistics,
    StopAt,
    ViewOfEpoch,
    evaluated,
    last_checkpoint,
    settle,
)
from .trainer import forget_checkpoints as forget_checkpoints


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
    cache: bool | FeatureStore = True,
    cached_views: int | None = None,
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
        cache: Whether to compute what lies before the first tuned tensor once for each image (see `CachedPrefix`),
            which changes nothing in the outcome; or the store that several runs share.
        cached_views: For tuning images that change at random from one reading to the next: so many fixed views of
            each, used in turn, epoch by epoch. Without it, such images are not cached.

    Raises:
        ConfigError: Unknown method, option or setting, ``stop_epoch`` without a folder; a launch or a checkpoint that
            does not fit this run.
    """
    row = method_of(method) if isinstance(method, str) else method
    if stop_epoch is not None and folder is None:
        raise ConfigError("stop_epoch needs a folder: a stopped run goes on from its checkpoint")
    if row.solved:
        place = "private.private_head" if row.name.startswith(PRIVATE_HEAD) else "logistic.solve_head"
        raise ConfigError(f"{row.name} is not trained: call peft_surgical.training.{place}")
    if average and stop_epoch is not None:
        raise ConfigError("average=True takes the mean over the end of a run, and stop_epoch= leaves that out")
    given, begun = row.settings(options), time.perf_counter()
    torch.manual_seed(settings.seed)  # a new head must not depend on what ran before
    model = get_peft_model(network, SurgicalConfig(target=row.target, **dict(config or {})))
    anatomy = anatomy_under(model)
    chosen = balanced(tuning, settings.seed) if row.balanced else None
    if model.active_peft_config.norm_stats == "estimated":
        model.to(accelerator_or_cpu(settings.use_cpu))
        estimate_statistics(model, mixed_batches(chosen or tuning, collate or default_data_collator))
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
        trainer_arguments = OneDevice(**decided, **{**usual, **(arguments or {})})
        check_launch(trainer_arguments, settings.precision)
        world = trainer_arguments.world_size
        # Accelerate pads the batches of all processes to full ones, however few images there are.
        share = -(-len(validation) // world)  # type: ignore[arg-type]
        trainer_arguments.per_device_eval_batch_size = min(trainer_arguments.per_device_eval_batch_size, share)
        ((last, done),) = broadcast_object_list([(None, 0) if folder is None else last_checkpoint(folder, world)])
        batches = -(-len(chosen or tuning) // (settings.batch_size * world))  # type: ignore[arg-type]

        off = f"{sharding()} cuts up the network" if sharding() else "it is switched off" if cache is False else None
        if off is None:
            model.to(trainer_arguments.device)  # as Trainer would
        cached = CachedPrefix(
            model,
            tuning,
            validation,
            batch_size=(settings.batch_size, trainer_arguments.per_device_eval_batch_size),
            views=cached_views,
            collate=collate,
            store=cache
            if isinstance(cache, FeatureStore)
            else FeatureStore(folder=Path(place, "prefix"), shared=world > 1),
            autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision or ""),
            off=off,
        )

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
                prefix="" if trained is None else str(cached),
                seconds=time.perf_counter() - begun,
                saved=FORWARD_SHARE * cached.share * (cached.replayed - cached.computed) * world / settings.batch_size,
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
        with cached:
            train = Subset(cached.dataset, chosen.indices) if chosen else cached.dataset
            trainer = ClassifierTrainer(
                model=model,
                args=trainer_arguments,
                train_dataset=train,
                eval_dataset=cached.datasets[1],
                data_collator=collate,
                compute_metrics=functools.partial(evaluated, metric=metric),
                optimizer_cls_and_kwargs=(optimizer, {"lr": settings.lr, **how}),
                callbacks=[
                    *([surgical] if paced else []),  # which DeepSpeed's optimizers do not work with
                    *([] if stop_epoch is None else [StopAt(stop_epoch)]),
                    *([mean] if average else []),
                    *([] if folder is None else [Mark()]),
                    SameStatistics(),
                    ViewOfEpoch(cached),
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
                predicted = trainer.predict(cached.datasets[1], metric_key_prefix="mean")
        settle(whole, trainer.model, names)
        # With mixed precision, Accelerate has replaced the forward by one that casts.
        trained = extract_model_from_parallel(whole, keep_fp32_wrapper=False)
        found = outcome(trained, trainer.state.log_history, None)
        if not average:
            return found
        logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        value = predicted.metrics[f"mean_{SELECTED_BY}"]
        return replace(found, averaged=value, logits=torch.from_numpy(logits), best_epoch=settings.epochs)


def balanced(dataset: Dataset[Any], seed: int) -> Subset[Any]:
    """As many images of every class as the rarest one has, drawn with a seed, in the order of the data."""
    known, count = getattr(dataset, "labels", None), len(dataset)  # type: ignore[arg-type]
    labels = torch.as_tensor([dataset[i]["labels"] for i in range(count)] if known is None else known)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
    chosen = [found[torch.randperm(len(found), generator=generator)[: min(map(len, rows))]] for found in rows]
    return Subset(dataset, torch.cat(chosen).sort().values.tolist())
