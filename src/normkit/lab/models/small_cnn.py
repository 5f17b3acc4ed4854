"""A small convolutional network whose normalization is a parameter, for experiments with many runs."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """Four 3x3 convolutions, each with a norm and ReLU, average pool down to 2x2 and a linear classifier.

    The second and the fourth halve height and width; they have 1, 2, 2 and 4 times `width` channels. Weights of convolutions are
    Kaiming-normal; they have no bias, as the norm has one. The pool leaves four places: after a norm over each sample, means over
    all places hardly tell samples apart. `hidden` is the units of a linear layer with a norm and ReLU before the classifier.

    Shape: (N, channels, H, W) to (N, classes).
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        classes: int = 10,
        channels: int = 3,
        width: int = 16,
        hidden: int = 0,
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
