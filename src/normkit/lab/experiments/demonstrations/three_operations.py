"""The three operations of a normalization on a tensor so small that every number can be followed.

Compute mean and variance over the support set, normalize by them, compensate by a linear transform. The tensor has two samples,
two channels and three positions; each channel is a support set, as in batch normalization. The compensation here has the
channel's own deviation as its weight and its mean as its bias, which gives the input back: a network can undo the normalization
if that is best.
"""

import itertools
from typing import Any

import torch
from matplotlib.figure import Figure

from normkit.activations.batch_norm import batch_norm
from normkit.core.moments import moments
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import drawings, drawn
from normkit.lab.report.drawing import COLOURS, FAINT, FULL, Motion

X = (((4.0, 6.0, 8.0), (1.0, 1.5, 2.0)), ((10.0, 12.0, 14.0), (2.5, 3.0, 5.0)))  # samples, channels, positions
EPS = 1e-5
STAGES = ("x", "x - mean", "(x - mean) / deviation", "weight · x̂ + bias")
FRAMES = 12  # of a move from stage to stage


def run(bench: Bench) -> dict[str, Any]:
    x = torch.tensor(X, dtype=torch.float64)
    found = moments(x, (0, 2))
    weight, bias = (found.var + EPS).sqrt().flatten(), found.mean.flatten()
    plain = batch_norm(x, None, None, training=True, eps=EPS)
    y = batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    stages = [x, x - found.mean, plain, y]
    result = {"stages": [stage.tolist() for stage in stages], "error": (y - x).abs().max().item()}
    return {**result, "mean": bias.tolist(), "variance": found.var.flatten().tolist()}


def tables(result: dict[str, Any]) -> list[Table]:
    lines = []
    for n, c in itertools.product(range(len(X)), range(len(X[0]))):
        stages = (" ".join(f"{value:.3g}" for value in stage[n][c]) for stage in result["stages"])
        lines.append([f"sample {n + 1}, channel {c + 1}", *stages])
    pairs = zip(result["mean"], result["variance"], strict=True)
    statistics = []
    for c, (mean, var) in enumerate(pairs, 1):
        statistics.append([f"channel {c}", f"{mean:g}", f"{var:.4f}", f"{(var + EPS) ** 0.5:.4f}"])
    columns = ("support set", "mean, the bias", "variance", "deviation, the weight")
    return [
        Table("1: mean and variance", columns, statistics),
        Table("2 and 3: normalize, compensate", ("elements", *STAGES), lines),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    return [f"With its deviation as weight and its mean as bias the input is restored within {result['error']:.1g}."]


@drawn(
    "operations",
    "The six values of each channel (rows) on a line: as they are, centred, divided by their deviation, and "
    "compensated by weight and bias, which brings them back. Filled dots are of the first sample, hollow ones of the "
    "second; grey lines mark 0 and one deviation on either side after normalization.",
    moves=True,
)
def _draw(result: dict[str, Any]) -> Motion:
    figure = Figure(figsize=(FULL, 2.2), layout="constrained")
    axes = figure.subplots(len(X[0]), 1, sharex=True)
    stages = torch.tensor(result["stages"], dtype=torch.float64)
    dots = []
    for c, axis in enumerate(axes):
        for place in (-1, 0, 1):
            axis.axvline(place, color=FAINT, linewidth=0.9 if place == 0 else 0.5)
        for n in range(len(X)):
            face = COLOURS[c] if n == 0 else "white"
            line = axis.plot([], [], "o", color=COLOURS[c], markerfacecolor=face, markersize=7)[0]
            dots.append((line, stages[:, n, c]))
        axis.set(xlim=(-6, 15), ylim=(-1, 1), yticks=(), ylabel=f"channel {c + 1}")
    axes[0].set_title(STAGES[-1], loc="left")

    def show(number: int) -> None:
        # A rest at each stage, then a move to the next.
        stage, part = divmod(number, 2 * FRAMES)
        part = min(1.0, max(0.0, part / FRAMES - 1))
        after = min(stage + 1, len(STAGES) - 1)
        for line, values in dots:
            line.set_data(((1 - part) * values[stage] + part * values[after]).tolist(), [0] * values.shape[1])
        axes[0].set_title(STAGES[after if part else stage], loc="left")

    last = 2 * FRAMES * (len(STAGES) - 1)
    show(last)
    return Motion(figure, last + 1, show)


EXPERIMENT = Experiment(
    "three-operations", "demo", "The three operations of a normalization",
    "Compute mean and variance, normalize by them, compensate by a linear transform.",
    None, run, tables, drawings(_draw), remarks, ("tiny", "small"),
)  # fmt: skip
