"""What every activation norm costs in training: time and memory of forward and backward, next to torch's own operator.

Each layer of the catalogue runs forward and backward on one tensor, images (32, 64, 32, 32) or tokens (8, 512, 768), all in
turns in one process; so does torch's own layer where there is one, and a copy of the input as the floor. Time is relative to
batch normalization for images and to layer normalization for tokens. Memory is the peak of a step beyond its input: the output,
what is kept for the backward pass, and the gradients.

Ours: a repetition for each seed, one thread; left out are recurrent cells, which see one time step, and layers that are
another one with other settings. An epoch of ``--epochs`` is one round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from normkit.catalogue.methods import METHODS, method
from normkit.lab.bench import speed
from normkit.lab.bench.race import race
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import drawings, drawn, labelled, side
from normkit.lab.memory import peak_bytes
from normkit.lab.report.drawing import COLOURS, FAINT, FULL, GREY, INK, marked, rows_of
from normkit.lab.say import counted
from normkit.lab.stats import known, mean, paired_interval, spread
from normkit.lab.sweep import Work

SHAPES: dict[str, tuple[int, ...]] = {"images": (32, 64, 32, 32), "tokens": (8, 512, 768)}
BASES = {"images": "batch_norm", "tokens": "layer_norm"}
TINY: dict[str, tuple[int, ...]] = {"images": (2, 32, 8, 8), "tokens": (2, 3, 8)}
ROUNDS = {"tiny": 1, "small": 5, "full": 25}
LEFT_OUT = (
    *("example_weighing", "sync_batch_norm", "recurrent_batch_norm", "igdn", "fix_norm"),
    *("layer_norm_rnn", "layer_norm_lstm", "layer_norm_gru"),
)
COPY = "copy"
TORCH = {
    "images": ("batch_norm", "group_norm", "instance_norm", "local_response_norm"),
    "tokens": ("layer_norm", "rms_norm"),
}


@dataclass(frozen=True)
class Measurement(Work, path="{0.kind}/seed={0.seed}"):
    kind: str
    shape: tuple[int, ...]
    rounds: int
    seed: int


def names(kind: str) -> list[str]:
    """The catalogue's layers for images or for tokens."""
    layout = "n c *" if kind == "images" else "* d"
    cards = (card for card in METHODS if card.kind == "activation" and card.layout == layout)
    return [card.name for card in cards if card.name not in LEFT_OUT]


def make(name: str, kind: str, channels: int) -> nn.Module:
    """The catalogue's layer, with as many groups as torch's layer."""
    if name == "group_norm":
        from normkit.activations.group_norm import GroupNorm

        return GroupNorm(min(32, channels), channels)
    return method(name).make(channels)


def step(layer: Callable[..., Any], x: Tensor, others: Sequence[Any] = ()) -> Callable[[], None]:
    """Forward and backward of a layer on x, in training; gradients are dropped at the end."""
    with torch.no_grad():
        first = layer(x, *others)
        gradient = torch.randn_like(first[0] if isinstance(first, tuple) else first)

    def run() -> None:
        leaf = x.detach().requires_grad_()
        y = layer(leaf, *others)
        (y[0] if isinstance(y, tuple) else y).backward(gradient)
        if isinstance(layer, nn.Module):
            layer.zero_grad()

    return run


def measure(job: Measurement, folder: Path) -> dict[str, Any]:
    """Times every layer of a kind, all in turns, and measures what a step of each holds."""
    torch.manual_seed(job.seed)
    x = torch.randn(job.shape)
    channels = job.shape[1] if job.kind == "images" else job.shape[-1]
    steps: dict[str, Callable[[], None]] = {COPY: step(torch.clone, x)}
    for name in names(job.kind):
        extra = method(name).extra
        steps[name] = step(make(name, job.kind, channels), x, extra(x) if extra else ())
    for name in TORCH[job.kind]:
        steps[f"torch {name}"] = step(speed.TORCH[name](channels), x)
    seconds = race(steps, job.rounds)
    megabytes = {name: peak_bytes(run, x.device) / 1e6 for name, run in steps.items()}
    return {"ms": {name: 1e3 * value for name, value in seconds.items()}, "mb": megabytes}


def run(bench: Bench) -> dict[str, Any]:
    rounds = bench.epochs or ROUNDS[bench.scale]
    taken = TINY if bench.scale == "tiny" else SHAPES
    jobs = [Measurement(kind, shape, rounds, seed) for seed in bench.seeds for kind, shape in taken.items()]
    runs = [labelled(bench, measure, [job], "kind", "seed")[0] for job in jobs]
    shapes = {kind: list(shape) for kind, shape in taken.items()}
    return {"runs": runs, "shapes": shapes, "rounds": rounds, "threads": bench.threads}


def ratios(result: dict[str, Any], kind: str, name: str, base: str, of: str = "ms") -> list[float | None]:
    """What a layer costs relative to another, for each repetition."""
    runs = [run for run in result["runs"] if run["kind"] == kind]
    return [run[of][name] / run[of][base] if name in run[of] and run[of].get(base) else None for run in runs]


