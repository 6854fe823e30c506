"""Gradients of a loss over some batches, per minibatch or per input, from a model that is left exactly as it was."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import DataError
from ..extras import generators_kept
from .models import LossFunction, TrainedTensor, forward_loss, labels_in, unwrapped

logger = logging.getLogger(__name__)

# Models whose gradients are being taken for scores: the hooks of a running schedule must not change those. This is not
# a context variable, because backward passes on an accelerator run in other threads.
_looking: list[nn.Module] = []

_CHUNK_ENTRIES = 2**28  # per-input gradients held at once, 1 GiB in float32
_HALF_PRECISION_SCALE = 2.0**12  # keeps float16 gradients out of the subnormals; divided out again


Measure = Callable[[Tensor], Tensor]
"""Gradients of one tensor (units, *tensor) -> a number for each unit (units,), float64."""


def squared_norms(gradients: Tensor) -> Tensor:
    """The squared L2 norm of each unit's gradient; see `Measure`."""
    return gradients.flatten(1).double().square().sum(1)


@dataclass
class GradientStatistics:
    """What the criteria are computed from, over all batches and processes.

    A unit is what one gradient was taken over: a minibatch, or a single input.

    Attributes:
        units: Number of units.
        measure: Gradients of a tensor (units, *tensor) -> what is kept of each unit (units,), float64; by default the
            squared L2 norm.
        sums: (units, tensors) float64, what ``measure`` gave.
        mean: Tensor -> mean of its gradient over units, in its shape.
        deviations: Tensor -> sum over units of (gradient - mean)^2, in its shape.
        weights: Tensor -> its value, in its shape.
    """

    names: tuple[str, ...]
    weights: dict[str, Tensor]
    units: int = 0
    samples: int = 0
    batches: int = 0
    labels: bool = False
    measure: Measure = squared_norms
    sums: Tensor = field(default_factory=lambda: torch.empty(0))
    mean: dict[str, Tensor] = field(default_factory=dict)
    deviations: dict[str, Tensor] = field(default_factory=dict)

    def variance(self, name: str) -> Tensor:
        """Unbiased variance of the gradient over units, in the tensor's shape."""
        return self.deviations[name] / max(self.units - 1, 1)

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Merge gradients of further units, each of shape (units, *tensor): Chan et al. 1983, eq. 1.5."""
        count = len(next(iter(gradients.values())))
        total = self.units + count
        rows = []
        for name in self.names:
            new = gradients[name].float()
            rows.append(self.measure(new))
            mean = new.mean(0)
            deviations = (new - mean).square_().sum(0)
            if name in self.mean:
                shift = mean - self.mean[name]
                self.deviations[name] += deviations + shift.square() * (self.units * count / total)
                self.mean[name] += shift * (count / total)
            else:
                self.mean[name], self.deviations[name] = mean, deviations
        self.sums = torch.cat([self.sums.to(rows[0]).reshape(-1, len(rows)), torch.stack(rows, 1)])
        self.units = total

    def gather(self) -> None:
        """Merge the statistics of all processes, so that every one of them has the same."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return
        device = next(iter(self.weights.values())).device
        sums = self.sums.double().reshape(-1, len(self.names)).cpu()
        counts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(counts, (self.units, self.samples, self.batches, self.labels, sums))
        total = sum(count[0] for count in counts)
        if not total:
            return
        self.sums = torch.cat([count[4] for count in counts]).to(device)
        for name in self.names:
            own_mean = self.mean.get(name, torch.zeros_like(self.weights[name], dtype=torch.float32))
            own_deviations = self.deviations.get(name, torch.zeros_like(own_mean))
            mean = own_mean * (self.units / total)
            distributed.all_reduce(mean)
            deviations = own_deviations + (own_mean - mean).square() * self.units
            distributed.all_reduce(deviations)
            self.mean[name], self.deviations[name] = mean, deviations
        self.units = total
        self.samples, self.batches = (sum(count[i] for count in counts) for i in (1, 2))
        self.labels = any(count[3] for count in counts)


