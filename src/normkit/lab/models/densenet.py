"""A small DenseNet for images of 32x32."""

import torch
from torch import Tensor, nn

from normkit.lab.models.width import scaled

GROWTH, LAYERS, BOTTLENECK = 16, (6, 6, 6, 6), 2  # channels per layer, layers per block, channels between in growths


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution, and the result concatenated in front of the input.

    Shape: ``(n, inputs, h, w)`` to ``(n, growth + inputs, h, w)``.
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        between = BOTTLENECK * growth
        # ReLU must not write in place here: where the norm is taken out, its input is the one that is kept.
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, between, 1, bias=False),
            nn.BatchNorm2d(between),
            nn.ReLU(),
            nn.Conv2d(between, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layers(x), x], dim=1)


def transition(inputs: int, outputs: int) -> nn.Sequential:
    """BN, ReLU, 1x1 convolution and average pool: fewer channels, half the height and width."""
    return nn.Sequential(
        nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.AvgPool2d(2, stride=2)
    )


class DenseNet(nn.Module):
    """Stem, dense blocks with transitions between them, BN, ReLU, global average pool and a linear classifier.

    Shape: ``(n, 3, h, w)`` to ``(n, classes)``; 32x32 images are meant, of which the last block sees 4x4. `width` is a factor
    of the growth, and so of every number of channels.

    Reference:
        Huang et al. 2017, Densely connected convolutional networks, https://arxiv.org/abs/1608.06993; this small form:
        Lippe 2024, UvA Deep Learning Tutorials, https://uvadlc-notebooks.readthedocs.io, tutorial 5.
    """

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        growth = scaled(GROWTH, width)
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        blocks: list[nn.Module] = []
        for place, count in enumerate(LAYERS):
            if place:
                blocks.append(transition(channels, channels // 2))
                channels //= 2
            blocks += [DenseLayer(channels + k * growth, growth) for k in range(count)]
            channels += count * growth
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.blocks(self.stem(x))).relu().mean(dim=(2, 3)))


def densenet(classes: int = 10, width: float = 1.0) -> nn.Module:
    """Makes the small DenseNet for `classes`, every number of channels times `width`; see :class:`DenseNet`."""
    return DenseNet(classes, width)
