"""What weight conditioning costs: milliseconds and megabytes per step, and inference before and after folding.

The paper says that conditioning makes each iteration longer than other normalizations do, and nothing once it is folded into the
weights; its numbers are in a supplement that is not public. Ours: all methods side by side in one process, in an order shuffled
again each round; a step is forward, backward and SGD, on batches of 128 (4,096 points of a field). The first row is measured
twice, as if it were two methods: how far "again" is from 1 is how far these rounds can be trusted. Full scale: up to 100 rounds,
as many as ten minutes per network give, but at least 6. Small scale: two minutes per network, on batches of 32, in which weights
weigh four times as much, but for the field; the transformer is a tiny one. Inference is of a quarter of a batch.

In transformers LN stands where BN does elsewhere. The field is a NeRF's fine network; BN stands between its trunk's layers and
their ReLU. W and E are on all layers of it ("all") or on the first and last.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from normkit.lab.data.split import Data, Split
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.classification import PAPER
from normkit.lab.experiments.runs import drawings, drawn
from normkit.lab.models.convolutional import densenet, inception8
from normkit.lab.models.nerf import RadianceField
from normkit.lab.models.vit import vit_s, vit_tiny
from normkit.lab.report.drawing import COLOURS, FULL, GREY, INK, rows_of
from normkit.lab.report.experiment_tables import tell_ratio
from normkit.lab.say import counted
from normkit.lab.seeding import reseed
from normkit.lab.settings import Settings
from normkit.lab.sweep import Work
from normkit.lab.train.cost import Step, measure_costs, measure_steps
from normkit.lab.train.parallel import start_fabric
from normkit.surgery.fold import fold
from normkit.surgery.recipe import apply_recipe

GOAL = 0.02
# By scale: rounds at least and at most, seconds for the steps of a network, and for its inference.
EFFORTS = {"tiny": ((6, 6), 0.1, 0.1), "small": ((6, 50), 120.0, 40.0), "full": ((6, 100), 600.0, 40.0)}
BN: dict[str, str] = {
    "BN": "bn",
    "BN again": "bn",
    "none": "none",
    "BN + WS": "bn+ws@all",
    "BN + W": "bn+wn",
    "BN + E, two layers": "bn+e",
    "BN + E, all": "bn+e@all",
}
LN = {name.replace("BN", "LN"): recipe.replace("bn", "keep") for name, recipe in BN.items()}


@dataclass(frozen=True)
class Network:
    """A network of the table, with its own norms; its batches' size at small and full scale, and its recipes by row."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: Callable[[int], Tensor]
    batch: dict[str, int]
    recipes: dict[str, str]


@dataclass(frozen=True)
class Measure(Work, path="{0.network}"):
    network: str
    scale: str
    batch: int


