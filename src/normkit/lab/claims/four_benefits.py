"""Faster convergence, less sensitivity to the scale of inputs, less overfitting, better generalization: four claims, every norm.

A small network learns CIFAR-10 with each norm and with none. The rate of each is the best of four on held-out images at
the usual scale of inputs; then inputs are multiplied by 0.1, 1 and 10, with that same rate. What is reported is the number of
steps to a training loss of 1.8 nats (guessing gives 2.3), test accuracy, and training less test accuracy.

Ours: SGD with momentum 0.9 and cosine decay, batches of 64; a bias stands where there is no norm, also with weight norm and with
equilibrated weights, which are on all layers; the first layer's bias starts at 0, so that inputs scale what it gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.core.card import Paper
from normkit.lab.claims.four_benefits_drawing import METHODS, draw
from normkit.lab.claims.images import Stream, accuracy, fit, load
from normkit.lab.claims.numbers import choose, known, mean, spread
from normkit.lab.claims.steps import OK, device, forget
from normkit.lab.claims.why_bn import Shift
from normkit.lab.data.cifar import cifar10
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.seeding import reseed
from normkit.surgery.recipe import apply_recipe

SIZES: dict[str, dict[str, Any]] = {
    "small": {"data": "cifar10", "train": 1500, "test": 2000, "halve": True, "width": 16, "epochs": 4},
    "full": {"data": "cifar10", "train": None, "test": None, "halve": False, "width": 32, "epochs": 10},
}
BATCH, TARGET, EVERY = 64, 1.8, 5
RATES = (0.001, 0.01, 0.1, 0.5)
SCALES = (0.1, 1.0, 10.0)
MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "none": Shift,
    "bn": BatchNorm,
    "ln": lambda channels: GroupNorm(1, channels),
    "in": lambda channels: InstanceNorm(channels, affine=True),
    "gn": lambda channels: GroupNorm(4, channels),
    "gn+ws": lambda channels: GroupNorm(4, channels),
    "wn": Shift,
    "e": Shift,
}
RECIPES = {"gn+ws": "keep+ws", "wn": "keep+wn", "e": "keep+e@all"}


@dataclass(frozen=True)
class Job:
    """One training."""

    method: str
    rate: float
    scale: float
    seed: int
    data: str
    train: int | None
    test: int | None
    halve: bool
    width: int
    epochs: int

    @property
    def path(self) -> str:
        """The folder."""
        return f"{self.method}/scale={self.scale:g}/rate={self.rate:g}/seed={self.seed}"


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Trains a network on scaled inputs, and evaluates it on inputs of the same scale."""
    images = {part: (job.scale * x, y) for part, (x, y) in load(job.data, job.train, job.test, job.halve).items()}
    stream = Stream(images["train"], BATCH, job.seed)
    reseed(job.seed, "init")
    model = SmallCNN(MAKERS[job.method], channels=images["train"][0].shape[1], width=job.width)
    if job.method in RECIPES:
        apply_recipe(model, RECIPES[job.method])
    walked = fit(model.to(device()), stream, job.epochs, job.rate, job.seed, folder, every=EVERY)
    scores: dict[str, float | None] = dict.fromkeys(("train", "val", "test"))
    if walked.status == OK:
        model.eval()
        scores = {part: accuracy(model, images[part]) for part in scores}
    forget(folder)
    reached = next((row["step"] for row in walked.rows if row["loss"] <= TARGET), None)
    return {"status": walked.status, "steps": reached, **scores}


def run(bench: Bench) -> dict[str, Any]:
    """Finds each norm's rate with the first seed, then trains with it at every scale of inputs and with every seed."""
    size = dict(SIZES[bench.scale])
    size["epochs"] = bench.epochs or size["epochs"]
    if bench.download and size["data"] == "cifar10":
        cifar10(download=True)
    tried = [Job(method, rate, 1.0, bench.seeds[0], **size) for method in METHODS for rate in RATES]
    sweeps = [
        {"method": job.method, "rate": job.rate, "val": done["val"]}
        for job, done in zip(tried, bench.sweep(train, tried), strict=True)
    ]
    rates = {method: best(choose(sweeps, method=method)) for method in METHODS}
    jobs = [
        Job(method, rates[method], scale, seed, **size)
        for seed in bench.seeds
        for method in METHODS
        for scale in SCALES
    ]
    runs = [
        {"method": job.method, "scale": job.scale, "seed": job.seed, **done}
        for job, done in zip(jobs, bench.sweep(train, jobs), strict=True)
    ]
    return {"runs": runs, "sweeps": sweeps, "rates": rates, **size}


