"""Batch normalization is one function in training and another in evaluation: how far they are apart, and what mends it.

A small network learns CIFAR-10 in batches of 4 and of 32, shuffled or sorted: of two classes a batch, the hard case. Each is
then evaluated with running statistics, with statistics estimated anew ("precise"), with the test example's own share weighed in,
and with the statistics of test batches; batch renormalization is trained beside it. What normalized values can be is
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
from torch import Tensor, nn

from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.activations.batch_norm import BatchNorm
from normkit.activations.batch_renorm import BatchRenorm, RenormSchedule
from normkit.core.card import Paper
from normkit.lab.claims.batch_size import BASE, CHANCE, RATE, interval, norm
from normkit.lab.claims.disparity_drawing import METHODS, ORDERS, RANGES, WAYS, draw
from normkit.lab.claims.images import Images, Size, Stream, accuracy, fit
from normkit.lab.claims.numbers import choose, spread
from normkit.lab.claims.steps import OK, device, forget
from normkit.lab.data.cifar import download_missing
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.interval import Interval, differences
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.seeding import reseed
from normkit.surgery.example_weighing import choose_alpha, weigh_examples
from normkit.surgery.recalibrate import recalibrate

SIZES: dict[str, dict[str, Any]] = {
    "small": {"data": "cifar10", "train": 1500, "test": 2000, "halve": True, "width": 16, "epochs": 3},
    "full": {"data": "cifar10", "train": None, "test": None, "halve": False, "width": 32, "epochs": 10},
}
BATCHES = (4, 32)
HIDDEN = 64
JUDGED = 1024  # training images by which statistics are estimated anew
STRONG = 10.0
OUTLIERS = [2.0 ** (power / 2) for power in range(-4, 15)]
RESPONSES = 8  # values a channel in the table of what one value becomes


@dataclass(frozen=True)
class Job(Size):
    """One training."""

    method: str
    order: str
    batch: int
    seed: int

    @property
    def path(self) -> str:
        """The folder."""
        return f"{self.method}/{self.order}/batch={self.batch}/seed={self.seed}"


def train(job: Job, folder: Path) -> dict[str, Any]:
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


def judge(model: SmallCNN, job: Job, seen: Images, chosen: Images, test: Images) -> dict[str, Any]:
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


@torch.no_grad()
def ranges(model: SmallCNN, x: Tensor, batch: int) -> list[dict[str, float]]:
    """For each batch normalization the bound sqrt(n - 1) and the largest normalized values met, before weight and bias.

    ``train`` is normalized by each batch's own statistics and ``eval`` by the running ones; ``train strong`` and ``eval strong``
    likewise, where the first image of each batch is made ten times as strong.
    """
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
    """Values (channels, n) minus their mean, over their deviation: none exceeds sqrt(n - 1), which one value alone attains.

    >>> normalized(torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]])).max()
    tensor(2.0000)
    """
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).add(1e-30).sqrt()


def against(values: Tensor, layer: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Values (channels, n) normalized by a layer's running statistics."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return (values - layer.running_mean[:, None]) / (layer.running_var[:, None] + layer.eps).sqrt()


def responses() -> dict[str, list[float]]:
    """What one value out of eight becomes as it grows, the other seven standard normal in sum, by each kind of statistics.

    Running statistics are those of standard normal values.

    >>> round(max(responses()["batch"]), 3) <= round(math.sqrt(7), 3)
    True
    """
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


def run(bench: Bench) -> dict[str, Any]:
    """Trains both methods in both orders and batch sizes with every seed."""
    size = dict(SIZES[bench.scale])
    size["epochs"] = bench.epochs or size["epochs"]
    if bench.download:
        download_missing(size["data"])
    jobs = [
        Job(method, order, batch, seed, **size)
        for seed in bench.seeds
        for method in METHODS
        for order in ORDERS
        for batch in BATCHES
    ]
    done = bench.sweep(train, jobs)
    keys = ("method", "order", "batch", "seed")
    runs = [{**{key: getattr(job, key) for key in keys}, **result} for job, result in zip(jobs, done, strict=True)]
    return {"runs": runs, "responses": responses(), "batches": list(BATCHES), **size}


def scores(result: dict[str, Any], method: str, way: str, order: str, batch: int) -> list[float | None]:
    """Accuracies over seeds."""
    return [run["accuracy"].get(way) for run in choose(result["runs"], method=method, order=order, batch=batch)]


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
        runs = [run for run in choose(result["runs"], method="bn", order="shuffled", batch=batch) if run.get("ranges")]
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
    return differences(*([lost if score is None else score for score in scores] for scores in (these, those)))


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
    draw=draw,
    remarks=remarks,
)
