"""Input normalization in three steps, after LeCun and others 1998: centre, decorrelate, equalize.

For a linear unit with squared error the Hessian is the second moment of its inputs, H = E[xx']. Descent is stable at rates
below 2 / lambda_max(H), and its slowest direction takes about lambda_max / lambda_min steps. A mean adds the rank-one term mm'
with a large eigenvalue; unequal scales and correlation spread the rest. Each step need not lower the condition number: centring
alone can raise it, as it lowers the middle of the spectrum too. The last one gives H = I.

Ours: 500 points in two dimensions with means (3, -2), scales (10, 0.1) and correlation 0.9; a linear unit without bias that
learns targets linear in the inputs with noise, and a logistic unit that learns their sign. The largest stable rate is found by
bisection, on descent itself.
"""

import math
from bisect import bisect_left
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from normkit.catalogue.methods import method
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments.theory.quadratic import descend, largest_stable
from normkit.lab.report.canvas import FULL
from normkit.lab.report.drawing import COLOURS, Motion
from normkit.lab.report.wording import ABSENT
from normkit.preprocessing.feature_scaling import ZScore
from normkit.preprocessing.whitening import Whitening

STAGES = ("raw", "centred", "decorrelated", "equalized")
POINTS, FRAMES = 500, 32
LIMIT = {"tiny": 50, "small": 3000}  # steps of the logistic unit


def inputs(seed: int) -> Tensor:
    """Points with an offset, unequal scales and correlation."""
    made = torch.Generator().manual_seed(seed)
    z = torch.randn(POINTS, 2, generator=made, dtype=torch.float64)
    mixed = torch.stack([z[:, 0], 0.9 * z[:, 0] + math.sqrt(1 - 0.9**2) * z[:, 1]], dim=1)
    return mixed * torch.tensor([10.0, 0.1], dtype=torch.float64) + torch.tensor([3.0, -2.0], dtype=torch.float64)


def stages(x: Tensor) -> dict[str, Tensor]:
    """The inputs after each step."""
    forms = (Whitening("pca", eps=0.0, equalize=False), Whitening("pca", eps=0.0))
    return dict(zip(STAGES, (x, x - x.mean(0), *(form.fit(x)(x) for form in forms)), strict=True))


def steps_to(h: Tensor, start: Tensor, rate: float) -> int:
    """The steps until the excess loss w'Hw/2 is below a millionth of the first, exactly: iterates are powers of I - rate H."""
    values, vectors = torch.linalg.eigh(h)
    parts = values * (start @ vectors) ** 2

    def done(steps: int) -> bool:
        return bool((parts * (1 - rate * values) ** (2 * steps)).sum() <= 1e-6 * parts.sum())

    return bisect_left(range(2**30), True, key=done)


def logistic_steps(x: Tensor, y: Tensor, limit: int) -> int | None:
    """The steps of a logistic unit until its excess loss is below a thousandth of the first; None beyond the limit.

    The rate is 1 / lambda_max of the bound H/4 on its Hessian, and a little for the penalty. Newton's method finds the
    least loss.
    """
    w = torch.zeros(2, dtype=x.dtype)

    def loss(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, y) + 1e-3 * (x @ w).square().mean()

    def slope(w: Tensor) -> Tensor:
        return x.T @ (torch.sigmoid(x @ w) - y + 2e-3 * (x @ w)) / len(x)

    best = w
    for _ in range(50):
        sure = torch.sigmoid(x @ best)
        curvature = x.T @ ((sure * (1 - sure) + 2e-3)[:, None] * x) / len(x)
        best = best - 0.5 * torch.linalg.solve(curvature, slope(best))
    h, least = (0.25 + 2e-3) * x.T @ x / len(x), loss(best)
    for number in range(limit):
        if loss(w) - least <= 1e-3 * (math.log(2) - least):
            return number
        w = w - slope(w) / torch.linalg.eigvalsh(h)[-1]
    return None


