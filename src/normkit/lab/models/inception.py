"""Inception networks: a small one for images of 8x8, one of eight blocks and GoogLeNet for images of 32x32."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from normkit.lab.models.width import scaled

# A block: channels after the 1x1 convolutions in front of 3x3 and 5x5, then those of the branches 1x1, 3x3, 5x5 and pooled.
Block = tuple[tuple[int, ...], tuple[int, ...]]


class ConvUnit(nn.Sequential):
    """Convolution, batch normalization and ReLU, keeping height and width; the bias that BN takes away is usual here."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class InceptionBlock(nn.Module):
    """Four branches, concatenated over channels: 1x1, 1x1 to 3x3, 1x1 to 5x5, and max-pool to 1x1.

    `reduce` are channels after the 1x1 convolutions in front of 3x3 and 5x5, `outputs` those of the branches; `factorized` puts
    two 3x3 convolutions in the place of 5x5.

    Shape: ``(n, inputs, h, w)`` to ``(n, sum(outputs), h, w)``.
    """

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
    """Stacks the blocks of `table`, channels times `width`; None there is a max-pool. Gives the channels that go out, too.

    >>> blocks, outputs = inception_blocks(4, (((8, 4), (8, 12, 6, 6)), None, ((8, 4), (8, 12, 6, 6))), width=0.5)
    >>> len(blocks), outputs
    (3, 16)
    """
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
    """A stem, inception blocks, global average pool, dropout and a linear classifier.

    Shape: ``(n, channels, h, w)`` to ``(n, classes)``; the blocks begin with the stem's channels.

    Reference: Szegedy et al. 2015, Going deeper with convolutions, https://arxiv.org/abs/1409.4842
    """

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
    ((32, 16), (16, 32, 8, 8)),
    ((32, 16), (24, 48, 12, 12)),
    None,
    ((32, 16), (24, 48, 12, 12)),
    ((32, 16), (16, 48, 16, 16)),
    ((32, 16), (16, 48, 16, 16)),
    ((32, 16), (32, 48, 24, 24)),
    None,
    ((48, 16), (32, 64, 16, 16)),
    ((48, 16), (32, 64, 16, 16)),
)
# Blocks 3a to 5b of the paper's table 1.
FULL: tuple[Block | None, ...] = (
    ((96, 16), (64, 128, 32, 32)),
    ((128, 32), (128, 192, 96, 64)),
    None,
    ((96, 16), (192, 208, 48, 64)),
    ((112, 24), (160, 224, 64, 64)),
    ((128, 24), (128, 256, 64, 64)),
    ((144, 32), (112, 288, 64, 64)),
    ((160, 32), (256, 320, 128, 128)),
    None,
    ((160, 32), (256, 320, 128, 128)),
    ((192, 48), (384, 384, 128, 128)),
)


def digits_inception(classes: int = 10) -> Inception:
    """Makes the network that ``normkit compare`` trains by default, of three blocks, for images ``(n, 1, 8, 8)``."""
    return Inception((ConvUnit(1, 16, 3),), DIGITS, classes)


def inception8(classes: int = 10, width: float = 1.0) -> Inception:
    """Makes an Inception network of eight blocks for images of 32x32, of which the last blocks see 8x8.

    Every number of channels is times `width`, which must be above 0.

    Reference:
        Szegedy et al. 2015, as :class:`Inception`; this narrow form for 32x32: Lippe 2024, UvA Deep Learning Tutorials,
        https://uvadlc-notebooks.readthedocs.io, tutorial 5.
    """
    return Inception((ConvUnit(3, scaled(64, width), 3),), NARROW, classes, width)


def googlenet(classes: int = 10, width: float = 1.0) -> Inception:
    """Makes GoogLeNet for images of 32x32: three convolutions and nine blocks, of which the last see 4x4.

    The 5x5 convolutions are two 3x3 ones, and there are no auxiliary classifiers. Every number of channels is times `width`.

    Reference:
        Szegedy et al. 2015, as :class:`Inception`; this form for 32x32: https://github.com/weiaicunzai/pytorch-cifar100
    """
    sizes = (3, scaled(64, width), scaled(64, width), scaled(192, width))
    stem = tuple(ConvUnit(wide, wider, 3, bias=False) for wide, wider in pairwise(sizes))
    return Inception(stem, FULL, classes, width, factorized=True, dropout=0.4)
