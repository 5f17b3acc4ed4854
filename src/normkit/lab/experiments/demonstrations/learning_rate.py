"""One learning rate for all weights: gradient descent on a quadratic of two weights.

On E = (a w1² + b w2²) / 2 a step at rate r multiplies w1 by 1 - ra and w2 by 1 - rb. Descent converges if and only if r <
2/max(a, b): the direction of large curvature sets the rate, and the other one crawls. With equal curvatures, as after
normalization, both weights move at one pace. Every iterate here is computed by descent and compared with (1 - ra)^t w1, (1 -
rb)^t w2.
"""

import itertools
from typing import Any

import torch
from matplotlib.figure import Figure

from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import drawings, drawn
from normkit.lab.experiments.theory.quadratic import descend
from normkit.lab.report.drawing import COLOURS, FULL, Motion

CURVATURES = ((1.0, 25.0), (1.0, 1.0))
RATES = (0.02, 0.075, 0.079, 0.081)
SHOWN = (0.02, 0.075, 0.081)
START, STEPS, FRAMES = (10.0, 2.0), 400, 40


def run(bench: Bench) -> dict[str, Any]:
    rows, one = [], torch.eye(2, dtype=torch.float64)
    for curvatures, rate in itertools.product(CURVATURES, RATES):
        a, start = torch.tensor(curvatures, dtype=torch.float64), torch.tensor(START, dtype=torch.float64)
        path, factors = descend(a.diag(), 0 * a, one, rate, STEPS, start, 0.0), 1 - rate * a
        predicted = factors ** torch.arange(STEPS + 1)[:, None] * start
        error = ((path - predicted).abs() / predicted.abs().clamp_min(1e-300)).max().item()
        ends = path[-1].abs() < start.abs()
        row = {"curvatures": curvatures, "rate": rate, "factors": factors.tolist(), "converges": bool(ends.all())}
        rows.append({**row, "path": path[: FRAMES + 1].tolist(), "end": path[-1].norm().item(), "error": error})
    return {"rows": rows}


def tables(result: dict[str, Any]) -> list[Table]:
    lines = []
    for row in result["rows"]:
        given, factors = (f"{v:g}" for v in (*row["curvatures"], row["rate"])), (f"{v:.3f}" for v in row["factors"])
        lines.append([*given, *factors, f"{row['end']:.2g}", "converges" if row["converges"] else "diverges"])
    columns = ("λ₁", "λ₂", "rate", "factor of w₁", "factor of w₂", f"distance after {STEPS} steps", "descent")
    return [Table("Factors per step", columns, lines)]


def remarks(result: dict[str, Any]) -> list[str]:
    first = [row for row in result["rows"] if tuple(row["curvatures"]) == CURVATURES[0]]
    stable = max(row["rate"] for row in first if row["converges"])
    lost = min(row["rate"] for row in first if not row["converges"])
    return [
        f"With curvatures 1 and 25 descent converges at rate {stable:g} and diverges at {lost:g}; 2/25 is 0.08.",
        f"Every iterate is (1 - rate λ)^t times the start, within {max(row['error'] for row in result['rows']):.1g} relative.",
    ]


@drawn(
    "descent",
    f"Gradient descent on a quadratic from the same start, step by step to step {FRAMES}, at three rates (columns). "
    "Above, curvatures 1 and 25: at 0.02 the flat direction crawls, at 0.075 the steep one oscillates, at 0.081 it "
    "diverges, as 2/25 = 0.08. Below, both curvatures 1, as after normalization: the path is straight at any of these "
    "rates. Level lines are of the loss.",
    moves=True,
)
def _draw(result: dict[str, Any]) -> Motion:
    figure = Figure(figsize=(FULL, 3.3), layout="constrained")
    grid = figure.subplots(len(CURVATURES), len(SHOWN), sharex=True, sharey=True)
    u, v = torch.meshgrid(torch.linspace(-12, 12, 81), torch.linspace(-4, 4, 61), indexing="xy")
    drawn = []
    for line, curvatures in zip(grid, CURVATURES, strict=True):
        for axis, rate, hue in zip(line, SHOWN, COLOURS, strict=False):
            row = next(r for r in result["rows"] if tuple(r["curvatures"]) == curvatures and r["rate"] == rate)
            loss = 0.5 * (curvatures[0] * u**2 + curvatures[1] * v**2)
            axis.contour(u, v, loss, levels=[1, 4, 12, 30, 60, 110], colors="#c9d1d9", linewidths=0.6)
            path = axis.plot([], [], "-o", color=hue, markersize=2.4, linewidth=0.8)[0]
            axis.plot([0], [0], "+", color="black", markersize=6)
            axis.set(xlim=(-2, 11), ylim=(-4, 4), xticks=(0, 10), yticks=(-2, 0, 2), aspect="equal")
            axis.grid(visible=False)
            axis.set_title(f"λ = ({curvatures[0]:g}, {curvatures[1]:g}), rate {rate:g}", loc="left")
            drawn.append((path, list(zip(*row["path"], strict=True))))

    def show(number: int) -> None:
        for path, (x, y) in drawn:
            path.set_data(x[: number + 2], y[: number + 2])
        grid[-1][-1].set_xlabel(f"step {number + 1}", loc="right")

    show(FRAMES - 1)
    return Motion(figure, FRAMES, show)


EXPERIMENT = Experiment(
    "learning-rate", "demo", "One learning rate for all directions",
    "One rate serves all weights, so the direction of the largest curvature limits it and the others crawl.",
    None, run, tables, drawings(_draw), remarks, ("tiny", "small"),
)  # fmt: skip
