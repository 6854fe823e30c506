"""Forward passes as the training loop makes them, and the proof that replaying a cut changes nothing in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import default_collate
from transformers import default_data_collator

from ..choosing.models import forward_loss, labels_in, logits_of
from ..extras import generators_kept
from .cut import NetworkCut, UncutError
from .samples import around, blank_images, image_of, put, with_image
from .storage import layout_of

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""By dtype, the largest difference relative to the largest value where bit equality is not asked for."""
PROVEN_ON = 8
"""Largest number of images in the batch of the proof; twice as many are recorded for it."""


class Passes:
    """The forward and backward passes of a loop.

    Args:
        model: Its parameters lie where the loop runs.
        collate: Makes a batch of rows; None for Trainer's own (dicts) or torch's (tuples).
        autocast: The dtype of mixed precision.
        rounded: The dtype that features are rounded to in the store, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Callable[[Any], Any] | None = None,
        autocast: torch.dtype | None = None,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.model, self.collate, self.autocast, self.rounded = model, collate, autocast, rounded
        self.device = next(model.parameters()).device

    def batch(self, rows: Sequence[Any]) -> Any:
        """The rows as the loop gives them to the model."""
        collate = self.collate
        if collate is None:
            collate = default_data_collator if isinstance(rows[0], dict) else default_collate
        return _moved(collate(list(rows)), self.device)

    def outputs(self, rows: Sequence[Any]) -> Any:
        """What the model returns for some rows."""
        return self._outputs(self.batch(rows))

    def scalar(self, rows: Sequence[Any]) -> Tensor:
        """A number that depends on everything that the model returns for some rows."""
        return _scalar(self.outputs(rows))

    def _outputs(self, batch: Any) -> Any:
        kept: list[Any] = []

        def keep(outputs: Any, labels: Any) -> Tensor:
            kept.append(outputs)
            return torch.zeros(())

        precision: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            precision = torch.autocast(self.device.type, self.autocast)
        with precision:
            forward_loss(self.model, batch, keep)
        return kept[0]

    def _step(self, rows: Sequence[Any], training: bool) -> tuple[list[Tensor], list[Tensor]]:
        """All outputs, and in training the gradients of what is trained."""
        batch = self.batch(rows)
        with generators_kept(), torch.set_grad_enabled(training):
            torch.manual_seed(0)
            outputs = self._outputs(batch)
            if not training:
                return _floats(outputs), []
            labels, loss = labels_in(batch), getattr(outputs, "loss", None)
            if not isinstance(loss, Tensor):
                numbers = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.dim() == 1
                loss = F.cross_entropy(logits_of(outputs).float(), labels) if numbers else _scalar(outputs)
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            grads = torch.autograd.grad(loss, trained, allow_unused=True)
        empty = torch.zeros(())
        return [one.detach() for one in _floats(outputs)], [empty if grad is None else grad for grad in grads]

    def same(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
        """Whether tensors agree: on the CPU in float32 bit for bit, elsewhere within `TOLERANCE`."""
        pairs = list(zip(found, wanted, strict=True))
        if self.device.type == "cpu" and self.autocast is None and self.rounded is None:
            return all(torch.equal(a, b) for a, b in pairs)
        scale = max((float(tensor.abs().max()) for tensor in wanted if tensor.numel()), default=0.0)
        dtypes = {tensor.dtype for tensor in wanted} | {self.autocast, self.rounded} - {None}
        bound = scale * max(TOLERANCE.get(dtype, TOLERANCE[torch.float32]) for dtype in dtypes if dtype is not None)
        return all(a.shape == b.shape and bool(((a.float() - b.float()).abs() <= bound).all()) for a, b in pairs)

    def prove(self, cut: NetworkCut, rows: Sequence[Any], training: bool) -> None:
        """Raise UncutError unless a replayed step, of training or of evaluation, is a plain one."""
        model, size = self.model, min(PROVEN_ON, max(len(rows) // 2, 2))
        halves = [around(rows, size), around(rows[size:] if len(rows) >= 2 * size else rows, size)]
        model.train(training)
        before, state = [buffer.clone() for buffer in model.buffers()], _random_state(self.device)
        with torch.set_grad_enabled(training):
            found = [cut.record(lambda half=half: self.outputs(half)) for half in halves]  # type: ignore[misc]
        if not _equal(state, _random_state(self.device)):
            raise UncutError("dropout or another random operation is active before the first tuned tensor")
        if not _equal(before, list(model.buffers())):
            raise UncutError("statistics before the first tuned tensor move in training")
        # Other companions in the batch than those with which the features were computed.
        order = [*range(1, 2 * size, 2)]
        chosen = [halves[i // size][i % size] for i in order]
        layouts = [layout_of(tensor) for tensor in found[0]]
        pairs = zip(layouts, zip(*found, strict=True), strict=True)
        features = [layout.read(layout.stored(torch.cat(both))[order].contiguous()) for layout, both in pairs]
        plain = self._step(chosen, training)
        blank = blank_images(image_of(chosen[0]), size, self.device)
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: (put(args, blank), put(kwargs, blank)), with_kwargs=True, prepend=True
        )
        cut.begin(features, size)
        try:
            numbers = [with_image(row, torch.full((1, 1, 1), i)) for i, row in enumerate(chosen)]
            replayed = self._step(numbers, training)
        finally:
            cut.end()
            hook.remove()
        for what, one, other in zip(("outputs", "gradients"), plain, replayed, strict=True):
            if not self.same(one, other):
                raise UncutError(f"replayed, {what} differ from those of the network as it is")


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _scalar(outputs: Any) -> Tensor:
    return torch.stack([leaf.float().square().sum() for leaf in _floats(outputs)]).sum()


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, (list, tuple)) else batch


def _random_state(device: torch.device) -> list[Tensor]:
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def seed_all(seed: int) -> None:
    """Seed the generators that data sets draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Forward passes within it leave the model's buffers and modes, and all random generators, as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with generators_kept():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in training:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
