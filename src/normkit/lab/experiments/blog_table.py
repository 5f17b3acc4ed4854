"""The usual comparison table of seven normalizations, with every cell that a machine can measure measured.

Introductions compare batch, layer, instance, group, RMS, weight and spectral normalization by what they normalize over, what
they are for, and strengths and weaknesses. The words come from the catalogue's cards; the properties are measured on small
layers in double precision: whether a sample depends on its batch, whether training and evaluation agree, whether the layer can
be folded into the weights, whether a stream can be computed place by place, what low precision costs, what contrast is left,
which singular values are held, and how the length of a weight grows.

Ours: images (8, 16, 6, 6) of noise about 1. Layer and RMS normalization are over channels and positions, except in a stream,
where they are over channels at each position, as in a transformer; the weights' methods stand on a 1x1 convolution, and for
singular values and for the length of a weight, over 300 steps of SGD, on a linear layer of 64 inputs and outputs.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.catalogue.methods import method
from normkit.core.errors import NormkitError
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import drawings, drawn, titled
from normkit.lab.report.drawing import COLOURS, FAINT, GREY, key, rows_of
from normkit.lab.stats import ABSENT
from normkit.lab.sweep import Work
from normkit.lab.train.images import descend
from normkit.surgery.fold import fold
from normkit.weights.spectral_norm import spectral_norm
from normkit.weights.weight_norm import weight_norm

CHANNELS, SIDE, SAMPLES, MANY = 16, 6, 8, 200
SAME = 1e-9  # a difference that is rounding, in double precision
DRIFT = 300
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: BatchNorm(CHANNELS),
    "layer_norm": lambda: LayerNorm(CHANNELS, over="c *"),
    "instance_norm": lambda: InstanceNorm(CHANNELS, affine=True),
    "group_norm": lambda: GroupNorm(4, CHANNELS),
    "rms_norm": lambda: RMSNorm(CHANNELS, over="c *"),
}
WEIGHTS = {"weight_norm": weight_norm, "spectral_norm": spectral_norm}
LOW = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STREAMS = {"layer_norm": lambda: LayerNorm(CHANNELS, over="c"), "rms_norm": lambda: RMSNorm(CHANNELS, over="c")}
METHODS = (*ACTIVATIONS, *WEIGHTS)


@dataclass(frozen=True)
class Measurement(Work, path="{0.method}/seed={0.seed}"):
    method: str
    seed: int = 0


def make(name: str) -> nn.Module:
    """A layer with the method, for images of 16 channels, in double precision."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]().double()
    layer = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False).double()
    WEIGHTS[name](layer)
    return layer


def draw_images(samples: int = SAMPLES) -> Tensor:
    """Noise about 1, from torch's global generator."""
    return torch.randn(samples, CHANNELS, SIDE, SIDE, dtype=torch.float64) + 1


def measure(job: Measurement, folder: Path) -> dict[str, Any]:
    """Measures one method."""
    torch.manual_seed(job.seed)
    layer, x = make(job.method), draw_images()
    plain = CHANNELS**2 if job.method in WEIGHTS else 0
    # Of another layer, as records have it: making it draws numbers.
    found: dict[str, Any] = {"parameters": sum(part.numel() for part in make(job.method).parameters()) - plain}
    others = torch.cat([x[:1], 3 * draw_images(SAMPLES - 1)])
    with torch.no_grad():
        # Each on a copy, so that nothing is carried over from one to the next.
        first, second, third = (copy.deepcopy(layer) for _ in range(3))
        y = first(x)
        found["batch"] = difference(second(others)[:1], y[:1])
        buffers = zip(first.buffers(), second.buffers(), strict=True)
        found["running"] = any(not torch.equal(one, other) for one, other in buffers)
        found["evaluation"] = difference(third.eval()(x), y)
        found["mean"] = y.mean(dim=(1, 2, 3)).abs().max().item()
        found["stream"] = stream(job.method)
        found["precision"] = {name: precision(job.method, x, dtype) for name, dtype in LOW.items()}
        found["contrast"] = {kind: contrast(job.method, kind) for kind in ("all channels", "one channel")}
    found["fold"] = folded(job.method, x)
    if job.method in WEIGHTS:
        found["spectrum"] = spectrum(job.method)
        found["drift"] = drift(job.method)
    return found


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()


def stream(name: str) -> float | None:
    """How far a row of positions computed one by one, in evaluation, is from the whole; None if one position is refused."""
    layer = (STREAMS[name]().double() if name in STREAMS else make(name)).eval()
    row = draw_images(1)[:, :, :1]
    try:
        one_by_one = torch.cat([layer(row[..., k : k + 1]) for k in range(SIDE)], dim=-1)
    except (NormkitError, ValueError):
        return None
    return difference(one_by_one, layer(row))