def ordered(result: dict[str, Any], kind: str) -> list[str]:
    """The catalogue's layers that were measured, the cheapest first."""
    measured = [name for name in names(kind) if any(v is not None for v in ratios(result, kind, name, BASES[kind]))]
    return sorted(measured, key=lambda name: mean(ratios(result, kind, name, BASES[kind])) or 0.0)


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    threads = counted(result["threads"], "thread")
    note = (
        f"Forward and backward, float32, {threads}, first quartile of {counted(result['rounds'], 'round')}; mean ± standard "
        "deviation over repetitions."
    )
    for kind, shape in result["shapes"].items():
        base, rows = BASES[kind], []
        own = [run for run in result["runs"] if run["kind"] == kind]
        for name in [COPY, *ordered(result, kind)]:
            torchs = spread(ratios(result, kind, name, f"torch {name}"), ".2f") if name in TORCH[kind] else None
            title, ms = name if name == COPY else method(name).title, mean(run["ms"][name] for run in own)
            room = mean(run["mb"][name] for run in own), mean(ratios(result, kind, name, base, "mb"))
            rows.append([title, ms, spread(ratios(result, kind, name, base), ".2f"), torchs, *room])
        first = method(base).title.lower()
        columns = ("layer", "ms", f"ratio to {first}", "ratio to torch's", "MB", "ratio of MB")
        found.append(Table(f"{kind.capitalize()}, {'x'.join(map(str, shape))}", columns, rows, [note]))
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for kind, cheap, dear in (("tokens", "rms_norm", "layer_norm"), ("images", "group_norm", "batch_norm")):
        found = paired_interval(known(ratios(result, kind, cheap, dear)))
        if found.mean is None:
            continue
        text = f"{method(cheap).title} takes {found.mean:.2f} of the time of {method(dear).title.lower()}"
        if found.low is None or found.high is None:
            said.append(f"{text} in one repetition, which has no interval.")
            continue
        word = side(paired_interval([ratio - 1 for ratio in found.differences]), "less", "more")
        said.append(f"{text}, 95 % interval over repetitions {found.low:.2f} to {found.high:.2f}: {word}.")
    for kind, layers in TORCH.items():
        means = {name: mean(ratios(result, kind, name, f"torch {name}")) for name in layers}
        listed = ", ".join(f"{method(name).title} {ratio:.2f}" for name, ratio in means.items() if ratio is not None)
        said.append(f"{kind.capitalize()}, our time divided by that of torch's own layer: {listed}.")
        for name in ordered(result, kind)[-1:]:
            times = mean(ratios(result, kind, name, BASES[kind]))
            base = method(BASES[kind]).title.lower()
            said.append(f"{kind.capitalize()}: {method(name).title} takes longest, {times:.1f} times {base}.")
    return said


@drawn(
    "costs",
    "Time (bars) and peak memory (diamonds) of a forward and backward pass through each layer, relative to the layer "
    "with the grey bar; a black mark is the time of torch's own layer. The scale is logarithmic, so read where bars "
    "end: left of 1 is faster than the grey one, left of the black mark faster than torch's.",
)
def _costs(result: dict[str, Any]) -> Figure:
    counts = [len(ordered(result, kind)) for kind in SHAPES]
    figure = Figure(figsize=(0.8 * FULL, 1.6 + 0.155 * sum(counts)), layout="constrained")
    axes = figure.subplots(len(counts), 1, height_ratios=counts)
    for axis, kind in zip(axes, SHAPES, strict=True):
        base, layers = BASES[kind], ordered(result, kind)
        for y, name in enumerate(layers):
            time, room = (mean(ratios(result, kind, name, base, of)) for of in ("ms", "mb"))
            axis.barh([y], [time or 0.0], height=0.62, color=COLOURS[0] if name != base else GREY)
            if room is not None:
                axis.plot([room], [y], "D", color=COLOURS[1], markersize=3)
            if name in TORCH[kind]:
                torchs = mean(ratios(result, kind, f"torch {name}", base)) or 0.0
                axis.plot([torchs, torchs], [y - 0.4, y + 0.4], color=INK, linewidth=1.6)
        axis.axvline(1, color=FAINT, linewidth=0.8, zorder=0)
        rows_of(axis, [method(name).title.replace("normalization", "norm") for name in layers])
        axis.set_xscale("log")
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if axis.get_xlim()[0] < tick < axis.get_xlim()[1]]
        marked(axis, ticks)
        axis.tick_params(axis="y", labelsize=6.5)
        size = " × ".join(map(str, result["shapes"][kind]))
        axis.set_title(f"{kind}, {size}", loc="left")
        axis.set_xlabel(f"relative to {method(base).title.lower()}")
    handles = [
        axes[0].barh([0], [0], color=COLOURS[0]),
        *axes[0].plot([], [], "D", color=COLOURS[1], markersize=3),
        *axes[0].plot([], [], "|", color=INK, markersize=9, markeredgewidth=1.6),
    ]
    figure.legend(handles, ["time", "memory", "time of torch's own layer"], loc="outside upper left", ncols=3)
    return figure


EXPERIMENT = Experiment(
    "cost-activations", "claim", "What activation norms cost",
    "Root mean square normalization costs less than layer normalization, as it needs no mean.",
    method("rms_norm").paper, run, tables, drawings(_costs), remarks,
)  # fmt: skip
