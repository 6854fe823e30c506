"""From a PIL image to a network's input: what a base was trained with, and the two augmentations of `load_base`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..extras import require

Transform = Callable[[Any], Tensor]
"""PIL image in RGB -> float tensor (3, h, w)."""

AUGMENTS = ("none", "flip", "crop")
_FLIP = 0.5


def of_timm(config: Mapping[str, Any], augment: str) -> tuple[Transform, Transform]:
    """The training and the evaluation transform of a timm data config.

    Args:
        config: What ``timm.data.resolve_model_data_config`` returns.
        augment: One of `AUGMENTS`.
    """
    create = require("timm.data", "loading a timm model", "timm").create_transform
    evaluation = create(**config, is_training=False)
    if augment == "crop":
        # crop_pct and crop_mode describe evaluation; colour jitter is off, because colours may be what has shifted.
        return create(**config, is_training=True, hflip=_FLIP, color_jitter=None), evaluation
    if augment == "flip":
        vision = require("torchvision.transforms", "augmenting images", "timm")
        return vision.Compose([vision.RandomHorizontalFlip(_FLIP), evaluation]), evaluation
    return evaluation, evaluation


class _Processed:
    """An image processor as a plain transform. A class of the module, so that worker processes can be handed one."""

    def __init__(self, processor: Any, before: Any = None, **options: Any) -> None:
        self.processor = processor
        self.before = before
        self.options = options

    def __call__(self, image: Any) -> Tensor:
        image = image if self.before is None else self.before(image)
        return self.processor(images=image, return_tensors="pt", **self.options)["pixel_values"][0]


def of_processor(processor: Any, augment: str) -> tuple[Transform, Transform]:
    """The training and the evaluation transform of a transformers image processor.

    Args:
        processor: What ``AutoImageProcessor.from_pretrained`` returns.
        augment: One of `AUGMENTS`.

    Raises:
        DataError: If it does not make one image of three channels out of one image.
    """
    if hasattr(processor, "data_config"):  # timm's own, wrapped by transformers
        return of_timm(processor.data_config, augment)
    evaluation = _Processed(processor)
    blank = require("PIL.Image", "loading a transformers model").new("RGB", (64, 64))
    shape = tuple(evaluation(blank).shape)
    if len(shape) != 3 or shape[0] != 3:
        raise DataError(
            f"{type(processor).__name__} turns an image into a tensor of shape {shape}, not (3, height, width): "
            "only networks on whole RGB images can be loaded by name"
        )
    if augment == "none":
        return evaluation, evaluation
    vision = require("torchvision.transforms", "augmenting images", "timm")
    flip = vision.RandomHorizontalFlip(_FLIP)
    if augment == "flip":
        return _Processed(processor, flip), evaluation
    resized = vision.RandomResizedCrop(shape[1:], interpolation=vision.InterpolationMode.BICUBIC)
    # The random crop has the final size already: only the processor's normalisation is left to do.
    return _Processed(processor, vision.Compose([resized, flip]), do_resize=False, do_center_crop=False), evaluation
