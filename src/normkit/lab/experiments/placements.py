"""Eight placements of the norms in a deep encoder: gradients before training, and the loss with and without warm-up.

Encoders of twelve layers sort sequences by Adam at 1e-3, with and without a linear warm-up over a tenth of the steps: the setting
of ``pre-post-ln``, whose seeds and sequences these are. Before training, the gradient of each layer's second feed-forward weight
is measured at depths 2 to 16.

Ours: Adam with beta (0.9, 0.98); after warm-up the rate is constant; no clipping, dropout or decay. DeepNorm starts from Xavier
weights times its factor; HybridNorm is the paper's plain form, without Pre-LN in its first layer. At small scale the width is 32
and the length 16, in place of 128 and 32. An epoch of ``--epochs`` is 20 steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normkit.core.card import Paper
from normkit.lab.data import sequences
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.pre_post_ln import LEARNT, cell_of, exponents, gradients_at_start, size_of, state
from normkit.lab.experiments.runs import drawings, drawn, grid, side, titled
from normkit.lab.jobs.encoders import VOCABULARY, Training, train
from normkit.lab.report import drawing
from normkit.lab.stats import ABSENT, differences, mean, spread, tell, where

NAMES = {
    "post": "Post-LN",
    "deep": "DeepNorm",
    "hybrid": "HybridNorm",
    "mix": "Mix-LN",
    "pre": "Pre-LN",
    "scaled": "LN scaling",
    "sandwich": "Peri-LN",
    "branch": "residual post-norm",
}
WARMUPS = {False: "no warm-up", True: "10 % warm-up"}
TASK, BASE = "sort", "pre"


def run(bench: Bench) -> dict[str, Any]:
    size = size_of(bench)
    fixed = {"task": TASK, "norm": "ln", "optimizer": "adam 1e-3", **size}
    return {
        "runs": grid(bench, train, Training, {"warmup": WARMUPS, "placement": NAMES}, **fixed),
        "starts": gradients_at_start(bench, NAMES),
        "guess": sequences.guess(TASK, VOCABULARY),
        **size,
    }


def against(result: Mapping[str, Any], placement: str, warmup: bool) -> Any:
    """The differences of a placement's losses from Pre-LN's, seed by seed."""
    runs = where(result["runs"], warmup=warmup)
    these, those = ([run["loss"] for run in where(runs, placement=name)] for name in (placement, BASE))
    return differences(these, those)


def ratio(result: Mapping[str, Any], placement: str) -> list[float]:
    """The first layer's gradient over the last one's in the deepest encoder, of the mean loss of a batch; one per seed."""
    deepest = max(start["depth"] for start in result["starts"])
    starts = where(result["starts"], placement=placement, depth=deepest)
    return [start["batch"][0] / start["batch"][-1] for start in starts]


def tables(result: dict[str, Any]) -> list[Table]:
    rows = []
    for p, name in NAMES.items():
        runs = (where(result["runs"], placement=p, warmup=warmup) for warmup in WARMUPS)
        less = (None if p == BASE else tell(against(result, p, warmup)) for warmup in WARMUPS)
        rows.append([name, *(state(own, result["guess"]) for own in runs), *less])
    columns = ("placement", *WARMUPS.values(), *(f"less {NAMES[BASE]}, {word}" for word in WARMUPS.values()))
    note = (
        f"Nats per token after {result['steps']} steps, mean ± standard deviation over seeds; {result['guess']:.3f} is reached "
        f"by knowing frequencies alone, and more than {LEARNT:g} of it counts as flat. Differences are seed by seed, with 95 % "
        f"intervals; below zero is better. {result['depth']} layers of width {result['features']}, Adam at 1e-3."
    )
    depths = sorted({start["depth"] for start in result["starts"]})
    starts = []
    for p, name in NAMES.items():
        ends = (cell_of(result, p, "token", depth) for depth in (depths[0], depths[-1]))
        powers = (exponents(result, p, what) for what in ("token", "batch"))
        starts.append([name, *ends, *(spread(values, ".2f") for values in (*powers, ratio(result, p)))])
    heads = [f"depth {depth}, token" for depth in (depths[0], depths[-1])]
    heads += ["exponent, token", "exponent, batch", f"first / last layer, batch, depth {depths[-1]}"]
    about = (
        "Euclidean norm of the gradient of the last layer's second feed-forward weight, of the loss at one token and of the mean "
        "loss of a batch; mean over 8 initial weights per seed. The exponent p of depth^p is fitted for each seed."
    )
    return [
        Table(f"Loss on {TASK}", columns, rows, [note]),
        Table("Gradients before training", ("placement", *heads), starts, [about]),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for warmup, word in WARMUPS.items():
        sides: dict[str, list[str]] = {"lower than": [], "higher than": [], "not told apart from": []}
        for placement in NAMES:
            if placement != BASE:
                found = against(result, placement, warmup)
                sides[side(found, "lower than", "higher than", "not told apart from")].append(NAMES[placement])
        told = [f"{how} Pre-LN's: {', '.join(names)}" for how, names in sides.items() if names]
        said.append(f"With {word} the loss at the end is {'; '.join(told)}.")
    places = [(placement, warmup) for placement in NAMES for warmup in WARMUPS]
    losses = [[run["loss"] for run in where(result["runs"], placement=p, warmup=w)] for p, w in places]
    flat = [
        f"{NAMES[placement]} with {WARMUPS[warmup]}"
        for (placement, warmup), some in zip(places, losses, strict=True)
        if all((loss or np.inf) > LEARNT * result["guess"] for loss in some)
    ]
    said.append(f"Learned next to nothing in any seed: {', '.join(flat) or ABSENT}.")
    steepest = sorted(NAMES, key=lambda placement: mean(exponents(result, placement, "token")) or 0.0)
    fitted = ", ".join(f"{NAMES[p]} {mean(exponents(result, p, 'token')):.2f}" for p in steepest)
    said.append(
        f"Before training, the last layer's gradient of the loss at one token goes as depth^p with p: {fitted}."
    )
    return said


def _lines() -> list[tuple[str, str, str, str]]:
    """Each placement with its name, hue and line."""
    hues = [drawing.GREY, *drawing.COLOURS]
    looks = [(hue, line) for line in ("-", "--") for hue in hues]
    return [(*pair, *look) for pair, look in zip(NAMES.items(), looks, strict=False)]


@drawn(
    "losses",
    f"Training loss on {TASK} with the norms in eight places, without warm-up and with one over a tenth of the steps; "
    f"{drawing.SEEDS}. The dotted line is the loss of a guess that knows only how frequent each token is.",
)
def _losses(result: dict[str, Any]) -> Figure:
    figure, axes = titled(3.4, *WARMUPS.values(), sharey=True)
    named = []
    for axis, warmup in zip(axes, WARMUPS, strict=True):
        curves = []
        for placement, name, hue, line in _lines():
            runs = where(result["runs"], placement=placement, warmup=warmup)
            curves.append(drawing.Curve(name, hue, [run["rows"] for run in runs], {"linestyle": line}))
        ends = drawing.along(axis, curves, lambda row: row["loss"])
        axis.axhline(result["guess"], color=drawing.FAINT, linestyle=drawing.DOTTED, linewidth=0.9)
        named.append((axis, ends))
    axes[0].set_ylim(bottom=0)  # of both, once both are drawn
    for axis, ends in named:
        drawing.name_ends(axis, ends)
    axes[0].set_ylabel(f"training loss on {TASK}, nats per token")
    figure.legend(
        [drawing.key(drawing.FAINT, linestyle=drawing.DOTTED)], ["frequencies alone"], loc="outside upper left"
    )
    return figure


@drawn(
    "gradients",
    f"Gradient norms before training: of the last layer of encoders of several depths (left), and of each layer of the "
    f"deepest, the first layer's at the left (right); {drawing.SEEDS}. A flat line on the right trains every layer at one pace.",
)
def _gradients(result: dict[str, Any]) -> Figure:
    depths = sorted({start["depth"] for start in result["starts"]})
    figure, axes = titled(
        3.4, "last layer, loss at one token", f"every layer at depth {depths[-1]}, mean loss of a batch"
    )
    ends: list[Any] = [[], []]
    for placement, name, hue, line in _lines():
        starts = where(result["starts"], placement=placement)
        lasts = {depth: [start["token"][-1] for start in where(starts, depth=depth)] for depth in depths}
        ends[0] += drawing.across(axes[0], name, hue, lasts, linestyle=line)
        layers = [start["batch"] for start in where(starts, depth=depths[-1])]
        each = {float(k + 1): [norms[k] for norms in layers] for k in range(depths[-1])}
        ends[1] += drawing.across(axes[1], name, hue, each, linestyle=line)
    for axis, found, x in zip(axes, ends, ("depth of the encoder", "layer"), strict=True):
        axis.set_xlabel(x)
        if axis is axes[0]:
            drawing.marked(axis, depths)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        drawing.log(axis)
        drawing.name_ends(axis, found)
    axes[0].set_ylabel("gradient norm of the second\nfeed-forward weight, before training")
    return figure


EXPERIMENT = Experiment(
    "placements", "claim", "Eight places for the norms of a transformer",
    "Norms in other places than Post-LN and Pre-LN train deep transformers as stably as Pre-LN, with gradients spread more "
        "evenly over the layers, and end lower.",
    Paper("Li, Pengxiang and Yin, Lu and Liu, Shiwei",
          "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN", 2024,
          "https://arxiv.org/abs/2412.13795"),
    run, tables, drawings(_losses, _gradients), remarks,
)  # fmt: skip
