"""Conditioned weights along training: condition numbers, the curvature of the loss, and the largest stable rate.

A perceptron so small that its Hessian can be computed whole learns handwritten digits by gradient descent on one large batch,
with batch normalization and without, with its weights' rows equilibrated and without. Along training every raw and effective
weight's condition number and spread of row norms are measured, and the largest and the smallest eigenvalue of the Hessian by the
raw parameters; 2 / lambda_max is the largest rate at which descent on that quadratic is stable. Runs at many rates show the
largest that still learns.

Ours: digits averaged to 4x4, two hidden layers of 12 units with tanh, 256 images, double precision, rate 0.3 along
training and 60 steps in the search; a loss below nine tenths of guessing has learned. An epoch of ``--epochs`` is a step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.activations.batch_norm import BatchNorm
from normkit.catalogue.methods import method
from normkit.diagnostics.conditioning import weight_conditions
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.report.canvas import FULL, log, panels
from normkit.lab.report.drawing import COLOURS, GREY, SEEDS, band, name_ends
from normkit.lab.seeding import reseed
from normkit.lab.stats import ABSENT, by_step, known, mean, spread, where
from normkit.lab.train.images import load
from normkit.lab.train.walk import OK, Diverged, forget, walk
from normkit.surgery.recipe import apply_recipe

RECIPES = {"none": "plain", "none+e": "plain + E", "bn": "BatchNorm", "bn+e": "BatchNorm + E"}
HUES = {"none": GREY, "none+e": COLOURS[1], "bn": COLOURS[2], "bn+e": COLOURS[0]}
STEPS = {"tiny": 4, "small": 200, "full": 1000}
RATE, SHORT, LOOKS = 0.3, 60, 8
RATES = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
SAMPLES, HIDDEN = 256, 12
COLUMNS = {
    "raw": "κ raw",
    "used": "κ effective",
    "rows": "row norms",
    "largest": "λ max",
    "smallest": "λ min",
}


@dataclass(frozen=True)
class Descent:
    """One descent: measured along the way at the usual rate, or short at some rate to see whether it learns."""

    recipe: str
    rate: float
    measured: bool
    seed: int
    steps: int
    hidden: int = HIDDEN

    @property
    def path(self) -> str:
        """The folder."""
        return f"{'along' if self.measured else 'rates'}/{self.recipe}/rate={self.rate:g}/seed={self.seed}"


def make(recipe: str, hidden: int) -> nn.Sequential:
    """A perceptron with three linear layers; its norms use each batch's statistics, so that the loss is a function of it alone.

    >>> sum(p.numel() for p in make("none", 12).parameters())
    490
    """
    norm, _, weight = recipe.partition("+")
    layers: list[nn.Module] = []
    for wide in (16, hidden):
        layers += [nn.Linear(wide, hidden), BatchNorm(hidden, track_running_stats=False), nn.Tanh()]
        if norm == "none":
            del layers[-2]
    model = nn.Sequential(*layers, nn.Linear(hidden, 10)).double()
    if weight:
        apply_recipe(model, "keep+e@all")
    return model


def descend(job: Descent, folder: Path) -> dict[str, Any]:
    """Gradient descent on one batch, measured on the way if the job says so."""
    images, labels = load("digits")["train"]
    x = F.avg_pool2d(images[:SAMPLES], 2).flatten(1).double()
    y = labels[:SAMPLES]
    reseed(job.seed, "init")
    model = make(job.recipe, job.hidden)
    optimizer = torch.optim.SGD(model.parameters(), job.rate)

    def step(number: int) -> dict[str, Any] | None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        looking = job.measured and (number == 1 or number % max(1, job.steps // LOOKS) == 0)
        row = {"loss": loss.item(), **(look(model, x, y) if looking else {})}
        loss.backward()
        optimizer.step()
        if not math.isfinite(row["loss"]):
            raise Diverged
        return row if looking or number == job.steps else None

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    forget(folder)
    rows = walked.rows if job.measured else []
    return {"status": walked.status, "rows": rows, "end": walked.rows[-1]["loss"] if walked.status == OK else None}


def look(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Geometric means over layers of condition numbers and of the spread of row norms, and the Hessian's extreme eigenvalues."""
    found = weight_conditions(model).values()
    rows = [norms.max() / norms.min() for norms in (weight.norm(dim=1) for weight in weights(model))]
    # Row-equilibrated directions leave the loss as it is: eigenvalues of zero are among them.
    values = torch.linalg.eigvalsh(hessian(model, x, y))
    raw, used = (geometric_mean([pair[k] for pair in found]) for k in (0, 1))
    extremes = {"largest": values[-1].item(), "smallest": values[0].item()}
    return {"raw": raw, "used": used, "rows": geometric_mean([row.item() for row in rows]), **extremes}


def weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights that the layers compute with."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            yield layer.weight.detach()


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The second derivatives of the loss by all raw parameters, row by row, made symmetric against rounding."""
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = []
    for value in gradient:
        row = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in row]))
    whole = torch.stack(rows)
    return 0.5 * (whole + whole.T)


def run(bench: Bench) -> dict[str, Any]:
    """Descends with every recipe, measured, and at every rate."""
    steps = bench.epochs or STEPS[bench.scale]
    rates, hidden = (RATES, HIDDEN) if bench.scale != "tiny" else ((0.3, 1e30), 3)
    jobs = [Descent(recipe, RATE, True, seed, steps, hidden) for seed in bench.seeds for recipe in RECIPES]
    short = min(SHORT, steps)
    jobs += [
        Descent(recipe, rate, False, seed, short, hidden)
        for seed in bench.seeds
        for recipe in RECIPES
        for rate in rates
    ]
    done = bench.sweep(descend, jobs)
    keys = ("recipe", "rate", "measured", "seed")
    runs = [{**{key: getattr(job, key) for key in keys}, **one} for job, one in zip(jobs, done, strict=True)]
    return {"runs": runs, "rates": list(rates), "steps": steps, "short": short}


def largest(result: dict[str, Any], recipe: str) -> list[float]:
    """For each seed the largest rate that ended below nine tenths of the loss of guessing."""
    found = []
    for seed in sorted({run["seed"] for run in result["runs"]}):
        runs = where(result["runs"], recipe=recipe, measured=False, seed=seed)
        found.append(max((run["rate"] for run in runs if (run["end"] or math.inf) < 0.9 * math.log(10)), default=0.0))
    return found


def lowest(result: dict[str, Any], recipe: str) -> tuple[float, float] | None:
    """The lowest mean loss at any rate, and that rate; a rate at which a seed diverged is passed over."""
    found = []
    for rate in result["rates"]:
        losses = [run["end"] for run in where(result["runs"], recipe=recipe, measured=False, rate=rate)]
        if losses and None not in losses:
            found.append((fmean(losses), rate))
    return min(found, default=None)


def ends(result: dict[str, Any], recipe: str, key: str, place: int = -1) -> list[float | None]:
    """A measure at the end of training, or at another place, for each seed."""
    rows = [[row for row in run["rows"] if key in row] for run in where(result["runs"], recipe=recipe, measured=True)]
    return [run[place][key] if run else None for run in rows]


def tables(result: dict[str, Any]) -> list[Table]:
    """Measures at the start and at the end, and the largest rates."""
    found = []
    for title, place in (("At the start", 0), (f"After {result['steps']} steps", -1)):
        rows: list[list[Any]] = []
        for recipe, name in RECIPES.items():
            cells = [spread(ends(result, recipe, key, place), ".3g") for key in COLUMNS]
            stable = [2 / value for value in known(ends(result, recipe, "largest", place))]
            rows.append([name, spread(ends(result, recipe, "loss", place), ".3f"), *cells, spread(stable, ".3g")])
        found.append(Table(title, ("recipe", "loss", *COLUMNS.values(), "2 / λ max"), rows))
    notes = (
        "Geometric means over layers of condition numbers and of the largest row norm by the smallest; eigenvalues are of the "
        "loss's Hessian by the raw parameters. Mean ± standard deviation over seeds."
    )
    rows = []
    for recipe, name in RECIPES.items():
        cells = [
            spread([run["end"] for run in where(result["runs"], recipe=recipe, measured=False, rate=rate)], ".2f")
            for rate in result["rates"]
        ]
        rows.append([name, *cells, ", ".join(f"{rate:g}" for rate in largest(result, recipe))])
    columns = ("recipe", *(f"rate {rate:g}" for rate in result["rates"]), "largest")
    title = f"Loss after {result['short']} steps"
    return [*found, Table(title, columns, rows, [notes, "Largest: rate that learned, for each seed."])]


def remarks(result: dict[str, Any]) -> list[str]:
    """What equilibration did to each number."""
    said = []
    for base, name in (("none", "plain"), ("bn", "BatchNorm")):
        parts, pair = [], (base, f"{base}+e")
        for key, title in (("used", "κ of the weights"), ("largest", "λ max")):
            without, with_it = (mean(ends(result, recipe, key)) for recipe in pair)
            if without is not None and with_it is not None:
                parts.append(f"{title} {without:.3g} without E and {with_it:.3g} with")
        rates = [", ".join(f"{rate:g}" for rate in largest(result, recipe)) for recipe in pair]
        parts.append(f"largest rate that learned, for each seed, {rates[0]} without and {rates[1]} with")
        # A larger rate is worth something only where it leads to a lower loss.
        best = [ABSENT if b is None else f"{b[0]:.2f} (rate {b[1]:g})" for b in (lowest(result, r) for r in pair)]
        parts.append(f"lowest mean loss at any rate after {result['short']} steps {best[0]} without and {best[1]} with")
        said.append(f"{name}, at the end: {'; '.join(parts)}.")
    said += verdict(result)
    # Run by run: condition numbers differ so much from seed to seed that their mean is that of the largest.
    counts = []
    for recipe in ("none+e", "bn+e"):
        pairs = zip(*(known(ends(result, recipe, key)) for key in ("used", "raw")), strict=True)
        better = [used <= raw for used, raw in pairs]
        counts.append(f"{sum(better)} of {len(better)} seeds with {RECIPES[recipe]}")
    said.append(
        f"At the end the effective weights are no worse conditioned than the raw ones in {' and '.join(counts)}."
    )
    return said


def verdict(result: dict[str, Any]) -> list[str]:
    """In how many seeds each of the three things that are claimed came about."""
    said = []
    for base, name in (("none", "plain"), ("bn", "BatchNorm")):
        found = []
        for key, title in (("used", "lower condition numbers"), ("largest", "lower λ max")):
            pairs = list(zip(*(ends(result, recipe, key) for recipe in (base, f"{base}+e")), strict=True))
            both = [(a, b) for a, b in pairs if a is not None and b is not None]
            found.append(f"{title} at the end in {sum(b < a for a, b in both)} of {len(both)} seeds")
        rates = list(zip(*(largest(result, recipe) for recipe in (base, f"{base}+e")), strict=True))
        found.append(f"larger rates in {sum(b > a for a, b in rates)} of {len(rates)}")
        said.append(f"Of the claim, with E on top of {name}: {', '.join(found)}.")
    return said


def figures(result: dict[str, Any]) -> list[Drawing]:
    """Draws the measures along training and the losses at every rate.

    Args:
        result: what :func:`run` returned.
        folder: where to.
    """
    return [
        Drawing(
            "conditioning",
            lambda: figure_of(result),
            "The condition number κ of the weights that layers compute with, geometric mean over layers (left), and the largest "
            f"eigenvalue λ of the loss's Hessian (middle), along descent at rate {RATE:g}, and the loss after {result['short']} "
            f"steps at each rate (right); {SEEDS}, named on the right. Look for the rate from which on each line on the right "
            "rises.",
        )
    ]


def figure_of(result: dict[str, Any]) -> Figure:
    """Condition numbers, the largest eigenvalue, and the loss at every rate."""
    figure, axes = panels(3, FULL, 2.5)
    titles = ("κ of the effective weights", "λ max of the Hessian", f"loss after {result['short']} steps")
    for axis, key in zip(axes, ("used", "largest"), strict=False):
        for recipe, hue in HUES.items():
            rows = [run["rows"] for run in where(result["runs"], recipe=recipe, measured=True)]
            steps, middle, low, high = by_step(rows, lambda row, key=key: row.get(key))
            if steps:
                band(axis, steps, middle, low, high, color=hue)
        axis.set_xlabel("step")
        axis.margins(x=0)
        log(axis)
    names = []
    for recipe, hue in HUES.items():
        places, columns = [], []
        for rate in result["rates"]:
            values = known(run["end"] for run in where(result["runs"], recipe=recipe, measured=False, rate=rate))
            if values:
                places.append(rate)
                columns.append(values)
        if places:
            middle = [mean(values) or 0.0 for values in columns]
            style: dict[str, Any] = {"color": hue, "marker": "o", "markersize": 3}
            band(axes[2], places, middle, list(map(min, columns)), list(map(max, columns)), **style)
            names.append((middle[-1], RECIPES[recipe], hue))
    axes[2].axhline(math.log(10), color="#8a8a8a", linewidth=0.8)
    axes[2].annotate(
        "guessing",
        (result["rates"][0], math.log(10)),
        (0, 2),
        textcoords="offset points",
        fontsize=6.5,
        color="#666666",
    )
    axes[2].set_xscale("log")
    axes[2].set_xlabel("learning rate")
    log(axes[2])
    name_ends(axes[2], names)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left")
    return figure


EXPERIMENT = Experiment(
    name="conditioning",
    kind="claim",
    title="Conditioned weights: condition numbers, curvature and stable rates",
    claim="Conditioning the weights lowers their condition numbers, smooths the loss, and so allows larger learning rates.",
    paper=method("weight_conditioning").paper,
    run=run,
    tables=tables,
    figures=figures,
    remarks=remarks,
    scales=("tiny", "small", "full"),
)
