"""Four improvements of batch normalization, alone and together, at a medium and at a small batch size.

Inference example weighing counts the example's own statistics in evaluation, with a weight chosen on held-out images; ghost
batch normalization takes statistics over 16 examples of a larger batch; weight decay draws gains to 1 and biases to 0; and for
small batches statistics are taken over groups of channels and of examples, as group and batch normalization in one. Together:
ghost batches (at the medium size) or groups (at the small one), with decay and weighing.

Ours: decoupled weight decay of 0.01 in all rows, which leaves out gains and biases where the row does not decay them; 4 groups
of channels, of 2 examples; batches of 64 and of 8. At small scale 1,500 images at half the resolution are learned for 3 epochs.
"""

import torch
from torch import nn

from normkit.activations.batch_group_norm import CARD, BatchGroupNorm
from normkit.lab.experiments.small_table import Plan, Training
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.train.images import Images, accuracy
from normkit.surgery.example_weighing import choose_alpha

MEDIUM, SMALL, GHOST, GROUPS, EXAMPLES, DECAY = 64, 8, 16, 4, 2, 0.01
TITLES = {
    "bn": "BatchNorm",
    "bn+weighing": "example weighing",
    "ghost": "ghost batches of 16",
    "bn+decay": "decay of γ and β",
    "group": "groups of 4 x 2",
    "ghost+decay+weighing": "together",
    "group+decay+weighing": "together",
}
ROWS = {
    MEDIUM: {row: title for row, title in TITLES.items() if row != "group+decay+weighing"},
    SMALL: {row: title for row, title in TITLES.items() if not row.startswith("ghost")},
}
ABOUT = "Example weighing changes evaluation alone: at the same rate its difference from batch normalization is not of training."
RATES = {MEDIUM: (0.03, 0.1, 0.3), SMALL: (0.01, 0.03)}


def make(row: str, **size: int) -> nn.Module:
    """Makes a row's network; its norms take statistics over the groups of the row."""
    kinds = {"bn": (None, None), "ghost": (None, GHOST), "group": (GROUPS, EXAMPLES)}
    groups, examples = kinds[row.partition("+")[0]]
    return SmallCNN(lambda channels: BatchGroupNorm(channels, groups, examples, momentum=0.1), **size)


@torch.no_grad()
def decay(model: nn.Module, job: Training, part: float) -> None:
    """Shrinks weights, and gains and biases of norms towards 1 and 0 where the row does."""
    by = job.rate * part * DECAY
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.mul_(1 - by)
        elif isinstance(module, BatchGroupNorm) and "decay" in job.row and module.weight is not None:
            module.weight.lerp_(torch.ones_like(module.weight), by)
            if module.bias is not None:
                module.bias.mul_(1 - by)


def settle(model: nn.Module, job: Training, held_out: Images) -> None:
    """Chooses the example's weight where the row has one."""
    if "weighing" in job.row:
        choose_alpha(model, lambda model: accuracy(model, held_out))


PLAN = Plan(make, ROWS, RATES, 3, [(row, "bn") for row in TITLES if row != "bn"], ABOUT, decay, settle)
EXPERIMENT = PLAN.experiment(
    "four-improvements",
    "Four improvements of batch normalization",
    "Batch normalization improves by weighing in the example at inference, by ghost batches, by decay of its gains and biases, "
    "and in small batches by groups of channels.",
    CARD.paper,
)
