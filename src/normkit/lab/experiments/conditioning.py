"""Conditioned weights along training: condition numbers, the curvature of the loss, the largest stable rate, and controls.

A perceptron so small that its whole Hessian can be computed learns handwritten digits by gradient descent on one large batch,
with batch normalization and without. Along training it measures the condition number and the spread of row norms of every raw and
effective weight, and the extreme eigenvalues of the Hessian by the raw parameters; 2 / lambda_max is the largest rate
at which descent on that quadratic is stable. Runs at many rates show the largest that still learns, and the lowest loss.

Controls tell where an effect of E, row equilibration of all three layers, comes from: E on the last layer alone; E on the two
layers before it; no E, but rows that start with norm 1; weight norm, whose lengths are learned; and E on all layers with one
learned scalar, a temperature, on the last weight. E on the last layer bounds the logits: a logit minus its bias is at most the
norm of the features.

Ours: digits averaged to 4x4, two hidden layers of 12 units with tanh, 256 images, double precision, rate 0.3 along
training and 60 steps in the search; a loss below nine tenths of guessing has learned. An epoch of ``--epochs`` is a step.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from normkit.activations.batch_norm import BatchNorm
from normkit.catalogue.methods import method
from normkit.diagnostics.conditioning import weight_conditions
from normkit.diagnostics.curvature import hessian
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments import runs
from normkit.lab.models.rows import unit_rows
from normkit.lab.report.drawing import COLOURS, FULL, GREY, SEEDS, Curve, along, log, name_ends
from normkit.lab.seeding import reseed
from normkit.lab.stats import Interval, Row, differences, known, mean, spread, tell, where
from normkit.lab.train.images import OK, load, walk
from normkit.lab.train.images import descend as step_down
from normkit.surgery.recipe import apply_recipe

BASES = {"none": "plain", "bn": "BatchNorm"}
FORMS = {
    "": "no E",
    "e": "E",
    "e-last": "E, last layer",
    "e-hidden": "E, hidden layers",
    "unit": "unit start",
    "wn": "weight norm",
    "e-temperature": "E, temperature",
}
RECIPES = {"e": "keep+e@all", "e-last": "keep+e@re:last", "e-hidden": "keep+e@re:hidden", "wn": "keep+wn"}
HUES = dict(zip(FORMS, (GREY, *COLOURS), strict=False))
STEPS = {"tiny": 2, "small": 200, "full": 1000}
LOOKS = 4  # a Hessian of 500 parameters takes half a second
RATE, SHORT = 0.3, 60
RATES = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
SAMPLES, HIDDEN = 256, 12
COLUMNS = {"raw": "κ raw", "used": "κ effective", "rows": "row norms", "largest": "λ max", "smallest": "λ min"}


@dataclass(frozen=True)
class Descent:
    base: str
    form: str
    rate: float
    measured: bool
    seed: int
    steps: int
    hidden: int = HIDDEN

    @property
    def path(self) -> str:
        kind, recipe = "along" if self.measured else "rates", f"{self.base}{self.form and '+'}{self.form}"
        return f"{kind}/{recipe}/rate={self.rate:g}/seed={self.seed}"


class Temperature(nn.Module):
    """Multiplies a weight by one learned scalar, which starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight


def make(base: str, form: str, hidden: int) -> nn.Sequential:
    """A perceptron with three linear layers, whose norms use each batch's statistics: the loss is a function of it alone."""
    model = nn.Sequential()
    for number, wide in enumerate((16, hidden), 1):
        model.add_module(f"hidden{number}", nn.Linear(wide, hidden))
        if base == "bn":
            model.add_module(f"norm{number}", BatchNorm(hidden, track_running_stats=False))
        model.add_module(f"tanh{number}", nn.Tanh())
    last = nn.Linear(hidden, 10)
    model.add_module("last", last)
    model.double()
    if form == "unit":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                unit_rows(layer.weight)
    elif form:
        apply_recipe(model, RECIPES[form.removesuffix("-temperature")])
    if form == "e-temperature":
        parametrize.register_parametrization(last, "weight", Temperature())
    return model


