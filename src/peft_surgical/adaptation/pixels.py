"""An evaluation transform in two halves: to an image in [0, 1] of the network's size, and from there to its input.

Views and other augmentations are made of images in [0, 1]; bases bring one transform that ends with the normalisation.
The normalisation is read off two solid images, so that transforms of any library can be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..extras import require

_SIDE = 64
_CLOSE = 1e-4


def halves(transform: Callable[[Any], Tensor]) -> tuple[Callable[[Any], Tensor], Callable[[Tensor], Tensor]]:
    """Cut a transform before its normalisation.

    Args:
        transform: PIL image in RGB -> float tensor (3, h, w), whose last step is (x - mean) / std for each channel of
            an image in [0, 1], such as a base's ``transform_eval``.

    Returns:
        PIL image -> pixels (3, h, w) in [0, 1]; and pixels (n, 3, h, w) -> the network's input.

    Raises:
        DataError: If the transform does not end so.
    """
    pillow = require("PIL.Image", "adapting to images")
    solid = [transform(pillow.new("RGB", (_SIDE, _SIDE), (value,) * 3)) for value in (0, 51, 255)]
    black, grey, white = (image.flatten(1).mean(1) for image in solid)
    even = all(float(image.flatten(1).std(1).max()) < _CLOSE for image in solid)
    straight = torch.allclose(torch.lerp(black, white, 51 / 255), grey, atol=_CLOSE)
    if not even or not straight or bool((white - black).abs().min() < _CLOSE):
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