def precision(name: str, x: Tensor, dtype: torch.dtype) -> float:
    """The error of a low precision, inputs and outputs in it, against double precision of the same inputs."""
    layer = make(name).train(name in ACTIVATIONS)
    low, small = copy.deepcopy(layer).to(dtype), x.to(dtype)
    return difference(low(small).double(), layer(small.double()))


def contrast(name: str, kind: str) -> float:
    """How well a doubled contrast shows in the deviation over positions behind the layer: area under the ROC curve."""
    # For a 1x1 convolution, which mixes channels, the deviation is of all channels.
    images = draw_images(2 * MANY)
    strong = images[:MANY] if kind == "all channels" else images[:MANY, :1]
    strong.sub_(1).mul_(2).add_(1)
    y = make(name)(images)
    scores = (y[:, :1] if name in ACTIVATIONS else y).std(dim=(2, 3)).mean(1)
    # What differs by less than a thousandth is no cue: eps alone makes such a difference.
    gaps = (scores[:MANY, None] - scores[None, MANY:]) / scores.mean()
    return ((gaps > 1e-3).double() + 0.5 * (gaps.abs() <= 1e-3).double()).mean().item()


def folded(name: str, x: Tensor) -> float | None:
    """The error of a convolution into which the method is folded, in evaluation; None if it can't be."""
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 1).double()
    model = nn.Sequential(convolution, make(name)) if name in ACTIVATIONS else nn.Sequential(make(name))
    model.train()(x)
    model.eval()
    whole = model(x)
    changes = fold(model, x)
    return None if all(row.before == row.after for row in changes.rows) else difference(changes.model(x), whole)


def spectrum(name: str) -> list[list[float]]:
    """Singular values of a random weight before and after."""
    layer = nn.Linear(64, 64).double()
    first = torch.linalg.svdvals(layer.weight.detach())
    WEIGHTS[name](layer)
    for _ in range(200):  # steps of power iteration, one per call in training
        layer(torch.zeros(1, 64, dtype=torch.float64))
    layer.eval()
    return [first.tolist(), torch.linalg.svdvals(layer.weight.detach()).tolist()]


def drift(name: str) -> list[float]:
    """The mean length of a row of the parameter behind a weight along SGD on noise, by its length at the start."""
    layer = nn.Linear(64, 64).double()
    WEIGHTS[name](layer)
    parameter = layer.get_parameter(f"parametrizations.weight.original{1 if name == 'weight_norm' else ''}")
    optimizer = torch.optim.SGD([parameter], 0.1)
    start, found = parameter.detach().norm(dim=1).mean(), []
    for _ in range(DRIFT):
        x = torch.randn(16, 64, dtype=torch.float64)
        descend(optimizer, (layer(x) - x.roll(1, 1)).square().mean().mul(64))
        found.append((parameter.detach().norm(dim=1).mean() / start).item())
    return found


def run(bench: Bench) -> dict[str, Any]:
    return {"rows": dict(zip(METHODS, bench.sweep(measure, [Measurement(name) for name in METHODS]), strict=True))}


def tell(value: float | None, missing: str = ABSENT) -> str:
    """Says whether a difference is more than rounding, and how large it is."""
    return missing if value is None else "equal" if value <= SAME else f"differs, {value:.2g}"


