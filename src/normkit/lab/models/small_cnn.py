"""A small convolutional network whose normalization is a parameter, for experiments with many runs, and norms for it by name."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.activations.batch_channel_norm import BatchChannelNorm
from normkit.activations.batch_norm import BatchNorm
from normkit.activations.ghost_batch_norm import GhostBatchNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm

GROUPS, GHOST = 4, 16
MEAN, DEVIATION, JITTER = 0.5, 1.25, 0.1


class Shift(nn.Module):
    """A bias for each channel of (N, C, *), which stands in for a norm that is left out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, *[1] * (x.dim() - 2))


class NoisyBatchNorm(nn.Module):
    """Batch normalization, and in training noise behind it whose mean and deviation are redrawn at every call.

    y = s * BN(x) + m. A channel's mean is within 0.5 of 0 and its deviation from 1 to 1.25; m is within 0.1 of the mean, and s
    normal about the deviation with deviation 0.1, both for each sample and channel (Santurkar et al. 2018,
    https://arxiv.org/abs/1805.11604, appendix A).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if not self.training:
            return y
        size = x.shape[:2]
        means = (2 * torch.rand(1, size[1], device=x.device) - 1) * MEAN
        deviations = 1 + (DEVIATION - 1) * torch.rand(1, size[1], device=x.device)
        m = means + (2 * torch.rand(size, device=x.device) - 1) * JITTER
        s = deviations + torch.randn(size, device=x.device) * JITTER
        shape = [*size, *[1] * (x.dim() - 2)]
        return s.view(shape) * y + m.view(shape)


MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "none": Shift,
    "bn": BatchNorm,
    "noisy": NoisyBatchNorm,
    "ln": lambda channels: GroupNorm(1, channels),
    "in": lambda channels: InstanceNorm(channels, affine=True),
    "gn": lambda channels: GroupNorm(GROUPS, channels),
    "bcn": lambda channels: BatchChannelNorm(channels, GROUPS, estimate=True),
    "ghost": lambda channels: GhostBatchNorm(channels, GHOST),
}


class SmallCNN(nn.Module):
    """Four 3x3 convolutions, each with a norm and ReLU, average pool down to 2x2 and a linear classifier.

    The second and the fourth halve height and width; they have 1, 2, 2 and 4 times `width` channels. Weights of convolutions are
    Kaiming-normal; they have no bias, as the norm has one. The pool leaves four places: after a norm over each sample, means over
    all places hardly tell samples apart. `hidden` is the units of a linear layer with a norm and ReLU before the classifier.
    """

    def __init__(
        self, norm: Callable[[int], nn.Module], classes: int = 10, channels: int = 3, width: int = 16, hidden: int = 0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = (channels, width, 2 * width, 2 * width, 4 * width)
        for k, (wide, wider) in enumerate(pairwise(sizes)):
            convolution = nn.Conv2d(wide, wider, 3, stride=1 + k % 2, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, norm(wider), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential()
        if hidden:
            self.hidden.extend([nn.Linear(16 * width, hidden, bias=False), norm(hidden), nn.ReLU(inplace=True)])
        self.classifier = nn.Linear(hidden or 16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.features(x), 2)
        return self.classifier(self.hidden(torch.flatten(pooled, 1)))
