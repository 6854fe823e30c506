"""MEMO along many streams at once, on one accelerator: what `Memo` does along each of them.

Streams differ in their images, their rate and, as they go on, in the tensors that are adapted. What is frozen is one
network for all of them, so its convolutions see the images of all streams as one batch; a tensor that is adapted is a
stack with one entry per stream. On a GPU the whole step is one CUDA graph: one image of every stream costs little more
than one image of one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_surgical.adaptation.objectives import marginal_entropy
from peft_surgical.adaptation.streams import COLLAPSE_WINDOW
from peft_surgical.adaptation.views import AugMix, Draw, generator_at
from peft_surgical.choosing.models import logits_of
from peft_surgical.errors import TargetError

_TOGETHER = 128  # images of a stream whose views are made together
_EPSILON, _BETAS = 1e-8, (0.9, 0.999)  # of AdamW


@dataclass(frozen=True)
class Plan:
    """One stream.

    Attributes:
        images: (n, c, h, w) in [0, 1]; streams of one call that share a tensor share its views, too.
        seed: Seed of the views, which depend on it and on the position alone.
        lr: Learning rate.
    """

    images: Tensor
    seed: int
    lr: float


@dataclass(frozen=True)
class Outcome:
    """What became of one stream.

    Attributes:
        logits: (n, classes), each image's after the steps on its own views.
        steps: Steps that were taken.
        skipped: Steps that were not, because of NaN or Inf.
    """

    logits: Tensor
    steps: int
    skipped: int


class _Stacked(nn.Module):
    """A convolution, linear layer or GroupNorm of which some tensors are one per stream.

    It takes the images of all streams as one batch, those of a stream beside each other.
    """

    def __init__(self, module: nn.Module, tuned: Sequence[str], count: int) -> None:
        super().__init__()
        self.module, self.count = module, count
        self.deltas = {
            name: torch.zeros_like(getattr(module, name).expand(count, *getattr(module, name).shape)).contiguous()
            for name in tuned
        }
        for delta in self.deltas.values():
            delta.requires_grad_()

    def tensor(self, name: str) -> Any:
        """Weight or bias (streams, ...), with the deltas; None where the module has none."""
        base = getattr(self.module, name)
        if base is None or name in self.deltas:
            return None if base is None else base + self.deltas[name]
        return base.expand(self.count, *base.shape)

    def forward(self, x: Tensor) -> Tensor:
        module, weight, bias = self.module, self.tensor("weight"), self.tensor("bias")
        each = x.unflatten(0, (self.count, -1))  # (streams, images, ...)
        if isinstance(module, nn.GroupNorm):
            each = F.group_norm(x, module.num_groups, eps=module.eps).unflatten(0, (self.count, -1))
            return (each * weight[:, None, :, None, None] + bias[:, None, :, None, None]).flatten(0, 1)
        if isinstance(module, nn.Linear):
            found = each @ weight.mT
            return (found if bias is None else found + bias[:, None]).flatten(0, 1)
        found = _Convolution.apply(each, weight, module.stride, module.padding)
        return (found if bias is None else found + bias[:, None, :, None, None]).flatten(0, 1)


class _Convolution(torch.autograd.Function):
    """A convolution with a kernel per stream as a matrix product over patches.

    As a grouped convolution it would be one call, whose gradient for the kernels is many times slower on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        """Images (s, n, c, h, w), kernels (s, o, c, k, l) -> (s, n, o, h, w)."""
        patches, (high, wide) = _patches(images.flatten(0, 1), weight.shape[-2:], stride, padding)
        patches = patches.unflatten(0, images.shape[:2])
        ctx.save_for_backward(patches, weight)
        ctx.shapes = images.shape, stride, padding
        return (_flat(weight)[:, None] @ patches).unflatten(-1, (high, wide))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        patches, weight = ctx.saved_tensors
        shape, stride, padding = ctx.shapes
        of_weight = (gradient.flatten(-2) @ patches.mT).sum(1)
        of_weight = of_weight.unflatten(-1, (*weight.shape[-2:], weight.shape[2])).movedim(-1, 2)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        kernel = weight.shape[-2:]
        if tuple(stride) == (1, 1):  # the gradient for the images is a convolution with the mirrored kernels
            mirrored = weight.flip(-1, -2).transpose(1, 2)
            around = tuple(size - 1 - pad for size, pad in zip(kernel, padding, strict=True))
            spread, _ = _patches(gradient.flatten(0, 1), kernel, stride, around)
            return (_flat(mirrored)[:, None] @ spread.unflatten(0, shape[:2])).view(shape), of_weight, None, None
        columns = weight.flatten(2).mT[:, None] @ gradient.flatten(-2)
        found = F.fold(columns.flatten(0, 1), shape[-2:], kernel, padding=padding, stride=stride)
        return found.view(shape), of_weight, None, None


