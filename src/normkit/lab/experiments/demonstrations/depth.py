"""Scale through depth, with normalization inside the network, and what happens if statistics are not differentiated.

A perceptron of equal layers starts with weights of s times He's standard deviation. Without a norm the scale of activations and
of gradients goes as s^depth; with one it is constant, whatever s is. Row equilibration has the gain sqrt(2), which keeps the
second moment through ReLU; weight norm is initialized on the data. Each norm is after the linear layer, and scales are taken
after the activation.

The second part is the failure named by Ioffe and Szegedy: a norm's statistics are part of the network, and gradients must go
through them. On x = a u + b, normalized to mean 0 and deviation 1 and fitted to targets of mean 1 and deviation 2, no a and b
change the loss. With the statistics held constant in backpropagation both drift all the same.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.catalogue.methods import method
from normkit.diagnostics.activations import activations
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.report.bands import End
from normkit.lab.report.canvas import FULL, panels
from normkit.lab.report.drawing import COLOURS, GREY, name_ends
from normkit.lab.seeding import reseed
from normkit.lab.stats import where
from normkit.surgery.data_dependent_init import data_dependent_init
from normkit.weights.weight_conditioning import weight_conditioning
from normkit.weights.weight_norm import weight_norm

NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "input alone": None,
    "BatchNorm": BatchNorm,
    "LayerNorm": LayerNorm,
    "RMSNorm": RMSNorm,
    "weight norm": None,
    "E, gain √2": None,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "tanh": nn.Tanh}
SCALES, MEASURED = (0.5, 1.0, 2.0), ("activations", "gradients")
SIZES = {"tiny": (6, 64, 64), "small": (30, 256, 256)}  # depth, width, samples
RATE, STEPS = 0.1, 200


def network(norm: str, activation: str, scale: float, x: Tensor, depth: int) -> nn.Sequential:
    """The layers, each a linear map, a norm and an activation."""
    width, layers = x.shape[1], []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=scale * math.sqrt(2 / width))
        if norm == "E, gain √2":
            weight_conditioning(linear, gain=math.sqrt(2))
        layers.append(weight_norm(linear) if norm == "weight norm" else linear)
        make = NORMS[norm]
        layers += [*([make(width)] if make else []), ACTIVATIONS[activation]()]
    model = nn.Sequential(*layers)
    if norm == "weight norm":
        data_dependent_init(model, x)
    return model


def scales(model: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """The standard deviation of activations and of a loss's gradients after every layer."""
    after = tuple(ACTIVATIONS.values())
    how = {"where": lambda _, module: isinstance(module, after)}
    found = activations(model, [(x, None)], lambda y, _: (y * torch.randn_like(y)).sum(), **how)
    return {"activations": [row.std for row in found], "gradients": [row.gradient_std or 0.0 for row in found]}


def slope(values: list[float]) -> float:
    """The slope of the logarithm per layer, by least squares."""
    logs = torch.tensor(values, dtype=torch.float64).clamp_min(1e-300).log()
    place = torch.arange(len(logs), dtype=torch.float64)
    place -= place.mean()
    return ((place * logs).sum() / place.square().sum()).item()


def drift(detached: bool, steps: int = STEPS) -> list[list[float]]:
    """Rows (a, b, loss) of descent on the scale and shift of what a norm normalizes next."""
    u = torch.linspace(-1.7, 1.7, 64, dtype=torch.float64)
    u = u / u.square().mean().sqrt()
    target = 2 * u + 1
    w, rows = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True), []
    for _ in range(steps + 1):
        x = w[0] * u + w[1]
        mean, deviation = x.mean(), x.std(correction=0)
        if detached:
            mean, deviation = mean.detach(), deviation.detach()
        loss = 0.5 * ((x - mean) / deviation - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, w)
        # Through the statistics the gradient is 0 but for rounding.
        rows.append([*(w.detach().round(decimals=12)).tolist(), loss.item()])
        w = (w - RATE * gradient).detach().requires_grad_()
    return rows


def run(bench: Bench) -> dict[str, Any]:
    """Measures every network once, and the drift."""
    depth, width, samples = SIZES[bench.scale]
    rows = []
    for activation, norm, scale in itertools.product(ACTIVATIONS, NORMS, SCALES):
        reseed(bench.seeds[0], "depth")
        x = torch.randn(samples, width)
        x = x if norm != "input alone" else (x - x.mean(0)) / x.std(0, correction=0)
        about = {"activation": activation, "norm": norm, "scale": scale}
        rows.append({**about, **scales(network(norm, activation, scale, x, depth), x)})
    drifts = {name: drift(name == "detached") for name in ("through", "detached")}
    return {"rows": rows, "drift": drifts, "depth": depth}


