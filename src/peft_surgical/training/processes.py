"""What the processes of one run must agree on: how they were launched, statistics that move by themselves, the outcome.

Accelerate and Trainer make several processes train one model. What is here is what they leave open.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from ..errors import ConfigError

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