def collect(
    model: nn.Module,
    tensors: Mapping[str, TrainedTensor],
    dataloader: Iterable[Any],
    *,
    per_input: bool,
    num_batches: int | None,
    loss_fn: LossFunction | None = None,
    autocast: torch.dtype | None = None,
    chunk_size: int | None = None,
    measure: Measure = squared_norms,
) -> GradientStatistics:
    """Gradients of the loss with respect to ``tensors``, over the first ``num_batches`` batches of this process.

    The model runs in ``eval()``, as in the paper's reference code: no dropout, source statistics. Everything is left
    bit-identical: parameters, gradients, modes, buffers, random number generators, and the loader's generator.
    Arguments are those of `score_blocks`, the result of `trained_tensors`, whether a unit is one input or one
    minibatch, and what is kept of each.

    Raises:
        DataError: No process has a batch, or a batch has a form that is not understood.
    """
    model = unwrapped(model)
    names = tuple(tensors)
    found = GradientStatistics(names, {name: tensor.value.float() for name, tensor in tensors.items()}, measure=measure)
    device = next(iter(tensors.values())).parameter.device
    scale = _HALF_PRECISION_SCALE if torch.float16 in {autocast, next(iter(tensors.values())).value.dtype} else 1.0
    entries = sum(tensor.parameter.numel() for tensor in tensors.values())
    chunk = chunk_size or max(1, _CHUNK_ENTRIES // entries)
    precision: Callable[[], AbstractContextManager[Any]] = (
        nullcontext if autocast is None else lambda: torch.autocast(device.type, dtype=autocast)
    )

    def loss_of(batch: Any) -> Tensor:
        with precision():
            return forward_loss(model, batch, loss_fn).float() * scale

    with left_as_it_was(model, tensors, dataloader), torch.enable_grad():
        for batch in itertools.islice(dataloader, num_batches):
            batch = moved(batch, device)
            size = batch_size(batch)
            for start in range(0, size, chunk if per_input else size):
                if per_input:
                    part = _rows(batch, size, start, min(start + chunk, size))
                    gradients = _per_input(model, tensors, part, loss_of)
                else:
                    gradients = {name: g[None] for name, g in _gradients(loss_of(batch), tensors).items()}
                found.add({name: value / scale for name, value in gradients.items()})
            found.samples += size
            found.batches += 1
            found.labels = found.labels or labels_in(batch) is not None
    found.gather()
    if not found.units:
        raise DataError("the dataloader gave no batch: check the split, or drop_last with fewer images than a batch")
    return found


def is_looking() -> bool:
    """Whether gradients are being taken for scores, not for a step."""
    return bool(_looking)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    # Processors and tokenizers return mappings of their own, which torch would take for a single leaf.
    batch = dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def batch_size(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    sizes = [len(leaf) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes:
        raise DataError("a batch holds no tensor: give (inputs, labels) or a dict of tensors")
    return sizes[0]


def _gradients(loss: Tensor, tensors: Mapping[str, TrainedTensor]) -> dict[str, Tensor]:
    parameters = {name: tensor.parameter for name, tensor in tensors.items()}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def _rows(batch: Any, size: int, start: int, stop: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf

    return tree_map(cut, batch)


def _per_input(
    model: nn.Module, tensors: Mapping[str, TrainedTensor], batch: Any, loss_of: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Gradients (inputs, *tensor) of each input's own loss."""
    size = batch_size(batch)
    leaves, shape = tree_flatten(batch)
    varying = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size for leaf in leaves]
    paths = {name: tensor.path for name, tensor in tensors.items()}

    class Loss(nn.Module):
        """The loss as a module, so that functional_call can replace the network's parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, one: Any) -> Tensor:
            return loss_of(one)

    wrapped = Loss()

    def loss_of_one(parameters: dict[str, Tensor], *rows: Any) -> Tensor:
        one = tree_unflatten([r[None] if v else r for r, v in zip(rows, varying, strict=True)], shape)
        return functional_call(wrapped, {f"inner.{paths[name]}": value for name, value in parameters.items()}, (one,))

    parameters = {name: tensor.parameter.detach() for name, tensor in tensors.items()}
    try:
        # Fused attention has no batching rule: torch would loop over it, slowly and with a warning.
        with sdpa_kernel(SDPBackend.MATH):
            found = vmap(grad(loss_of_one), in_dims=(None, *(0 if v else None for v in varying)))(parameters, *leaves)
        return {name: value.detach() for name, value in found.items()}
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        # Control flow that depends on data, or an operation without a batching rule: one input at a time is slower, and
        # always works. An error in the user's own code is raised again there.
        logger.info("per-input gradients one at a time, torch.func.vmap refused: %s", str(error).split("\n")[0])
    rows = [_gradients(loss_of(_rows(batch, size, i, i + 1)), tensors) for i in range(size)]
    return {name: torch.stack([row[name] for row in rows]) for name in tensors}


@contextmanager
def left_as_it_was(model: nn.Module, tensors: Mapping[str, TrainedTensor], dataloader: Any) -> Iterator[None]:
    """The model in ``eval()`` with gradients for ``tensors`` alone; everything is put back after, bit for bit."""
    modes = {module: module.__dict__["training"] for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    generators = _generators(dataloader)
    states = [generator.get_state() for generator in generators]
    python, numpys = random.getstate(), np.random.get_state()
    wanted = {tensor.parameter for tensor in tensors.values()}
    _looking.append(model)
    try:
        with generators_kept():
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(parameter in wanted)
            yield
    finally:
        _looking.pop()
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        current = dict(model.named_buffers())
        for name, value in buffers.items():
            if not torch.equal(current[name], value):
                current[name].copy_(value)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpys)


def _generators(dataloader: Any) -> Sequence[torch.Generator]:
    holders = [dataloader, *(getattr(dataloader, name, None) for name in ("sampler", "batch_sampler"))]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