def tables(result: dict[str, Any]) -> list[Table]:
    words, rows, outputs = [], [], []
    for name, found in result["rows"].items():
        c = method(name)
        author = c.paper.cite().split(",")[0]
        words.append((c.title, c.normalized_over, author, c.use_cases, c.strengths, c.weaknesses))
        told = (tell(found["batch"]), tell(found["evaluation"]), tell(found["fold"]), tell(found["stream"], "refused"))
        rows.append((c.title, found["parameters"], "yes" if found["running"] else "no", *told))
        low = (found["precision"][dtype] for dtype in LOW)
        outputs.append((c.title, found["mean"], *low, *found["contrast"].values()))
    about = [
        "In double precision; a difference is relative to the largest value. With others: the other samples of the batch are "
        "drawn again, three times as large.",
        "Evaluation: compared with training, from the same state. Stream: a row of positions one by one, in evaluation.",
    ]
    below = [
        "Mean: the largest mean of a sample's output. AUC: how well a doubled contrast shows in the output; 0.5: not at all."
    ]
    columns = ("method", "parameters", "running", "with others", "evaluation", "folded", "stream")
    outs = ("method", "mean", *(f"error {name}" for name in LOW), "AUC, contrast of all", "AUC, of one channel")
    return [
        Table("In words", ("name", "normalized over", "paper", "use", "strength", "weakness"), words),
        Table("Properties, measured", columns, rows, about),
        Table("Outputs, measured", outs, outputs, below),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    rows, disputes = result["rows"], []
    for name, found in rows.items():
        card = method(name)
        measured = {
            "batch_dependent": found["batch"] > SAME,
            "running_state": found["running"],
            "train_equals_eval": found["evaluation"] <= SAME,
            "foldable": found["fold"] is not None,
        }
        disputes += [f"{card.title}: {key}" for key, value in measured.items() if value != getattr(card, key)]
    count, otherwise = 4 * len(rows), f"; otherwise: {', '.join(disputes)}" if disputes else ""
    said = [
        "Batch dependence, running state, agreement of training and evaluation, and folding: "
        f"{count - len(disputes)} of {count} measurements are as the catalogue says{otherwise}."
    ]
    for kind, words in (("all channels", "the whole image"), ("one channel", "one channel")):
        # One score of many that there could be; chance alone has a deviation of 0.03.
        blind = [method(name).title for name, found in rows.items() if abs(found["contrast"][kind] - 0.5) < 0.1]
        said.append(
            f"Doubling the contrast of {words} hardly shows in the deviation of the output (AUC from 0.4 to 0.6) behind "
            f"{', '.join(blind) or 'none'}."
        )
    after, lengths = rows["spectral_norm"]["spectrum"][1], rows["weight_norm"]["drift"]
    fell = "fell at times, which theory excludes" if any(b < a for a, b in pairwise(lengths)) else "never fell"
    return [
        *said,
        f"RMS normalization leaves a mean of up to {rows['rms_norm']['mean']:.2f} in a sample.",
        f"Spectral normalization holds the largest singular value at {after[0]:.4f}; the other {len(after) - 1} go down to "
        f"{after[-1]:.2g}.",
        f"Weight normalization: after {DRIFT} steps of SGD the length behind the weight is {lengths[-1]:.2f} times that at the "
        f"start; it {fell}.",
    ]


@drawn(
    "weaknesses",
    "How well images of doubled contrast are told from others behind each layer, as the area under the ROC curve, where "
    "1 is always and 0.5, the grey line, is guessing (left); the singular values of a random weight as it is (plain) "
    "and under the two methods for weights, the largest first, with a grey line at 1 (middle); and the mean row length "
    "of the parameter behind weight normalization along SGD on noise, relative to that at the start (right). Dots at "
    "the grey line on the left are contrasts that a layer erases.",
)
def _weaknesses(result: dict[str, Any]) -> Figure:
    titles = ("contrast behind the layer", "what the weight becomes", "parameter behind weight norm")
    figure, axes = titled(2.4, *titles)
    rows = result["rows"]
    for y, found in enumerate(rows.values()):
        for shift, kind, hue in ((-0.15, "all channels", COLOURS[0]), (0.15, "one channel", COLOURS[1])):
            axes[0].plot([found["contrast"][kind]], [y + shift], "o", color=hue, markersize=4)
    axes[0].axvline(0.5, color=FAINT, linewidth=0.8)
    rows_of(axes[0], [method(name).title.removesuffix(" normalization") for name in rows])
    axes[0].set_xlim(0.3, 1.04)
    axes[0].set_xlabel("AUC of a doubled contrast")
    hues = {"plain": GREY, "weight_norm": COLOURS[3], "spectral_norm": COLOURS[0]}
    for y, (name, hue) in enumerate(hues.items()):
        values = rows["weight_norm"]["spectrum"][0] if name == "plain" else rows[name]["spectrum"][1]
        axes[1].plot(range(1, len(values) + 1), values, color=hue, linestyle="--" if name == "weight_norm" else "-")
        title = name.removesuffix("_norm")
        axes[1].text(0.05, 0.06 + 0.09 * y, title, color=hue, transform=axes[1].transAxes, fontsize=7)
    axes[1].axhline(1, color=FAINT, linewidth=0.8)
    axes[1].set(xlabel="rank", ylabel="singular value")
    axes[2].plot(range(1, DRIFT + 1), rows["weight_norm"]["drift"], color=hues["weight_norm"])
    axes[2].set(xlabel="step of SGD", ylabel="length, relative to the start")
    axes[2].margins(x=0)
    handles = [key(hue, marker="o", markersize=4, linestyle="") for hue in COLOURS[:2]]
    figure.legend(handles, ["contrast of all channels", "contrast of one channel"], loc="outside upper left", ncols=2)
    return figure


EXPERIMENT = Experiment(
    "blog-table", "claim", "Seven normalizations side by side, measured",
    "Batch normalization depends on the batch and on running statistics; layer, instance and group normalization do not. "
        "RMS, weight and spectral normalization, which are of other papers, are measured as well.",
    method("group_norm").paper, run, tables, drawings(_weaknesses), remarks,
)  # fmt: skip
