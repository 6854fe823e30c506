"""The two halves of an evaluation transform, for the transforms of timm and of transformers."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from peft_surgical.adaptation.views import halves
from peft_surgical.bases.transforms import of_processor, of_timm
from peft_surgical.errors import DataError

pytest.importorskip("torchvision")


def photo(side=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def of_a_timm_base():
    timm_data = pytest.importorskip("timm.data")
    config = timm_data.resolve_data_config({"input_size": (3, 24, 24), "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)})
    return of_timm(config, "none")[1]


def of_a_processor():
    size = {"height": 24, "width": 24}
    return of_processor(transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3), "none")[
        1
    ]


@pytest.mark.parametrize("make", [of_a_timm_base, of_a_processor])
def test_the_halves_are_the_transform(make):
    transform = make()
    to_pixels, normalise = halves(transform)
    pixels = to_pixels(photo())
    assert pixels.shape == (3, 24, 24)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert torch.allclose(normalise(pixels[None])[0], transform(photo()), atol=1e-5)
    assert torch.allclose(to_pixels(Image.new("RGB", (24, 24), (51, 102, 255)))[:, 0, 0], torch.tensor([0.2, 0.4, 1.0]))


def test_pixels_of_an_image_of_the_networks_size_are_its_own():
    size = {"height": 24, "width": 24}
    processor = transformers.ViTImageProcessor(size=size, image_mean=[0.1] * 3, image_std=[0.3] * 3)
    found = halves(of_processor(processor, "none")[1])[0](photo(24))
    assert torch.allclose(found, torch.from_numpy(np.array(photo(24))).permute(2, 0, 1) / 255, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: torch.zeros(3, 8, 8),
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).div(255).square(),
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).div(255) + torch.linspace(0, 1, 64),
    ],
    ids=["blank", "curved", "uneven"],
)
def test_a_transform_of_another_form_is_refused(transform):
    with pytest.raises(DataError, match="does not end with"):
        halves(transform)
