"""Batch normalization is one function in training and another in evaluation: how far they are apart, and what mends it.

A small network learns CIFAR-10 in batches of 4 and of 32, shuffled or sorted: of two classes a batch, the hard case. Each is
then evaluated with running statistics, with re-estimated statistics ("precise"), with the test example's own share weighed in,
and with the statistics of test batches; batch renormalization is trained as well. What normalized values can be is
measured at each layer: within a batch none exceeds sqrt(n - 1), n values a channel; in evaluation there is no bound.

Ours: as in the claim on batch sizes, with one more linear layer of 64 units and a norm before the classifier, whose n is the
batch; the share alpha is chosen on half of the test images, and every accuracy is of the other half.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from normkit.core.card import Paper
from normkit.lab.data.cifar import download_missing
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments.batch_size import BASE, CHANCE, RATE, interval, norm
from normkit.lab.jobs.ranges import ranges, responses
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.report.canvas import DOTTED, FAINT, FULL, INK, log, panels
from normkit.lab.report.drawing import COLOURS, GREY, SEEDS, band, name_ends
from normkit.lab.seeding import reseed
from normkit.lab.stats import Interval, differences, known, mean, spread, where
from normkit.lab.train.images import TINY, Images, Size, Stream, accuracy, fit
from normkit.lab.train.walk import OK, device, forget
from normkit.surgery.example_weighing import choose_alpha, weigh_examples
from normkit.surgery.recalibrate import recalibrate

METHODS = {"bn": "BatchNorm", "brn": "BatchRenorm"}
ORDERS = {"shuffled": "Shuffled", "sorted": "Two classes a batch"}
WAYS = {
    "running": "running statistics",
    "precise": "precise statistics",
    "weighed": "example weighing",
    "batch": "test batch, shuffled",
    "sorted": "test batch, two classes",
}
RANGES = {
    "bound": "sqrt(n - 1)",
    "train": "training",
    "train strong": "training, strong",
    "eval": "evaluation",
    "eval strong": "evaluation, strong",
}
HUES = {"bn": GREY, "brn": COLOURS[0]}
KINDS = {
    "batch": ("batch", GREY),
    "running": ("running", COLOURS[1]),
    "weighed": ("weighing", COLOURS[2]),
    "renorm": ("renorm", COLOURS[0]),
}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "small": {"data": "cifar10", "train": 1500, "test": 2000, "halve": True, "width": 16, "epochs": 3},
    "full": {"data": "cifar10", "train": None, "test": None, "halve": False, "width": 32, "epochs": 10},
}
BATCHES = {"tiny": (4, 8), "small": (4, 32), "full": (4, 32)}
HIDDEN = 64
JUDGED = 1024  # training images on which statistics are re-estimated


@dataclass(frozen=True)
class Training(Size):
    """One training."""

    method: str
    order: str
    batch: int
    seed: int

    @property
    def path(self) -> str:
        """The folder."""
        return f"{self.method}/{self.order}/batch={self.batch}/seed={self.seed}"


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a network, and evaluates it in every way."""
    images = job.images()
    order = partial(sorted_order, images["train"][1], job.batch, job.seed) if job.order == "sorted" else None
    stream = Stream(images["train"], job.batch, job.seed, order)
    reseed(job.seed, "init")
    make = norm(job.method, job.epochs * stream.per_epoch)
    model = SmallCNN(make, channels=images["train"][0].shape[1], width=job.width, hidden=HIDDEN).to(device())
    walked = fit(model, stream, job.epochs, RATE * job.batch / BASE, job.seed, folder)
    result: dict[str, Any] = {"status": walked.status, "accuracy": dict.fromkeys(WAYS), "alphas": None, "ranges": None}
    if walked.status == OK:
        half = len(images["test"][0]) // 2
        x, y = images["test"]
        result |= judge(model, job, images["train"], (x[:half], y[:half]), (x[half:], y[half:]))
    forget(folder)
    return result


