"""Generators and discriminators: sizes, shapes, and what spectral normalization does to them."""

import torch
from torch.testing import assert_close

import normkit as nk
from normkit.lab.models.gan import (
    ImageDiscriminator,
    ImageGenerator,
    PointDiscriminator,
    PointGenerator,
    centres,
    ring,
)


def test_images_come_out_and_go_in() -> None:
    generator, discriminator = ImageGenerator(16, 32), ImageDiscriminator(4)
    images = generator(torch.randn(2, 16))
    assert images.shape == (2, 3, 32, 32)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2, 1)


def test_spectral_normalization_comes_on_by_recipe() -> None:
    discriminator = ImageDiscriminator(4)
    changes = nk.apply_recipe(discriminator, "keep+sn", example=torch.zeros(1, 3, 32, 32))
    assert len(changes.rows) == 8


def test_points_lie_on_the_ring() -> None:
    points = ring(4000, torch.Generator().manual_seed(0))
    distances = torch.cdist(points, centres())
    nearest = distances.min(1)
    # Of a Gaussian in the plane 1.1 % lies beyond three deviations.
    assert (nearest.values > 0.15).float().mean() < 0.02
    assert torch.bincount(nearest.indices, minlength=8).min() > 400
    assert_close(centres(4, 1.0), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)


def test_points_pass_the_perceptrons() -> None:
    assert PointDiscriminator(8)(PointGenerator(3, 8)(torch.zeros(5, 3))).shape == (5, 1)
