"""A small DenseNet for images of 32x32."""

import torch
from torch import Tensor, nn

from normkit.lab.models.width import scaled


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution, and the result concatenated to the input.

    Args:
        inputs: channels that come in.
        growth: channels that are added.
        bottleneck: channels after the 1x1 convolution, in units of `growth`. Default: 2.

    Shape:
        ``(n, inputs, h, w)`` to ``(n, growth + inputs, h, w)``, the new channels first.
    """

    def __init__(self, inputs: int, growth: int, bottleneck: int = 2) -> None:
        super().__init__()
        between = bottleneck * growth
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
        """Adds channels."""
        return torch.cat([self.layers(x), x], dim=1)


def transition(inputs: int, outputs: int) -> nn.Sequential:
    """BN, ReLU, 1x1 convolution and average pool: fewer channels, half the height and width."""
    return nn.Sequential(
        nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.AvgPool2d(2, stride=2)
    )


class DenseNet(nn.Module):
    """Stem, dense blocks with transitions between them, BN, ReLU, global average pool and a linear classifier.

    Args:
        classes: outputs of the classifier. Default: 10.
        width: factor of the growth, and so of every number of channels. Default: 1.
        growth: channels that a layer adds. Default: 16.
        layers: of each dense block. Default: (6, 6, 6, 6).
        bottleneck: channels after a layer's 1x1 convolution, in units of the growth. Default: 2.

    Shape:
        ``(n, 3, h, w)`` to ``(n, classes)``; 32x32 images are meant, of which the last block sees 4x4.

    Raises:
        OptionError: `width` is not above 0.

    Reference:
        Huang et al. 2017, Densely connected convolutional networks, https://arxiv.org/abs/1608.06993; this small form:
        Lippe 2024, UvA Deep Learning Tutorials, https://uvadlc-notebooks.readthedocs.io, tutorial 5.

    >>> [sum(p.numel() for p in DenseNet(classes).parameters()) for classes in (10, 100)]
    [239146, 255796]
    """

    def __init__(
        self,
        classes: int = 10,
        width: float = 1.0,
        *,
        growth: int = 16,
        layers: tuple[int, ...] = (6, 6, 6, 6),
        bottleneck: int = 2,
    ) -> None:
        super().__init__()
        growth = scaled(growth, width)
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        blocks: list[nn.Module] = []
        for place, count in enumerate(layers):
            if place:
                blocks.append(transition(channels, channels // 2))
                channels //= 2
            blocks += [DenseLayer(channels + k * growth, growth, bottleneck) for k in range(count)]
            channels += count * growth
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        return self.classifier(self.norm(self.blocks(self.stem(x))).relu().mean(dim=(2, 3)))


def densenet(classes: int = 10, width: float = 1.0) -> nn.Module:
    """Makes the small DenseNet; see :class:`DenseNet`.

    Args:
        classes: outputs of the classifier. Default: 10.
        width: factor of every number of channels. Default: 1.
    """
    return DenseNet(classes, width)
