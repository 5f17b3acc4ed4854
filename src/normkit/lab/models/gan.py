"""A generator and a discriminator of points in the plane."""

import math

import torch
from torch import Tensor, nn

SLOPE = 0.1


def ring(
    samples: int, generator: torch.Generator | None = None, modes: int = 8, radius: float = 2.0, std: float = 0.05
) -> Tensor:
    """Draws `samples` points (samples, 2) from a mixture of equal Gaussians whose means lie on a circle."""
    which = torch.randint(modes, (samples,), generator=generator)
    return centres(modes, radius)[which] + std * torch.randn(samples, 2, generator=generator)


def centres(modes: int = 8, radius: float = 2.0) -> Tensor:
    """The means of :func:`ring`'s Gaussians, (modes, 2)."""
    angles = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)


class PointGenerator(nn.Sequential):
    """A perceptron with two hidden layers from noise (N, noise) to points (N, 2)."""

    def __init__(self, noise: int = 8, hidden: int = 64) -> None:
        self.noise = noise
        super().__init__(
            *(nn.Linear(noise, hidden), nn.ReLU()), *(nn.Linear(hidden, hidden), nn.ReLU()), nn.Linear(hidden, 2)
        )


class PointDiscriminator(nn.Sequential):
    """A perceptron from points (N, 2) to one number (N, 1); its activations are Lipschitz with constant 1."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__(
            *(nn.Linear(2, hidden), nn.LeakyReLU(SLOPE)),
            *(nn.Linear(hidden, hidden), nn.LeakyReLU(SLOPE)),
            nn.Linear(hidden, 1),
        )
