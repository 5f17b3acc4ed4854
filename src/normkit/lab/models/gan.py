"""Generators and discriminators: of points in the plane, and of 32x32 images after the paper of spectral normalization."""

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


class ImageGenerator(nn.Sequential):
    """SN-GAN's standard generator: a linear layer to 4x4, three transposed convolutions up to 32x32, and tanh.

    Batch normalization follows each transposed convolution, which has no bias for that reason (our choice).

    Shape: (N, noise) to (N, 3, 32, 32), within -1 and 1; `channels` after the linear layer are halved by each step.

    Reference:
        Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks, https://arxiv.org/abs/1802.05957, table 3
    """

    def __init__(self, noise: int = 128, channels: int = 512) -> None:
        self.noise = noise
        layers: list[nn.Module] = [nn.Linear(noise, 16 * channels), nn.Unflatten(1, (channels, 4, 4))]
        for wide in (channels, channels // 2, channels // 4):
            up = nn.ConvTranspose2d(wide, wide // 2, 4, stride=2, padding=1, bias=False)
            layers += [up, nn.BatchNorm2d(wide // 2), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(channels // 8, 3, 3, padding=1), nn.Tanh())


class ImageDiscriminator(nn.Sequential):
    """SN-GAN's standard discriminator without its normalization: seven convolutions down to 4x4, and a linear layer.

    Spectral normalization comes on by ``normkit.apply_recipe(model, "keep+sn")``. Source: as :class:`ImageGenerator`.

    Shape: (N, 3, 32, 32) to (N, 1); `channels` of the first two convolutions are doubled by each step.
    """

    def __init__(self, channels: int = 64) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.LeakyReLU(SLOPE, inplace=True)]
        for wide in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(wide, wide, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE, inplace=True)]
            layers += [nn.Conv2d(wide, 2 * wide, 3, padding=1), nn.LeakyReLU(SLOPE, inplace=True)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(16 * 8 * channels, 1))
