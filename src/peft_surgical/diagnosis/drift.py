"""How far each block's features have moved from the source: pooled features, and tests by permutation.

A block's output is pooled over positions to the mean and the standard deviation of each channel. Features are
standardised by the source's mean and deviation, projected to at most `WIDTH` dimensions by a fixed Gaussian matrix,
which about preserves distances (Johnson and Lindenstrauss 1984), and two sets of images are compared by the energy
distance (Szekely and Rizzo 2013), a maximum mean discrepancy whose kernel has nothing to choose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..blocks import Anatomy
from ..choosing.models import block_outputs
from ..errors import DataError

WIDTH = 64
PERMUTATIONS = 999
_CLIP = 10.0  # a channel that the source never moves may move by any number of its deviations


@dataclass(frozen=True)
class Features:
    """What a network makes of some images.

    Attributes:
        blocks: Block -> pooled output (n, d), in the order in which data flows; ``head`` has the logits.
        labels: int64 (n,), or None.
    """

    blocks: Mapping[str, Tensor]
    labels: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """(n, classes)."""
        return self.blocks["head"]

    @property
    def last(self) -> Tensor:
        """The features before the head, (n, d)."""
        return [value for name, value in self.blocks.items() if name != "head"][-1]


def block_features(
    network: nn.Module, anatomy: Anatomy, batches: Iterable[Tensor], labels: Tensor | None = None
) -> Features:
    """Run images through a network and pool what each block puts out.

    Args:
        network: In ``eval()``, without adapters.
        anatomy: Its blocks.
        batches: Pixel values (n, 3, h, w), on the network's device.
        labels: The labels of all images, int64 (n,).

    Raises:
        DataError: There is no image.
    """
    kept: dict[str, list[Tensor]] = {}
    with torch.no_grad(), block_outputs(network, anatomy) as seen:
        for batch in batches:
            seen.clear()
            outputs = network(batch)
            seen["head"] = getattr(outputs, "logits", outputs)
            for name, value in seen.items():
                kept.setdefault(name, []).append(pooled(value).float().cpu())
    if not kept:
        raise DataError("no image to diagnose: check the folder")
    order = [block.name for block in anatomy if block.name in kept and block.name != "head"]
    return Features({name: torch.cat(kept[name]) for name in [*order, "head"]}, labels)


def pooled(value: Tensor) -> Tensor:
    """Mean and deviation of each channel over positions, of (n, d), (n, tokens, d), (n, d, h, w) or (n, h, w, d)."""
    if value.ndim == 4:
        # The features of a square map; channels come last in timm's Swin and its like.
        last = value.shape[1] == value.shape[2] != value.shape[3]
        value = value.flatten(1, 2) if last else value.flatten(2).transpose(1, 2)
    if value.ndim != 3 or value.shape[1] == 1:
        return value.flatten(1)
    return torch.cat([value.mean(1), value.std(1)], 1)


@dataclass(frozen=True)
class Reference:
    """What is kept of source images: no image can be told from it.

    Attributes:
        mean: Block -> mean of its features, (d,).
        deviation: Block -> their standard deviation, (d,).
        points: Block -> the features, standardised and projected, (n, at most `WIDTH`).
        confidence: Largest probability of each image, (n,).
        right: Which images are classified correctly, bool (n,); None without labels.
        model: What the network was called.
    """

    mean: Mapping[str, Tensor]
    deviation: Mapping[str, Tensor]
    points: Mapping[str, Tensor]
    confidence: Tensor
    right: Tensor | None
    model: str = ""

    @classmethod
    def of(cls, source: Features, model: str = "") -> Reference:
        """What is kept of the features of source images."""
        mean = {name: value.mean(0) for name, value in source.blocks.items()}
        deviation = {name: value.std(0).clamp(min=1e-6) for name, value in source.blocks.items()}
        right = None if source.labels is None else source.logits.argmax(1) == source.labels
        confidence = source.logits.softmax(1).amax(1)
        empty = cls(mean, deviation, {}, confidence, right, model)
        return cls(mean, deviation, empty.seen(source), confidence, right, model)

    def seen(self, features: Features) -> dict[str, Tensor]:
        """Features of other images, standardised and projected as the source's were.

        Raises:
            DataError: They are of a network with other blocks or widths.
        """
        shapes = {name: (value.shape[1],) for name, value in features.blocks.items()}
        if shapes != {name: tuple(value.shape) for name, value in self.mean.items()}:
            raise DataError(
                f"the reference is of {self.model or 'another network'}, whose blocks are "
                f"{', '.join(self.mean)} and of other widths than this network's: make one with this network"
            )
        found = {}
        for name, value in features.blocks.items():
            scaled = ((value - self.mean[name]) / self.deviation[name]).clamp(-_CLIP, _CLIP)
            found[name] = scaled @ _projection(scaled.shape[1])
        return found

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it as safetensors."""
        parts = {"mean": self.mean, "deviation": self.deviation, "points": self.points}
        tensors = {f"{part}.{name}": value for part, found in parts.items() for name, value in found.items()}
        tensors |= {"confidence": self.confidence}
        if self.right is not None:
            tensors["right"] = self.right
        plain = {"format": "pt", "kind": "peft-surgical reference 1", "model": self.model}
        plain["blocks"] = json.dumps(list(self.mean))
        save_file({key: value.contiguous() for key, value in tensors.items()}, Path(file), metadata=plain)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Reference:
        """Read what `save` wrote.

        Raises:
            DataError: It is no such file.
        """
        try:
            with safe_open(os.fspath(file), framework="pt") as opened:
                plain = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            names = json.loads(plain["blocks"])
            mean, deviation, points = (
                {name: tensors[f"{part}.{name}"] for name in names} for part in ("mean", "deviation", "points")
            )
            return cls(mean, deviation, points, tensors["confidence"], tensors.get("right"), plain["model"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(
                f"{file} is no reference of source images ({error}): write one with save_reference="
            ) from error


def _projection(width: int) -> Tensor:
    if width <= WIDTH:
        return torch.eye(width)
    return torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(width)) / WIDTH**0.5


# --- the test ---


def distances(first: Tensor, second: Tensor) -> Tensor:
    """All Euclidean distances among the rows of two sets, the first set's rows first, relative to their mean."""
    together = torch.cat([first, second]).double()
    found = torch.cdist(together, together)
    mean = found.sum() / max(len(found) * (len(found) - 1), 1)
    return found / mean.clamp(min=1e-12)


def energy(found: Tensor, members: Tensor) -> Tensor:
    """The energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| without bias, for each way to part rows in two sets.

    Args:
        found: Distances (N, N).
        members: Which rows are of the first set, (ways, N).
    """
    one = members.double()
    other = 1 - one
    near = one @ found
    within = (near * one).sum(1) / (one.sum(1) * (one.sum(1) - 1))
    between = (near * other).sum(1) / (one.sum(1) * other.sum(1))
    rest = ((other @ found) * other).sum(1) / (other.sum(1) * (other.sum(1) - 1))
    return 2 * between - within - rest


def permuted_p(found: Tensor, first: int, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """The share of random partings with at least the energy distance of the true one, which counts as one of them.

    Args:
        found: Distances (N, N).
        first: Number of rows of the first set, which come first.
        permutations: Number of random partings.
        seed: Seed of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(permutations, len(found), generator=generator).argsort(1)
    members = torch.cat([torch.arange(len(found))[None], rows]) < first
    values = energy(found, members)
    return float((values[1:] >= values[0]).sum() + 1) / (permutations + 1)
