"""GoogLeNet for images of 32x32: a stem of three convolutions and nine inception blocks."""

from torch import Tensor, nn

from normkit.lab.models.inception import Block, ConvUnit, inception_blocks
from normkit.lab.models.width import scaled

# Blocks 3a to 5b of the paper's table 1.
BLOCKS: tuple[Block | None, ...] = (
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


class GoogLeNet(nn.Module):
    """Stem, nine inception blocks at three scales, global average pool, dropout and a linear classifier.

    The 5x5 convolutions are two 3x3 ones, and there are no auxiliary classifiers.

    Args:
        classes: outputs of the classifier. Default: 10.
        width: factor of every number of channels. Default: 1.
        dropout: of the pooled features. Default: 0.4.

    Shape:
        ``(n, 3, h, w)`` to ``(n, classes)``; 32x32 images are meant, of which the last blocks see 4x4.

    Raises:
        OptionError: `width` is not above 0.

    Reference:
        Szegedy et al. 2015, Going deeper with convolutions, https://arxiv.org/abs/1409.4842; this form for 32x32:
        https://github.com/weiaicunzai/pytorch-cifar100

    >>> [sum(p.numel() for p in GoogLeNet(classes).parameters()) for classes in (10, 100)]
    [6310314, 6402564]
    """

    def __init__(self, classes: int = 10, width: float = 1.0, *, dropout: float = 0.4) -> None:
        super().__init__()
        narrow, wide = scaled(64, width), scaled(192, width)
        self.stem = nn.Sequential(
            ConvUnit(3, narrow, 3, bias=False),
            ConvUnit(narrow, narrow, 3, bias=False),
            ConvUnit(narrow, wide, 3, bias=False),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.blocks, channels = inception_blocks(wide, BLOCKS, width, factorized=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        return self.classifier(self.dropout(self.blocks(self.stem(x)).mean(dim=(2, 3))))


def googlenet(classes: int = 10, width: float = 1.0) -> nn.Module:
    """Makes GoogLeNet for images of 32x32; see :class:`GoogLeNet`.

    Args:
        classes: outputs of the classifier. Default: 10.
        width: factor of every number of channels. Default: 1.
    """
    return GoogLeNet(classes, width)