def sorted_order(labels: Tensor, batch: int, seed: int, epoch: int) -> Tensor:
    """Rows in blocks of half a batch, each of one class; blocks come at random, two make a batch.

    >>> sorted_order(torch.tensor([0, 1] * 4), 4, seed=0, epoch=1).remainder(2).view(4, 2).tolist()
    [[1, 1], [0, 0], [0, 0], [1, 1]]
    """
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    half = batch // 2
    blocks = []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0].cpu()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        blocks += rows[: len(rows) // half * half].split(half)
    return torch.cat([blocks[place] for place in torch.randperm(len(blocks), generator=generator)])


def judge(model: SmallCNN, job: Training, seen: Images, chosen: Images, test: Images) -> dict[str, Any]:
    """Accuracies by what is normalized with; of batch normalization also the alpha curve and the range of each layer."""
    found: dict[str, Any] = {}
    scores: dict[str, float | None] = {"running": accuracy(model.eval(), test)}
    keep = {name: value.clone() for name, value in model.state_dict().items()}
    rows = sorted_order(test[1], job.batch, job.seed, 0)
    for way, (x, y) in (("batch", test), ("sorted", (test[0][rows], test[1][rows]))):
        scores[way] = accuracy(model.train(), (x, y), job.batch)
        model.load_state_dict(keep)  # training mode has moved the running averages
    if job.method == "bn":
        found["ranges"] = ranges(model, test[0], job.batch)
        model.load_state_dict(keep)
        weighed = weigh_examples(copy.deepcopy(model)).model
        curve = choose_alpha(weighed, lambda model: accuracy(model, chosen))
        scores["weighed"] = accuracy(weighed, test)
        best = max(curve, key=lambda alpha: curve[alpha])
        tested = choose_alpha(weighed, lambda model: accuracy(model, test))
        found["alphas"] = {"chosen": best, "test": list(tested.items())}
        recalibrate(model, seen[0][:JUDGED].split(job.batch), limit=None)
        scores["precise"] = accuracy(model.eval(), test)
    return {**found, "accuracy": scores}


def run(bench: Bench) -> dict[str, Any]:
    """Trains both methods in both orders and batch sizes with every seed."""
    size = dict(SIZES[bench.scale])
    size["epochs"] = bench.epochs or size["epochs"]
    if bench.download:
        download_missing(size["data"])
    jobs = [
        Training(method, order, batch, seed, **size)
        for seed in bench.seeds
        for method in METHODS
        for order in ORDERS
        for batch in BATCHES[bench.scale]
    ]
    done = bench.sweep(train, jobs)
    keys = ("method", "order", "batch", "seed")
    runs = [{**{key: getattr(job, key) for key in keys}, **result} for job, result in zip(jobs, done, strict=True)]
    return {"runs": runs, "responses": responses(), "batches": list(BATCHES[bench.scale]), **size}


def scores(result: dict[str, Any], method: str, way: str, order: str, batch: int) -> list[float | None]:
    """Accuracies over seeds."""
    return [run["accuracy"].get(way) for run in where(result["runs"], method=method, order=order, batch=batch)]


def tables(result: dict[str, Any]) -> list[Table]:
    """Accuracies by what is normalized with, and ranges of normalized values."""
    places = [(order, batch) for order in ORDERS for batch in result["batches"]]
    columns = [f"{ORDERS[order]}, batch {batch}" for order, batch in places]
    rows: list[list[Any]] = []
    for method, name in METHODS.items():
        for way, title in WAYS.items():
            cells = [scores(result, method, way, *place) for place in places]
            if any(value is not None for cell in cells for value in cell):
                rows.append([f"{name}: {title}", *(spread(cell, ".1f", 100) for cell in cells)])
    about = [
        f"{result['data']}: {result['train'] or 'all'} training images, {result['epochs']} epochs; mean ± standard deviation "
        "over seeds; half of the test images, the other half chose alpha. A test batch is as large as a training batch; two "
        "classes: each test batch is of two classes, as in sorted training.",
    ]
    found = [Table("Test accuracy, %, by training batches", ("evaluated with", *columns), rows, about)]
    for batch in result["batches"]:
        runs = [run for run in where(result["runs"], method="bn", order="shuffled", batch=batch) if run.get("ranges")]
        if runs:
            rows = []
            for place in range(len(runs[0]["ranges"])):
                layers = [run["ranges"][place] for run in runs]
                cells = [max(layer[key] for layer in layers) for key in RANGES]
                rows.append([f"norm {place + 1}", *cells])
            notes = [
                "Largest absolute value over test images and seeds; strong: one image a batch ten times as strong."
            ]
            title = f"Normalized values before weight and bias, training batches of {batch}, shuffled"
            found.append(Table(title, ("layer", *RANGES.values()), rows, notes))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """What was seen of each part of the claim."""
    said = []
    names = {"batch": "those of shuffled test batches", "precise": "precise statistics", "weighed": "example weighing"}
    for order, words in ORDERS.items():
        for batch in result["batches"]:
            running = scores(result, "bn", "running", order, batch)
            # Of one network, which diverged for every way or for none.
            parts = {name: less(scores(result, "bn", way, order, batch), running, None) for way, name in names.items()}
            parts["BatchRenorm"] = less(scores(result, "brn", "running", order, batch), running, CHANCE)
            there = [f"{name} {interval(gaps)}" for name, gaps in parts.items() if gaps.mean is not None]
            if there:
                said.append(
                    f"{words}, batch {batch}: test accuracy of BatchNorm with running statistics in %: "
                    f"{spread(running, '.1f', 100)}; minus that, paired by seed: {', '.join(there)}."
                )
    layers = [layer for run in result["runs"] for layer in run.get("ranges") or []]
    if layers:
        over = sum(
            layer["train"] > layer["bound"] * 1.0001 or layer["train strong"] > layer["bound"] * 1.0001
            for layer in layers
        )
        beyond = sum(layer["eval strong"] > layer["bound"] for layer in layers)
        said.append(
            f"The bound sqrt(n - 1) of training was exceeded in {over} of {len(layers)} layers; in evaluation, with one strong "
            f"image a batch, values beyond it were met in {beyond}."
        )
    lost = [run for run in result["runs"] if run["status"] != OK]
    said.append(
        f"{len(lost)} of {len(result['runs'])} runs diverged, and count as guessing where BatchRenorm is compared with BatchNorm."
    )
    return said


def less(these: list[float | None], those: list[float | None], lost: float | None) -> Interval:
    """The interval of differences seed by seed.

    Args:
        these: accuracies over seeds.
        those: which are taken off them.
        lost: what a run that diverged counts as; None leaves its seed out.
    """
    ours, theirs = ([lost if score is None else score for score in scores] for scores in (these, those))
    return differences(ours, theirs)


def figures(result: dict[str, Any]) -> list[Drawing]:
    """The figures of the claim, from what its ``run`` returned."""
    sizes = " or ".join(map(str, result["batches"]))
    return [
        Drawing(
            "accuracy",
            lambda: accuracies(result),
            "Test accuracy by the statistics that evaluation normalizes with; a dot is a seed and a bar the mean over seeds. "
            f"Each panel is a way to put together training batches of {sizes} images; where its rows lie apart, the choice of "
            "statistics matters.",
        ),
        Drawing(
            "alpha",
            lambda: alphas(result),
            "Test accuracy of batch normalization that mixes a part α of the test example's own statistics into the running "
            f"ones, by how training batches were put together; {SEEDS}. Look for a maximum to the right of α = 0, where running "
            "statistics stand alone; marks at the bottom are the α chosen on held-out images, one a seed.",
        ),
        Drawing(
            "ranges",
            lambda: draw_ranges(result),
            "On the left, what one value of eight becomes as it grows, normalized by its batch, by running statistics, by "
            "running statistics with a tenth of its own (weighing) and by batch renormalization (renorm). On the right, the "
            "largest normalized value in each layer over test images and seeds, as triangles where one image of each batch is "
            "ten times as strong; √(n − 1) is the most that n values can reach by their own statistics, so only evaluation can "
            "lie above it.",
        ),
    ]


def accuracies(result: dict[str, Any]) -> Figure:
    """Test accuracy by what is normalized with; a dot is a seed, a bar their mean."""
    places = [(order, batch) for order in ORDERS for batch in result["batches"]]
    figure, axes = panels(len(places), FULL, 2.3, sharey=True, sharex=True)
    for axis, (order, batch) in zip(axes, places, strict=True):
        for y, way in enumerate(WAYS):
            for method, hue in HUES.items():
                runs = where(result["runs"], method=method, order=order, batch=batch)
                values = [100 * value for value in known(run["accuracy"].get(way) for run in runs)]
                at = y + (0.15 if method == "brn" else -0.15)
                axis.plot(values, [at] * len(values), "o", color=hue, markersize=3, alpha=0.5, markeredgewidth=0)
                if (middle := mean(values)) is not None:
                    axis.plot([middle], [at], "|", color=hue, markersize=9, markeredgewidth=1.8)
        axis.set_title(f"{ORDERS[order]}, {batch}", loc="left")
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("test accuracy, %")
    axes[0].set_yticks(range(len(WAYS)), list(WAYS.values()))
    axes[0].set_ylim(len(WAYS) - 0.5, -0.5)
    handles = [Line2D([], [], color=HUES[m], marker="|", markersize=9, markeredgewidth=1.8, linestyle="") for m in HUES]
    figure.legend(handles, [METHODS[m] for m in METHODS], loc="outside upper left", ncols=2)
    return figure


def alphas(result: dict[str, Any]) -> Figure:
    """Test accuracy against the weight of the example's own statistics."""
    figure, axes = panels(len(ORDERS), FULL, 2.5, sharey=True)
    for axis, (order, words) in zip(axes, ORDERS.items(), strict=True):
        ends = []
        for batch, hue in zip(result["batches"], (COLOURS[1], COLOURS[0]), strict=False):
            runs = [run for run in where(result["runs"], method="bn", order=order, batch=batch) if run["alphas"]]
            if not runs:
                continue
            places = [alpha for alpha, _ in runs[0]["alphas"]["test"]]
            columns = list(zip(*([100 * score for _, score in run["alphas"]["test"]] for run in runs), strict=True))
            middle = [sum(column) / len(column) for column in columns]
            style: dict[str, Any] = {"color": hue, "marker": "o", "markersize": 3}
            band(axis, places, middle, list(map(min, columns)), list(map(max, columns)), **style)
            ends.append((middle[-1], f"batch {batch}", hue))
            for run in runs:
                axis.axvline(run["alphas"]["chosen"], ymax=0.04, color=hue, linewidth=1.4)
        axis.set_xscale("symlog", linthresh=1e-3, linscale=0.5)
        ticks = (0, 1e-3, 1e-2, 1e-1, 1)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        # Its own margin would be as wide below 0 as three decades.
        axis.set_xlim(-2e-4, 1.2)
        axis.set_title(f"{words} in training", loc="left")
        axis.set_xlabel("α, weight of the example's own statistics")
        name_ends(axis, ends)
    axes[0].set_ylabel("test accuracy, %")
    figure.legend(
        [Line2D([], [], color=FAINT, linewidth=1.4, marker="|", linestyle="", markersize=7)],
        ["chosen on held-out images, a mark a seed"],
        loc="outside upper left",
    )
    return figure


def draw_ranges(result: dict[str, Any]) -> Figure:
    """What one value of eight becomes as it grows, and the largest normalized values met in each layer."""
    figure, axes = panels(1 + len(result["batches"]), FULL, 2.7)
    found, ends = result["responses"], []
    for key, (name, hue) in KINDS.items():
        axes[0].plot(found["input"], found[key], color=hue)
        ends.append((found[key][-1], name, hue))
    bound = math.sqrt(7)
    axes[0].axhline(bound, color=INK, linestyle=DOTTED, linewidth=0.9)
    axes[0].set(xscale="log", yscale="log", xlabel="one value of eight", ylabel="what it becomes")
    axes[0].set_title("a value that grows", loc="left")
    styles = {
        "train": (GREY, "o"),
        "train strong": (GREY, "^"),
        "eval": (COLOURS[1], "o"),
        "eval strong": (COLOURS[1], "^"),
    }
    for axis, batch in zip(axes[1:], result["batches"], strict=True):
        runs = [r for r in where(result["runs"], method="bn", order="shuffled", batch=batch) if r.get("ranges")]
        if not runs:
            continue
        layers = range(1, len(runs[0]["ranges"]) + 1)
        for key, (hue, shape) in styles.items():
            largest = [max(run["ranges"][k - 1][key] for run in runs) for k in layers]
            axis.plot(layers, largest, color=hue, marker=shape, markersize=3.5, linestyle="" if shape == "^" else "-")
        axis.plot(
            layers, [runs[0]["ranges"][k - 1]["bound"] for k in layers], color=INK, linestyle=DOTTED, linewidth=0.9
        )
        log(axis)
        axis.set_title(f"largest in each layer, batch {batch}", loc="left")
        axis.set_xlabel("norm")
        axis.set_xticks(layers)
    axes[0].set_xlim(found["input"][0], found["input"][-1])
    name_ends(axes[0], ends)
    handles = [
        *(Line2D([], [], color=hue, marker=shape, markersize=3.5, linestyle="") for hue, shape in styles.values()),
        Line2D([], [], color=INK, linestyle=DOTTED),
    ]
    labels = ["training", "training, one image ten times as strong", "evaluation", "evaluation, strong", "√(n − 1)"]
    figure.legend(handles, labels, loc="outside upper left", ncols=5, columnspacing=1.0)
    return figure


EXPERIMENT = Experiment(
    name="disparity",
    kind="claim",
    title="Batch normalization in training and in evaluation",
    claim=(
        "Batch normalization computes another function in evaluation than in training, with another range of outputs; weighing "
        "in the example's own statistics at inference, better estimates, or batch renormalization narrow the gap."
    ),
    paper=Paper(
        "Summers, Cecilia and Dinneen, Michael J.",
        "Four Things Everyone Should Know to Improve Batch Normalization",
        2020,
        "https://arxiv.org/abs/1906.03548",
    ),
    run=run,
    tables=tables,
    figures=figures,
    remarks=remarks,
    scales=("tiny", "small", "full"),
)