def run(bench: Bench) -> dict[str, Any]:
    """Measures every stage."""
    x = inputs(bench.seeds[0])
    labels = (ZScore().fit(x)(x) @ torch.tensor([1.0, -1.0], dtype=x.dtype) > 0.2).double()
    rows = []
    for name, z in stages(x).items():
        h = z.T @ z / len(z)
        values, vectors = torch.linalg.eigh(h)
        start = vectors @ values.rsqrt()  # the same excess loss along both directions, and at every stage
        low, high = values.tolist()
        path = descend(h, 0 * start, torch.eye(2, dtype=h.dtype), 1 / high, FRAMES, start, 0.0).tolist()
        row = {"stage": name, "condition": high / low, "predicted": 2 / high, "stable": largest_stable(h)}
        row |= {"steps": steps_to(h, start, 1 / high), "logistic": logistic_steps(z, labels, LIMIT[bench.scale])}
        rows.append({**row, "hessian": h.tolist(), "path": path})
    off = max(abs(row["stable"] / row["predicted"] - 1) for row in rows)
    return {"stages": rows, "off": off, "limit": LIMIT[bench.scale]}


def tables(result: dict[str, Any]) -> list[Table]:
    """Every stage."""
    lines = []
    for row in result["stages"]:
        measured = (f"{row[key]:.4g}" for key in ("condition", "predicted", "stable"))
        lines.append([row["stage"], *measured, row["steps"], ABSENT if row["logistic"] is None else row["logistic"]])
    columns = ("inputs", "κ(H)", "2 / λ max", "largest stable rate", "steps, linear unit", "steps, logistic unit")
    notes = [
        "Steps at rate 1 / λ max: of the linear unit to a millionth of the first excess loss, of the logistic unit to a "
        f"thousandth (at most {result['limit']:,})."
    ]
    return [Table("Inputs step by step", columns, lines, notes)]


def remarks(result: dict[str, Any]) -> list[str]:
    """Rates and condition numbers."""
    kappas = ", ".join(f"{row['stage']} {row['condition']:.3g}" for row in result["stages"])
    return [
        f"The largest stable rate is 2 / λ max within {100 * result['off']:.1g} % at every stage.",
        f"Condition numbers: {kappas}; only the last step is sure to lower it.",
    ]


def figures(result: dict[str, Any]) -> list[Drawing]:
    """One animation."""
    caption = (
        f"Descent of a linear unit at rate 1 / lambda_max in {FRAMES} steps, on inputs raw and after each step of "
        "normalization. Level lines are of the loss, about the best weights (cross); axes are the eigenvectors of the "
        "Hessian, both in units of the steep direction's width, and the flat one is cut off: on raw inputs the path falls "
        "across the valley and then stands still. Equalized inputs give circles, and one step suffices."
    )
    return [Drawing("stages", lambda: draw(result), caption, moves=True)]


def draw(result: dict[str, Any]) -> Motion:
    """Descent at every stage."""
    figure = Figure(figsize=(FULL, 1.25), layout="constrained")
    paths = []
    u, v = torch.meshgrid(torch.linspace(-3, 3, 121), torch.linspace(-1.5, 1.5, 61), indexing="xy")
    for axis, row, hue in zip(figure.subplots(1, 4, sharey=True), result["stages"], COLOURS, strict=False):
        values, vectors = torch.linalg.eigh(torch.tensor(row["hessian"], dtype=torch.float64))
        # In widths of the steep direction; the start is within sight along it, and the flat one is shown as far as it fits.
        steep = values[1].sqrt()
        heights, levels = (values[0] / values[1]) * u**2 + v**2, [0.02, 0.2, 0.6, 1.2, 2.2]
        axis.contour(u, v, heights, levels=levels, colors="#c9d1d9", linewidths=0.6)
        flat, across = (torch.tensor(row["path"], dtype=torch.float64) @ vectors * steep).T
        place = (flat / flat[0] * min(flat[0].item(), 2.5)).tolist(), across.tolist()
        axis.plot([0], [0], "+", color="black", markersize=6)
        axis.set(xlim=(-3, 3), ylim=(-1.5, 1.5), xticks=(), yticks=(), aspect="equal")
        axis.grid(visible=False)
        axis.set_title(f"{row['stage']}, κ = {row['condition']:.3g}", loc="left")
        paths.append((axis.plot([], [], "-o", color=hue, markersize=2.6, linewidth=0.8)[0], place))

    def show(number: int) -> None:
        for path, (x, y) in paths:
            path.set_data(x[: number + 1], y[: number + 1])

    show(FRAMES)
    return Motion(figure, FRAMES + 1, show)


EXPERIMENT = Experiment(
    "input-normalization", "demo", "Input normalization, step by step",
    "Inputs with mean 0, without correlation and of equal variance make gradient descent faster.",
    method("whitening").paper, run, tables, figures, remarks, ("tiny", "small"),
)  # fmt: skip
