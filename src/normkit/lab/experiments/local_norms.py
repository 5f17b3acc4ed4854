"""Local response and local contrast normalization, the norms of early convolutional networks, and batch normalization.

Local response normalization divides each value by what neighbouring channels have at its place; local contrast normalization
subtracts local means first, in the form that articles give or in that of Jarrett et al., over a window of places and all
channels. They stand behind ReLU, as in the networks that they are from, with a bias before it; batch normalization stands before
ReLU.

Ours: the constants of the first deep network on ImageNet (5 channels, alpha 1e-4, beta 0.75, k 2), which divide by nearly the
same number everywhere where values are of the order of 1; so each form is run with alpha 1 too. Batches of 64; at small scale
1,500 images at half the resolution are learned for 6 epochs.
"""

from pathlib import Path
from typing import Any

from torch import nn

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.local_response_norm import CARD, LocalContrastNorm, LocalResponseNorm
from normkit.lab.experiments.small_table import Plan, Training, learn, turned
from normkit.lab.models.noisy_norm import Shift
from normkit.lab.models.small_cnn import SmallCNN

BATCH = 64
ROWS = {
    BATCH: {
        "bn": "BatchNorm",
        "none": "no norm",
        "lrn": "local response",
        "lrn-strong": "local response, alpha 1",
        "lcn": "local contrast",
        "lcn-strong": "local contrast, alpha 1",
        "jarrett": "local contrast, Jarrett",
    }
}
LOCAL = {
    "lrn": lambda alpha: LocalResponseNorm(5, alpha, 0.75, 2.0, torch_compat=False),
    "lcn": lambda alpha: LocalContrastNorm(5, alpha=alpha),
    "jarrett": lambda alpha: LocalContrastNorm(form="jarrett"),
}
PAIRS = (*((row, "none") for row in ROWS[BATCH] if row != "none"), ("lrn-strong", "bn"), ("jarrett", "bn"))


def make(row: str, **size: int) -> nn.Module:
    """Makes a row's network.

    >>> [type(layer).__name__ for layer in make("lrn-strong", width=4).features[:4]]
    ['Conv2d', 'Shift', 'ReLU', 'LocalResponseNorm']
    """
    kind, _, strong = row.partition("-")
    if kind in LOCAL:
        return turned(SmallCNN(lambda channels: LOCAL[kind](1.0 if strong else 1e-4), **size))
    return SmallCNN({"bn": BatchNorm, "none": Shift}[kind], **size)


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a row and evaluates it."""
    return learn(job, folder, make)


EXPERIMENT = Plan(train, ROWS, {BATCH: (0.01, 0.03, 0.1, 0.3)}, 6, PAIRS).experiment(
    "local-norms",
    "Local response and local contrast normalization against batch normalization",
    "Normalization by neighbouring channels or places helps a convolutional network; batch normalization does it better.",
    CARD.paper,
)