def tables(result: dict[str, Any]) -> list[Table]:
    """Slopes, and the drift."""
    lines, columns = [], ["norm", *(f"{what}, s = {scale:g}" for what in MEASURED for scale in SCALES)]
    for norm, activation in itertools.product(NORMS, ACTIVATIONS):
        rows = where(result["rows"], activation=activation, norm=norm)
        lines.append([f"{norm}, {activation}", *(f"{slope(row[key]):+.3f}" for key in MEASURED for row in rows)])
    notes = [
        f"Slope of the logarithm of the standard deviation per layer, over {result['depth']} layers; log 2 is 0.693. "
        "Gradients are of a loss after the last layer: their slope is against the direction in which they travel."
    ]  # fmt: skip
    drifts = []
    for (name, rows), step in itertools.product(result["drift"].items(), (0, STEPS // 2, STEPS)):
        drifts.append([name, step, *(f"{value:.4g}" for value in rows[step])])
    return [
        Table("Scale through depth", columns, lines, notes),
        Table("Gradients through the statistics, or not", ("statistics", "step", "a", "b", "loss"), drifts),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    """Slopes without and with a norm, and the drift."""
    plain = where(result["rows"], activation="ReLU", norm="none")
    told = ", ".join(f"{slope(row['activations']):+.3f} at s = {row['scale']:g}" for row in plain)
    inside = [row for row in where(result["rows"], activation="ReLU") if row["norm"] not in ("none", "input alone")]
    flat = max(abs(slope(row["activations"])) for row in inside)
    (batch,) = where(result["rows"], activation="ReLU", norm="BatchNorm", scale=1.0)
    first, last = result["drift"]["detached"][0], result["drift"]["detached"][-1]
    return [
        f"Without a norm, ReLU: the slope per layer is {told}; log s is {-math.log(2):+.3f}, 0 and {math.log(2):+.3f}. "
        "Normalizing the input alone changes nothing of it.",
        f"With a norm inside, or weights of fixed length, the steepest slope of activations is {flat:.3f}. Gradients at the "
        "start are another matter: with BatchNorm and ReLU they grow by a factor of "
        f"{math.exp(-slope(batch['gradients'])):.2f} per layer towards the input.",
        f"With detached statistics {STEPS} steps take b from {first[1]:g} to {last[1]:.1f} and a from {first[0]:g} to "
        f"{last[0]:.1f}, while the loss stays at {last[2]:.3f}; through the statistics neither moves.",
    ]


def figures(result: dict[str, Any]) -> list[Drawing]:
    """Depth, and drift."""
    return [
        Drawing(
            "depth",
            lambda: draw(result),
            "Standard deviation of activations (above) and of gradients (below) along the depth of a ReLU network, weights "
            "starting at a half (left), one (middle) and two times He's (right). Activations fall or rise by decades in "
            "networks without a norm inside alone, and stay level at every start in the others; gradients of BatchNorm, "
            "and less so of weight norm, grow towards the input, whatever the start.",
        ),
        Drawing(
            "drift",
            lambda: draw_drift(result),
            "Shift b and scale a of a layer whose output is normalized next, and the loss, along descent. With the "
            "gradient through the statistics nothing moves (grey); with the statistics held constant both grow (colour) "
            "while the loss does not change.",
        ),
    ]


def draw(result: dict[str, Any]) -> Figure:
    """Scales along depth."""
    figure = Figure(figsize=(FULL, 3.6), layout="constrained")
    grid = figure.subplots(2, len(SCALES), sharex=True, sharey="row")
    ends: list[End] = []
    for line, key in zip(grid, MEASURED, strict=True):
        for axis, scale in zip(line, SCALES, strict=True):
            ends = []
            for norm, hue, style in zip(NORMS, (GREY, GREY, *COLOURS), ("-", ":", *["-"] * 5), strict=False):
                (row,) = where(result["rows"], activation="ReLU", norm=norm, scale=scale)
                axis.plot(range(1, len(row[key]) + 1), row[key], color=hue, linestyle=style)
                ends.append((row[key][-1], norm, hue))
            axis.set_yscale("log")
            axis.set_title(f"{key}, s = {scale:g}", loc="left")
        name_ends(line[-1], ends, gap=0.11)
    for axis in grid[-1]:
        axis.set_xlabel("layer")
    return figure


def draw_drift(result: dict[str, Any]) -> Figure:
    """Shift, scale and loss along descent."""
    figure, axes = panels(3, FULL, 1.9)
    ends: list[End] = []
    for axis, place, title in zip(axes, (1, 0, 2), ("shift b", "scale a", "loss"), strict=True):
        ends = []
        for (name, rows), hue in zip(result["drift"].items(), (GREY, COLOURS[1]), strict=True):
            axis.plot([row[place] for row in rows], color=hue, linestyle="-" if name == "through" else "--")
            ends.append((rows[-1][place], name, hue))
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
    axes[2].set_ylim(0, 2)
    name_ends(axes[2], ends, gap=0.1)
    return figure


EXPERIMENT = Experiment(
    "depth", "demo", "Scale through depth, and gradients through statistics",
    "Normalization inside a network keeps the scale of features through its depth, and is trained by backpropagation end to end.",
    method("batch_norm").paper, run, tables, figures, remarks, ("tiny", "small"),
)  # fmt: skip
