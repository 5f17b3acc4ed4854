"""Convolutional networks for small images: DenseNet, Inception networks and GoogLeNet, ResNet-18 and ResNet-50."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from normkit.core.errors import OptionError

GROWTH, LAYERS, BOTTLENECK = 16, (6, 6, 6, 6), 2  # channels per layer, layers per block, channels between in growths
CHANNELS, STRIDES = (64, 128, 256, 512), (1, 2, 2, 2)


def scaled(channels: int, width: float) -> int:
    """Gives a number of channels times `width`, a factor above 0; rounded, at least 1."""
    if not 0 < width < float("inf"):
        raise OptionError(f"width is {width}; wanted a factor above 0, such as 0.5")
    return max(1, round(channels * width))


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution, and the result concatenated in front of the input."""

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


class DenseNet(nn.Module):
    """Stem, dense blocks with transitions between them, BN, ReLU, global average pool and a linear classifier.

    Images ``(n, 3, 32, 32)`` are meant, of which the last block sees 4x4 (Huang et al. 2017, https://arxiv.org/abs/1608.06993;
    this small form: Lippe 2024, UvA Deep Learning Tutorials, https://uvadlc-notebooks.readthedocs.io, tutorial 5).
    """

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        growth = scaled(GROWTH, width)
        channels = 2 * growth
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        blocks: list[nn.Module] = []
        for place, count in enumerate(LAYERS):
            if place:
                # Fewer channels, half the height and width.
                convolution = nn.Conv2d(channels, channels // 2, 1, bias=False)
                blocks.append(
                    nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), convolution, nn.AvgPool2d(2, stride=2))
                )
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


# A block: channels after the 1x1 convolutions in front of 3x3 and 5x5, then those of the branches 1x1, 3x3, 5x5 and pooled.
Block = tuple[tuple[int, ...], tuple[int, ...]]


class ConvUnit(nn.Sequential):
    """Convolution, batch normalization and ReLU, keeping height and width; the bias that BN takes away is usual here."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class InceptionBlock(nn.Module):
    """Four branches, concatenated over channels: 1x1, 1x1 to 3x3, 1x1 to 5x5 (or two 3x3), and max-pool to 1x1."""

    def __init__(
        self, inputs: int, reduce: tuple[int, ...], outputs: tuple[int, ...], *, factorized: bool = False
    ) -> None:
        super().__init__()
        one, three, five, pooled = outputs
        self.one = ConvUnit(inputs, one, 1)
        self.three = nn.Sequential(ConvUnit(inputs, reduce[0], 1), ConvUnit(reduce[0], three, 3))
        self.five = nn.Sequential(ConvUnit(inputs, reduce[1], 1), ConvUnit(reduce[1], five, 3 if factorized else 5))
        if factorized:
            self.five.append(ConvUnit(five, five, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvUnit(inputs, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


def inception_blocks(
    inputs: int, table: tuple[Block | None, ...], width: float = 1.0, *, factorized: bool = False
) -> tuple[nn.Sequential, int]:
    """Stacks the blocks of `table`, channels times `width`; None there is a max-pool. Gives the channels that go out, too."""
    blocks: list[nn.Module] = []
    for block in table:
        if block is None:
            blocks.append(nn.MaxPool2d(3, stride=2, padding=1))
            continue
        before, outputs = (tuple(scaled(channels, width) for channels in some) for some in block)
        blocks.append(InceptionBlock(inputs, before, outputs, factorized=factorized))
        inputs = sum(outputs)
    return nn.Sequential(*blocks), inputs


class Inception(nn.Module):
    """A stem, inception blocks, global average pool, dropout and a linear classifier (Szegedy et al. 2015, arXiv:1409.4842)."""

    def __init__(
        self,
        stem: tuple[ConvUnit, ...],
        table: tuple[Block | None, ...],
        classes: int,
        width: float = 1.0,
        *,
        factorized: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        outputs = stem[-1][0].out_channels
        assert isinstance(outputs, int)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = stem[0] if len(stem) == 1 else nn.Sequential(*stem, pool)
        self.blocks, channels = inception_blocks(outputs, table, width, factorized=factorized)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.blocks(self.stem(x)).mean(dim=(2, 3))))


SMALL: Block = ((8, 4), (8, 12, 6, 6))
DIGITS = (SMALL, None, SMALL, SMALL)
NARROW: tuple[Block | None, ...] = (
    ((32, 16), (16, 32, 8, 8)), ((32, 16), (24, 48, 12, 12)), None,
    ((32, 16), (24, 48, 12, 12)), ((32, 16), (16, 48, 16, 16)), ((32, 16), (16, 48, 16, 16)), ((32, 16), (32, 48, 24, 24)), None,
    ((48, 16), (32, 64, 16, 16)), ((48, 16), (32, 64, 16, 16)),
)  # fmt: skip
# Blocks 3a to 5b of the paper's table 1.
FULL: tuple[Block | None, ...] = (
    ((96, 16), (64, 128, 32, 32)), ((128, 32), (128, 192, 96, 64)), None,
    ((96, 16), (192, 208, 48, 64)), ((112, 24), (160, 224, 64, 64)), ((128, 24), (128, 256, 64, 64)),
    ((144, 32), (112, 288, 64, 64)), ((160, 32), (256, 320, 128, 128)), None,
    ((160, 32), (256, 320, 128, 128)), ((192, 48), (384, 384, 128, 128)),
)  # fmt: skip


def digits_inception(classes: int = 10) -> Inception:
    """Makes the network that ``normkit compare`` trains by default, of three blocks, for images ``(n, 1, 8, 8)``."""
    return Inception((ConvUnit(1, 16, 3),), DIGITS, classes)


def inception8(classes: int = 10, width: float = 1.0) -> Inception:
    """Makes an Inception network of eight blocks for images of 32x32: Lippe 2024, UvA Deep Learning Tutorials, tutorial 5."""
    return Inception((ConvUnit(3, scaled(64, width), 3),), NARROW, classes, width)


def googlenet(classes: int = 10, width: float = 1.0) -> Inception:
    """Makes GoogLeNet for 32x32, its 5x5 convolutions as two 3x3, as https://github.com/weiaicunzai/pytorch-cifar100 has it."""
    sizes = (3, scaled(64, width), scaled(64, width), scaled(192, width))
    stem = tuple(ConvUnit(wide, wider, 3, bias=False) for wide, wider in pairwise(sizes))
    return Inception(stem, FULL, classes, width, factorized=True, dropout=0.4)


