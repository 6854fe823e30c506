"""How much each block enlarges a small perturbation of its network's input: scores that need no labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Anatomy
from ..errors import DataError
from .gradients import batch_size, left_as_it_was, moved
from .models import TrainedTensor, block_outputs, forward_loss, labels_in, logits_of, unwrapped

NOISE = 0.1
"""Standard deviation of the perturbation, in those of the batch's values."""


@dataclass(frozen=True)
class OutputChanges:
    """What a perturbation of the input does to the outputs of blocks.

    Attributes:
        growth: Tensor -> growth of the perturbation in its block: by how much more the block's output changes than the
            output of the block before it, both relative to their size; mean over batches. 0 where a block has no output
            of its own.
        samples: Inputs, over all processes.
        batches: Minibatches, over all processes.
        labels: Whether the batches held labels.
    """

    growth: Mapping[str, float]
    samples: int
    batches: int
    labels: bool


def collect_changes(
    model: nn.Module,
    anatomy: Anatomy,
    tensors: Mapping[str, TrainedTensor],
    dataloader: Iterable[Any],
    *,
    num_batches: int | None,
    autocast: torch.dtype | None = None,
) -> OutputChanges:
    """Run the first ``num_batches`` batches of this process as they are, and with Gaussian noise on their inputs.

    The model runs in ``eval()`` and is left as it was. The noise is drawn on the CPU from a generator of its own, so
    that it is the same on every machine. Arguments are those of `score_blocks`, and the result of `trained_tensors`.

    Raises:
        DataError: No process has a batch, or a batch has a form that is not understood, or nothing to perturb.
    """
    model = unwrapped(model)
    device = next(iter(tensors.values())).parameter.device
    precision = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    perturb = _Perturbation()
    order = [block.name for block in anatomy]
    found: list[tuple[dict[str, float], int, bool]] = []
    with (
        left_as_it_was(model, {}, dataloader),
        torch.no_grad(),
        precision,
        block_outputs(model, anatomy) as seen,
        model.register_forward_pre_hook(perturb, with_kwargs=True, prepend=True),
    ):

        def keep(given: Any, labels: Any) -> Tensor:
            seen["head"] = logits_of(given)
            return torch.zeros(())

        def outputs(batch: Any, noise: float) -> dict[str, Tensor]:
            seen.clear()
            perturb.noise = noise
            forward_loss(model, batch, keep)
            return dict(seen)

        for batch in itertools.islice(dataloader, num_batches):
            batch = moved(batch, device)
            plain = outputs(batch, 0.0)
            noisy = outputs(batch, NOISE)
            if (entering := perturb.relative) == 0:
                raise DataError(
                    "no input of a batch can be perturbed: sensitivity needs images as floating point tensors that "
                    "are not all alike. Give such batches, or another criterion"
                )
            growth = {}
            for name in [name for name in order if name in plain and plain[name].shape == noisy[name].shape]:
                leaving = _relative(plain[name], noisy[name])
                growth[name] = leaving / entering if entering > 0 else 0.0
                entering = leaving
            found.append((growth, batch_size(batch), labels_in(batch) is not None))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shared, found)
        found = [one for of_process in shared for one in of_process]
    if not found:
        raise DataError("the dataloader gave no batch: check the split, or drop_last with fewer images than a batch")
    mean = {name: sum(growth.get(name, 0.0) for growth, _, _ in found) / len(found) for name in order}
    growth = {name: mean[anatomy.block_of(name).name] for name in tensors}
    return OutputChanges(growth, sum(size for _, size, _ in found), len(found), any(has for _, _, has in found))


def sensitivity(changes: OutputChanges, names: Sequence[str]) -> float:
    """Growth of a perturbation of the input in the block of these tensors.

    That the embeddings of some layers tell apart what others do not, once the input is perturbed, is an observation of
    detectors of generated images; as a criterion of what to tune it is this project's own. See `OutputChanges`.
    """
    return changes.growth[names[0]]


def _relative(plain: Tensor, noisy: Tensor) -> float:
    """Norm of the difference over that of the value, each of all entries together."""
    size = float(plain.double().norm())
    return float((noisy.double() - plain.double()).norm()) / size if size > 0 else 0.0


class _Perturbation:
    """A pre-hook of the network that adds noise to the images it is given: the same to each batch."""

    def __init__(self) -> None:
        self.noise = 0.0  # in standard deviations of the values; 0 leaves inputs as they are
        self.relative = 0.0  # change of the latest input, over its size
        self.generator = torch.Generator()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not self.noise:
            return None
        self.relative = 0.0
        self.generator.manual_seed(0)
        return tuple(map(self._noisy, args)), {name: self._noisy(value) for name, value in kwargs.items()}

    def _noisy(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            return value
        drawn = torch.randn(value.shape, generator=self.generator).to(value)
        found = value + self.noise * value.std() * drawn
        self.relative = _relative(value, found)
        return found
