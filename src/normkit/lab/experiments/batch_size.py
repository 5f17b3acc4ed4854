"""Test accuracy against the size of training batches, from 128 down to 1, for batch normalization, its rivals and remedies.

A small convolutional network learns CIFAR-10 with SGD whose rate is proportional to the batch size, for the same number of
epochs. Batch normalization's running statistics are judged apart from its training: the same network is evaluated with them,
with statistics re-estimated on training data ("precise"), and with those of test batches of the training's size.

Ours: rate 0.2 at batch 128 with momentum 0.9 and cosine decay; 4 groups in group and batch-channel normalization; sub-batches
of 16 in ghost batch normalization, which at 16 and below is batch normalization and not run; batch renormalization with bounds
up to 3 and 5 over 0.1 to 0.8 and 0.5 of the steps and a momentum of 10 / steps, within 0.01 and 0.1; batch-channel
normalization in its form for micro-batches, with a momentum of 0.1 at batch 128 that follows the learning rate. At small scale
1,500 images are learned, at half the resolution; at full scale all, as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from normkit.activations.batch_channel_norm import BatchChannelNorm
from normkit.activations.batch_renorm import BatchRenorm, RenormSchedule
from normkit.activations.group_norm import CARD
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments import runs
from normkit.lab.experiments.runs import CHANCE, drawn, points, side
from normkit.lab.models.small_cnn import GHOST, MAKERS
from normkit.lab.report.drawing import COLOURS, GREY, SEEDS, SHAPES, across, marked, name_ends
from normkit.lab.stats import differences, known, spread, where
from normkit.lab.train.images import OK, Size, Stream, accuracy, fit
from normkit.surgery.recalibrate import recalibrate
from normkit.surgery.recipe import apply_recipe

METHODS = {
    "bn": "BatchNorm",
    "gn": "GroupNorm",
    "ln": "LayerNorm",
    "gn+ws": "GroupNorm + WS",
    "bcn+ws": "BatchChannelNorm + WS",
    "brn": "BatchRenorm",
    "ghost": "GhostBatchNorm",
}
WAYS = {"running": "running statistics", "precise": "precise statistics", "batch": "test batch's statistics"}
BATCHES = {"tiny": (2, 32), "small": (1, 2, 4, 8, 32, 128), "full": (1, 2, 4, 8, 16, 32, 64, 128)}
BASE, RATE = 128, 0.2
JUDGED = 512  # training images on which statistics are re-estimated


@dataclass(frozen=True)
class Training(Size, path="{0.method}/batch={0.batch}/seed={0.seed}"):
    method: str
    batch: int
    seed: int


def norm(method: str, steps: int) -> Callable[[int], nn.Module]:
    """Builder of a method's norm from channels; batch renormalization's schedule is scaled to the steps of the training."""
    if method == "brn":
        start, r_end, d_end = (max(1, round(part * steps)) for part in (0.1, 0.8, 0.5))
        schedule = RenormSchedule(3.0, 5.0, start, max(r_end, start + 1), max(d_end, start + 1))
        return lambda channels: BatchRenorm(channels, momentum=min(0.1, max(0.01, 10 / steps)), schedule=schedule)
    return MAKERS[method.removesuffix("+ws")]


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a network and evaluates it as it is; batch normalization also with other statistics."""
    images = job.images()
    stream = Stream(images["train"], job.batch, job.seed)
    model = runs.network(job, images, norm(job.method, job.epochs * stream.per_epoch))
    if job.method.endswith("+ws"):
        apply_recipe(model, "keep+ws")
    estimating = [module for module in model.modules() if isinstance(module, BatchChannelNorm)]

    def follow(part: float) -> None:
        for module in estimating:
            # By tenths, as a layer recomputes its rule for a new momentum.
            module.momentum = 0.1 * job.batch / BASE * math.ceil(10 * part) / 10

    walked = fit(model, stream, job.epochs, RATE * job.batch / BASE, job.seed, folder, follow)
    found: dict[str, float | None] = dict.fromkeys(WAYS)
    if walked.status == OK:
        found["running"] = accuracy(model.eval(), images["test"])
        if job.method == "bn":
            # Evaluation moves the running averages, which are overwritten next.
            found["batch"] = accuracy(model.train(), images["test"], job.batch)
            recalibrate(model, images["train"][0][:JUDGED].split(job.batch), limit=None)
            found["precise"] = accuracy(model.eval(), images["test"])
    return {"status": walked.status, "loss": [row["loss"] for row in walked.rows], "accuracy": found}


def run(bench: Bench) -> dict[str, Any]:
    size, batches = runs.size_of(bench, 3), BATCHES[bench.scale]
    each = [(method, batch) for method in METHODS for batch in batches if method != "ghost" or batch > GHOST]
    jobs = [Training(method, batch, seed, **size) for seed in bench.seeds for method, batch in each]
    done = runs.labelled(bench, train, jobs, "method", "batch", "seed")
    return {"runs": done, "batches": list(batches), **size, **runs.source_of(size, bench)}


