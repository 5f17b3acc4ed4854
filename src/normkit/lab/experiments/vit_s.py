"""A vision transformer on CIFAR-100, with LN, LN + weight norm and LN + weight conditioning, and what LN is needed for.

The paper announces ViT-S on CIFAR-100 in a supplement that is not public: there are no printed numbers. Ours: patches of 4, 384
features, 12 blocks, 6 heads; AdamW at 5e-4, weight decay 0.05, batches of 512, 200 epochs, 10 of them warm-up, cosine decay,
gradients clipped at 1; W and E on every layer of attention, MLP, patches and head. A side claim of the paper is run too: without
LN gradients vanish. So there are rows without LN, with E alone, and with BN in the place of LN.

At small scale images are 16x16, features 192, blocks 6, heads 3; 2,048 images are learned for 5 epochs in batches of 128, one of
them warm-up, and each row takes the better of two rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from normkit.lab import task
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments import classification
from normkit.lab.experiments.classification import PAPER, Plan, Row, difference, early, study, verdicts
from normkit.lab.experiments.classification import figures as curves_of
from normkit.lab.experiments.runs import drawn
from normkit.lab.models.vit import Patches, VisionTransformer
from normkit.lab.report.drawing import FULL, log, name_ends, panels, styles
from normkit.lab.sweep import Work
from normkit.lab.train.learning import Training, images, make
from normkit.lab.train.parallel import start_fabric

LN, W, E = "LN", "LN + W", "LN + E"
TWO, UNIT, NONE, ONLY, BN = "LN + E, two layers", "LN, unit rows at the start", "no LN", "E without LN", "BN for LN"
ROWS = (Row(LN, "keep"), Row(W, "keep+wn"), Row(E, "keep+e@all"))
CONTROLS = (
    Row(TWO, "keep+e"),
    Row(UNIT, "keep", unit="all"),
    Row(NONE, "none", once=True),
    Row(ONLY, "none+e@all", once=True),
    Row(BN, "bn", once=True),
)
HOW: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "clip": 1.0}
# The model and the rest of a training, by scale.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny_vit", {"epochs": 1}),
    "small": ("small_vit", {"size": 16, "train": 2048, "val": 1000, "test": 1000, "epochs": 5, "warmup": 1.0}),
    "full": ("vit_s", {"epochs": 200, "warmup": 10.0, "batch_size": 512}),
}


@dataclass(frozen=True)
class Gradients(Work, path="{0.rows[0].data}/gradients"):
    """Takes the length of the gradient in each block, before the first step, for several rows."""

    rows: tuple[Training, ...]


def small_vit(classes: int = 100) -> nn.Module:
    """Makes the small scale's transformer: images of 16x16, patches of 4, 192 features, 6 blocks, 3 heads."""
    return VisionTransformer(size=16, patch=4, features=192, depth=6, heads=3, classes=classes)


def tiny_vit(classes: int = 10) -> nn.Module:
    """Makes a transformer for digits: patches of 4, 12 features, 2 blocks, 3 heads."""
    model = VisionTransformer(size=8, patch=4, features=12, depth=2, heads=3, classes=classes)
    model.patch_embed = Patches(8, 4, 12, channels=1)
    return model


def gradients(job: Gradients, folder: Path) -> dict[str, Any]:
    """Measures, for each row, the norm of the loss's gradient by the weights of each block, on the first batch."""
    first = job.rows[0]
    data = images(first.data, first.size, first.train, first.val, first.test)
    device = start_fabric(first.settings()).device
    inputs, targets = data.train.batch(torch.arange(min(first.batch_size, len(data.train))), device)
    found = {}
    for row in job.rows:
        model = make(row, data).to(device)
        task.loss(task.call(model, inputs), targets).backward()
        assert isinstance(model, VisionTransformer)
        squares = [[p.grad.square().sum() for p in block.parameters() if p.grad is not None] for block in model.blocks]
        found[row.name] = [float(torch.stack(some).sum().sqrt()) for some in squares]
    return found


