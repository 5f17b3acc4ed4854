"""Residual networks for images of 32x32: ResNet-18 and ResNet-50."""

from torch import Tensor, nn

from normkit.lab.models.width import scaled

CHANNELS, STRIDES = (64, 128, 256, 512), (1, 2, 2, 2)


class ResidualBlock(nn.Module):
    """relu(f(x) + shortcut(x)), f two 3x3 convolutions, or 1x1, 3x3 and 1x1; each with BN, and ReLU between them.

    `stride` is of the first 3x3 convolution; the shortcut is a 1x1 convolution with BN where shapes differ. An `expansion` above
    1 makes a bottleneck.

    Shape: ``(n, inputs, h, w)`` to ``(n, expansion * channels, h / stride, w / stride)``.
    """

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

    (2, 2, 2, 2) blocks are ResNet-18; (3, 4, 6, 3) with expansion 4, for bottlenecks, are ResNet-50.

    Shape: ``(n, 3, h, w)`` to ``(n, classes)``; 32x32 images are meant, of which the last stage sees 4x4.

    Reference: He et al. 2016, Deep residual learning for image recognition, https://arxiv.org/abs/1512.03385

    >>> sum(p.numel() for p in ResNet((2, 2, 2, 2), 1, classes=100).parameters())
    11220132
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
