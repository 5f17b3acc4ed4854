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
from torch import Tensor, nn

from normkit.activations.batch_group_norm import CARD, BatchGroupNorm
from normkit.activations.batch_norm import BatchNorm
from normkit.activations.batch_renorm import BatchRenorm, RenormSchedule
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments import runs
from normkit.lab.experiments.batch_size import BASE, RATE, norm
from normkit.lab.experiments.runs import CHANCE, drawn, points
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.report import drawing
from normkit.lab.report.drawing import key
from normkit.lab.stats import Row, differences, known, spread, where
from normkit.lab.train.images import OK, Size, Stream, accuracy, fit
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
HUES = {"bn": drawing.GREY, "brn": drawing.COLOURS[0]}
KINDS = {
    "batch": drawing.GREY,
    "running": drawing.COLOURS[1],
    "weighing": drawing.COLOURS[2],
    "renorm": drawing.COLOURS[0],
}
BATCHES = {"tiny": (4, 8), "small": (4, 32), "full": (4, 32)}
HIDDEN = 64
JUDGED = 1024  # training images on which statistics are re-estimated
STRONG = 10.0  # what one image of a batch is multiplied by
RESPONSES = 8  # values per channel in the table of what one value becomes


@dataclass(frozen=True)
class Training(Size, path="{0.method}/{0.order}/batch={0.batch}/seed={0.seed}"):
    method: str
    order: str
    batch: int
    seed: int


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a network, and evaluates it in every way; of batch normalization also the alpha curve and ranges by layer."""
    images = job.images()
    order = partial(sorted_order, images["train"][1], job.batch, job.seed) if job.order == "sorted" else None
    stream = Stream(images["train"], job.batch, job.seed, order)
    model = runs.network(job, images, norm(job.method, job.epochs * stream.per_epoch), HIDDEN)
    walked = fit(model, stream, job.epochs, RATE * job.batch / BASE, job.seed, folder)
    scores: dict[str, float | None] = dict.fromkeys(WAYS)
    result: dict[str, Any] = {"status": walked.status, "accuracy": scores, "alphas": None, "ranges": None}
    if walked.status != OK:
        return result
    x, y = images["test"]
    half = len(x) // 2
    chosen, test = (x[:half], y[:half]), (x[half:], y[half:])
    result["accuracy"] = scores = {"running": accuracy(model.eval(), test)}
    keep = {name: value.clone() for name, value in model.state_dict().items()}
    rows = sorted_order(test[1], job.batch, job.seed, 0)
    for way, (x, y) in (("batch", test), ("sorted", (test[0][rows], test[1][rows]))):
        scores[way] = accuracy(model.train(), (x, y), job.batch)
        model.load_state_dict(keep)  # training mode has moved the running averages
    if job.method == "bn":
        result["ranges"] = ranges(model, test[0], job.batch)
        model.load_state_dict(keep)
        weighed = weigh_examples(copy.deepcopy(model)).model
        curve = choose_alpha(weighed, lambda model: accuracy(model, chosen))
        scores["weighed"] = accuracy(weighed, test)
        tested = choose_alpha(weighed, lambda model: accuracy(model, test))
        result["alphas"] = {"chosen": max(curve, key=lambda alpha: curve[alpha]), "test": list(tested.items())}
        recalibrate(model, images["train"][0][:JUDGED].split(job.batch), limit=None)
        scores["precise"] = accuracy(model.eval(), test)
    return result


def sorted_order(labels: Tensor, batch: int, seed: int, epoch: int) -> Tensor:
    """Rows in blocks of half a batch, each of one class; blocks come at random, two make a batch."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    half = batch // 2
    blocks = []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0].cpu()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        blocks += rows[: len(rows) // half * half].split(half)
    return torch.cat([blocks[place] for place in torch.randperm(len(blocks), generator=generator)])


def run(bench: Bench) -> dict[str, Any]:
    size, batches = runs.size_of(bench, 3), BATCHES[bench.scale]
    done = runs.grid(bench, train, Training, {"method": METHODS, "order": ORDERS, "batch": batches}, **size)
    return {"runs": done, "responses": responses(), "batches": list(batches), **size, **runs.source_of(size, bench)}


def scores(result: dict[str, Any], method: str, way: str, order: str, batch: int) -> list[float | None]:
    """Accuracies over seeds."""
    return [run["accuracy"].get(way) for run in where(result["runs"], method=method, order=order, batch=batch)]


def layers_of(result: dict[str, Any], batch: int) -> list[tuple[Row, ...]]:
    """For each layer its ranges of normalized values over seeds."""
    measured = where(result["runs"], method="bn", order="shuffled", batch=batch)
    return list(zip(*(run["ranges"] for run in measured if run.get("ranges")), strict=True))


def tables(result: dict[str, Any]) -> list[Table]:
    places = [(order, batch) for order in ORDERS for batch in result["batches"]]
    columns = ("evaluated with", *(f"{ORDERS[order]}, batch {batch}" for order, batch in places))
    rows: list[list[Any]] = []
    for method, name in METHODS.items():
        for way, title in WAYS.items():
            cells = [scores(result, method, way, *place) for place in places]
            if any(map(known, cells)):
                rows.append([f"{name}: {title}", *(spread(cell, ".1f", 100) for cell in cells)])
    about = (
        f"{result['data']}: {result['train'] or 'all'} training images, {result['epochs']} epochs; mean ± standard deviation "
        "over seeds; half of the test images, the other half chose alpha. A test batch is as large as a training batch; two "
        "classes: each test batch is of two classes, as in sorted training."
    )
    found = [Table("Test accuracy, %, by training batches", columns, rows, runs.notes(result, about))]
    note = "Largest absolute value over test images and seeds; strong: one image per batch ten times as strong."
    for batch in result["batches"]:
        title = f"Normalized values before weight and bias, training batches of {batch}, shuffled"
        largest = [[max(layer[key] for layer in seeds) for key in RANGES] for seeds in layers_of(result, batch)]
        rows = [[f"norm {number}", *row] for number, row in enumerate(largest, 1)]
        if rows:
            found.append(Table(title, ("layer", *RANGES.values()), rows, [note]))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    names = {"batch": "those of shuffled test batches", "precise": "precise statistics", "weighed": "example weighing"}
    for order, words in ORDERS.items():
        for batch in result["batches"]:
            running = scores(result, "bn", "running", order, batch)
            # Of one network, which diverged for every way or for none.
            gaps = {name: differences(scores(result, "bn", way, order, batch), running) for way, name in names.items()}
            renorm = scores(result, "brn", "running", order, batch)
            ours, base = ([CHANCE if score is None else score for score in some] for some in (renorm, running))
            gaps["BatchRenorm"] = differences(ours, base)
            there = [f"{name} {points(gap)}" for name, gap in gaps.items() if gap.mean is not None]
            if there:
                said.append(
                    f"{words}, batch {batch}: test accuracy of BatchNorm with running statistics in %: "
                    f"{spread(running, '.1f', 100)}; minus that, paired by seed: {', '.join(there)}."
                )
    layers = [layer for run in result["runs"] for layer in run.get("ranges") or []]
    if layers:
        # Rounding in single precision may pass the bound by a little.
        over = sum(max(layer["train"], layer["train strong"]) > layer["bound"] * 1.0001 for layer in layers)
        beyond = sum(layer["eval strong"] > layer["bound"] for layer in layers)
        said.append(
            f"The bound sqrt(n - 1) of training was exceeded in training in {over} of {len(layers)} layers; in evaluation, with "
            f"one image per batch ten times as strong, in {beyond}."
        )
    return [
        *said,
        runs.diverged(result["runs"], ", and count as guessing where BatchRenorm is compared with BatchNorm"),
    ]


@drawn(
    "accuracy",
    "Test accuracy by the statistics that evaluation normalizes with; a dot is a seed and a bar the mean over seeds. "
    "Each panel is a way to put together training batches of {batches[0]} or {batches[1]} images; where its rows lie apart, "
    "the choice of statistics matters.",
)
def _accuracies(result: dict[str, Any]) -> Figure:
    places = [(order, batch) for order in ORDERS for batch in result["batches"]]
    titles = [f"{ORDERS[order]}, {batch}" for order, batch in places]
    figure, axes = runs.titled(2.3, *titles, sharey=True, sharex=True)
    for axis, (order, batch) in zip(axes, places, strict=True):
        for y, way in enumerate(WAYS):
            for shift, (method, hue) in zip((-0.15, 0.15), HUES.items(), strict=True):
                drawing.dots(
                    axis, y + shift, [100 * score for score in known(scores(result, method, way, order, batch))], hue
                )
        axis.set_xlabel("test accuracy, %")
        drawing.rows_of(axis, list(WAYS.values()))
    handles = [key(hue, marker="|", markersize=9, markeredgewidth=1.8, linestyle="") for hue in HUES.values()]
    figure.legend(handles, list(METHODS.values()), loc="outside upper left", ncols=2)
    return figure


@drawn(
    "alpha",
    "Test accuracy of batch normalization that mixes a part α of the test example's own statistics into the running "
    f"ones, by how training batches were put together; {drawing.SEEDS}. Look for a maximum to the right of α = 0, where running "
    "statistics stand alone; marks at the bottom are the α chosen on held-out images, one per seed.",
)
def _alphas(result: dict[str, Any]) -> Figure:
    figure, axes = runs.titled(2.5, *(f"{words} in training" for words in ORDERS.values()), sharey=True)
    for axis, order in zip(axes, ORDERS, strict=True):
        ends = []
        for batch, hue in zip(result["batches"], (drawing.COLOURS[1], drawing.COLOURS[0]), strict=False):
            own = [run for run in where(result["runs"], method="bn", order=order, batch=batch) if run["alphas"]]
            found: dict[float, list[float]] = {}
            for run in own:
                axis.axvline(run["alphas"]["chosen"], ymax=0.04, color=hue, linewidth=1.4)
                for alpha, score in run["alphas"]["test"]:
                    found.setdefault(alpha, []).append(100 * score)
            ends += drawing.across(axis, f"batch {batch}", hue, found)
        axis.set_xscale("symlog", linthresh=1e-3, linscale=0.5)
        ticks = (0, 1e-3, 1e-2, 1e-1, 1)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        # Its own margin would be as wide below 0 as three decades.
        axis.set_xlim(-2e-4, 1.2)
        axis.set_xlabel("α, weight of the example's own statistics")
        drawing.name_ends(axis, ends)
    axes[0].set_ylabel("test accuracy, %")
    mark = key(drawing.FAINT, linewidth=1.4, marker="|", linestyle="", markersize=7)
    figure.legend([mark], ["chosen on held-out images, a mark per seed"], loc="outside upper left")
    return figure


@drawn(
    "ranges",
    "On the left, what one value of eight becomes as it grows, normalized by its batch, by running statistics, by "
    "running statistics with a tenth of its own (weighing) and by batch renormalization (renorm). On the right, the "
    "largest normalized value in each layer over test images and seeds, as triangles where one image of each batch is "
    "ten times as strong; √(n − 1) is the most that n values can reach by their own statistics, so only evaluation can "
    "lie above it.",
)
def _ranges(result: dict[str, Any]) -> Figure:
    titles = (f"largest in each layer, batch {batch}" for batch in result["batches"])
    figure, axes = runs.titled(2.7, "a value that grows", *titles)
    found, ends = result["responses"], []
    for kind, hue in KINDS.items():
        values = found["weighed" if kind == "weighing" else kind]
        axes[0].plot(found["input"], values, color=hue)
        ends.append((values[-1], kind, hue))
    limit: dict[str, Any] = {"color": drawing.INK, "linestyle": drawing.DOTTED, "linewidth": 0.9}
    axes[0].axhline(math.sqrt(7), **limit)
    axes[0].set(xscale="log", yscale="log", xlabel="one value of eight", ylabel="what it becomes")
    axes[0].set_xlim(found["input"][0], found["input"][-1])
    drawing.name_ends(axes[0], ends)
    looks = {
        way: (drawing.GREY if "train" in way else drawing.COLOURS[1], "^" if "strong" in way else "o")
        for way in [*RANGES][1:]
    }
    for axis, batch in zip(axes[1:], result["batches"], strict=True):
        seeds = layers_of(result, batch)
        layers = range(1, len(seeds) + 1)
        for way, (hue, shape) in looks.items():
            largest = [max(layer[way] for layer in some) for some in seeds]
            axis.plot(layers, largest, color=hue, marker=shape, markersize=3.5, linestyle="" if shape == "^" else "-")
        axis.plot(layers, [some[0]["bound"] for some in seeds], **limit)
        drawing.log(axis)
        axis.set_xlabel("norm")
        axis.set_xticks(layers)
    handles = [key(hue, marker=shape, markersize=3.5, linestyle="") for hue, shape in looks.values()]
    labels = ["training", "training, one image ten times as strong", "evaluation", "evaluation, strong", "√(n − 1)"]
    figure.legend(
        [*handles, key(drawing.INK, linestyle=drawing.DOTTED)],
        labels,
        loc="outside upper left",
        ncols=5,
        columnspacing=1.0,
    )
    return figure


OUTLIERS = [2.0 ** (power / 2) for power in range(-4, 15)]


@torch.no_grad()
def ranges(model: SmallCNN, x: Tensor, batch: int) -> list[dict[str, float]]:
    """For each batch normalization the bound sqrt(n - 1) and the largest normalized values met, before weight and bias."""
    # "train" is normalized by each batch's own statistics, "eval" by the running ones; "strong" is the first image of each batch.
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    found: list[dict[str, float]] = [{} for _ in layers]
    x = x[: len(x) // batch * batch]
    strong = x.clone()
    strong[::batch] *= STRONG

    def see(place: int, key: str, layer: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        normal = normalized(values) if layer.training else against(values, layer)
        found[place]["bound"] = math.sqrt(batch * inputs[0][0, 0].numel() - 1)
        found[place][key] = max(found[place].get(key, 0.0), normal.abs().max().item())

    for mode in ("train", "eval"):
        for suffix, images in (("", x), (" strong", strong)):
            hooks = [
                layer.register_forward_pre_hook(partial(see, place, mode + suffix))
                for place, layer in enumerate(layers)
            ]
            model.train(mode == "train")
            for part in images.split(batch):
                model(part)
            for hook in hooks:
                hook.remove()
    return found


def normalized(values: Tensor) -> Tensor:
    """Values (channels, n) minus their mean, over their deviation: none exceeds sqrt(n - 1), which one value alone attains."""
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).add(1e-30).sqrt()


def against(values: Tensor, layer: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Values (channels, n) normalized by a layer's running statistics."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return (values - layer.running_mean[:, None]) / (layer.running_var[:, None] + layer.eps).sqrt()


def responses() -> dict[str, list[float]]:
    """What one value out of eight becomes as it grows, the other seven standard normal in sum, by each kind of statistics."""
    others = normalized(torch.randn(1, RESPONSES - 1, generator=torch.Generator().manual_seed(0)))
    layers: dict[str, nn.Module] = {
        "batch": BatchNorm(1),
        "running": BatchNorm(1).eval(),
        "weighed": BatchGroupNorm(1, alpha=0.1).eval(),
        "renorm": BatchRenorm(1, schedule=RenormSchedule.constant(r_max=3, d_max=5)),
    }
    found: dict[str, list[float]] = {"input": OUTLIERS, **{name: [] for name in layers}}
    for value in OUTLIERS:
        column = torch.cat([torch.tensor([[value]]), others], dim=1).T
        for name, layer in layers.items():
            fresh = copy.deepcopy(layer)  # a training step moves running statistics
            found[name].append(fresh(column)[0].item())
    return found


EXPERIMENT = Experiment(
    "disparity", "claim", "Batch normalization in training and in evaluation",
    "Batch normalization computes another function in evaluation than in training, with another range of outputs; weighing "
        "in the example's own statistics at inference, better estimates, or batch renormalization narrow the gap.",
    CARD.paper, run, tables, runs.drawings(_accuracies, _alphas, _ranges), remarks,
)  # fmt: skip