def scores(result: dict[str, Any], method: str, batch: int, way: str = "running") -> list[float | None]:
    """Accuracies over seeds, in the order of the seeds."""
    return [run["accuracy"].get(way) for run in where(result["runs"], method=method, batch=batch)]


def counted(result: dict[str, Any], method: str, batch: int) -> list[float]:
    """Accuracies over seeds, where a run that diverged counts as guessing: else only the luckier seeds would be compared."""
    return [CHANCE if score is None else score for score in scores(result, method, batch)]


def tables(result: dict[str, Any]) -> list[Table]:
    sizes = result["batches"]

    def cell(method: str, batch: int, way: str = "running") -> str:
        same = method == "ghost" and batch <= GHOST
        return "as BN" if same else spread(scores(result, method, batch, way), ".1f", 100)

    about = (
        f"{result['data']}: {result['train'] or 'all'} training images, {result['epochs']} epochs, rate {RATE:g} at batch {BASE} "
        "and in proportion; mean ± standard deviation over seeds."
    )
    columns = ("norm", *(f"batch {batch}" for batch in sizes))
    rows = [[name, *(cell(method, batch) for batch in sizes)] for method, name in METHODS.items()]
    ways = [[name, *(cell("bn", batch, way) for batch in sizes)] for way, name in WAYS.items()]
    return [
        Table("Test accuracy, %", columns, rows, runs.notes(result, about)),
        Table("Batch normalization, test accuracy by what it normalizes with in evaluation, %", columns, ways),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    sizes = result["batches"]
    smallest, usual = sizes[0], 32 if 32 in sizes else sizes[-1]
    said = []
    for method in ("bn", "gn", "ln"):
        low, high = (counted(result, method, batch) for batch in (smallest, usual))
        if low and high:
            said.append(
                f"{METHODS[method]}: {100 * fmean(high):.1f} % at batch {usual}, {100 * fmean(low):.1f} % at batch {smallest}, a "
                f"change of {points(differences(low, high))}."
            )
    pairs = [("gn", batch) for batch in sizes if batch <= 4]
    for method, batch in [*pairs, *((method, smallest) for method in ("gn+ws", "bcn+ws", "brn"))]:
        gaps = differences(counted(result, method, batch), counted(result, "bn", batch))
        if gaps.mean is not None:
            word = side(gaps, "below", "above", "not told apart from")
            said.append(f"Batch {batch}: {METHODS[method]} is {word} BatchNorm, by {points(gaps)}.")
    ways = {name: scores(result, "bn", smallest, way) for way, name in WAYS.items()}
    parts = ", ".join(f"{name} {spread(found, '.1f', 100)}" for name, found in ways.items() if known(found))
    said.append(f"BatchNorm at batch {smallest}, test accuracy in %, the same networks: {parts or 'all diverged'}.")
    return [*said, runs.diverged(result["runs"], ", and count as guessing in these differences")]


@drawn(
    "accuracy",
    "Test accuracy against the number of images in a training batch: every norm on the left, and on the right batch "
    "normalization evaluated with its running statistics, with statistics re-estimated on training images (precise) "
    f"and with those of the test batch; {SEEDS}. Look at how far each line falls towards a batch of one image.",
)
def _accuracies(result: dict[str, Any]) -> Figure:
    titles = ("all norms", "BatchNorm, by what evaluation normalizes with")
    figure, axes = runs.titled(3.0, *titles, sharey=True)
    norms = [(method, "running", name) for method, name in METHODS.items()]
    ways = [("bn", way, name) for way, name in WAYS.items()]
    for axis, lines in zip(axes, (norms, ways), strict=True):
        ends = []
        for (method, way, name), hue, shape in zip(lines, (GREY, *COLOURS), (*SHAPES, "X"), strict=False):
            percent = {b: [100 * x for x in known(scores(result, method, b, way))] for b in result["batches"]}
            ends += across(axis, name, hue, percent, marker=shape, markersize=3.5, linewidth=1.2)
        marked(axis, result["batches"], 2)
        axis.set_xlabel("images in a training batch")
        name_ends(axis, ends)
    axes[0].set_ylabel("test accuracy, %")
    return figure


EXPERIMENT = Experiment(
    "batch-size", "claim", "Normalization against the size of training batches",
    "Batch normalization loses accuracy as batches become small, while group normalization keeps its own. What was proposed "
        "since then, or for the same end, stands next to it: weight standardization, batch-channel normalization, batch "
        "renormalization, ghost batches.",
    CARD.paper, run, tables, runs.drawings(_accuracies), remarks,
)  # fmt: skip
