"""Whether batch normalization removes the linear part of a layer, with a linear bypass around the network.

An article reads batch normalization as removing purely linear effects, so that layers concentrate on the non-linear part, as a
linear layer could always supply the rest. A branch (three linear layers, with batch normalization or without, of ReLU or with
no activation) learns the sum of a linear and a non-linear map of its inputs, alone or added to a linear map of the input.
Measured is the linear share of what the branch gives: the part of its variance that the best linear map of the input explains.
Batch normalization takes a mean and a scale from each channel, which leaves a linear function linear.

Ours: 1,024 inputs of 16 features, widths of 64, Adam at 0.003, whole batches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.activations.batch_norm import BatchNorm
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import drawings, drawn, labelled, titled
from normkit.lab.report.bands import dots, rows_of
from normkit.lab.report.drawing import COLOURS
from normkit.lab.seeding import reseed
from normkit.lab.stats import mean, spread, where
from normkit.lab.train.walk import descend, walk

KINDS = [
    (act, norm, bypass) for act in ("linear", "ReLU") for norm in ("no norm", "BatchNorm") for bypass in (False, True)
]
STEPS = {"tiny": 4, "small": 400, "full": 4000}


@dataclass(frozen=True)
class Training:
    """One branch that learns."""

    activation: str
    norm: str
    bypass: bool
    seed: int
    steps: int

    @property
    def path(self) -> str:
        """The folder."""
        kind = f"{self.activation}/{self.norm}".replace(" ", "-")
        return f"{kind}/{'bypass' if self.bypass else 'alone'}/seed={self.seed}"


def linear_share(x: Tensor, y: Tensor) -> float:
    """The part of the variance of y that an affine map of x explains."""
    wide = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1).double()
    rest = y.double() - wide @ torch.linalg.lstsq(wide, y.double()).solution
    return 1 - (rest.square().sum() / (y - y.mean(0)).double().square().sum()).item()


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a branch, and measures its linear share."""
    reseed(job.seed, "data")
    x = torch.randn(1024, 16)
    y = x @ torch.randn(16, 8) / 4 + torch.tanh(x @ torch.randn(16, 32)) @ torch.randn(32, 8) / 32**0.5
    reseed(job.seed, "init")
    layers: list[nn.Module] = []
    for wide in (16, 64):
        layers += [nn.Linear(wide, 64), *([BatchNorm(64)] if job.norm == "BatchNorm" else [])]
        layers += [nn.ReLU()] if job.activation == "ReLU" else []
    model = nn.ModuleDict({"branch": nn.Sequential(*layers, nn.Linear(64, 8)), "bypass": nn.Linear(16, 8)})
    optimizer = torch.optim.Adam(model.parameters(), 0.003)

    def step(number: int) -> dict[str, float] | None:
        loss = F.mse_loss(model["branch"](x) + job.bypass * model["bypass"](x), y)
        descend(optimizer, loss)
        return {"loss": loss.item()} if number == job.steps else None

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    with torch.no_grad():
        shares = {"share": linear_share(x, model["branch"](x)), "target": linear_share(x, y)}
    return {"loss": walked.rows[-1]["loss"], **shares}


def run(bench: Bench) -> dict[str, Any]:
    """Trains every branch."""
    steps = bench.epochs or STEPS[bench.scale]
    jobs = [Training(*kind, seed, steps) for seed in bench.seeds for kind in KINDS]
    return {"runs": labelled(bench, train, jobs, "activation", "norm", "bypass", "seed"), "steps": steps}


def rows(result: dict[str, Any]) -> dict[str, list[Any]]:
    """The runs of every branch, by its name."""
    named = {f"{act}, {norm}{', bypass' * bypass}": (act, norm, bypass) for act, norm, bypass in KINDS}
    return {name: where(result["runs"], activation=k[0], norm=k[1], bypass=k[2]) for name, k in named.items()}


def tables(result: dict[str, Any]) -> list[Table]:
    """Losses and linear shares."""
    found = rows(result).items()
    lines = [[name, *(spread([run[key] for run in runs]) for key in ("loss", "share"))] for name, runs in found]
    target = spread([run["target"] for run in result["runs"]])
    note = f"Mean ± standard deviation over seeds. The linear share of the targets is {target}."
    return [Table(f"After {result['steps']} steps", ("branch", "loss", "linear share of the branch"), lines, [note])]


def remarks(result: dict[str, Any]) -> list[str]:
    """What the norm and the bypass change."""
    share = {name: mean(run["share"] for run in runs) for name, runs in rows(result).items()}
    told = [
        f"{name} {share[f'ReLU, {name}']:.3f} alone and {share[f'ReLU, {name}, bypass']:.3f} with a bypass"
        for name in ("no norm", "BatchNorm")
    ]
    return [
        f"A branch without activation stays linear under BatchNorm (share {share['linear, BatchNorm']:.3f}): what the norm "
        "takes away are a mean and a scale of each channel.",
        f"Linear share of a ReLU branch: {'; '.join(told)}.",
    ]


@drawn(
    "linear-part",
    "The loss (left) and the part of the variance of a branch's output that a linear map of the input explains "
    "(right); a dot is a seed. If batch normalization removed the linear part, its rows would lie further left on the "
    "right side than those without it.",
)
def _parts(result: dict[str, Any]) -> Figure:
    figure, axes = titled(2.4, "loss", "linear share of the branch", sharey=True)
    for axis, key in zip(axes, ("loss", "share"), strict=True):
        for place, (name, runs) in enumerate(rows(result).items()):
            dots(axis, place, [run[key] for run in runs], COLOURS["BatchNorm" in name])
    rows_of(axes[0], list(rows(result)))
    return figure


EXPERIMENT = Experiment(
    "linear-part", "claim", "Does batch normalization remove the linear part?",
    "Batch normalization removes purely linear effects, so that layers concentrate on the non-linear part of the data.",
    None, run, tables, drawings(_parts), remarks,
)  # fmt: skip
