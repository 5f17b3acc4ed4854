"""Flips and crops in batch: equal to one image at a time, and drawn from the distribution that is said."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.lab.data.augment import FlipAndCrop, Standardize
from normkit.preprocessing.image_standardization import ImageStandardization


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(augment: FlipAndCrop, x: Tensor, seed: int) -> Tensor:
    """Cuts, resizes and flips each image by itself."""
    out = []
    for image, *where, flip in zip(x, *augment.draw(len(x), *x.shape[-2:], drawn(seed)), strict=True):
        top, left, height, width = (int(value) for value in where)
        cut = image[None, :, top : top + height, left : left + width]
        full = functional.interpolate(cut, x.shape[-2:], mode="bilinear", align_corners=False)
        out.append(full.flip(-1) if flip else full)
    return torch.cat(out)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (5, 7)])
@pytest.mark.parametrize(
    "augment", [FlipAndCrop(), FlipAndCrop((0.05, 1.0), (0.5, 2.0)), FlipAndCrop((0.3, 0.3), (1, 1), flip=0)]
)
def test_batch_equals_one_image_at_a_time(augment: FlipAndCrop, shape: tuple[int, int]) -> None:
    x = torch.randn(40, 3, *shape)
    # Places in the image are computed in another order: rounding of a few units in the last place.
    assert_close(augment(x, drawn(3)), one_by_one(augment, x, 3), rtol=1e-4, atol=1e-5)


def test_same_generator_same_images_and_the_global_one_untouched() -> None:
    x, before = torch.randn(4, 3, 8, 8), torch.get_rng_state()
    first, second, other = (FlipAndCrop()(x, drawn(seed)) for seed in (1, 1, 2))
    assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1, 8, 8, dtype=dtype)
    out = FlipAndCrop()(x, drawn())
    assert (out.dtype, out.shape) == (dtype, x.shape)
    # A mean of neighbours is never beyond them; bfloat16 rounds to 3 digits.
    assert out.abs().max() <= x.abs().max() * 1.01


def test_whole_image_and_flips() -> None:
    x = torch.randn(200, 3, 6, 9)
    still = FlipAndCrop(scale=(1, 1), ratio=(1, 1), flip=0)
    # Places are divided by the size and multiplied by it again: an error of a few units in the last place of 9.
    near = {"rtol": 0, "atol": 1e-5}
    assert_close(still(x, drawn()), x, **near)
    assert_close(FlipAndCrop(scale=(1, 1), ratio=(1, 1), flip=1)(x, drawn()), x.flip(-1), **near)
    half = FlipAndCrop(scale=(1, 1), ratio=(1, 1))(x, drawn())
    flipped = torch.isclose(half, x.flip(-1), **near).flatten(1).all(1)
    kept = torch.isclose(half, x, **near).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert 60 < int(flipped.sum()) < 140  # six deviations of 200 fair coins around 100


def test_rectangles_are_where_they_should_be() -> None:
    augment = FlipAndCrop(scale=(0.5, 0.9), ratio=(0.8, 1.25))
    top, left, height, width, _ = augment.draw(20_000, 100, 100, drawn())
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 100) & (left + width <= 100)).all())
    area, ratio = height * width / 1e4, width / height
    # Sides are rounded to whole pixels: up to 1 % of the area and of the ratio.
    assert 0.49 < area.min() < 0.52
    assert 0.88 < area.max() < 0.91
    assert 0.79 < ratio.min() < 0.82
    assert 1.23 < ratio.max() < 1.27
    # Uniform area within 0.5 to 0.9 has mean 0.7; large rectangles of an extreme shape do not fit and are drawn anew.
    assert 0.68 < area.mean() < 0.70
    assert abs(float(ratio.log().mean())) < 0.01
    # A place is uniform among those possible: the mean is in the middle.
    free = height < 100
    assert abs(float((top / (100 - height))[free].mean()) - 0.5) < 0.01


def test_what_can_never_fit_leaves_the_image_whole() -> None:
    augment = FlipAndCrop(scale=(1, 1), ratio=(0.25, 4))
    x = torch.randn(50, 1, 8, 8)
    top, left, height, width, _ = augment.draw(50, 8, 8, drawn())
    assert (height == 8).all()
    assert (width == 8).all()
    assert top.abs().max() == left.abs().max() == 0
    assert_close(augment(x, drawn()).sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": (0, 1)}, r"scale is \(0, 1\); wanted two parts of the area"),
        ({"scale": (0.9, 0.8)}, "scale is"),
        ({"scale": (0.9, 1.2)}, "scale is"),
        ({"ratio": (1.1, 2)}, "ratio is"),
        ({"ratio": (0.5, math.inf)}, "ratio is"),
        ({"flip": 1.5}, "flip is 1.5; wanted a probability"),
    ],
)
def test_options(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        FlipAndCrop(**options)


def test_standardize_is_image_standardization() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 3
    ours, theirs = Standardize.of(images), ImageStandardization(None).fit(images)
    # Theirs divides by 255 in float32.
    assert_close(torch.tensor(ours.mean, dtype=torch.double), theirs.center(), rtol=1e-6, atol=0)
    assert_close(torch.tensor(ours.std, dtype=torch.double), theirs.scale(), rtol=1e-6, atol=0)
    assert_close(ours(images), theirs(images))
    std, mean = torch.std_mean(ours(images), (0, 2, 3), correction=0)
    assert_close(std, torch.ones(3))
    assert_close(mean, torch.zeros(3), rtol=0, atol=1e-6)  # of values near 1 in float32
