"""Batch normalization before or after the activation, with ReLU and with tanh, with and without a bias before it.

The authors of batch normalization put it between a layer's product and its activation, where the layer needs no bias. Later
practice puts it after the activation too, where the bias counts. A small network learns CIFAR-10 either way.

Ours: batches of 64; a network without a norm has a bias in its place. In the row with a redundant bias the norm cancels it, so
that row is the first but for rounding, and shows how much that and the choice of a rate by one seed change. At small scale 1,500
images at half the resolution are learned for 6 epochs.
"""

from torch import nn

from normkit.activations.batch_norm import CARD, BatchNorm
from normkit.lab.experiments.small_table import Plan, turned
from normkit.lab.models.small_cnn import Shift, SmallCNN

BATCH = 64
ROWS = {
    BATCH: {
        "before": "before ReLU",
        "after": "after ReLU",
        "biased": "before ReLU, redundant bias",
        "none": "no norm, ReLU",
        "before-tanh": "before tanh",
        "after-tanh": "after tanh",
        "none-tanh": "no norm, tanh",
    }
}
PAIRS = (("after", "before"), ("biased", "before"), ("before", "none"), ("after-tanh", "before-tanh"))


def make(row: str, **size: int) -> nn.Module:
    """Makes a row's network."""
    order, _, tanh = row.partition("-")
    norms = {"biased": lambda width: nn.Sequential(Shift(width), BatchNorm(width)), "none": Shift}
    model = SmallCNN(norms.get(order, BatchNorm), **size)
    if order == "after":
        return turned(model, nn.Tanh if tanh else nn.ReLU)
    if tanh:
        for place in range(2, len(model.features), 3):
            model.features[place] = nn.Tanh()
    return model


PLAN = Plan(make, ROWS, {BATCH: (0.03, 0.1, 0.3)}, 6, PAIRS)
EXPERIMENT = PLAN.experiment(
    "bn-order",
    "Batch normalization before or after the activation",
    "Batch normalization belongs before the activation, where it makes a bias redundant; practice has it after it, too.",
    CARD.paper,
)
