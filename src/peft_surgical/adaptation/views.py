"""Random views of one image, which MEMO asks a network to agree on, and the images in [0, 1] of which they are made.

The recipe is that of MEMO (Zhang, Levine and Finn 2022, Sec. 3), itself after AugMix (Hendrycks et al. 2020): a random
crop and flip, then a random mixture of the crop and three chains of one to three mild operations. All views of an
image are made together, as tensors on the image's device; what is random is drawn on the CPU from one generator, so
that the same position of a stream gets the same views on every device.

Departures from MEMO's published code: magnitudes are real numbers where it rounds them to whole degrees and pixels;
rotations and shears keep the centre of the image in place where it keeps a corner; what they uncover is mid-grey in
every channel where it fills the red channel alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError
from ..extras import require

Views = Callable[[Tensor, torch.Generator], Tensor]
"""(image (c, h, w) in [0, 1], generator) -> views (v, c, h, w) in [0, 1]."""

CROPS = ("pad", "resize")
COLOUR = ("autocontrast", "equalize", "posterize", "solarize")
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*COLOUR, *GEOMETRY)
"""The operations of a chain, all equally likely: AugMix's set, none of which is a corruption of CIFAR-10-C."""

_LEAST_LEVEL = 0.1
_MOST_LEVEL = 10.0  # the level at which an operation has the full magnitude below
_DEGREES, _SHEAR, _SHIFT, _SOLARIZED, _BITS = 30.0, 0.3, 1 / 3, 1.0, 4
_GREY = 0.5
_TOLERANCE = 1e-4  # of pixel values, in telling how a transform normalises


def generator_at(seed: int, position: int) -> torch.Generator:
    """A generator on the CPU for one position of a stream, from 0: no two positions or seeds share their numbers."""
    state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True)
class Draw:
    """What is random about the views of one image; tensors on the CPU, in the order in which `AugMix` draws them."""

    crops: tuple[Tensor, ...]
    lengths: Tensor
    operations: Tensor
    levels: Tensor
    signs: Tensor
    weights: Tensor
    kept: Tensor


@dataclass(frozen=True)
class AugMix:
    """Makes the views of an image; see the module. Any callable of the same form (`Views`) can take its place.

    Attributes:
        views: How many.
        crop: ``"pad"``: an eighth of black around the image, then a crop of its size (MEMO on CIFAR-10, 4 of 32
            pixels); ``"resize"``: a part of 8 to 100% of the area, resized (MEMO on ImageNet).
        chains: Chains that are mixed with random weights, Dirichlet(1, ..., 1).
        depth: Operations in a chain at most; each chain draws its number from 1 to this.
        severity: Largest level of an operation, of 10. MEMO's 1 rotates by up to 3 degrees and shifts by up to 1 pixel
            of 32; AugMix trains CIFAR networks with 3.
    """

    views: int = 32
    crop: str = "pad"
    chains: int = 3
    depth: int = 3
    severity: float = 1.0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ConfigError(f"crop={self.crop!r}: choose one of {', '.join(CROPS)}")
        if min(self.views, self.chains, self.depth) < 1:
            raise ConfigError(f"views={self.views}, chains={self.chains}, depth={self.depth}: each must be 1 or more")
        if not _LEAST_LEVEL <= self.severity <= _MOST_LEVEL:
            raise ConfigError(f"severity={self.severity}: choose a level from {_LEAST_LEVEL} to {_MOST_LEVEL:.0f}")

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Views (views, c, h, w) in [0, 1] of an image (c, h, w) in [0, 1], c = 1 or 3.

        Raises:
            DataError: For an image of another shape or dtype.
        """
        if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
            raise DataError(
                f"views are made of one float image (1 or 3 channels, height, width) in [0, 1], not of {image.dtype} "
                f"{tuple(image.shape)}: pass the image before it is normalised"
            )
        return self.of_each(image[None], [self.draw(image.shape[1], image.shape[2], generator)])[0]

    def draw(self, height: int, width: int, generator: torch.Generator) -> Draw:
        """What is random about the views of one image of that size, on the CPU; the same serves several images."""
        n, chains, depth = self.views, self.chains, self.depth
        crops = _draw_crops(n, self.crop, height, width, generator)
        # Everything is drawn, also what a short chain does not use: each number has its place in the sequence.
        lengths = torch.randint(1, depth + 1, (n * chains,), generator=generator)
        operations = torch.randint(len(OPERATIONS), (depth, n * chains), generator=generator)
        levels = torch.rand(depth, n * chains, generator=generator) * (self.severity - _LEAST_LEVEL) + _LEAST_LEVEL
        signs = torch.randint(2, (depth, n * chains), generator=generator) * 2 - 1
        exponential = -torch.rand(n, chains, generator=generator).clamp_min(1e-12).log()
        weights = exponential / exponential.sum(1, keepdim=True)  # Dirichlet(1, ..., 1)
        kept = torch.rand(n, generator=generator)  # Beta(1, 1)
        return Draw(crops, lengths, operations, levels, signs, weights, kept)

    def of_each(self, images: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Views (k, views, c, h, w) of k images (k, c, h, w), the i-th by the i-th of ``draws``.

        Those of an image do not depend on what else is there, beyond the last bits of a float.
        """
        k, n, chains = len(images), self.views, self.chains
        lengths, weights, kept = (
            torch.cat([getattr(d, name) for d in draws]) for name in ("lengths", "weights", "kept")
        )
        operations, levels, signs = (
            torch.cat([getattr(d, name) for d in draws], 1) for name in ("operations", "levels", "signs")
        )
        start = _crops(images, n, self.crop, [draw.crops for draw in draws])
        mixed = start.repeat_interleave(chains, 0)
        for step in range(self.depth):
            active = torch.where(lengths > step, operations[step], -1)
            _apply(mixed, active, levels[step] / _MOST_LEVEL, signs[step])
        weights, kept = (value.to(images.device, images.dtype) for value in (weights, kept))
        chained = torch.einsum("nk,nkchw->nchw", weights, mixed.unflatten(0, (k * n, chains)))
        return torch.lerp(chained, start, kept.view(-1, 1, 1, 1)).clamp(0, 1).unflatten(0, (k, n))