def _flat(weight: Tensor) -> Tensor:
    """(s, o, c, k, l) -> (s, o, k * l * c), in the order of `_patches`."""
    return weight.movedim(2, -1).flatten(2)


def _patches(
    images: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """Every patch of the images (n, c, h, w) as (n, k * l * c, places), and how many places there are each way."""
    images = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    high, wide = ((images.shape[2 + i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
    shifted = [
        images[:, :, i : i + stride[0] * high : stride[0], j : j + stride[1] * wide : stride[1]][:, :, :high, :wide]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.cat(shifted, 1).flatten(2), (high, wide)


class ManyMemo:
    """A network of which ``count`` streams adapt some tensors, each its own copy.

    Args:
        network: In ``eval()``, without an adapter; a network without BatchNorm that moves. Its modules are exchanged.
        names: The tensors that are adapted: weights and biases of plain convolutions, linear layers and GroupNorms.
        count: Streams.
        optimizer: ``sgd`` (no momentum) or ``adamw``, as of `STREAM_OPTIMIZERS`.
        steps: Per image.
        weight_decay: As of `Memo`.
        episodic: Whether every image starts from the network's own tensors.
        preprocess: As of `Memo`.

    Raises:
        TargetError: For a tensor of another module.
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        count: int,
        *,
        optimizer: str,
        steps: int = 1,
        weight_decay: float = 0.0,
        episodic: bool = False,
        preprocess: Callable[[Tensor], Tensor],
    ) -> None:
        self.network, self.count, self.preprocess = network.requires_grad_(False), count, preprocess
        self.optimizer, self.steps, self.weight_decay, self.episodic = optimizer, steps, weight_decay, episodic
        tuned: dict[str, list[str]] = {}
        for name in names:
            path, _, own = name.rpartition(".")
            tuned.setdefault(path, []).append(own)
        self.deltas: list[Tensor] = []
        for path, owned in tuned.items():
            module = network.get_submodule(path)
            plain = isinstance(module, nn.Linear | nn.GroupNorm) or (
                isinstance(module, nn.Conv2d) and module.groups == 1 and set(module.dilation) == {1}
            )
            if not plain or set(owned) - {"weight", "bias"}:
                raise TargetError(
                    f"{path}.{owned[0]} belongs to {type(module).__name__}, and many streams at once adapt plain "
                    "convolutions, linear layers and GroupNorms alone: adapt one stream after the other"
                )
            stacked = _Stacked(module, owned, count)
            network.set_submodule(path, stacked)
            self.deltas += stacked.deltas.values()
        self.moments = [torch.zeros_like(delta) for delta in [*self.deltas, *self.deltas]]
        device = self.deltas[0].device
        self.taken, self.skipped = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(2))
        self.age = torch.zeros(count, device=device, dtype=self.deltas[0].dtype)  # steps since the optimizer was new

    @torch.no_grad()
    def reset(self) -> None:
        """As new."""
        for tensor in (*self.deltas, *self.moments, self.taken, self.skipped, self.age):
            tensor.zero_()

    def __call__(self, views: Tensor, images: Tensor, rates: Tensor) -> Tensor:
        """Adapt to and predict one image of every stream.

        Args:
            views: (steps, count, views, c, h, w) in [0, 1].
            images: (count, c, h, w) in [0, 1].
            rates: (count,).

        Returns:
            Logits (count, classes).
        """
        if self.episodic:
            with torch.no_grad():
                for tensor in (*self.deltas, *self.moments, self.age):
                    tensor.zero_()
        for of_step in views:
            logits = logits_of(self.network(self.preprocess(of_step.flatten(0, 1)))).unflatten(0, (self.count, -1))
            losses = torch.vmap(marginal_entropy)(logits.to(torch.promote_types(logits.dtype, torch.float32)))
            self._move(losses.detach(), torch.autograd.grad(losses.sum(), self.deltas), rates)
        with torch.no_grad():
            return logits_of(self.network(self.preprocess(images)))

    @torch.no_grad()
    def _move(self, losses: Tensor, gradients: Sequence[Tensor], rates: Tensor) -> None:
        def of_stream(value: Tensor, like: Tensor) -> Tensor:
            return value.view(-1, *[1] * (like.ndim - 1))

        def finite(tensors: Sequence[Tensor]) -> Tensor:
            norms = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in tensors]
            return torch.isfinite(torch.linalg.vector_norm(torch.stack(norms), dim=0))

        good = torch.isfinite(losses) & finite(gradients)
        self.age += good
        moved = []
        for number, (delta, gradient) in enumerate(zip(self.deltas, gradients, strict=True)):
            gradient = torch.where(of_stream(good, delta), gradient, 0)
            rate, age = of_stream(rates, delta), of_stream(self.age, delta)
            if self.optimizer == "sgd":
                moved.append(delta - rate * (gradient + self.weight_decay * delta))
                continue
            first, second = self.moments[number], self.moments[number + len(self.deltas)]
            first.copy_(torch.where(of_stream(good, delta), first.lerp(gradient, 1 - _BETAS[0]), first))
            squares = second * _BETAS[1] + gradient.square() * (1 - _BETAS[1])
            second.copy_(torch.where(of_stream(good, delta), squares, second))
            root = (second / (1 - _BETAS[1] ** age)).sqrt() + _EPSILON
            moved.append(delta * (1 - rate * self.weight_decay) - rate / (1 - _BETAS[0] ** age) * first / root)
        good &= finite(moved)
        for delta, new in zip(self.deltas, moved, strict=True):
            delta.copy_(torch.where(of_stream(good, delta), new, delta))
        self.taken += good
        self.skipped += ~good


def _captured(function: Callable[..., Tensor], example: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A function of tensors of these shapes as one CUDA graph; the next call overwrites its result."""
    inputs = [tensor.clone() for tensor in example]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*inputs)

    def replay(*values: Tensor) -> Tensor:
        for own, value in zip(inputs, values, strict=True):
            own.copy_(value)
        graph.replay()
        return result

    return replay


class ViewsOfMany:
    """The views of images at their positions, made on the images' device, kept for other targets while there is room.

    Args:
        augment: Makes them.
        steps: Sets of views of an image.
        room: Bytes to keep at most.
    """

    def __init__(self, augment: AugMix, steps: int = 1, room: float = 0) -> None:
        self.augment, self.steps, self.room = augment, steps, room
        self._draws: dict[tuple[int, int], list[Draw]] = {}
        self._kept: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, seed: int, first: int, last: int) -> Tensor:
        """Views (positions, steps, views, c, h, w) of the images of a stream from ``first`` up to ``last``."""
        key = (id(images), seed, first, last)
        if key in self._kept:
            return self._kept[key][1]
        draws = [self._drawn(images, seed, position) for position in range(first, last)]
        made = [self.augment.of_each(images[first:last], of_step) for of_step in zip(*draws, strict=True)]
        found = torch.stack(made, 1)
        self.room -= found.nbytes
        if self.room > 0:
            self._kept[key] = images, found  # with the images, so that no other tensor gets their id
        return found

    def _drawn(self, images: Tensor, seed: int, position: int) -> list[Draw]:
        if (seed, position) not in self._draws:
            generator = generator_at(seed, position)
            height, width = images.shape[2:]
            drawn = [self.augment.draw(height, width, generator) for _ in range(self.steps)]
            self._draws[seed, position] = drawn
        return self._draws[seed, position]


def adapt_many(memo: ManyMemo, plans: Sequence[Plan], views: ViewsOfMany, *, eager: bool = False) -> list[Outcome]:
    """Adapt along every stream, online all together, episodic as many images at a time as ``memo`` has streams.

    Args:
        memo: New, or `ManyMemo.reset`; online it has as many streams as there are plans.
        plans: Streams of equal length online; images on the device of the network.
        views: The views for `memo`'s steps.
        eager: On a GPU, not to make a graph of a step.
    """
    device = memo.deltas[0].device
    rows = [[(i, j) for j in range(len(plan.images))] for i, plan in enumerate(plans)]
    if memo.episodic:
        flat = [place for row in rows for place in row]
        flat += [flat[-1]] * (-len(flat) % memo.count)  # the last image again, until the last batch is full
        batches = [flat[at : at + memo.count] for at in range(0, len(flat), memo.count)]
    else:
        batches = [list(batch) for batch in zip(*rows, strict=True)]
    numbers = torch.tensor([[stream for stream, _ in batch] for batch in batches])
    every = torch.tensor([plan.lr for plan in plans], dtype=memo.deltas[0].dtype)[numbers].to(device)
    found: list[Tensor] = []
    counts: list[tuple[Tensor, Tensor]] = []
    step: Callable[..., Tensor] = memo
    for rates, (views_of, images) in zip(every, _batches(batches, plans, views), strict=True):
        if device.type == "cuda" and step is memo and not eager:
            step = _captured(memo, (views_of, images, rates))
            memo.reset()
        before = memo.taken.clone(), memo.skipped.clone()
        found.append(step(views_of, images, rates).clone())
        counts.append((memo.taken - before[0], memo.skipped - before[1]))
    logits, taken, skipped = (
        torch.stack(found).flatten(0, 1).cpu(),
        *(torch.stack(of_batch).flatten().cpu() for of_batch in zip(*counts, strict=True)),
    )
    where: Mapping[tuple[int, int], int] = {
        place: at for at, place in reversed(list(enumerate(p for batch in batches for p in batch)))
    }
    picked = [torch.tensor([where[place] for place in row]) for row in rows]
    return [Outcome(logits[at], int(taken[at].sum()), int(skipped[at].sum())) for at in picked]


def _batches(
    batches: Sequence[Sequence[tuple[int, int]]], plans: Sequence[Plan], views: ViewsOfMany
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views and images of every batch of (stream, position). Views are made for several positions together."""
    made: dict[tuple[int, int], Tensor] = {}
    begun: dict[tuple[int, int], int] = {}
    for batch in batches:
        picked = []
        for stream, position in batch:
            plan, first = plans[stream], position // _TOGETHER * _TOGETHER
            key = (id(plan.images), plan.seed)
            if begun.get(key) != first:
                made[key] = views(plan.images, plan.seed, first, min(first + _TOGETHER, len(plan.images)))
                begun[key] = first
            picked.append(made[key][position - first])
        yield torch.stack(picked, 1), torch.stack([plans[stream].images[position] for stream, position in batch])


def collapses(logits: Tensor, window: int = COLLAPSE_WINDOW) -> list[int]:
    """Where the predictions (n, classes) of a whole window have become one class, as `Stream` counts it."""
    found: list[int] = []
    recent: list[int] = []
    before = False
    for place, row in enumerate(logits):
        if not bool(torch.isfinite(row).all()):
            continue
        recent = [*recent, int(row.argmax())][-window:]
        now = len(recent) == window and len(set(recent)) == 1
        if now and not before:
            found.append(place)
        before = now
    return found
