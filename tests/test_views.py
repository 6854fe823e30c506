"""Views: each operation against torchvision's own for one image, crops and mixtures against hand-worked ones."""

import math

import pytest
import torch

from peft_surgical.adaptation import views as module
from peft_surgical.adaptation.views import COLOUR, GEOMETRY, OPERATIONS, AugMix, affine, generator_at
from peft_surgical.errors import ConfigError, DataError

functional = pytest.importorskip("torchvision.transforms.v2.functional")


def picture(height=24, width=32, channels=3):
    """A smooth image in [0, 1], so that bilinear samplers agree away from the border."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([(x * (k + 1) + y).mul(2).sin() / 2 + 0.5 for k in range(channels)])


def applied(image, name, share, sign=1):
    images = image[None].clone()
    number = torch.tensor([OPERATIONS.index(name)])
    module._apply(images, number, torch.tensor([share]), torch.tensor([sign]))
    return images[0]


def crops_of(image, n, kind):
    draws = [module._draw_crops(n, kind, *image.shape[1:], generator_at(0, 0))]
    return module._crops(image[None], n, kind, draws)


def test_a_position_and_a_seed_have_their_own_numbers():
    first = torch.rand(4, generator=generator_at(0, 7))
    assert torch.equal(first, torch.rand(4, generator=generator_at(0, 7)))
    for seed, position in ((0, 8), (1, 7), (7, 0)):
        assert not torch.equal(first, torch.rand(4, generator=generator_at(seed, position)))


@pytest.mark.parametrize("crop", ["pad", "resize"])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_images_and_depend_on_the_generator_alone(crop, channels):
    make, image = AugMix(views=9, crop=crop, severity=3), picture(channels=channels)
    torch.manual_seed(1)
    found = make(image, generator_at(0, 0))
    torch.manual_seed(2)
    assert torch.equal(found, make(image, generator_at(0, 0)))
    assert not torch.equal(found, make(image, generator_at(0, 1)))
    assert found.shape == (9, channels, 24, 32)
    assert found.dtype == image.dtype
    assert 0 <= found.min() < found.max() <= 1
    assert len({tuple(view.flatten().tolist()) for view in found}) == 9
    assert torch.equal(image, picture(channels=channels))  # the image itself is not written to


@pytest.mark.parametrize("crop", ["pad", "resize"])
def test_views_of_several_images_are_those_of_each(crop):
    make, images = (
        AugMix(views=5, crop=crop, severity=3),
        torch.stack([picture(), picture().flip(1), picture().flip(2)]),
    )
    draws = [make.draw(24, 32, generator_at(0, position)) for position in (4, 7)]
    found = make.of_each(images, [draws[0], draws[1], draws[0]])
    for views, image, position in zip(found, images, (4, 7, 4), strict=True):
        assert torch.allclose(views, make(image, generator_at(0, position)), atol=1e-6)


def test_a_padded_crop_is_a_window_of_the_padded_image_or_its_mirror_image():
    image = torch.rand(3, 16, 24)
    crops = crops_of(image, 40, "pad")
    padded = torch.zeros(3, 20, 30)
    padded[:, 2:18, 3:27] = image
    windows = [padded[:, y : y + 16, x : x + 24] for y in range(5) for x in range(7)]
    plain = sum(any(torch.equal(crop, window) for window in windows) for crop in crops)
    mirrored = sum(any(torch.equal(crop, window.flip(-1)) for window in windows) for crop in crops)
    assert plain + mirrored == 40
    assert 10 < plain < 30


def test_a_resized_crop_is_a_part_of_the_image_at_the_images_size():
    ramp = torch.linspace(0, 1, 32).expand(1, 24, 32)
    crops = crops_of(ramp, 60, "resize")
    inner = crops[:, 0, 12, 4:-4]
    steps = inner.diff(dim=1)
    spread = steps.max(1).values - steps.min(1).values
    assert (spread[inner.min(1).values.gt(0.02) & inner.max(1).values.lt(0.98)] < 1e-5).all()  # a ramp remains one
    assert 15 < int((steps.mean(1) > 0).sum()) < 45  # half of them mirrored
    share = steps.mean(1).abs() / (1 / 31)
    assert share.min() < 0.6
    assert share.max() <= 1 + 1e-4


def test_a_mixture_of_chains_that_do_nothing_is_the_crop(monkeypatch):
    monkeypatch.setattr(module, "_apply", lambda *arguments: None)
    found = AugMix(20)(picture(), generator_at(0, 0))
    assert torch.allclose(found, crops_of(picture(), 20, "pad"), atol=1e-6)


def test_views_mix_between_the_crop_and_its_chains(monkeypatch):
    def black(images, *arguments):
        images.zero_()

    monkeypatch.setattr(module, "_apply", black)
    shares = AugMix(400, crop="resize")(torch.ones(1, 4, 4), generator_at(0, 0)).amax((1, 2, 3))
    assert shares.mean().item() == pytest.approx(1 / 2, abs=0.05)  # Beta(1, 1)
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize(
    ("name", "share", "expected"),
    [
        ("autocontrast", 0.3, lambda x: functional.autocontrast(x)),
        ("equalize", 0.3, lambda x: functional.equalize(x)),
        ("posterize", 0.1, lambda x: functional.posterize(x, bits=4)),
        ("posterize", 0.6, lambda x: functional.posterize(x, bits=2)),
        ("solarize", 0.3, lambda x: functional.solarize(x, threshold=0.7)),
    ],
)
def test_colour_operations_are_torchvisions(name, share, expected):
    image = picture() * 0.8 + 0.1
    assert torch.equal(applied(image, name, share), expected(image))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_turning_and_shearing_are_torchvisions_about_the_centre(name, sign):
    share = 0.7
    shear = math.degrees(math.atan(0.3 * share)) * sign
    options = {"rotate": (-30 * share * sign, [0.0, 0.0]), "shear_x": (0.0, [shear, 0.0])}
    angle, shears = options.get(name, (0.0, [0.0, shear]))
    theirs = functional.affine(
        picture(),
        angle=angle,
        translate=[0, 0],
        scale=1.0,
        shear=shears,
        interpolation=functional.InterpolationMode.BILINEAR,
    )
    ours = applied(picture(), name, share, sign)
    assert not torch.allclose(ours, picture(), atol=0.05)
    assert torch.allclose(ours[:, 8:-8, 10:-10], theirs[:, 8:-8, 10:-10], atol=1e-4)


def test_shifts_move_by_pixels_and_uncover_grey():
    image = torch.rand(3, 12, 24)
    right = applied(image, "translate_x", 3 * 2 / 24)  # two pixels of 24, of a third at most
    assert torch.allclose(right[:, :, :-2], image[:, :, 2:], atol=1e-5)
    assert torch.allclose(right[:, :, -2:], torch.tensor(0.5), atol=1e-5)
    down = applied(image, "translate_y", 3 * 1 / 12, sign=-1)
    assert torch.allclose(down[:, 1:], image[:, :-1], atol=1e-5)


def test_each_image_has_its_own_operation_and_magnitude():
    images = picture().repeat(5, 1, 1, 1)
    numbers = torch.tensor([OPERATIONS.index("rotate"), -1, OPERATIONS.index("solarize")] * 2)[:5]
    shares = torch.tensor([0.2, 0.9, 0.4, 0.5, 0.9])
    expected = torch.stack(
        [picture() if n < 0 else applied(picture(), OPERATIONS[n], s) for n, s in zip(numbers, shares, strict=True)]
    )
    module._apply(images, numbers, shares, torch.ones(5, dtype=torch.long))
    assert torch.allclose(images, expected, atol=1e-6)


def test_no_magnitude_is_the_identity():
    kinds = torch.arange(len(GEOMETRY))
    assert torch.allclose(affine(kinds, torch.zeros(5), 8, 12), torch.eye(2, 3).expand(5, 2, 3))
    assert len(COLOUR) + len(GEOMETRY) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "centre"}, "crop='centre': choose one of pad, resize"),
        ({"views": 0}, "views=0"),
        ({"depth": 0}, "depth=0"),
        ({"severity": 11}, "severity=11"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AugMix(**settings)


@pytest.mark.parametrize(
    "image", [torch.rand(1, 3, 8, 8), torch.rand(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
)
def test_what_is_no_image_in_0_1_is_refused(image):
    with pytest.raises(DataError, match="before it is normalised"):
        AugMix(2)(image, generator_at(0, 0))