def _draw_crops(n: int, crop: str, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    flips = torch.rand(n, generator=generator) < 0.5
    if crop == "pad":
        return flips, *(torch.randint(2 * (side // 8) + 1, (n,), generator=generator) for side in (height, width))
    scale = torch.rand(n, generator=generator) * (1 - 0.08) + 0.08
    ratio = torch.exp((torch.rand(n, generator=generator) * 2 - 1) * math.log(4 / 3))
    # As shares of the image; a part that would stick out is cut at the border.
    wide = (scale * ratio * height / width).sqrt().clamp_max(1)
    high = (scale / ratio * width / height).sqrt().clamp_max(1)
    right, down = ((torch.rand(n, generator=generator) * 2 - 1) * (1 - share) for share in (wide, high))
    return flips, wide, high, right, down


def _crops(images: Tensor, n: int, crop: str, draws: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Random crops of the images' own size, half of them mirrored (k * n, c, h, w)."""
    height, width = images.shape[2:]
    drawn = [torch.stack(of_each) for of_each in zip(*draws, strict=True)]  # each (k, n)
    flips = drawn[0]
    if crop == "pad":
        pads = [side // 8 for side in (height, width)]
        padded = F.pad(images, (pads[1], pads[1], pads[0], pads[0]))
        rows, columns = (
            start[..., None] + torch.arange(side) for start, side in zip(drawn[1:], (height, width), strict=True)
        )
        columns = torch.where(flips[..., None], columns.flip(-1), columns)
        which = torch.arange(len(images), device=images.device)[:, None, None, None]
        rows, columns = rows.to(images.device)[..., :, None], columns.to(images.device)[..., None, :]
        return padded.permute(0, 2, 3, 1)[which, rows, columns].movedim(-1, 2).flatten(0, 1).contiguous()
    _, wide, high, right, down = (value.flatten() for value in drawn)
    theta = torch.zeros(len(wide), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = torch.where(flips.flatten(), -wide, wide), right
    theta[:, 1, 1], theta[:, 1, 2] = high, down
    return _sampled(images[:, None].expand(-1, n, -1, -1, -1).flatten(0, 1), theta, "border")


def _apply(images: Tensor, operations: Tensor, shares: Tensor, signs: Tensor) -> None:
    """One operation on each image (m, c, h, w) in [0, 1], in place.

    Each has its number of `OPERATIONS` or -1 for none, a magnitude as a share of the full one, and a direction.
    """
    for number, name in enumerate(COLOUR):
        if len(rows := torch.nonzero(operations == number).flatten()):
            at = rows.to(images.device)
            images[at] = _coloured(name, images[at], shares[rows])
    if len(rows := torch.nonzero(operations >= len(COLOUR)).flatten()):
        at = rows.to(images.device)
        height, width = images.shape[2:]
        theta = affine(operations[rows] - len(COLOUR), shares[rows] * signs[rows], height, width)
        images[at] = _sampled(images[at] - _GREY, theta, "zeros") + _GREY


def _coloured(name: str, images: Tensor, shares: Tensor) -> Tensor:
    functional = require("torchvision.transforms.v2.functional", "making views of an image", "timm")
    if name == "autocontrast":
        return functional.autocontrast(images)
    if name == "equalize":
        return functional.equalize(images)
    if name == "solarize":
        # Values above the threshold are inverted; torchvision's own takes one threshold for all images.
        thresholds = (1 - _SOLARIZED * shares).to(images.device, images.dtype).view(-1, 1, 1, 1)
        return torch.where(images >= thresholds, functional.invert(images), images)
    bits = _BITS - (shares * _BITS).long()
    out = torch.empty_like(images)
    for some in bits.unique().tolist():
        at = (bits == some).to(images.device)
        out[at] = functional.posterize(images[at], bits=some)
    return out


def affine(kinds: Tensor, shares: Tensor, height: int, width: int) -> Tensor:
    """Matrices (m, 2, 3) of geometric operations for ``torch.nn.functional.affine_grid``: where a pixel comes from.

    Args:
        kinds: int64 (m,), numbers of `GEOMETRY`.
        shares: (m,), in [-1, 1]: signed magnitudes as shares of the full one (30 degrees, shear 0.3, a third).
        height: Pixels of the images.
        width: Pixels of the images.
    """
    angle = torch.where(kinds == 0, shares * math.radians(_DEGREES), 0)
    theta = torch.zeros(len(kinds), 2, 3)
    # affine_grid counts both sides from -1 to 1, so turning an oblong image changes the unit.
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos(), -angle.sin() * height / width
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * width / height, angle.cos()
    theta[:, 0, 1] += torch.where(kinds == 1, shares * _SHEAR * height / width, 0)
    theta[:, 1, 0] += torch.where(kinds == 2, shares * _SHEAR * width / height, 0)
    theta[:, 0, 2] = torch.where(kinds == 3, shares * 2 * _SHIFT, 0)
    theta[:, 1, 2] = torch.where(kinds == 4, shares * 2 * _SHIFT, 0)
    return theta


def _sampled(images: Tensor, theta: Tensor, padding: str) -> Tensor:
    grid = F.affine_grid(theta.to(images.device, images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


# --- the images in [0, 1] that views are made of ---


def halves(transform: Callable[[Any], Tensor]) -> tuple[Callable[[Any], Tensor], Callable[[Tensor], Tensor]]:
    """Cut an evaluation transform before its normalisation, which is read off two solid images.

    Args:
        transform: PIL image in RGB -> float tensor (3, h, w), whose last step is (x - mean) / std for each channel of
            an image in [0, 1], such as a base's ``transform_eval``.

    Returns:
        PIL image -> pixels (3, h, w) in [0, 1]; and pixels (n, 3, h, w) -> the network's input.

    Raises:
        DataError: If the transform does not end so.
    """
    pillow = require("PIL.Image", "adapting to images")
    solid = [transform(pillow.new("RGB", (64, 64), (value,) * 3)) for value in (0, 51, 255)]
    black, grey, white = (image.flatten(1).mean(1) for image in solid)
    even = all(float(image.flatten(1).std(1).max()) < _TOLERANCE for image in solid)
    straight = torch.allclose(torch.lerp(black, white, 51 / 255), grey, atol=_TOLERANCE)
    if not even or not straight or bool((white - black).abs().min() < _TOLERANCE):
        raise DataError(
            "the transform of this base does not end with (x - mean) / std of an image in [0, 1], so views cannot be "
            "made before it: adapt from Python, with preprocess= and images of your own"
        )
    low, span = black.view(3, 1, 1), (white - black).view(3, 1, 1)

    def to_pixels(image: Any) -> Tensor:
        return ((transform(image) - low) / span).clamp(0, 1)

    def normalise(pixels: Tensor) -> Tensor:
        return pixels * span.to(pixels) + low.to(pixels)

    return to_pixels, normalise
