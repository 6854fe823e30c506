"""Candidates of one target, with several rates and seeds, trained as one batched job: is it faster than one by one?

::

    python benchmarks/stacked.py --json outputs/benchmarks/stacked.json

Each candidate trains the same tensors on the same features in front of the target, which are computed beforehand, with
Adam at its own rate and its own order of the images. *one by one* is a loop for each candidate. *stacked* holds the
deltas of all of them in one tensor more, and ``torch.func``'s ``vmap`` over ``functional_call`` computes all at once.
Neither is this package's training: it is the loop alone, without evaluation and checkpoints, so that the ratio is the
most that stacking could give. ``apart`` is the largest difference between the two after the last step, over the largest
delta. ``fit`` is how long this package takes for one candidate on features that are there already: its part that is no
step of the suffix cannot become faster by stacking.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import prefix
import step
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from peft_surgical import anatomy_of
from peft_surgical.blocks import parse, resolve
from peft_surgical.data.labelled import collate
from peft_surgical.prefix.storage import FeatureStore
from peft_surgical.training.fitting import FitSettings, fit

CELLS = (
    ("resnet26", "head", 1000, 32, 15),
    (prefix.LITE0, "head", 200, 224, 15),
    ("resnet26", "block3", 128, 32, 2),
    (prefix.LITE0, "block7", 64, 224, 2),
)
RATES, SEEDS = (1e-3, 3e-4, 1e-4), (0, 1, 2)


class Suffix(nn.Module):
    """What follows the input of a target's first module."""

    def __init__(self, model: nn.Module, target: str) -> None:
        super().__init__()
        self.model = model
        found = step.suffix(model, target)
        assert found is not None
        self.first, self.run = found

    def forward(self, x: Tensor) -> Tensor:
        """That input (n, ...) -> logits (n, classes)."""
        return self.run(x)


class Adam:
    """Adam of several tensors, with a rate for each candidate, or one for all."""

    def __init__(self, deltas: Sequence[Tensor], rate: Tensor) -> None:
        self.deltas, self.steps = deltas, 0
        self.means, self.squares = ([torch.zeros_like(one) for one in deltas] for _ in range(2))
        self.rates = [rate.view(-1, *[1] * (one.dim() - 1)) if rate.dim() else rate for one in deltas]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of all tensors."""
        self.steps += 1
        torch._foreach_lerp_(self.means, grads, 0.1)
        torch._foreach_mul_(self.squares, 0.999)
        torch._foreach_addcmul_(self.squares, grads, grads, 0.001)
        below = torch._foreach_sqrt(self.squares)
        torch._foreach_div_(below, (1 - 0.999**self.steps) ** 0.5)
        torch._foreach_add_(below, 1e-8)
        moves = torch._foreach_div(self.means, below)
        for delta, move, rate in zip(self.deltas, moves, self.rates, strict=True):
            delta.sub_(move * (rate / (1 - 0.9**self.steps)))


def orders(seed: int, n: int, size: int, epochs: int) -> Iterator[Tensor]:
    """The batches of a candidate, all of one size."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator)[: n // size * size].view(-1, size)


def measure(name: str, target: str, rows: tuple[prefix.Images, prefix.Images], epochs: int, rounds: int) -> Any:
    base = prefix.network_of(name, None)
    suffix, size = Suffix(copy.deepcopy(base), target), min(64, len(rows[0]) // 2)
    parts = rows[0].images.split(size)
    features = torch.cat([step.features_before(suffix.model, suffix.first, part) for part in parts])
    parameters = dict(suffix.named_parameters())
    names = [f"model.{key}" for key in resolve(parse(target), anatomy_of(suffix.model))]
    names = [key for key in names if key in parameters]
    bases, labels, n = [parameters[key].detach() for key in names], rows[0].labels, len(features)
    suffix.requires_grad_(False)
    candidates = list(itertools.product(RATES, SEEDS))

    def one_by_one() -> list[Tensor]:
        found = []
        for rate, seed in candidates:
            deltas = [torch.zeros_like(one, requires_grad=True) for one in bases]
            optimizer = Adam(deltas, torch.tensor(rate))
            for chosen in orders(seed, n, size, epochs):
                values = {key: one + delta for key, one, delta in zip(names, bases, deltas, strict=True)}
                loss = F.cross_entropy(functional_call(suffix, values, (features[chosen],)), labels[chosen])
                optimizer.step(torch.autograd.grad(loss, deltas))
            found.append(deltas)
        return [torch.stack(each).detach() for each in zip(*found, strict=True)]

    def stacked() -> list[Tensor]:
        deltas = [torch.zeros(len(candidates), *one.shape, requires_grad=True) for one in bases]
        optimizer = Adam(deltas, torch.tensor([rate for rate, _ in candidates]))
        run = vmap(lambda values, x: functional_call(suffix, dict(zip(names, values, strict=True)), (x,)))
        for batches in zip(*(orders(seed, n, size, epochs) for _, seed in candidates), strict=True):
            chosen = torch.stack(batches)
            logits = run([one + delta for one, delta in zip(bases, deltas, strict=True)], features[chosen])
            loss = F.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), reduction="sum") / size
            optimizer.step(torch.autograd.grad(loss, deltas))
        return [delta.detach() for delta in deltas]

    one, other = one_by_one(), stacked()
    apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True))
    seconds = step.interleave({"one by one": one_by_one, "stacked": stacked}, 0, rounds, lambda: None)
    settings = FitSettings(lr=RATES[0], epochs=epochs, batch_size=size, use_cpu=True)
    store, taken = FeatureStore(), 0.0
    for _ in range(2):  # the first computes the features
        begun = time.perf_counter()
        fit(copy.deepcopy(base), target, *rows, settings, collate=collate, cache=store)
        taken = time.perf_counter() - begun
    ratio = step.ratio(seconds, "stacked", "one by one")
    assert ratio is not None
    return {
        "network": name,
        "target": target,
        "candidates": len(candidates),
        "images": n,
        "epochs": epochs,
        "ratio": [x if math.isfinite(x) else None for x in ratio],
        "n": rounds,
        "apart": apart,
        "seconds": {kind: step.median_interval(values).value for kind, values in seconds.items()},
        "fit": taken,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tiny", action="store_true", help="few images, to see that it runs")
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmarks/stacked.json"))
    args = parser.parse_args(argv)
    found = []
    for name, target, count, pixels, epochs in CELLS[:1] if args.tiny else CELLS:
        found.append(cell(name, target, 20 if args.tiny else count, pixels, 1 if args.tiny else epochs, args.rounds))
        print(found[-1], flush=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def cell(name: str, target: str, count: int, pixels: int, epochs: int, rounds: int) -> dict[str, Any]:
    """One network and target, on random images."""
    images, labels = prefix.images_of(name, None, count + count // 5, pixels)
    rows = prefix.Images(images[:count], labels[:count]), prefix.Images(images[count:], labels[count:])
    found: dict[str, Any] = measure(name, target, rows, epochs, rounds)
    return found


if __name__ == "__main__":
    main()
