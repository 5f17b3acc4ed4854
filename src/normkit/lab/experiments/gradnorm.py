"""GradNorm's toy: two tasks that differ in scale by a hundred, through one network.

Task i is to regress s_i tanh((B + e_i) x) with s = (1, 100), B shared and e_i its own; losses are squared errors, so the second
is ten thousand times the first. GradNorm weights them so that their gradients at the last shared layer are balanced, and tasks
that lag are pushed. Compared are equal weights, GradNorm as published (``additive``), GradNorm with steps relative to the
weights, and the weights 1 / s_i², which nobody knows beforehand. A task's progress is its loss by that at the start.

Ours: inputs of 250, outputs of 100, four shared layers of 100 with ReLU as in the paper; 400 steps of Adam at 0.001 on batches
of 100.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from normkit.catalogue.methods import method
from normkit.gradients.grad_norm import GradNorm
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import drawings, drawn, grid, titled
from normkit.lab.report.drawing import COLOURS, GREY, SEEDS, Curve, along, log, name_ends
from normkit.lab.seeding import reseed
from normkit.lab.stats import spread, where
from normkit.lab.sweep import Work
from normkit.lab.train.images import descend, walk

WAYS = {
    "equal": "equal weights",
    "additive": "GradNorm, as published",
    "multiplicative": "GradNorm, relative steps",
    "inverse": "weights 1 / s²",
}
SCALES, STEPS = (1.0, 100.0), {"tiny": 6, "small": 400, "full": 20_000}


@dataclass(frozen=True)
class Training(Work, path="{0.way}/seed={0.seed}"):
    way: str
    seed: int
    steps: int


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains the network on both tasks."""
    reseed(job.seed, "tasks")
    # Scaled so that arguments of tanh have about variance 1; the paper's saturate it, and take far longer to learn.
    shared = torch.randn(250, 100)
    maps = [(shared + 0.35**0.5 * torch.randn(250, 100)) / (1.35 * 250) ** 0.5 for _ in SCALES]
    reseed(job.seed, "init")
    sizes = (250, 100, 100, 100, 100)
    trunk = nn.Sequential(*(part for k in range(4) for part in (nn.Linear(sizes[k], sizes[k + 1]), nn.ReLU())))
    heads = nn.ModuleList(nn.Linear(100, 100) for _ in SCALES)
    model = nn.ModuleList([trunk, heads])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    balance = GradNorm(2, step="multiplicative" if job.way == "multiplicative" else "additive")
    fixed = torch.tensor([1 / s**2 for s in SCALES] if job.way == "inverse" else [1.0, 1.0])
    fixed = 2 * fixed / fixed.sum()
    last = trunk[6].get_parameter("weight")

    def step(number: int) -> dict[str, Any] | None:
        x = torch.randn(100, 250)
        hidden = trunk(x)
        tasks = zip(heads, SCALES, maps, strict=True)
        losses = torch.stack([F.mse_loss(head(hidden), s * torch.tanh(x @ m)) for head, s, m in tasks])
        weights = fixed if job.way in ("equal", "inverse") else balance.weights.clone()
        total = (fixed * losses).sum() if job.way in ("equal", "inverse") else balance(losses, last)
        descend(optimizer, total)
        looking = number == 1 or number % max(1, job.steps // 20) == 0
        return {"losses": losses.tolist(), "weights": weights.tolist()} if looking else None

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer, "balance": balance}, step, job.seed)
    first = walked.rows[0]["losses"]
    paces = ([a / b for a, b in zip(row["losses"], first, strict=True)] for row in walked.rows)
    return {"rows": [{**row, "pace": pace} for row, pace in zip(walked.rows, paces, strict=True)]}


def run(bench: Bench) -> dict[str, Any]:
    steps = bench.epochs or STEPS[bench.scale]
    return {"runs": grid(bench, train, Training, {"way": WAYS}, steps=steps), "steps": steps}


def ends(result: dict[str, Any], way: str, key: str, task: int) -> list[float]:
    """A number at the end, for each seed."""
    return [run["rows"][-1][key][task] for run in where(result["runs"], way=way)]


def tables(result: dict[str, Any]) -> list[Table]:
    forms = [("pace", 0, ".3f"), ("pace", 1, ".3f"), ("weights", 0, ".4f"), ("weights", 1, ".4f")]
    lines = [[name, *(spread(ends(result, way, key, k), form) for key, k, form in forms)] for way, name in WAYS.items()]
    columns = ("weights", "loss by the first, s = 1", "s = 100", "weight, s = 1", "s = 100")
    notes = ["Mean ± standard deviation over seeds; a lower loss is further."]
    return [Table(f"After {result['steps']} steps", columns, lines, notes)]


def remarks(result: dict[str, Any]) -> list[str]:
    told = []
    for way, name in WAYS.items():
        one, other = (fmean(ends(result, way, "pace", task)) for task in (0, 1))
        told.append(f"{name} {one:.2f} and {other:.2f}")
    return [f"Losses by those at the start, task of scale 1 and of scale 100: {'; '.join(told)}."]


@drawn(
    "balance",
    "The loss by that at the start of the task of scale 1 (left) and 100 (middle), and the weight of the first task, "
    f"of 2 in all (right); {SEEDS}. A balanced training brings both losses down together; look at which lines fall on "
    "the left.",
)
def _balance(result: dict[str, Any]) -> Figure:
    figure, axes = titled(2.3, "loss, s = 1", "loss, s = 100", "weight, s = 1")
    rows = {way: [run["rows"] for run in where(result["runs"], way=way)] for way in WAYS}
    hues = zip(WAYS.items(), (GREY, *COLOURS), strict=False)
    curves = [Curve(name, hue, rows[way]) for (way, name), hue in hues]
    found = []
    for axis, (key, task) in zip(axes, (("pace", 0), ("pace", 1), ("weights", 0)), strict=True):
        found = along(axis, curves, lambda row, key=key, task=task: row[key][task])
    log(*axes[:2])
    name_ends(axes[2], found)
    return figure


EXPERIMENT = Experiment(
    "gradnorm", "claim", "Two tasks of unequal scale, balanced by GradNorm",
    "Weights that balance the gradients of several losses let tasks of very different scale be learned together.",
    method("grad_norm").paper, run, tables, drawings(_balance), remarks,
)  # fmt: skip