def plan(scale: str) -> Plan:
    """The plan at a scale."""
    model, size = SIZES[scale]
    model = model if scale == "full" else f"{__name__}:{model}"
    base = Training("digits" if scale == "tiny" else "cifar100", model, "", "keep", 0.0, 0, **HOW, **size)
    return Plan("ViT on CIFAR-100", base, ROWS, CONTROLS, (1e-4, 5e-4, 2e-3) if scale == "full" else (5e-4, 2e-3))


def run(bench: Bench) -> dict[str, Any]:
    planned = plan(bench.scale)
    found = study(bench, [planned])
    rows = [replace(planned.base, name=row.name, recipe=row.recipe, unit=row.unit) for row in (*ROWS, *CONTROLS)]
    rows = [replace(row, rate=planned.rates[0], seed=bench.seeds[0]) for row in rows]
    (found["gradients"],) = bench.sweep(gradients, [Gradients(tuple(rows))])
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    found = result["gradients"].items()
    lines = [[name, some[0], some[-1], some[0] / some[-1] if some[-1] else None] for name, some in found]
    notes = ["Norm of the loss's gradient by all parameters of a block, before the first step, first seed."]
    more = Table("Gradients at the start", ["method", "first block", "last block", "ratio"], lines, notes)
    return [*classification.tables(result), more]


def remarks(result: dict[str, Any]) -> list[str]:
    (label,) = result["parts"]
    said = verdicts(result)
    for one, other in ((E, UNIT), (E, TWO), (ONLY, NONE), (NONE, LN)):
        if text := difference(result, label, one, other):
            said.append(f"Test Top-1 of {one} minus {other}: {text}.")
    without, with_ln = result["gradients"][NONE], result["gradients"][LN]
    return [
        *said,
        f"Gradients at the start: with LN {with_ln[0]:.3g} in the first block and {with_ln[-1]:.3g} in the last; without "
        f"{without[0]:.3g} and {without[-1]:.3g}. {_vanish(without, with_ln)}",
        "E on every layer makes its rows unit, 1.3 to 3.6 times as long as at the start of such a transformer, by the layer; the "
        "row that begins with unit rows and is free afterwards computes the same at the start. E's effective steps are longer, "
        "as its raw rows are shorter, so each has a rate of its own.",
        *early(result, " of a small transformer; differences are those of early training."),
    ]


def _vanish(without: list[float], with_ln: list[float]) -> str:
    part, falls = without[0] / with_ln[0], without[0] / without[-1]
    size = f"{1 / part:.3g} times smaller" if part < 1 else f"{part:.3g} times larger"
    depth = "they fall towards the first block" if falls < 0.5 else "they do not fall towards the first block"
    return f"So without LN they are {size} in the first block, and {depth} (first over last {falls:.2f})."


@drawn(
    "gradients",
    "Norm of the loss's gradient by all parameters of each block before the first step, with the first seed; methods "
    "that start alike lie on one another. Gradients that vanish on their way back are a line that falls from the last "
    "block to the first.",
)
def _blocks(result: Mapping[str, Any]) -> Figure:
    figure, (axis,) = panels(1, FULL * 0.62, 2.6)
    found = result["gradients"]
    ends = []
    for (name, lengths), look in zip(found.items(), styles(list(found), LN), strict=True):
        places = range(1, len(lengths) + 1)
        axis.plot(places, lengths, look.marker, linestyle=look.line, color=look.light, markersize=3.4)
        ends.append((lengths[-1], name, look.light))
    axis.set(xlabel="block", ylabel="norm of the gradient at the start")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    log(axis)
    figure.canvas.draw()
    name_ends(axis, ends)
    return figure


EXPERIMENT = Experiment(
    "vit-s", "reproduce", "ViT-S on CIFAR-100",
    "Weight conditioning on top of LN improves a vision transformer, and without LN its gradients vanish.",
    PAPER, run, tables, lambda result: [*curves_of(result), _blocks(result)], remarks,
)  # fmt: skip