def best(sweep: Sequence[Mapping[str, Any]]) -> float:
    """The rate with the highest accuracy on held-out images; a run that diverged has none.

    >>> best([{"rate": 0.1, "val": 0.3}, {"rate": 0.5, "val": None}])
    0.1
    """
    return max(sweep, key=lambda run: -1.0 if run["val"] is None else run["val"])["rate"]


def values(result: dict[str, Any], method: str, key: str, scale: float = 1.0) -> list[float | None]:
    """A value over seeds; ``"gap"`` is training less test accuracy."""
    runs = choose(result["runs"], method=method, scale=scale)
    if key == "gap":
        return [None if run["test"] is None else run["train"] - run["test"] for run in runs]
    return [run[key] for run in runs]


def range_of(result: dict[str, Any], method: str) -> float | None:
    """The highest less the lowest mean test accuracy over scales of inputs; a run that diverged counts as guessing."""
    means = [
        mean(0.1 if value is None else value for value in values(result, method, "test", scale)) for scale in SCALES
    ]
    there = known(means)
    return max(there) - min(there) if there else None


def tables(result: dict[str, Any]) -> list[Table]:
    """The four benefits, norm by norm."""
    rows: list[list[Any]] = []
    for method, name in METHODS.items():
        gap = range_of(result, method)
        rows.append(
            [
                name,
                result["rates"][method],
                spread(values(result, method, "steps"), ".0f"),
                *(spread(values(result, method, "test", scale), ".1f", 100) for scale in SCALES),
                None if gap is None else 100 * gap,
                spread(values(result, method, "gap"), ".1f", 100),
            ]
        )
    columns = ("norm", "rate", "steps", *(f"test, inputs x {scale:g}" for scale in SCALES), "range", "gap")
    notes = [
        f"Steps to a training loss of {TARGET:g}; test accuracy in %; range: of its means over the scales of inputs, in points; "
        "gap: training less test accuracy at the usual scale, in points. Mean ± standard deviation over seeds."
    ]
    rates: list[list[Any]] = []
    for method, name in METHODS.items():
        found = {run["rate"]: run["val"] for run in choose(result["sweeps"], method=method)}
        rates.append([name, *(None if found[rate] is None else 100 * found[rate] for rate in found)])
    columns_of_rates = ("norm", *(f"rate {rate:g}" for rate in RATES))
    return [
        Table("The four benefits", columns, rows, notes),
        Table("Accuracy on held-out images by rate, first seed, %", columns_of_rates, rates),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    """What was seen of each of the four claims, against the network without a norm."""
    others = [method for method in METHODS if method != "none"]

    def against(key: str, form: str, scale: float, better: Callable[[float, float], bool]) -> str:
        base = mean(values(result, "none", key))
        found = {method: mean(values(result, method, key)) for method in others}
        ahead = [
            f"{METHODS[m]} {scale * v:{form}}"
            for m, v in found.items()
            if v is not None and base is not None and better(v, base)
        ]
        said = "never there" if base is None else f"{scale * base:{form}}"
        return f"no norm {said}; better: {', '.join(ahead) or 'none'}"

    steps = mean(values(result, "none", "steps"))
    faster = [
        f"{METHODS[m]} {value:.0f}"
        for m in others
        if (value := mean(values(result, m, "steps"))) is not None and (steps is None or value < steps)
    ]
    said = [
        f"Faster convergence (steps to {TARGET:g}): no norm {'does not get there' if steps is None else f'{steps:.0f}'}; fewer: "
        f"{', '.join(faster) or 'none'}.",
    ]
    ranges = {method: range_of(result, method) for method in METHODS}
    parts = (f"{METHODS[m]} {100 * value:.1f}" for m, value in ranges.items() if value is not None)
    said.append(
        f"Sensitivity to the scale of inputs (range of test accuracy over x 0.1 to 10, in points): {', '.join(parts)}."
    )
    said.append(
        f"Less overfitting (training less test accuracy, in points): {against('gap', '.1f', 100, lambda v, b: v < b)}."
    )
    said.append(f"Better generalization (test accuracy, %): {against('test', '.1f', 100, lambda v, b: v > b)}.")
    return said


EXPERIMENT = Experiment(
    name="four-benefits",
    kind="claim",
    title="Four benefits of normalization",
    claim=(
        "Normalization speeds up convergence, makes training less sensitive to the scale of inputs, reduces overfitting and "
        "generalizes better."
    ),
    paper=Paper(
        "Ioffe, Sergey and Szegedy, Christian",
        "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        2015,
        "https://arxiv.org/abs/1502.03167",
    ),
    run=run,
    tables=tables,
    draw=draw,
    remarks=remarks,
)
