"""Why batch normalization helps: internal covariate shift, smoothness of the loss, and the largest learning rate.

A small network learns CIFAR-10 without normalization, with batch normalization, and with batch normalization followed by noise
whose mean and deviation change at every step, so that the inputs of every layer shift more than without any. Along training
three things are measured: how much a layer's gradient turns when the layers before it take their step, which is one
definition of covariate shift; how far means and deviations of a layer's inputs move; and how the loss and its gradient
change along the gradient. Apart from that, runs at many rates show the largest that still learns.

Ours: batches of 64, a bias in the place of the norm that is left out, rate 0.05 with momentum 0.9 and cosine decay for what is
measured along training, gradients compared on the training batch itself, steps of a half to four times the rate along the
gradient; 50 steps and no decay in the search for the largest rate.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.activations.batch_norm import BatchNorm
from normkit.core.card import Paper
from normkit.lab.claims.images import Images, Stream, load
from normkit.lab.claims.numbers import ABSENT, choose, mean, spread
from normkit.lab.claims.steps import OK, Diverged, device, forget, walk
from normkit.lab.claims.why_bn_drawing import METHODS, draw
from normkit.lab.data.cifar import download_missing
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.interval import differences, tell
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.seeding import reseed

SIZES: dict[str, dict[str, Any]] = {
    "small": {"data": "cifar10", "train": 1500, "halve": True, "width": 16, "steps": 120},
    "full": {"data": "cifar10", "train": None, "halve": False, "width": 32, "steps": 2000},
}
BATCH, RATE, LOOKS, SHORT = 64, 0.05, 20, 50
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ALONG = (0.5, 1.0, 2.0, 3.0, 4.0)
GUESS = math.log(10)  # the loss of guessing one of ten classes
MEAN, DEVIATION, JITTER = 0.5, 1.25, 0.1


class Shift(nn.Module):
    """A bias for each channel, which is what is left of a norm that is left out.

    Args:
        channels: C.

    Shape:
        (N, C, *) to the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Adds the bias."""
        return x + self.bias.view(-1, *[1] * (x.dim() - 2))


class NoisyBatchNorm(nn.Module):
    """Batch normalization, and in training noise behind it whose mean and deviation are drawn anew at every call.

    y = s * BN(x) + m. A channel's mean is within 0.5 of 0 and its deviation from 1 to 1.25; m is within 0.1 of the mean, and s
    normal about the deviation with deviation 0.1, both for each sample and channel.

    Args:
        channels: C.

    Shape:
        (N, C, *) to the same.

    Reference:
        Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, https://arxiv.org/abs/1805.11604, appendix A
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes, and adds the noise."""
        y = self.norm(x)
        if not self.training:
            return y
        size = x.shape[:2]
        means = (2 * torch.rand(1, size[1], device=x.device) - 1) * MEAN
        deviations = 1 + (DEVIATION - 1) * torch.rand(1, size[1], device=x.device)
        m = means + (2 * torch.rand(size, device=x.device) - 1) * JITTER
        s = deviations + torch.randn(size, device=x.device) * JITTER
        shape = [*size, *[1] * (x.dim() - 2)]
        return s.view(shape) * y + m.view(shape)


MAKERS: dict[str, Callable[[int], nn.Module]] = {"none": Shift, "bn": BatchNorm, "noisy": NoisyBatchNorm}


@dataclass(frozen=True)
class Job:
    """One training: measured along the way at the usual rate, or short at some rate to see whether it learns."""

    method: str
    rate: float
    measured: bool
    seed: int
    data: str
    train: int | None
    halve: bool
    width: int
    steps: int

    @property
    def path(self) -> str:
        """The folder."""
        return f"{'along' if self.measured else 'rates'}/{self.method}/rate={self.rate:g}/seed={self.seed}"


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Trains a network, and measures it twenty times meanwhile if the job says so."""
    images = load(job.data, job.train, 500, job.halve)["train"]
    stream = Stream(images, BATCH, job.seed)
    reseed(job.seed, "init")
    model = SmallCNN(MAKERS[job.method], channels=images[0].shape[1], width=job.width).to(device())
    optimizer = torch.optim.SGD(model.parameters(), job.rate, momentum=0.9)
    probe = images[0][: 2 * BATCH]

    def step(number: int) -> dict[str, Any] | None:
        x, y = stream(number)
        looking = job.measured and number % max(1, job.steps // LOOKS) == 0
        found = {**turns(model, (x, y), job.rate), **smoothness(model, (x, y), job.rate)} if looking else {}
        before = moments(model, probe) if looking else []
        if job.measured:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * job.rate * (1 + math.cos(math.pi * (number - 1) / job.steps))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise Diverged
        return {"loss": loss.item(), **found, **(moved(before, moments(model, probe)) if looking else {})}

    walked = walk(folder, job.steps, {"model": model, "optimizer": optimizer}, step, job.seed)
    forget(folder)
    losses = [row["loss"] for row in walked.rows]
    rows = [row for row in walked.rows if "turn" in row]
    return {
        "status": walked.status,
        "rows": rows,
        "loss": losses,
        "end": mean(losses[-10:]) if walked.status == OK else None,
    }


def groups(model: SmallCNN) -> list[list[nn.Parameter]]:
    """The parameters of each layer, a convolution with its norm, first layer first; a weight is first in each."""
    blocks = [model.features[k : k + 3] for k in range(0, len(model.features), 3)]
    return [list(block.parameters()) for block in [*blocks, model.classifier]]


def gradients(model: SmallCNN, batch: Images, seed: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients of all parameters on a batch, with noise drawn by a seed; nothing is changed but running averages."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss = F.cross_entropy(model(batch[0]), batch[1])
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def turns(model: SmallCNN, batch: Images, rate: float) -> dict[str, float]:
    """How the gradient of a layer's weight changes when the layers before it take a step: cosine and relative length.

    Mean over layers but the first; noise is drawn anew for the second gradient, as it is at the next step.
    """
    old, new = copy.deepcopy(model), copy.deepcopy(model)
    _, first = gradients(old, batch, 0)
    places = {id(parameter): place for place, parameter in enumerate(old.parameters())}
    layers, changed = groups(old), groups(new)
    cosines, lengths = [], []
    with torch.no_grad():
        for parameter, gradient in zip(new.parameters(), first, strict=True):
            parameter -= rate * gradient
    for k in range(1, len(layers)):
        mixed = copy.deepcopy(old)
        with torch.no_grad():
            for target, source in zip(groups(mixed)[:k], changed[:k], strict=True):
                for parameter, value in zip(target, source, strict=True):
                    parameter.copy_(value)
        place = places[id(layers[k][0])]
        one, other = first[place].flatten(), gradients(mixed, batch, 1)[1][place].flatten()
        cosines.append(F.cosine_similarity(one, other, dim=0).item())
        lengths.append(((one - other).norm() / one.norm().clamp_min(1e-30)).item())
    return {"turn": sum(cosines) / len(cosines), "change": sum(lengths) / len(lengths)}


def smoothness(model: SmallCNN, batch: Images, rate: float) -> dict[str, float]:
    """Along the gradient at a few lengths: the range of the loss, the largest change of the gradient, and that by distance."""
    here = copy.deepcopy(model)
    loss, first = gradients(here, batch, 0)
    length = torch.stack([gradient.norm() for gradient in first]).norm().item()
    losses, changes, ratios = [loss], [], []
    for part in ALONG:
        there = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, gradient in zip(there.parameters(), first, strict=True):
                parameter -= part * rate * gradient
        value, second = gradients(there, batch, 0)
        change = torch.stack([(a - b).norm() for a, b in zip(first, second, strict=True)]).norm().item()
        losses.append(value)
        changes.append(change)
        ratios.append(change / max(part * rate * length, 1e-30))
    return {"low": min(losses), "high": max(losses), "predictive": max(changes), "beta": max(ratios)}


@torch.no_grad()
def moments(model: SmallCNN, probe: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Means and deviations of the channels that enter each layer but the first, on images that stay the same."""
    twin, found = copy.deepcopy(model), []
    x = probe
    for place, module in enumerate(twin.features):
        x = module(x)
        if place % 3 == 2:
            found.append((x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3))))
    return found


def moved(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """How far means and deviations of layers' inputs have moved, in parts of the deviation; means over layers and channels."""
    means = [((b[0] - a[0]).abs() / a[1].clamp_min(1e-12)).mean().item() for a, b in zip(before, after, strict=True)]
    deviations = [
        ((b[1] - a[1]).abs() / a[1].clamp_min(1e-12)).mean().item() for a, b in zip(before, after, strict=True)
    ]
    return {"mean": sum(means) / len(means), "deviation": sum(deviations) / len(deviations)}


def run(bench: Bench) -> dict[str, Any]:
    """Trains every method measured, and with and without normalization at every rate."""
    size = dict(SIZES[bench.scale])
    if bench.epochs:
        size["steps"] = bench.epochs * (size["train"] or 45000) // BATCH
    if bench.download:
        download_missing(size["data"])
    jobs = [Job(method, RATE, True, seed, **size) for seed in bench.seeds for method in METHODS]
    short = {**size, "steps": min(SHORT, size["steps"])}
    jobs += [
        Job(method, rate, False, seed, **short) for seed in bench.seeds for method in ("none", "bn") for rate in RATES
    ]
    done = bench.sweep(train, jobs)
    keys = ("method", "rate", "measured", "seed")
    runs = [{**{key: getattr(job, key) for key in keys}, **one} for job, one in zip(jobs, done, strict=True)]
    return {"runs": runs, "rates": list(RATES), "short": short["steps"], **size}


def along(result: dict[str, Any], method: str, key: str) -> list[float | None]:
    """The mean of a measure over training, for each seed."""
    runs = choose(result["runs"], method=method, measured=True)
    return [mean(row.get(key) for row in run["rows"]) for run in runs]


def largest(result: dict[str, Any], method: str) -> list[float]:
    """For each seed the largest rate that ends below nine tenths of the loss of guessing."""
    seeds = sorted({run["seed"] for run in result["runs"]})
    found = []
    for seed in seeds:
        runs = choose(result["runs"], method=method, measured=False, seed=seed)
        found.append(max([run["rate"] for run in runs if (run["end"] or math.inf) < 0.9 * math.log(10)], default=0.0))
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """Measures along training, and losses at every rate."""
    rows: list[list[Any]] = []
    for method, name in METHODS.items():
        runs = choose(result["runs"], method=method, measured=True)
        turns, deviations, betas = (along(result, method, key) for key in ("turn", "mean", "beta"))
        swings = [mean(row["high"] - row["low"] for row in run["rows"]) for run in runs]
        ends = spread([run["end"] for run in runs])
        cells = (
            spread(values, ".3g") for values in (turns, deviations, swings, along(result, method, "predictive"), betas)
        )
        rows.append([name, ends, *cells])
    columns = (
        "norm",
        "loss at the end",
        "cosine",
        "shift of means",
        "range of loss",
        "change of gradient",
        "per distance",
    )
    notes = [
        "Means over training; mean ± standard deviation over seeds. Cosine: of a layer's gradient before and after the layers "
        "before it took their step. Shift: of the means of a layer's inputs in one step, in deviations.",
        "Range of loss, change of gradient and its ratio to the distance: along the gradient, up to four times the rate.",
    ]
    found = [Table(f"Along training at rate {RATE:g}", columns, rows, notes)]
    ends = {
        (method, rate): spread(
            [run["end"] for run in choose(result["runs"], method=method, measured=False, rate=rate)], ".2f"
        )
        for method in ("none", "bn")
        for rate in result["rates"]
    }
    rows = [[f"{rate:g}", ends["none", rate], ends["bn", rate]] for rate in result["rates"]]
    title = f"Training loss after {result['short']} steps"
    return [*found, Table(title, ("rate", METHODS["none"], METHODS["bn"]), rows, ["Without: the loss was no number."])]


def remarks(result: dict[str, Any]) -> list[str]:
    """What was seen of each explanation."""
    said = []
    values = {
        key: {method: mean(along(result, method, key)) for method in METHODS}
        for key in ("turn", "mean", "predictive", "beta")
    }
    # A run that diverged counts as guessing, so that the loss of the others is not taken for that of all.
    ends = {
        method: [
            GUESS if run["end"] is None else run["end"] for run in choose(result["runs"], method=method, measured=True)
        ]
        for method in METHODS
    }

    def three(key: str, form: str) -> str:
        found = values[key]
        parts = (f"{name} {ABSENT if found[m] is None else format(found[m], form)}" for m, name in METHODS.items())
        return ", ".join(parts)

    said.append(f"Covariate shift as cosine of a layer's gradients (1 is no shift): {three('turn', '.3f')}.")
    said.append(f"Covariate shift as movement of means in one step, in deviations: {three('mean', '.3f')}.")
    gaps = differences(ends["noisy"], ends["none"])
    if gaps.mean is not None:
        text = (
            f"Training loss at the end, all at rate {RATE:g}: BatchNorm with noise behind it {fmean(ends['noisy']):.2f}, "
            f"BatchNorm {fmean(ends['bn']):.2f}, no norm {fmean(ends['none']):.2f}; with noise minus no norm {tell(gaps)}"
        )
        if gaps.low is None or gaps.high is None:
            said.append(f"{text}, of one seed.")
        else:
            word = "lower" if gaps.high < 0 else "higher" if gaps.low > 0 else "not told apart"
            said.append(f"{text}, {word}.")
    said.append(f"Change of the gradient for each unit of distance along it: {three('beta', '.3g')}.")
    rates = {method: largest(result, method) for method in ("none", "bn")}
    said.append(
        "Largest rate that learned, for each seed: "
        + "; ".join(f"{METHODS[m]} {', '.join(f'{rate:g}' for rate in found)}" for m, found in rates.items())
        + "."
    )
    # A larger rate is worth something only where it leads to a lower loss.
    best = {method: lowest(result, method) for method in ("none", "bn")}
    parts = [f"{METHODS[m]} {ABSENT if b is None else f'{b[0]:.2f} (rate {b[1]:g})'}" for m, b in best.items()]
    said.append(f"Lowest mean training loss at any rate after {result['short']} steps: {'; '.join(parts)}.")
    return said


def lowest(result: dict[str, Any], method: str) -> tuple[float, float] | None:
    """The lowest mean loss at any rate, and that rate; a rate at which a seed diverged is passed over."""
    found = []
    for rate in result["rates"]:
        losses = [run["end"] for run in choose(result["runs"], method=method, measured=False, rate=rate)]
        if losses and None not in losses:
            found.append((fmean(losses), rate))
    return min(found, default=None)


EXPERIMENT = Experiment(
    name="why-bn",
    kind="claim",
    title="Why batch normalization helps",
    claim=(
        "Batch normalization does not reduce internal covariate shift, and trains fast even where noise adds to it; it makes the "
        "loss smoother along the gradient, so that larger steps can be taken."
    ),
    paper=Paper(
        "Santurkar, Shibani and Tsipras, Dimitris and Ilyas, Andrew and Madry, Aleksander",
        "How Does Batch Normalization Help Optimization?",
        2018,
        "https://arxiv.org/abs/1805.11604",
    ),
    run=run,
    tables=tables,
    draw=draw,
    remarks=remarks,
)
