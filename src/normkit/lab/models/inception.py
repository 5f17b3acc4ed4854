"""A small Inception-style network for 8x8 images."""

import torch
from torch import Tensor, nn

from normkit.lab.models.width import scaled

# A block: channels after the 1x1 convolutions in front of 3x3 and 5x5, then those of the branches 1x1, 3x3, 5x5 and pooled.
Block = tuple[tuple[int, int], tuple[int, int, int, int]]


class ConvUnit(nn.Sequential):
    """Convolution, batch normalization and ReLU, keeping height and width.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: height and width of the kernel, odd.
        bias: of the convolution. Default: True, although the normalization takes it away, as networks of this kind have it.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class InceptionBlock(nn.Module):
    """Four branches side by side, concatenated over channels: 1x1, 1x1 to 3x3, 1x1 to 5x5, and max-pool to 1x1.

    Args:
        inputs: channels that come in.
        reduce: channels after the 1x1 convolutions in front of the 3x3 and the 5x5 one.
        outputs: channels of the branches, in the order above.
        factorized: two 3x3 convolutions in place of the 5x5 one. Default: False.

    Shape:
        ``(n, inputs, h, w)`` to ``(n, sum(outputs), h, w)``.

    Reference:
        Szegedy et al. 2015, Going deeper with convolutions, https://arxiv.org/abs/1409.4842
    """

    def __init__(
        self, inputs: int, reduce: tuple[int, int], outputs: tuple[int, int, int, int], *, factorized: bool = False
    ) -> None:
        super().__init__()
        one, three, five, pooled = outputs
        self.one = ConvUnit(inputs, one, 1)
        self.three = nn.Sequential(ConvUnit(inputs, reduce[0], 1), ConvUnit(reduce[0], three, 3))
        first = ConvUnit(inputs, reduce[1], 1)
        wide = (
            (ConvUnit(reduce[1], five, 3), ConvUnit(five, five, 3)) if factorized else (ConvUnit(reduce[1], five, 5),)
        )
        self.five = nn.Sequential(first, *wide)
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvUnit(inputs, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Runs the branches and concatenates them."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], dim=1)


def inception_blocks(
    inputs: int, table: tuple[Block | None, ...], width: float = 1.0, *, factorized: bool = False
) -> tuple[nn.Sequential, int]:
    """Stacks inception blocks.

    Args:
        inputs: channels that come in, as they are.
        table: a block each; None is a max-pool that halves height and width.
        width: factor of the channels of `table`. Default: 1.
        factorized: of each block. Default: False.

    Returns:
        The blocks, and the channels that go out.

    >>> blocks, outputs = inception_blocks(4, (((8, 4), (8, 12, 6, 6)), None, ((8, 4), (8, 12, 6, 6))), width=0.5)
    >>> len(blocks), outputs
    (3, 16)
    """
    blocks: list[nn.Module] = []
    for block in table:
        if block is None:
            blocks.append(nn.MaxPool2d(3, stride=2, padding=1))
            continue
        reduce, (one, three, five, pooled) = block
        outputs = scaled(one, width), scaled(three, width), scaled(five, width), scaled(pooled, width)
        before = scaled(reduce[0], width), scaled(reduce[1], width)
        blocks.append(InceptionBlock(inputs, before, outputs, factorized=factorized))
        inputs = sum(outputs)
    return nn.Sequential(*blocks), inputs


class DigitsInception(nn.Module):
    """Stem, one inception block at 8x8, two at 4x4, global average pool and a linear classifier.

    Args:
        classes: outputs of the classifier. Default: 10.

    Shape:
        ``(n, 1, 8, 8)`` to ``(n, classes)``.

    >>> model = DigitsInception()
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in model.parameters())
    7390
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = ConvUnit(1, 16, 3)
        self.blocks = nn.Sequential(
            InceptionBlock(16, (8, 4), (8, 12, 6, 6)),
            nn.MaxPool2d(3, stride=2, padding=1),
            InceptionBlock(32, (8, 4), (8, 12, 6, 6)),
            InceptionBlock(32, (8, 4), (8, 12, 6, 6)),
        )
        self.classifier = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def digits_inception(classes: int = 10) -> nn.Module:
    """Makes the network that ``normkit compare`` trains by default.

    Args:
        classes: outputs of the classifier. Default: 10.

    Reference:
        Szegedy et al. 2015, Going deeper with convolutions, https://arxiv.org/abs/1409.4842
    """
    return DigitsInception(classes)