def descend(job: Descent, folder: Path) -> dict[str, Any]:
    """Gradient descent on one batch, measured on the way if the job says so."""
    images, labels = load("digits")["train"]
    x = F.avg_pool2d(images[:SAMPLES], 2).flatten(1).double()
    y = labels[:SAMPLES]
    reseed(job.seed, "init")
    model = make(job.base, job.form, job.hidden)
    optimizer = torch.optim.SGD(model.parameters(), job.rate)

    def step(number: int) -> dict[str, Any] | None:
        loss = F.cross_entropy(model(x), y)
        looking = job.measured and (number == 1 or number % max(1, job.steps // LOOKS) == 0)
        row = {"loss": loss.item(), **(look(model, x, y) if looking else {})}
        step_down(optimizer, loss)
        return row if looking or number == job.steps else None

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    rows = walked.rows if job.measured else []
    return {"status": walked.status, "rows": rows, "end": walked.rows[-1]["loss"] if walked.status == OK else None}


def look(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Geometric means over layers of condition numbers and of the spread of row norms, and the Hessian's extreme eigenvalues."""
    found = weight_conditions(model).values()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    lengths = [norms.max() / norms.min() for norms in (layer.weight.detach().norm(dim=1) for layer in layers)]
    # Row-equilibrated directions leave the loss as it is: eigenvalues of zero are among them.
    values = torch.linalg.eigvalsh(hessian(model, F.cross_entropy, [(x, y)]))
    raw, used = (geometric_mean([pair[k] for pair in found]) for k in (0, 1))
    extremes = {"largest": values[-1].item(), "smallest": values[0].item()}
    return {"raw": raw, "used": used, "rows": geometric_mean([length.item() for length in lengths]), **extremes}


def run(bench: Bench) -> dict[str, Any]:
    steps = bench.epochs or STEPS[bench.scale]
    tried, hidden = (RATES, HIDDEN) if bench.scale != "tiny" else ((0.3, 1e30), 3)
    short = min(SHORT, steps)
    each = [(base, form, seed) for seed in bench.seeds for base in BASES for form in FORMS]
    jobs = [Descent(base, form, RATE, True, seed, steps, hidden) for base, form, seed in each]
    jobs += [Descent(base, form, rate, False, seed, short, hidden) for base, form, seed in each for rate in tried]
    done = runs.labelled(bench, descend, jobs, "base", "form", "rate", "measured", "seed")
    return {"runs": done, "rates": list(tried), "steps": steps, "short": short}


def short_runs(result: dict[str, Any], base: str, form: str) -> list[Row]:
    """The runs of the search."""
    return where(result["runs"], base=base, form=form, measured=False)


def best(result: dict[str, Any], base: str, form: str) -> list[float | None]:
    """For each seed the lowest loss at any rate."""
    short = short_runs(result, base, form)
    by_seed = [where(short, seed=seed) for seed in sorted({run["seed"] for run in short})]
    return [min(known(run["end"] for run in some), default=None) for some in by_seed]


def against(result: dict[str, Any], base: str, form: str) -> Interval:
    """The lowest loss of a form minus that without E, seed by seed."""
    return differences(best(result, base, form), best(result, base, ""))


def at(result: dict[str, Any], base: str, form: str, key: str, place: int = -1) -> list[float | None]:
    """A measure at the end of training, or at another place, for each seed."""
    measured = where(result["runs"], base=base, form=form, measured=True)
    found = [[row for row in run["rows"] if key in row] for run in measured]
    return [rows[place][key] if rows else None for rows in found]


def tables(result: dict[str, Any]) -> list[Table]:
    short, found = result["short"], []
    for base, name in BASES.items():
        rows: list[list[Any]] = []
        losses = []
        for form, title in FORMS.items():
            large = runs.largest(short_runs(result, base, form))
            change = tell(against(result, base, form)) if form else None
            lowest = spread(best(result, base, form), ".2f")
            rows.append([title, f"{min(large):g} to {max(large):g}", lowest, change])
            losses.append([title, *runs.losses(short_runs(result, base, form))])
        columns = ("form", "largest rates", "lowest loss", "minus no E [95 %]")
        notes = [
            f"Largest: the largest rate that learned in {short} steps, from the lowest seed to the highest. Lowest loss: "
            "at any rate, for each seed; mean ± standard deviation over seeds, which share the images."
        ]
        found.append(Table(f"{name}: rates and losses after {short} steps", columns, rows, notes))
        columns = ("form", *(f"rate {rate:g}" for rate in result["rates"]))
        found.append(Table(f"{name}: loss after {short} steps", columns, losses))
    for title, place in (("At the start", 0), (f"After {result['steps']} steps at rate {RATE:g}", -1)):
        rows = []
        for base, name in BASES.items():
            for form, form_title in FORMS.items():
                cells = [spread(at(result, base, form, key, place), ".3g") for key in COLUMNS]
                stable = [2 / value for value in known(at(result, base, form, "largest", place))]
                loss = spread(at(result, base, form, "loss", place), ".3f")
                rows.append([f"{name}, {form_title}", loss, *cells, spread(stable, ".3g")])
        notes = [
            "Geometric means over layers of condition numbers and of the largest row norm by the smallest; eigenvalues are of "
            "the loss's Hessian by the raw parameters."
        ]
        found.append(Table(title, ("form", "loss", *COLUMNS.values(), "2 / λ max"), rows, notes))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for base, name in BASES.items():
        parts = []
        for key, title in (("used", "lower condition numbers"), ("largest", "a lower λ max")):
            pairs = zip(at(result, base, "e", key), at(result, base, "", key), strict=True)
            both = [(ours, other) for ours, other in pairs if ours is not None and other is not None]
            parts.append(f"{title} at the end in {sum(a < b for a, b in both)} of {len(both)} seeds")
        large = {form: runs.largest(short_runs(result, base, form)) for form in FORMS}
        parts.append(f"larger rates in {larger(large['e'], large[''])}")
        said.append(f"Of the claim, with E on all layers ({name}): {', '.join(parts)}.")
        told = [f"{title} {larger(large[form], large[''])}" for form, title in FORMS.items() if form]
        said.append(f"{name}, seeds in which the largest rate that learns is larger than without E: {', '.join(told)}.")
        told = [f"{title} {tell(against(result, base, form))}" for form, title in FORMS.items() if form]
        base_loss = mean(best(result, base, ""))
        lowest = "none" if base_loss is None else f"{base_loss:.2f}"
        said.append(f"{name}, lowest loss at any rate, {lowest} without E; minus that, by seed: {', '.join(told)}.")
    counts = []
    for base, name in BASES.items():
        # Run by run: condition numbers differ so much from seed to seed that their mean is that of the largest.
        pairs = zip(*(known(at(result, base, "e", key)) for key in ("used", "raw")), strict=True)
        better = [used <= raw for used, raw in pairs]
        counts.append(f"{sum(better)} of {len(better)} seeds ({name})")
    said.append(f"At the end E's weights are no worse conditioned than its raw ones in {' and '.join(counts)}.")
    return said


def larger(these: list[float], those: list[float]) -> str:
    """In how many seeds a rate is larger than another."""
    return f"{sum(a > b for a, b in zip(these, those, strict=True))} of {len(these)}"


@runs.drawn(
    "conditioning",
    "Without a norm (above) and with BatchNorm (below): the condition number κ of the weights that layers compute with, "
    f"geometric mean over layers (left), the largest eigenvalue λ of the loss's Hessian (middle), both along descent at rate "
    f"{RATE:g}, and the loss after {{short}} steps at each rate (right), with that of guessing as the grey line; "
    f"{SEEDS}. Look at which lines on the right stay low at large rates, and which reach as low as the grey one.",
)
def _figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(FULL, 5.0), layout="constrained")
    grid = figure.subplots(len(BASES), 3, squeeze=False)
    titles = ("κ of the weights", "λ max of the Hessian", f"loss after {result['short']} steps")
    for axes, (base, name) in zip(grid, BASES.items(), strict=True):
        for axis, key in zip(axes, ("used", "largest"), strict=False):
            found = {form: where(result["runs"], base=base, form=form, measured=True) for form in FORMS}
            curves = [Curve(FORMS[form], HUES[form], [run["rows"] for run in some]) for form, some in found.items()]
            along(axis, curves, lambda row, key=key: row.get(key))
            log(axis)
        ends = runs.draw_rates(axes[2], {FORMS[f]: (HUES[f], short_runs(result, base, f)) for f in FORMS})
        log(axes[2])
        name_ends(axes[2], ends, gap=0.075)
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(f"{name}: {title}", loc="left")
    return figure


EXPERIMENT = Experiment(
    "conditioning", "claim", "Conditioned weights: condition numbers, curvature and stable rates",
    "Conditioning the weights lowers their condition numbers, smooths the loss, and so allows larger learning rates.",
    method("weight_conditioning").paper, run, tables, runs.drawings(_figure), remarks,
)  # fmt: skip
