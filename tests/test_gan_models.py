"""A generator and a discriminator of points: where the ring lies, and shapes."""

import torch
from torch.testing import assert_close

from normkit.lab.jobs.adversarial import PointDiscriminator, PointGenerator, centres, ring


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
