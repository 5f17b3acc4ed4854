"""The Inception network with eight blocks, for images of 32x32."""

from torch import Tensor, nn

from normkit.lab.models.inception import Block, ConvUnit, inception_blocks
from normkit.lab.models.width import scaled

BLOCKS: tuple[Block | None, ...] = (
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


class Inception8(nn.Module):
    """Stem, eight inception blocks at three scales, global average pool and a linear classifier.

    Args:
        classes: outputs of the classifier. Default: 10.
        width: factor of every number of channels. Default: 1.

    Shape:
        ``(n, 3, h, w)`` to ``(n, classes)``; 32x32 images are meant, of which the last blocks see 8x8.

    Raises:
        OptionError: `width` is not above 0.

    Reference:
        Szegedy et al. 2015, Going deeper with convolutions, https://arxiv.org/abs/1409.4842; this narrow form for 32x32:
        Lippe 2024, UvA Deep Learning Tutorials, https://uvadlc-notebooks.readthedocs.io, tutorial 5.

    >>> [sum(p.numel() for p in Inception8(classes).parameters()) for classes in (10, 100)]
    [260650, 272260]
    """

    def __init__(self, classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        self.stem = ConvUnit(3, scaled(64, width), 3)
        self.blocks, channels = inception_blocks(scaled(64, width), BLOCKS, width)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def inception8(classes: int = 10, width: float = 1.0) -> nn.Module:
    """Makes the Inception network with eight blocks; see :class:`Inception8`.

    Args:
        classes: outputs of the classifier. Default: 10.
        width: factor of every number of channels. Default: 1.
    """
    return Inception8(classes, width)