class ResidualBlock(nn.Module):
    """relu(f(x) + shortcut(x)), f two 3x3 convolutions with BN or, where the `expansion` is above 1, a bottleneck."""

    def __init__(self, inputs: int, channels: int, stride: int, expansion: int = 1) -> None:
        super().__init__()
        outputs = expansion * channels
        if expansion == 1:
            branch = [*_unit(inputs, channels, 3, stride), nn.ReLU(inplace=True), *_unit(channels, outputs, 3)]
        else:
            branch = [
                *(*_unit(inputs, channels, 1), nn.ReLU(inplace=True)),
                *(*_unit(channels, channels, 3, stride), nn.ReLU(inplace=True)),
                *_unit(channels, outputs, 1),
            ]
        self.branch = nn.Sequential(*branch)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_unit(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Stem of one 3x3 convolution, four stages of residual blocks, global average pool and a linear classifier.

    (2, 2, 2, 2) blocks are ResNet-18; (3, 4, 6, 3) with expansion 4, for bottlenecks, are ResNet-50. Images of 32x32 are meant,
    of which the last stage sees 4x4 (He et al. 2016, https://arxiv.org/abs/1512.03385).
    """

    def __init__(self, blocks: tuple[int, ...], expansion: int, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        inputs = scaled(CHANNELS[0], width)
        self.stem = nn.Sequential(*_unit(3, inputs, 3), nn.ReLU(inplace=True))
        stages = []
        for count, full, stride in zip(blocks, CHANNELS, STRIDES, strict=True):
            channels = scaled(full, width)
            stage = []
            for place in range(count):
                stage.append(ResidualBlock(inputs, channels, 1 if place else stride, expansion))
                inputs = expansion * channels
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(x)).mean(dim=(2, 3)))


def resnet18(classes: int = 10, width: float = 1.0) -> nn.Module:
    """Makes ResNet-18 for images of 32x32, every number of channels times `width`; see :class:`ResNet`."""
    return ResNet((2, 2, 2, 2), 1, classes, width)


def resnet50(classes: int = 10, width: float = 1.0) -> nn.Module:
    """Makes ResNet-50 for images of 32x32, every number of channels times `width`; see :class:`ResNet`."""
    return ResNet((3, 4, 6, 3), 4, classes, width)


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)