class Field(nn.Module):
    """A radiance field whose colours and density are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.field = RadianceField(norm=nn.BatchNorm1d)

    def forward(self, points: Tensor, directions: Tensor) -> Tensor:
        colour, density = self.field(points, directions)
        return torch.cat([colour, density[:, None]], dim=1)


def photographs(count: int) -> Tensor:
    """Images of noise: their content does not matter to the time."""
    return torch.randn(count, 3, 32, 32)


def rays(count: int) -> dict[str, Tensor]:
    """Points and unit directions."""
    return {"points": torch.randn(count, 3), "directions": nn.functional.normalize(torch.randn(count, 3), dim=1)}


def labels(count: int) -> Tensor:
    """Classes."""
    return torch.randint(0, 100, (count,))


NETWORKS = {
    "inception8": Network(lambda: inception8(100), photographs, labels, {"small": 32, "full": 128}, BN),
    "densenet": Network(lambda: densenet(100), photographs, labels, {"small": 32, "full": 128}, BN),
    "vit": Network(lambda: vit_s(100), photographs, labels, {"small": 32, "full": 128}, LN),
    "nerf": Network(Field, rays, lambda count: torch.rand(count, 4), {"small": 4096, "full": 4096}, BN),
}


def time_network(job: Measure, folder: Path) -> dict[str, Any]:
    """Measures steps of all rows, then inference of each before and after folding."""
    network = NETWORKS[job.network]
    settings = Settings(optimizer="sgd", batch_size=job.batch, condition=False, devices="1")
    fabric = start_fabric(settings)
    reseed(0, "batch")
    split = Split(network.targets(job.batch), network.inputs(job.batch))
    models = {name: _made(job, recipe) for name, recipe in network.recipes.items()}
    rounds, budget, seconds = EFFORTS[job.scale]
    warm_up = 20 if fabric.device.type == "cuda" else 3
    copies, data = {name: copy.deepcopy(model) for name, model in models.items()}, Data(split, split, split)
    costs = measure_costs(copies, settings, data, fabric, budget, rounds, warm_up)
    inputs, _ = split.batch(torch.arange(job.batch // 4), fabric.device)
    found = _inference(models, inputs, fabric.device, warm_up, seconds)
    return {name: {**cost, **found[name]} for name, cost in costs.items()}


def _made(job: Measure, recipe: str) -> nn.Module:
    reseed(0, "init")
    make = partial(vit_tiny, 100) if job.network == "vit" and job.scale == "small" else NETWORKS[job.network].make
    return apply_recipe(make(), recipe).model


def _inference(
    models: Mapping[str, nn.Module], inputs: Any, device: torch.device, warm_up: int, seconds: float
) -> dict[str, dict[str, float]]:
    whole, folded = {}, {}
    for name, model in models.items():
        model.to(device).eval()
        whole[f"{name}, whole"] = _call(model, inputs)
        folded[f"{name}, folded"] = _call(fold(copy.deepcopy(model), inputs).model, inputs)
    with torch.no_grad():
        # The first is what the others are compared with.
        costs = measure_steps({**folded, **whole}, device, seconds, (6, 120), warm_up)
    each = {name: (costs[f"{name}, whole"], costs[f"{name}, folded"]) for name in models}
    return {
        name: {"eval_ms": one["ms_per_step"], "folded_ms": other["ms_per_step"], "folded_ratio": other["ratio"]}
        for name, (one, other) in each.items()
    }


def _call(model: nn.Module, inputs: Any) -> Step:
    return Step(partial(model, **inputs) if isinstance(inputs, dict) else partial(model, inputs), model)


def run(bench: Bench) -> dict[str, Any]:
    names = ["nerf"] if bench.scale == "tiny" else list(NETWORKS)  # the one whose steps are shortest
    jobs = [Measure(name, bench.scale, NETWORKS[name].batch.get(bench.scale, 64)) for name in names]
    found = {}
    for job in jobs:
        bench.watch(f"{job.network}: batches of {job.batch}")
        (found[job.network],) = bench.sweep(time_network, [job])
    batches = {job.network: job.batch for job in jobs}
    here = {"device": ", ".join(sorted(bench.devices)), "threads": bench.threads}
    return {"scale": bench.scale, **here, "batches": batches, "networks": found}


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for name, rows in result["networks"].items():
        base = next(iter(rows))
        columns = ["method", "ms per step", "quartiles", f"ratio to {base} [95 %]", "MB per step"]
        lines = []
        for row, cost in rows.items():
            quartiles = "–".join(f"{end:.2f}" for end in cost["ms_quartiles"])
            cells = [f"{cost['ms_per_step']:.2f}", quartiles, tell_ratio(cost), f"{cost['mb_per_step']:.1f}"]
            lines.append([row, *cells, *(f"{cost[key]:.2f}" for key in ("eval_ms", "folded_ms"))])
        model = "vit_tiny" if name == "vit" and result["scale"] == "small" else {"vit": "vit_s"}.get(name, name)
        notes = [
            f"Medians over {rows[base]['rounds']} rounds of all methods side by side, batches of {result['batches'][name]}, on "
            f"{result['device']}, {counted(result['threads'], 'thread')}. The ratio is the "
            "median over rounds of both times of a round, with its interval. MB: the most that a step holds beyond weights and "
            "optimizer."
        ]
        found.append(Table(f"{model}, {result['scale']} scale", [*columns, "inference ms", "folded ms"], lines, notes))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for name, rows in result["networks"].items():
        base, *others = rows
        ratios = ", ".join(f"{row} {100 * (rows[row]['ratio'] - 1):+.1f} %" for row in others)
        everywhere = next(cost for row, cost in rows.items() if row.endswith("E, all"))
        said.append(
            f"{name}: a step of {base} takes {rows[base]['ms_per_step']:.1f} ms; relative to it {ratios}. E on all layers, "
            f"{tell_ratio(everywhere)}: {_against_goal(everywhere)} 2 % of {base}."
        )
        folded = max(abs(cost["folded_ratio"] - 1) for row, cost in rows.items() if row != "none")
        said.append(f"{name}: folded, inference takes within {100 * folded:.1f} % of folded {base}'s.")
    return [
        *said,
        "The paper says that conditioning makes an iteration longer than other normalizations do, and prints no numbers where "
        "they can be read. A folded network has no trace of the method, so its time is that of the network without it.",
    ]


def _against_goal(cost: Mapping[str, Any]) -> str:
    low, high = cost["ratio_interval"] or (cost["ratio"], cost["ratio"])
    if high <= 1 + GOAL:
        return "within"
    return "not within" if low > 1 + GOAL else "these rounds do not tell whether within"


@drawn(
    "cost",
    "Time of a training step relative to that of the first row (the vertical line), a panel for each network; thin "
    "lines are 95 % intervals of the median over rounds. A method whose interval holds 1 is not told apart from the "
    "first row; again is that row measured a second time, and shows how far such ratios can be trusted.",
)
def _bars(result: Mapping[str, Any]) -> Figure:
    networks = result["networks"]
    down = -(-len(networks) // 2)
    figure = Figure(figsize=(FULL, 2.3 * down), layout="constrained")
    axes = figure.subplots(down, 2, squeeze=False).flatten()
    for axis, (name, rows) in zip(axes, networks.items(), strict=False):
        names = list(rows)
        right = 1.0
        for y, row in enumerate(names):
            ratio = rows[row]["ratio"]
            axis.barh(y, ratio, height=0.62, color=COLOURS[0] if y else GREY)
            low, high = rows[row]["ratio_interval"] or (ratio, ratio)
            axis.plot((low, high), (y, y), color=INK, linewidth=1.0)
            # Right of the line at 1 too, which would run through the number of a shorter bar.
            axis.annotate(f"{ratio:.3f}", (max(1, high), y), (3, 0), textcoords="offset points", va="center")
            right = max(right, high)
        axis.axvline(1.0, color=INK, linewidth=0.8)
        rows_of(axis, names)
        axis.set_xlim(0, 1.22 * right)
        axis.set(xlabel=f"time of a training step, {names[0]} = 1", title=name)
    return figure


EXPERIMENT = Experiment(
    "cost", "reproduce", "What weight conditioning costs",
    "Conditioning lengthens each training iteration compared with other normalizations, and costs nothing once folded.",
    PAPER, run, tables, drawings(_bars), remarks,
)  # fmt: skip
