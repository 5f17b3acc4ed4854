"""Why batch normalization helps: internal covariate shift, smoothness of the loss, and the largest learning rate.

A small network learns CIFAR-10 without normalization, with batch normalization, and with batch normalization followed by noise
whose mean and deviation change at every step, so that the inputs of every layer shift more than without any; and with E, row
equilibration of the first and the last layer, whose paper claims a smoother loss too. Along training three things are measured:
how much a layer's gradient turns when the layers before it take their step, which is one definition of covariate shift; how far
means and deviations of a layer's inputs move; and how the loss and its gradient change along the gradient. Apart from that,
runs at many rates show the largest that still learns.

Ours: batches of 64, a bias in the place of the norm that is left out, rate 0.05 with momentum 0.9 and cosine decay for what is
measured along training, gradients compared on the training batch itself, steps of a half to four times the rate along the
gradient; 50 steps and no decay in the search for the largest rate.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.core.card import Paper
from normkit.diagnostics.curvature import smoothness
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments import runs
from normkit.lab.experiments.runs import drawn, side
from normkit.lab.models.small_cnn import MAKERS, SmallCNN
from normkit.lab.report.drawing import COLOURS, FAINT, GREY, SEEDS, Curve, End, along, log, name_ends, panels
from normkit.lab.stats import ABSENT, Row, by_step, differences, mean, spread, tell, where
from normkit.lab.train.images import OK, Images, Stream, descend, load, walk
from normkit.surgery.recipe import apply_recipe

METHODS = {
    "none": "no norm",
    "bn": "BatchNorm",
    "noisy": "BatchNorm + noise",
    "none+e": "no norm + E",
    "bn+e": "BatchNorm + E",
}
HUES = dict(zip(METHODS, (GREY, *COLOURS), strict=False))
SEARCHED = ("none", "bn")

STEPS = {"tiny": 4, "small": 120, "full": 2000}
BATCH, RATE, LOOKS, SHORT = 64, 0.05, 20, 50
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Training:
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
        return f"{'along' if self.measured else 'rates'}/{self.method}/rate={self.rate:g}/seed={self.seed}"


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a network, and measures it twenty times meanwhile if the job says so."""
    images = load(job.data, job.train, 500, job.halve)
    stream, probe = Stream(images["train"], BATCH, job.seed), images["train"][0][: 2 * BATCH]
    norm, _, conditioned = job.method.partition("+")
    model = runs.network(job, images, MAKERS[norm])
    if conditioned:
        apply_recipe(model, "keep+e")
    optimizer = torch.optim.SGD(model.parameters(), job.rate, momentum=0.9)

    def step(number: int) -> dict[str, Any] | None:
        x, y = stream(number)
        looking = job.measured and number % max(1, job.steps // LOOKS) == 0
        found = turns(model, (x, y), job.rate) if looking else {}
        found |= vars(smoothness(model, F.cross_entropy, [(x, y)], job.rate)) if looking else {}
        before = moments(model, probe) if looking else []
        if job.measured:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * job.rate * (1 + math.cos(math.pi * (number - 1) / job.steps))
        loss = F.cross_entropy(model(x), y)
        descend(optimizer, loss)
        return {"loss": loss.item(), **found, **(moved(before, moments(model, probe)) if looking else {})}

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    losses = [row["loss"] for row in walked.rows]
    end = mean(losses[-10:]) if walked.status == OK else None
    return {"status": walked.status, "rows": [row for row in walked.rows if "turn" in row], "loss": losses, "end": end}


def run(bench: Bench) -> dict[str, Any]:
    size = runs.size_of(bench, 0)
    del size["test"], size["epochs"]
    size["steps"] = bench.epochs * (size["train"] or 45000) // BATCH if bench.epochs else STEPS[bench.scale]
    tried = RATES if bench.scale != "tiny" else (0.1, 1e30)  # one that learns and one that diverges
    short = {**size, "steps": min(SHORT, size["steps"])}
    searched = [(method, rate) for method in SEARCHED for rate in tried]
    jobs = [Training(method, RATE, True, seed, **size) for seed in bench.seeds for method in METHODS]
    jobs += [Training(method, rate, False, seed, **short) for seed in bench.seeds for method, rate in searched]
    done = runs.labelled(bench, train, jobs, "method", "rate", "measured", "seed")
    return {"runs": done, "rates": list(tried), "short": short["steps"], **size, **runs.source_of(size, bench)}


def measured(result: dict[str, Any], method: str) -> list[Row]:
    """The runs that were measured along the way."""
    return where(result["runs"], method=method, measured=True)


def searched(result: dict[str, Any], method: str) -> list[Row]:
    """The short runs at many rates."""
    return where(result["runs"], method=method, measured=False)


def over_training(result: dict[str, Any], method: str, key: str) -> list[float | None]:
    """The mean of a measure over training, for each seed."""
    return [mean(row.get(key) for row in run["rows"]) for run in measured(result, method)]


def tables(result: dict[str, Any]) -> list[Table]:
    lines: list[list[Any]] = []
    for method, name in METHODS.items():
        own = measured(result, method)
        turns, shifts, *more = (over_training(result, method, k) for k in ("turn", "mean", "predictive", "beta"))
        swings = [mean(row["high"] - row["low"] for row in run["rows"]) for run in own]
        cells = (spread(values, ".3g") for values in (turns, shifts, swings, *more))
        lines.append([name, spread([run["end"] for run in own]), *cells])
    columns = ("norm", "loss at the end", "cosine", "shift of means")
    columns += ("range of loss", "change of gradient", "per distance")
    said = runs.notes(
        result,
        "Means over training; mean ± standard deviation over seeds. Cosine: of a layer's gradient before and after the layers "
        "in front of it take their step. Shift: of the means of a layer's inputs in one step, in standard deviations.",
        "Range of loss, change of gradient and its ratio to the distance: along the gradient, up to four times the rate.",
    )
    rows = [[METHODS[method], *runs.losses(searched(result, method))] for method in SEARCHED]
    heads = ("norm", *(f"rate {rate:g}" for rate in result["rates"]))
    return [
        Table(f"Along training at rate {RATE:g}", columns, lines, said),
        Table(f"Training loss after {result['short']} steps", heads, rows, ["Without: the loss was no number."]),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    def each(key: str, form: str) -> str:
        found = {name: mean(over_training(result, method, key)) for method, name in METHODS.items()}
        return ", ".join(f"{name} {ABSENT if value is None else format(value, form)}" for name, value in found.items())

    # A run that diverged counts as guessing, so that the loss of the others is not taken for that of all.
    found = {method: [run["end"] for run in measured(result, method)] for method in METHODS}
    ends = {method: [runs.GUESS if end is None else end for end in some] for method, some in found.items()}
    said = [
        f"Covariate shift as the cosine of a layer's gradients (1 is no shift): {each('turn', '.3f')}.",
        f"Covariate shift as movement of means per step, in standard deviations: {each('mean', '.3f')}.",
    ]
    gaps = differences(ends["noisy"], ends["none"])
    if gaps.mean is not None:
        word = "of one seed" if gaps.low is None else side(gaps, "lower", "higher")
        said.append(
            f"Training loss at the end, all at rate {RATE:g}: BatchNorm with noise behind it {fmean(ends['noisy']):.2f}, "
            f"BatchNorm {fmean(ends['bn']):.2f}, no norm {fmean(ends['none']):.2f}; with noise minus no norm {tell(gaps)}, "
            f"{word}."
        )
    said.append(f"Change of the gradient per unit of distance along it: {each('beta', '.3g')}.")
    large = [f"{METHODS[m]} {', '.join(f'{rate:g}' for rate in runs.largest(searched(result, m)))}" for m in SEARCHED]
    said.append(f"Largest rate that learned, for each seed: {'; '.join(large)}.")
    # A larger rate is worth something only where it leads to a lower loss.
    lows = ((METHODS[m], runs.lowest(searched(result, m))) for m in SEARCHED)
    low = [f"{name} {ABSENT if one is None else f'{one[0]:.2f} (rate {one[1]:g})'}" for name, one in lows]
    said.append(f"Lowest mean training loss at any rate after {result['short']} steps: {'; '.join(low)}.")
    return said


@drawn(
    "shift",
    "Training loss (left) and two measures of covariate shift: the cosine between a layer's gradient before and "
    "after the layers in front of it take their step, 1 where that changes nothing (middle), and how far one step moves "
    f"the channel means of a layer's input, in standard deviations (right); {SEEDS}. More shift is lower in the middle "
    "and higher on the right: compare its order with that of the losses.",
)
def _shift(result: dict[str, Any]) -> Figure:
    titles = ("training loss", "cosine of a layer's gradients", "movement of means, in deviations")
    figure, axes = runs.titled(2.4, *titles)
    ends: list[End] = []
    for axis, key in zip(axes, ("loss", "turn", "mean"), strict=True):
        ends = along(axis, curves(result), lambda row, key=key: row[key])
    axes[1].set_ylim(top=1.02)
    log(axes[2])
    name_ends(axes[2], ends)
    return figure


@drawn(
    "smoothness",
    "Along the gradient, at steps of training: the range of the loss, from the mean over seeds of its lowest value to "
    "that of its highest (left), the largest change of the gradient (middle) and the largest change per unit of "
    f"distance (right); in the last two, {SEEDS}. Narrower on the left and lower in the others is smoother.",
)
def _smoothness(result: dict[str, Any]) -> Figure:
    titles = ("loss along the gradient", "largest change of the gradient", "… per unit of distance")
    figure, axes = runs.titled(2.4, *titles)
    for _, hue, rows, _ in curves(result):
        steps, low, *_ = by_step(rows, lambda row: row["low"])
        high = by_step(rows, lambda row: row["high"])[1]
        axes[0].fill_between(steps, low, high, color=hue, alpha=0.2, linewidth=0)
        for edge in (low, high):
            axes[0].plot(steps, edge, color=hue, linewidth=1)
    ends = along(axes[0], [], lambda row: None)
    for axis, key in zip(axes[1:], ("predictive", "beta"), strict=True):
        ends = along(axis, curves(result), lambda row, key=key: row[key])
        log(axis)
    name_ends(axes[2], ends)
    return figure


def curves(result: dict[str, Any]) -> list[Curve]:
    """The measured runs of each method."""
    return [Curve(name, HUES[m], [run["rows"] for run in measured(result, m)]) for m, name in METHODS.items()]


@drawn(
    "rates",
    f"Training loss after {{short}} steps at each learning rate; {SEEDS}. Guessing is the grey line; lines "
    "that leave the top go beyond 4. A cross is a rate at which the loss of a seed was no number; look for the largest "
    "rate at which each line is still low.",
)
def _rates(result: dict[str, Any]) -> Figure:
    figure, (axis,) = panels(1, 3.6, 2.5)
    ends = runs.draw_rates(axis, {METHODS[m]: (HUES[m], searched(result, m)) for m in SEARCHED})
    for y, method in zip((0.04, 0.09), SEARCHED, strict=True):
        lost = [rate for rate, found in runs.by_rate(searched(result, method)).items() if None in found]
        style: dict[str, Any] = {"color": HUES[method], "transform": axis.get_xaxis_transform(), "markersize": 4}
        axis.plot(lost, [y] * len(lost), "x", **style)
    axis.set_ylim(0, 4)
    axis.text(0.02, 0.04, "× loss was no number", transform=axis.transAxes, fontsize=6.5, color=FAINT)
    axis.set_ylabel(f"training loss after {result['short']} steps")
    name_ends(axis, [(min(value, 4.0), name, hue) for value, name, hue in ends])
    return figure


def groups(model: SmallCNN) -> list[list[nn.Parameter]]:
    """The parameters of each layer, a convolution with its norm, first layer first."""
    blocks = [model.features[k : k + 3] for k in range(0, len(model.features), 3)]
    return [list(block.parameters()) for block in [*blocks, model.classifier]]


def gradients(model: SmallCNN, batch: Images, seed: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients of all parameters on a batch, with noise drawn by a seed; nothing is changed but running averages."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss = F.cross_entropy(model(batch[0]), batch[1])
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def turns(model: SmallCNN, batch: Images, rate: float) -> dict[str, float]:
    """How the gradient of a layer's weight changes when the layers before it take a step: cosine and relative length."""
    old, new = copy.deepcopy(model), copy.deepcopy(model)
    _, first = gradients(old, batch, 0)
    places = {id(parameter): place for place, parameter in enumerate(old.parameters())}
    layers, changed = groups(old), groups(new)
    cosines, lengths = [], []
    with torch.no_grad():
        for parameter, gradient in zip(new.parameters(), first, strict=True):
            parameter -= rate * gradient
    for k in range(1, len(layers)):
        mixed = copy.deepcopy(old)
        with torch.no_grad():
            for target, source in zip(groups(mixed)[:k], changed[:k], strict=True):
                for parameter, value in zip(target, source, strict=True):
                    parameter.copy_(value)
        place = places[id(max(layers[k], key=Tensor.dim))]  # the weight, which a parametrization puts behind the bias
        one, other = first[place].flatten(), gradients(mixed, batch, 1)[1][place].flatten()
        cosines.append(F.cosine_similarity(one, other, dim=0).item())
        lengths.append(((one - other).norm() / one.norm().clamp_min(1e-30)).item())
    return {"turn": fmean(cosines), "change": fmean(lengths)}


@torch.no_grad()
def moments(model: SmallCNN, probe: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Means and deviations of the channels that enter each layer but the first, on images that stay the same."""
    twin, found = copy.deepcopy(model), []
    x = probe
    for place, module in enumerate(twin.features):
        x = module(x)
        if place % 3 == 2:
            found.append((x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3))))
    return found


def moved(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """How far means and deviations of layers' inputs have moved, in parts of the deviation; means over layers and channels."""

    def part(which: int) -> float:
        pairs = zip(before, after, strict=True)
        return fmean(((b[which] - a[which]).abs() / a[1].clamp_min(1e-12)).mean().item() for a, b in pairs)

    return {"mean": part(0), "deviation": part(1)}


EXPERIMENT = Experiment(
    "why-bn", "claim", "Why batch normalization helps",
    "Batch normalization does not reduce internal covariate shift, and trains fast even where noise adds to it; it makes the "
        "loss smoother along the gradient, so that larger steps can be taken.",
    Paper("Santurkar, Shibani and Tsipras, Dimitris and Ilyas, Andrew and Madry, Aleksander",
          "How Does Batch Normalization Help Optimization?", 2018, "https://arxiv.org/abs/1805.11604"),
    run, tables, runs.drawings(_shift, _smoothness, _rates), remarks,
)  # fmt: skip
