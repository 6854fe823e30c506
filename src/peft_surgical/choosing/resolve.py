"""Choosing what to tune from target data: `score_blocks` and `resolve_target`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..blocks import Anatomy, parse
from ..config import SurgicalConfig
from ..errors import ConfigError
from .gradients import GradientStatistics, collect
from .models import LossFunction, anatomy_under, refuse_sharded, trained_tensors
from .scores import CRITERIA, BlockScores, criterion_of
from .sensitivity import OutputChanges, collect_changes


def score_blocks(
    model: nn.Module,
    dataloader: Iterable[Any],
    criterion: str = "rgn",
    num_batches: int | None = 5,
    loss_fn: LossFunction | None = None,
    *,
    blocks: Mapping[str, str | Sequence[str]] | Anatomy | None = None,
    split: str = "tuning",
    autocast: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> BlockScores:
    """Score every block and tensor of a network on target data.

    The model is left bit for bit as it was, with its gradients, modes, buffers and random number generators. Under
    `accelerate launch` each process uses the batches of its own loader, and all get the same scores.

    Args:
        model: A network, or a PeftModel, whose trained tensors are scored with their current values.
        dataloader: Yields (inputs, labels) or dicts, on any device.
        criterion: ``rgn``, ``snr``, ``snr-reference``, ``fisher``, ``rgn-residual`` or ``sensitivity``; see
            `scores`.
        num_batches: Batches to use per process, 5 as in the paper; None for all.
        loss_fn: (what the model returns, labels or None) -> scalar mean over the batch. By default the model's own
            loss, or cross entropy of its logits.
        blocks: A block specification, as for `anatomy_of`.
        split: The part of the data, for the record: ``"tuning"``, ``"validation"``, ``"test"``.
        autocast: Run the forward in this dtype (``torch.bfloat16``), as mixed-precision training would.
        chunk_size: Number of inputs whose gradients are held at once, for criteria over inputs. By default as many as
            fit into 1 GiB.

    Raises:
        ConfigError: Unknown criterion, or ``num_batches`` below 1.
        DataError: No batch, no labels, or scores that are not finite.
        AnatomyError: The blocks cannot be inferred and none are given.
        UnsupportedModelError: The parameters are sharded by FSDP.
    """
    row = criterion_of(criterion)
    if num_batches is not None and num_batches < 1:
        raise ConfigError(f"num_batches={num_batches}: at least 1, or None for all")
    tensors = trained_tensors(model)
    refuse_sharded(tensors)
    anatomy = anatomy_under(model, blocks)
    statistics: GradientStatistics | OutputChanges
    if row.unit == "output":
        asked: dict[str, Any] = {"num_batches": num_batches, "autocast": autocast}
        statistics = collect_changes(model, anatomy, tensors, dataloader, **asked)
    else:
        statistics = collect(
            model,
            tensors,
            dataloader,
            per_input=row.unit == "input",
            num_batches=num_batches,
            loss_fn=loss_fn,
            autocast=autocast,
            chunk_size=chunk_size,
            measure=row.measure,
        )
    members: dict[str, list[str]] = {block.name: [] for block in anatomy}
    for name in tensors:
        members[anatomy.block_of(name).name].append(name)
    members = {block: names for block, names in members.items() if names}
    block_scores = {block: row.score(statistics, names) for block, names in members.items()}

    def tensor_score(name: str) -> float:
        weights = statistics.weights if isinstance(statistics, GradientStatistics) and row.relative else {}
        undefined = name in weights and not bool(weights[name].any())
        return block_scores[anatomy.block_of(name).name] if undefined else row.score(statistics, [name])

    return BlockScores(
        criterion=criterion,
        block_scores=block_scores,
        tensor_scores={name: tensor_score(name) for name in tensors},
        num_parameters={b: sum(tensors[name].parameter.numel() for name in names) for b, names in members.items()},
        num_samples=statistics.samples,
        num_batches=statistics.batches,
        uses_labels=statistics.labels,
        split=split,
    )


def resolve_target(
    config: SurgicalConfig,
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    num_blocks: int | None = None,
    budget: float | None = None,
    **how: Any,
) -> SurgicalConfig:
    """Replace ``auto-rgn``, ``auto-snr``, ``auto-fisher``, ``auto-sensitivity`` by the blocks that score best on data.

    ::

        config = resolve_target(SurgicalConfig(target="auto-rgn"), network, loader)
        model = get_peft_model(network, config)
        config.selection  # the target that was asked for, and the scores of all blocks

    Args:
        config: A config whose target needs no data is returned as it is.
        model: The network before get_peft_model.
        dataloader: Target data, as for `score_blocks`.
        num_blocks: Length of the contiguous run of blocks to tune; 1 unless a budget is given.
        budget: Instead, the largest share of the parameters to tune, in (0, 1].
        **how: Passed to `score_blocks`.

    Returns:
        A copy of the config with a concrete target; ``selection`` is saved with the adapter.

    Raises:
        ConfigError: The target is decided by training runs, not by scores.
    """
    spec = parse(config.target) if config.target is not None else None
    if spec is None or not spec.needs_data:
        return config
    asked = str(spec)
    criterion = asked.removeprefix("auto-")
    if criterion not in CRITERIA:
        raise ConfigError(
            f"target={asked!r} is decided by training candidates, not by scores: use peft_surgical.training.search, or "
            f"`peft-surgical tune --target {asked}`; scores decide {', '.join(f'auto-{name}' for name in CRITERIA)}"
        )
    how.setdefault("blocks", config.blocks)
    scores = score_blocks(model, dataloader, criterion, **how)
    chosen = scores.contiguous(num_blocks or (None if budget is not None else 1), budget)
    resolved = copy.deepcopy(config)
    resolved.target = " + ".join(chosen)
    resolved.selection = selection_record(asked, scores, num_blocks=num_blocks, budget=budget)
    return resolved


def selection_record(asked: str, scores: BlockScores, **settings: Any) -> dict[str, Any]:
    """The ``selection`` of an adapter's config: plain JSON, with the scores of blocks and not of tensors."""
    return {
        "asked": asked,
        "criterion": scores.criterion,
        "block_scores": dict(scores.block_scores),
        "num_samples": scores.num_samples,
        "num_batches": scores.num_batches,
        "uses_labels": scores.uses_labels,
        "split": scores.split,
    } | {name: value for name, value in settings.items() if value is not None}
