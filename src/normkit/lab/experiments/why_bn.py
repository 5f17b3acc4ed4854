"""Why batch normalization helps: internal covariate shift, smoothness of the loss, and the largest learning rate.

A small network learns CIFAR-10 without normalization, with batch normalization, and with batch normalization followed by noise
whose mean and deviation change at every step, so that the inputs of every layer shift more than without any. Along training
three things are measured: how much a layer's gradient turns when the layers before it take their step, which is one
definition of covariate shift; how far means and deviations of a layer's inputs move; and how the loss and its gradient
change along the gradient. Apart from that, runs at many rates show the largest that still learns.

Ours: batches of 64, a bias in the place of the norm that is left out, rate 0.05 with momentum 0.9 and cosine decay for what is
measured along training, gradients compared on the training batch itself, steps of a half to four times the rate along the
gradient; 50 steps and no decay in the search for the largest rate.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.nn import functional as F

from normkit.core.card import Paper
from normkit.lab.data.cifar import download_missing
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.jobs.landscape import moments, moved, smoothness, turns
from normkit.lab.models.noisy_norm import MAKERS
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.report.canvas import FAINT, FULL, log, panels
from normkit.lab.report.drawing import COLOURS, GREY, SEEDS, band, name_ends
from normkit.lab.seeding import reseed
from normkit.lab.stats import ABSENT, by_step, differences, known, mean, spread, tell, where
from normkit.lab.train.images import Stream, load
from normkit.lab.train.walk import OK, Diverged, device, forget, walk

METHODS = {"none": "no norm", "bn": "BatchNorm", "noisy": "BatchNorm + noise"}
HUES = {"none": GREY, "bn": COLOURS[0], "noisy": COLOURS[1]}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"data": "digits", "train": 128, "halve": False, "width": 4, "steps": 4},
    "small": {"data": "cifar10", "train": 1500, "halve": True, "width": 16, "steps": 120},
    "full": {"data": "cifar10", "train": None, "halve": False, "width": 32, "steps": 2000},
}
BATCH, RATE, LOOKS, SHORT = 64, 0.05, 20, 50
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GUESS = math.log(10)  # the loss of guessing one of ten classes


@dataclass(frozen=True)
class Training:
    """One training: measured along the way at the usual rate, or short at some rate to see whether it learns."""

    method: str
    rate: float
    measured: bool
    seed: int
    data: str
    train: int | None
    halve: bool
    width: int
    steps: int

    @property
    def path(self) -> str:
        """The folder."""
        return f"{'along' if self.measured else 'rates'}/{self.method}/rate={self.rate:g}/seed={self.seed}"


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a network, and measures it twenty times meanwhile if the job says so."""
    images = load(job.data, job.train, 500, job.halve)["train"]
    stream = Stream(images, BATCH, job.seed)
    reseed(job.seed, "init")
    model = SmallCNN(MAKERS[job.method], channels=images[0].shape[1], width=job.width).to(device())
    optimizer = torch.optim.SGD(model.parameters(), job.rate, momentum=0.9)
    probe = images[0][: 2 * BATCH]

    def step(number: int) -> dict[str, Any] | None:
        x, y = stream(number)
        looking = job.measured and number % max(1, job.steps // LOOKS) == 0
        found = {**turns(model, (x, y), job.rate), **smoothness(model, (x, y), job.rate)} if looking else {}
        before = moments(model, probe) if looking else []
        if job.measured:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * job.rate * (1 + math.cos(math.pi * (number - 1) / job.steps))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise Diverged
        return {"loss": loss.item(), **found, **(moved(before, moments(model, probe)) if looking else {})}

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    forget(folder)
    losses = [row["loss"] for row in walked.rows]
    rows = [row for row in walked.rows if "turn" in row]
    return {
        "status": walked.status,
        "rows": rows,
        "loss": losses,
        "end": mean(losses[-10:]) if walked.status == OK else None,
    }


def run(bench: Bench) -> dict[str, Any]:
    """Trains every method measured, and with and without normalization at every rate."""
    size = dict(SIZES[bench.scale])
    if bench.epochs:
        size["steps"] = bench.epochs * (size["train"] or 45000) // BATCH
    if bench.download:
        download_missing(size["data"])
    jobs = [Training(method, RATE, True, seed, **size) for seed in bench.seeds for method in METHODS]
    rates = RATES if bench.scale != "tiny" else (0.1, 1e30)  # one that learns and one that diverges
    short = {**size, "steps": min(SHORT, size["steps"])}
    jobs += [
        Training(method, rate, False, seed, **short)
        for seed in bench.seeds
        for method in ("none", "bn")
        for rate in rates
    ]
    done = bench.sweep(train, jobs)
    keys = ("method", "rate", "measured", "seed")
    runs = [{**{key: getattr(job, key) for key in keys}, **one} for job, one in zip(jobs, done, strict=True)]
    return {"runs": runs, "rates": list(rates), "short": short["steps"], **size}


def along(result: dict[str, Any], method: str, key: str) -> list[float | None]:
    """The mean of a measure over training, for each seed."""
    runs = where(result["runs"], method=method, measured=True)
    return [mean(row.get(key) for row in run["rows"]) for run in runs]


def largest(result: dict[str, Any], method: str) -> list[float]:
    """For each seed the largest rate that ends below nine tenths of the loss of guessing."""
    seeds = sorted({run["seed"] for run in result["runs"]})
    found = []
    for seed in seeds:
        runs = where(result["runs"], method=method, measured=False, seed=seed)
        found.append(max([run["rate"] for run in runs if (run["end"] or math.inf) < 0.9 * math.log(10)], default=0.0))
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """Measures along training, and losses at every rate."""
    rows: list[list[Any]] = []
    for method, name in METHODS.items():
        runs = where(result["runs"], method=method, measured=True)
        turns, deviations, betas = (along(result, method, key) for key in ("turn", "mean", "beta"))
        swings = [mean(row["high"] - row["low"] for row in run["rows"]) for run in runs]
        ends = spread([run["end"] for run in runs])
        cells = (
            spread(values, ".3g") for values in (turns, deviations, swings, along(result, method, "predictive"), betas)
        )
        rows.append([name, ends, *cells])
    columns = (
        "norm",
        "loss at the end",
        "cosine",
        "shift of means",
        "range of loss",
        "change of gradient",
        "per distance",
    )
    notes = [
        "Means over training; mean ± standard deviation over seeds. Cosine: of a layer's gradient before and after the layers "
        "before it took their step. Shift: of the means of a layer's inputs in one step, in deviations.",
        "Range of loss, change of gradient and its ratio to the distance: along the gradient, up to four times the rate.",
    ]
    found = [Table(f"Along training at rate {RATE:g}", columns, rows, notes)]
    ends = {
        (method, rate): spread(
            [run["end"] for run in where(result["runs"], method=method, measured=False, rate=rate)], ".2f"
        )
        for method in ("none", "bn")
        for rate in result["rates"]
    }
    rows = [[f"{rate:g}", ends["none", rate], ends["bn", rate]] for rate in result["rates"]]
    title = f"Training loss after {result['short']} steps"
    return [*found, Table(title, ("rate", METHODS["none"], METHODS["bn"]), rows, ["Without: the loss was no number."])]


def remarks(result: dict[str, Any]) -> list[str]:
    """What was seen of each explanation."""
    said = []
    values = {
        key: {method: mean(along(result, method, key)) for method in METHODS}
        for key in ("turn", "mean", "predictive", "beta")
    }
    # A run that diverged counts as guessing, so that the loss of the others is not taken for that of all.
    ends = {
        method: [
            GUESS if run["end"] is None else run["end"] for run in where(result["runs"], method=method, measured=True)
        ]
        for method in METHODS
    }

    def three(key: str, form: str) -> str:
        found = values[key]
        parts = (f"{name} {ABSENT if found[m] is None else format(found[m], form)}" for m, name in METHODS.items())
        return ", ".join(parts)

    said.append(f"Covariate shift as cosine of a layer's gradients (1 is no shift): {three('turn', '.3f')}.")
    said.append(f"Covariate shift as movement of means in one step, in deviations: {three('mean', '.3f')}.")
    gaps = differences(ends["noisy"], ends["none"])
    if gaps.mean is not None:
        text = (
            f"Training loss at the end, all at rate {RATE:g}: BatchNorm with noise behind it {fmean(ends['noisy']):.2f}, "
            f"BatchNorm {fmean(ends['bn']):.2f}, no norm {fmean(ends['none']):.2f}; with noise minus no norm {tell(gaps)}"
        )
        if gaps.low is None or gaps.high is None:
            said.append(f"{text}, of one seed.")
        else:
            word = "lower" if gaps.high < 0 else "higher" if gaps.low > 0 else "not told apart"
            said.append(f"{text}, {word}.")
    said.append(f"Change of the gradient for each unit of distance along it: {three('beta', '.3g')}.")
    rates = {method: largest(result, method) for method in ("none", "bn")}
    said.append(
        "Largest rate that learned, for each seed: "
        + "; ".join(f"{METHODS[m]} {', '.join(f'{rate:g}' for rate in found)}" for m, found in rates.items())
        + "."
    )
    # A larger rate is worth something only where it leads to a lower loss.
    best = {method: lowest(result, method) for method in ("none", "bn")}
    parts = [f"{METHODS[m]} {ABSENT if b is None else f'{b[0]:.2f} (rate {b[1]:g})'}" for m, b in best.items()]
    said.append(f"Lowest mean training loss at any rate after {result['short']} steps: {'; '.join(parts)}.")
    return said


def lowest(result: dict[str, Any], method: str) -> tuple[float, float] | None:
    """The lowest mean loss at any rate, and that rate; a rate at which a seed diverged is passed over."""
    found = []
    for rate in result["rates"]:
        losses = [run["end"] for run in where(result["runs"], method=method, measured=False, rate=rate)]
        if losses and None not in losses:
            found.append((fmean(losses), rate))
    return min(found, default=None)


def figures(result: dict[str, Any]) -> list[Drawing]:
    """The figures of the claim, from what its ``run`` returned."""
    return [
        Drawing(
            "shift",
            lambda: shift(result),
            "Training loss (left) and two measures of covariate shift: the cosine between a layer's gradient before and "
            "after the layers in front of it take their step, 1 where that changes nothing (middle), and how far one step moves "
            f"the channel means of a layer's input, in standard deviations (right); {SEEDS}. More shift is lower in the middle "
            "and higher on the right: compare its order with that of the losses.",
        ),
        Drawing(
            "smoothness",
            lambda: draw_smoothness(result),
            "Along the gradient, at steps of training: the range of the loss, from the mean over seeds of its lowest value to "
            "that of its highest (left), the largest change of the gradient (middle) and the largest change per unit of "
            f"distance (right); in the last two, {SEEDS}. Narrower on the left and lower in the others is smoother.",
        ),
        Drawing(
            "rates",
            lambda: rates(result),
            f"Training loss after {result['short']} steps at each learning rate; {SEEDS}, and lines that leave the top go beyond "
            "4. A cross is a rate at which the loss of a seed was no number; look for the largest rate at which each line is "
            "still low.",
        ),
    ]


def shift(result: dict[str, Any]) -> Figure:
    """The training loss, and covariate shift in two definitions."""
    figure, axes = panels(3, FULL, 2.4)
    titles = ("training loss", "cosine of a layer's gradients", "movement of means, in deviations")
    for axis, key, title in zip(axes, ("loss", "turn", "mean"), titles, strict=True):
        curves(axis, result, key, scaled=axis is axes[2], last=axis is axes[2])
        axis.set_title(title, loc="left")
    axes[1].set_ylim(top=1.02)
    return figure


def draw_smoothness(result: dict[str, Any]) -> Figure:
    """Range of the loss along the gradient, change of the gradient, and its ratio to the distance."""
    figure, axes = panels(3, FULL, 2.4)
    titles = ("loss along the gradient", "largest change of the gradient", "… per unit of distance")
    for method in METHODS:
        rows = [run["rows"] for run in where(result["runs"], method=method, measured=True)]
        steps, low, *_ = by_step(rows, lambda row: row["low"])
        _, high, *_ = by_step(rows, lambda row: row["high"])
        axes[0].fill_between(steps, low, high, color=HUES[method], alpha=0.2, linewidth=0)
        for edge in (low, high):
            axes[0].plot(steps, edge, color=HUES[method], linewidth=1)
    for axis, key in zip(axes[1:], ("predictive", "beta"), strict=True):
        curves(axis, result, key, scaled=True, last=axis is axes[2])
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.margins(x=0)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def curves(axis: Axes, result: dict[str, Any], key: str, scaled: bool, last: bool) -> None:
    """A value along training for each method, means in a band over seeds."""
    ends = []
    for method, name in METHODS.items():
        rows = [run["rows"] for run in where(result["runs"], method=method, measured=True)]
        steps, middle, low, high = by_step(rows, lambda row: row[key])
        if steps:
            band(axis, steps, middle, low, high, color=HUES[method])
            ends.append((middle[-1], name, HUES[method]))
    axis.set_xlabel("step")
    axis.margins(x=0)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if scaled:
        log(axis)
    if last:
        name_ends(axis, ends)


def rates(result: dict[str, Any]) -> Figure:
    """The loss after a few steps at every rate; a cross is a run whose loss was no number."""
    figure, (axis,) = panels(1, 3.6, 2.5)
    ends = []
    for method in ("none", "bn"):
        places, columns = [], []
        for rate in result["rates"]:
            runs = where(result["runs"], method=method, measured=False, rate=rate)
            values = known(run["end"] for run in runs)
            if values:
                places.append(rate)
                columns.append(values)
            if len(values) < len(runs):
                y = 0.04 if method == "none" else 0.09
                axis.plot([rate], [y], "x", color=HUES[method], transform=axis.get_xaxis_transform(), markersize=4)
        if places:
            middle = [mean(values) or 0.0 for values in columns]
            style: dict[str, Any] = {"color": HUES[method], "marker": "o", "markersize": 3}
            band(axis, places, middle, list(map(min, columns)), list(map(max, columns)), **style)
            ends.append((min(middle[-1], 4.0), METHODS[method], HUES[method]))
    axis.set_xscale("log")
    axis.set_ylim(0, 4)
    axis.text(0.02, 0.04, "× loss was no number", transform=axis.transAxes, fontsize=6.5, color=FAINT)
    axis.set(xlabel="learning rate", ylabel=f"training loss after {result['short']} steps")
    name_ends(axis, ends)
    return figure


EXPERIMENT = Experiment(
    name="why-bn",
    kind="claim",
    title="Why batch normalization helps",
    claim=(
        "Batch normalization does not reduce internal covariate shift, and trains fast even where noise adds to it; it makes the "
        "loss smoother along the gradient, so that larger steps can be taken."
    ),
    paper=Paper(
        "Santurkar, Shibani and Tsipras, Dimitris and Ilyas, Andrew and Madry, Aleksander",
        "How Does Batch Normalization Help Optimization?",
        2018,
        "https://arxiv.org/abs/1805.11604",
    ),
    run=run,
    tables=tables,
    figures=figures,
    remarks=remarks,
    scales=("tiny", "small", "full"),
)
