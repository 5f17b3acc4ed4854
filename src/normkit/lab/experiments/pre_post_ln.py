"""Layer normalization after each residual branch or before it: which trains without a warm-up, and the gradients at the start.

Encoders of twelve layers turn sequences into others and predict the next character of a text, with the norm after (Post-LN) or
before (Pre-LN) each branch, with and without a linear warm-up over a tenth of the steps, by Adam at two rates and by SGD. In some
RMSNorm, ScaleNorm, or ScaleNorm with FixNorm takes layer normalization's place. Before training, the gradient of each layer's
second feed-forward weight is measured at depths 2 to 16.

Ours: Adam with beta (0.9, 0.98); SGD at 0.1 with momentum 0.9; after warm-up the rate is constant; no clipping, dropout or decay.
The text is the first two chapters of "Alice's Adventures in Wonderland" (1865). At small scale the width is 32 and the
length 16, in place of 128 and 32. An epoch of ``--epochs`` is 20 steps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from normkit.core.card import Paper
from normkit.lab.data import sequences
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments.runs import drawn, grid, labelled, titled
from normkit.lab.jobs.encoders import VOCABULARY, Start, Training, look, train
from normkit.lab.report import drawing
from normkit.lab.report.drawing import key
from normkit.lab.stats import ABSENT, differences, mean, spread, tell, where
from normkit.lab.train.images import OK

PLACEMENTS = {"post": "Post-LN", "pre": "Pre-LN"}
OPTIMIZERS = {"adam 1e-3": "Adam 1e-3", "adam 3e-4": "Adam 3e-4", "sgd 0.1": "SGD 0.1"}
NORMS = {"ln": "LayerNorm", "rms": "RMSNorm", "scale": "ScaleNorm", "scale+fix": "ScaleNorm and FixNorm"}
HUES = {"post": drawing.COLOURS[1], "pre": drawing.COLOURS[0]}

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"depth": 1, "features": 8, "length": 6, "steps": 6},
    "small": {"depth": 12, "features": 32, "length": 16, "steps": 240},
    "full": {"depth": 12, "features": 128, "length": 32, "steps": 4000},
}
DEPTHS = (2, 4, 8, 16)
LEARNT = 0.9


def plan(small: bool) -> list[dict[str, Any]]:
    """What is trained with each seed: every optimizer and warm-up on sort, some on the other tasks, and the other norms."""
    found = [
        {"task": task, "placement": placement, "norm": "ln", "optimizer": optimizer, "warmup": warmup}
        for task in (("sort", "text") if small else sequences.TASKS)
        for optimizer in (OPTIMIZERS if task == "sort" or not small else list(OPTIMIZERS)[:1])
        for warmup in (False, True)
        for placement in PLACEMENTS
    ]
    return found + [
        {"task": "sort", "placement": placement, "norm": norm, "optimizer": "adam 1e-3", "warmup": False}
        for norm in NORMS
        if norm != "ln"
        for placement in PLACEMENTS
    ]


def size_of(bench: Bench) -> dict[str, Any]:
    """Depth, width, length and steps at a scale; an epoch is 20 steps."""
    return SIZES[bench.scale] | ({"steps": 20 * bench.epochs} if bench.epochs else {})


def gradients_at_start(bench: Bench, placements: Iterable[str]) -> list[dict[str, Any]]:
    """Measures the gradients of encoders of several depths before training."""
    depths = DEPTHS if bench.scale != "tiny" else (1, 2)
    size = {key: SIZES[bench.scale][key] for key in ("features", "length")}
    return grid(bench, look, Start, {"depth": depths, "placement": placements}, **size)


def run(bench: Bench) -> dict[str, Any]:
    size, plans = size_of(bench), plan(bench.scale != "full")
    jobs = [Training(**one, seed=seed, **size) for seed in bench.seeds for one in plans]
    tasks = [task for task in sequences.TASKS if any(job.task == task for job in jobs)]
    starts = gradients_at_start(bench, PLACEMENTS)
    return {
        "runs": labelled(bench, train, jobs, "task", "placement", "norm", "optimizer", "warmup", "seed"),
        "starts": starts,
        "guess": {task: sequences.guess(task, VOCABULARY) for task in tasks},
        **size,
    }


def state(runs: Sequence[Any], guess: float) -> str:
    """Mean loss at the end and its spread, and how many runs diverged or learned next to nothing."""
    lost = sum(run["status"] != OK for run in runs)
    flat = sum(run["status"] == OK and (run["loss"] or 0.0) > LEARNT * guess for run in runs)
    notes = [f"{lost} diverged"] if lost else []
    notes += [f"{flat} of {len(runs)} flat"] if flat else []
    return spread([run["loss"] for run in runs if run["status"] == OK]) + (f"; {', '.join(notes)}" if notes else "")


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for task, guess in result["guess"].items():
        rows: list[list[Any]] = []
        for optimizer, title in OPTIMIZERS.items():
            for warmup in (False, True):
                own = where(result["runs"], task=task, norm="ln", optimizer=optimizer, warmup=warmup)
                if own:
                    cells = (state(where(own, placement=placement), guess) for placement in PLACEMENTS)
                    rows.append([f"{title}, {'10 %' if warmup else 'none'}", *cells])
        notes = [
            f"Nats per token after {result['steps']} steps, mean ± standard deviation over seeds; {guess:.3f} is reached by "
            f"knowing frequencies alone, and more than {LEARNT:g} of it counts as flat. {result['depth']} layers of width "
            f"{result['features']}."
        ]
        found.append(Table(f"Loss on {task}", ("optimizer, warm-up", *PLACEMENTS.values()), rows, notes))
    rows, own = [], where(result["runs"], task="sort", optimizer="adam 1e-3", warmup=False)
    for norm, title in NORMS.items():
        cells = (where(own, norm=norm, placement=placement) for placement in PLACEMENTS)
        rows.append([title, *(state(runs, result["guess"]["sort"]) for runs in cells)])
    found.append(Table("Other norms, on sort, Adam 1e-3 without warm-up", ("norm", *PLACEMENTS.values()), rows))
    which = [(placement, what) for what in ("token", "batch") for placement in PLACEMENTS]
    columns = [f"{PLACEMENTS[placement]}, {what}" for placement, what in which]
    depths = sorted({start["depth"] for start in result["starts"]})
    rows = [[depth, *(cell_of(result, *key, depth) for key in which)] for depth in depths]
    rows.append(["exponent", *(spread(exponents(result, *key), ".2f") for key in which)])
    rows.append(["theory", "0", "-0.5", None, None])
    title = "Gradient of the last layer's second feed-forward weight before training"
    notes = [
        "Euclidean norm, of the loss at one token, as in the theory, and of the mean loss of a batch; mean over 8 initial "
        "weights per seed. The exponent p of depth^p is fitted for each seed."
    ]
    return [*found, Table(title, ("depth", *columns), rows, notes)]


def cell_of(result: dict[str, Any], placement: str, what: str, depth: int) -> str:
    """The gradient of the last layer, over seeds."""
    starts = where(result["starts"], placement=placement, depth=depth)
    return spread([start[what][-1] for start in starts], ".2f")


def exponents(result: dict[str, Any], placement: str, what: str) -> list[float]:
    """With what power of the depth the last layer's gradient goes, for each seed."""
    starts = where(result["starts"], placement=placement)
    by_seed = [where(starts, seed=seed) for seed in sorted({start["seed"] for start in starts})]
    return [
        float(np.polyfit(np.log([s["depth"] for s in some]), np.log([s[what][-1] for s in some]), 1)[0])
        for some in by_seed
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for what, how in (("token", "of the loss at one token"), ("batch", "of the mean loss of a batch")):
        post, pre = (mean(exponents(result, placement, what)) or 0.0 for placement in ("post", "pre"))
        theory = " (theory 0 and -0.5)" if what == "token" else ""
        said.append(
            f"Before training, the last layer's gradient {how} goes as depth^{post:.2f} with Post-LN and as depth^{pre:.2f} with "
            f"Pre-LN{theory}."
        )
    failed = []
    for task, guess in result["guess"].items():
        for optimizer, title in OPTIMIZERS.items():
            words = []
            for placement, name in PLACEMENTS.items():
                wanted = {"task": task, "norm": "ln", "placement": placement, "optimizer": optimizer}
                both = [where(result["runs"], **wanted, warmup=warmup) for warmup in (False, True)]
                if not all(both):
                    continue
                words.append(f"{name} {warming(*both)}")
                failed += [
                    f"{name} on {task} with {title}, {how} warm-up"
                    for how, runs in zip(("no", "10 %"), both, strict=True)
                    if all(run["status"] != OK or (run["loss"] or math.inf) > LEARNT * guess for run in runs)
                ]
            if words:
                said.append(f"{task.capitalize()}, {title}: {'; '.join(words)}.")
    said.append(f"Learned next to nothing in any seed: {'; '.join(failed) or ABSENT}.")
    return said


def warming(without: Sequence[Mapping[str, Any]], with_it: Sequence[Mapping[str, Any]]) -> str:
    """What a warm-up did to the loss at the end, seed by seed."""
    lost = [sum(run["status"] != OK or run["loss"] is None for run in runs) for runs in (without, with_it)]
    if any(lost):
        return f"diverged in {lost[0]} of {len(without)} seeds without warm-up and {lost[1]} of {len(with_it)} with"
    before, after = ([run["loss"] for run in runs] for runs in (without, with_it))
    change = differences(after, before)
    lower = sum(difference < 0 for difference in change.differences)
    text = f"ends at {mean(before):.2f} without warm-up and {mean(after):.2f} with, lower in {lower} of {len(before)} seeds"
    return text if change.low is None else f"{text}, a change of {tell(change)}"


def figures(result: dict[str, Any]) -> list[Drawing]:
    return [_gradients(result), _norms(result), *(losses(result, task) for task in result["guess"])]


def losses(result: dict[str, Any], task: str) -> Drawing:
    """The training loss on one task."""
    caption = (
        f"Training loss on {task}, a panel for each optimizer and learning rate, with the norm after each branch "
        f"(Post-LN) or before it (Pre-LN); {drawing.SEEDS}. The dotted line is the loss of a guess that knows only how frequent "
        "each token is: look at whether, and how soon, each line falls below it."
    )
    return Drawing(f"loss_{task}", lambda: _losses(result, task), caption)


def _losses(result: dict[str, Any], task: str) -> Figure:
    runs = where(result["runs"], task=task, norm="ln")
    used = [optimizer for optimizer in OPTIMIZERS if where(runs, optimizer=optimizer)]
    titles = [OPTIMIZERS[optimizer] for optimizer in used]
    figure, axes = titled(2.7, *titles, width=drawing.FULL if len(used) > 1 else 4.2, sharey=True)
    ends: list[drawing.End] = []
    for axis, optimizer in zip(axes, used, strict=True):
        curves = []
        for placement, name in PLACEMENTS.items():
            for warmup, word, style in ((False, "no warm-up", "--"), (True, "warm-up", "-")):
                own = where(runs, optimizer=optimizer, placement=placement, warmup=warmup)
                rows = [run["rows"] for run in own]
                curves.append(drawing.Curve(f"{name}, {word}", HUES[placement], rows, {"linestyle": style}))
        ends = drawing.along(axis, curves, lambda row: row["loss"])
        axis.axhline(result["guess"][task], color=drawing.FAINT, linestyle=drawing.DOTTED, linewidth=0.9)
        axis.set_ylim(bottom=0)
    drawing.name_ends(axes[-1], ends)
    axes[0].set_ylabel(f"training loss on {task}, nats per token")
    styles = {"no warm-up": "--", "warm-up over 10 % of the steps": "-", "frequencies alone": drawing.DOTTED}
    handles = [key(drawing.FAINT, linestyle=style) for style in styles.values()]
    columns = 3 if len(used) > 1 else 2  # what fits the figure's width
    figure.legend(handles, list(styles), loc="outside upper left", ncols=columns, columnspacing=1.2)
    return figure


@drawn(
    "gradients",
    "Gradient norms before training, with the norm after each branch (Post-LN) or before it (Pre-LN): of the last layer "
    f"of encoders of several depths (left and middle; {drawing.SEEDS}), and of every layer of each encoder for the loss at one "
    "token (right; the thicker a line, the deeper the encoder). Compare the slopes on the left with those of the "
    "theory, the dotted lines.",
)
def _gradients(result: dict[str, Any]) -> Figure:
    depths = sorted({start["depth"] for start in result["starts"]})
    listed = f"{', '.join(map(str, depths[:-1]))} and {depths[-1]}"
    titles = ("last layer, loss at one token", "last layer, mean loss of a batch", f"every layer, depths {listed}")
    figure, axes = titled(2.6, *titles)
    names: list[list[drawing.End]] = [[], [], []]
    for placement, name in PLACEMENTS.items():
        starts, hue = where(result["starts"], placement=placement), HUES[placement]
        for place, what in enumerate(("token", "batch")):
            lasts = {depth: [start[what][-1] for start in where(starts, depth=depth)] for depth in depths}
            names[place] += drawing.across(axes[place], name, hue, lasts, markersize=3.5)
        first = mean(start["token"][-1] for start in where(starts, depth=depths[0])) or 0.0
        theory = [first * (depth / depths[0]) ** (-0.5 if placement == "pre" else 0.0) for depth in depths]
        axes[0].plot(depths, theory, color=hue, linestyle=drawing.DOTTED, linewidth=0.9)
        for depth in depths:
            each = np.mean([start["token"] for start in where(starts, depth=depth)], axis=0)
            axes[2].plot(range(1, depth + 1), each, color=hue, linewidth=0.4 + 0.25 * np.log2(depth))
        names[2].append((names[0][-1][0], name, hue))
    for axis, found in zip(axes, names, strict=True):
        axis.set_xlabel("layer" if axis is axes[2] else "depth of the encoder")
        if axis is not axes[2]:
            drawing.marked(axis, depths)
        drawing.log(axis)
        drawing.name_ends(axis, found)
    axes[0].set_ylabel("gradient norm of the second\nfeed-forward weight, before training")
    label = "theory for one token: constant with Post-LN, 1 / √depth with Pre-LN"
    figure.legend([key(drawing.FAINT, linestyle=drawing.DOTTED)], [label], loc="outside upper left")
    return figure


@drawn(
    "norms",
    "Loss on sort at the end of training with Adam at 1e-3 and no warm-up, for each norm, placed after the branches or "
    "before them; a dot is a seed and a bar the mean over seeds. The dotted line is the loss of a guess that knows only "
    "how frequent each token is: a dot near it has learned nothing more.",
)
def _norms(result: dict[str, Any]) -> Figure:
    figure, (axis,) = drawing.panels(1, 4.2, 1.9)
    for y, norm in enumerate(NORMS):
        for placement, shift in zip(PLACEMENTS, (-0.14, 0.14), strict=True):
            which = {"task": "sort", "optimizer": "adam 1e-3", "warmup": False, "norm": norm, "placement": placement}
            drawing.dots(axis, y + shift, [run["loss"] for run in where(result["runs"], **which)], HUES[placement])
    axis.axvline(result["guess"]["sort"], color=drawing.FAINT, linestyle=drawing.DOTTED, linewidth=0.9)
    drawing.rows_of(axis, list(NORMS.values()))
    axis.set_xlim(left=0)
    axis.set_xlabel("loss on sort at the end, nats per token")
    handles = [key(HUES[placement], marker="o", markersize=3.5, linestyle="") for placement in PLACEMENTS]
    handles.append(key(drawing.FAINT, linestyle=drawing.DOTTED))
    labels = ["after the branch", "before the branch", "frequencies alone"]
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


EXPERIMENT = Experiment(
    "pre-post-ln", "claim", "Layer normalization before or after each branch of a transformer",
    "With layer normalization after each residual branch the gradients of the last layers are large at the start and a "
        "warm-up is needed; before each branch they shrink with the root of the depth, and it is not.",
    Paper("Xiong, Ruibin and Yang, Yunchang and He, Di and Zheng, Kai and Zheng, Shuxin and Xing, Chen and others",
          "On Layer Normalization in the Transformer Architecture", 2020, "https://arxiv.org/abs/2002.04745"),
    run, tables, figures, remarks,
)  # fmt: skip
