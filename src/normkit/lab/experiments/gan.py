"""Spectral normalization of a discriminator: what it bounds, what it leaves free, and what memory of u and v is worth.

A generator learns eight Gaussians on a ring. The discriminator's weights are left alone, clipped after each step, weight
normalized, spectrally normalized with a gradient through sigma, or divided by their largest singular value after each step.

Ours: networks of two hidden layers of 64 units; Adam with beta (0, 0.9), at 5e-4 for the discriminator and 1e-3 for the
generator, the same for every kind; two steps of the discriminator for each of the generator's; weights clipped at 0.1, as
so small a network passes nothing on at the 0.01 of Wasserstein GAN. Power iterations are counted on the weights before
normalization, whose vectors u and v are kept and get one iteration after each of the discriminator's steps.
An epoch of ``--epochs`` is 100 steps of the generator.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from normkit.catalogue.methods import method
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import diverged, drawings, drawn, grid, titled
from normkit.lab.jobs.adversarial import FOLLOWED, TOLERANCE, Game, centres, play, stable_rank
from normkit.lab.report import drawing
from normkit.lab.say import counted
from normkit.lab.stats import Row, by_step, known, mean, spread, where
from normkit.lab.train.images import OK

KINDS = {"none": "nothing", "clip": "clipping", "wn": "weight norm", "sn": "spectral norm", "hard": "reassignment"}
HUES = dict(
    zip(
        KINDS,
        (drawing.GREY, drawing.COLOURS[4], drawing.COLOURS[3], drawing.COLOURS[0], drawing.COLOURS[1]),
        strict=True,
    )
)
LOSSES = {"hinge": "Hinge loss", "wasserstein": "Wasserstein loss"}

STEPS = {"tiny": 3, "small": 1500, "full": 20000}


def run(bench: Bench) -> dict[str, Any]:
    steps = 100 * bench.epochs if bench.epochs else STEPS[bench.scale]
    runs = grid(bench, play, Game, {"loss": LOSSES, "kind": KINDS}, steps=steps)
    for run in runs:
        if run["seed"] != bench.seeds[0]:  # the pictures show one seed
            del run["points"], run["field"]
    return {"runs": runs, "steps": steps, "seeds": len(bench.seeds)}


def tables(result: dict[str, Any]) -> list[Table]:
    columns = ("weights", "modes of 8", "near, %", "sigma", "product", "steepest", "stable rank")
    notes = [
        f"After {result['steps']} steps of the generator; mean ± standard deviation over {counted(result['seeds'], 'seed')}.",
        "Near: points within three deviations of a mode. Sigma: the largest of all layers. Product: of all layers' sigma, "
        "which bounds the steepest gradient found. Stable rank: of the second layer, its squared singular values' sum by "
        "the largest of them.",
    ]
    found = []
    for loss in LOSSES:
        rows: list[list[Any]] = []
        for kind, name in KINDS.items():
            runs = where(result["runs"], loss=loss, kind=kind)
            last = [run["rows"][-1] if run["status"] == OK else {} for run in runs]
            sigmas = [max(row["sigmas"]) if row else None for row in last]
            ends = [sigmas, *([row.get(what) for row in last] for what in ("bound", "steepest"))]
            scores = (
                spread([run[what] for run in runs], ".1f", times) for what, times in (("modes", 1), ("near", 100))
            )
            rows.append([name, *scores, *(spread(end, ".3g") for end in ends), spread(ranks(runs, "last"), ".1f")])
        found.append(Table(LOSSES[loss], columns, rows, notes))
    both = [(kind, layer) for kind in FOLLOWED for layer in range(2)]
    rows = [[f"{KINDS[k]}, layer {n + 1}", *(x for way in memory_of(result, k, n) for x in way)] for k, n in both]
    note = f"Iterations to an error of {TOLERANCE:g} of sigma, and the error after one; means over training, seeds and losses."
    ways = [f"{way}: {what}" for way in ("kept", "random") for what in ("iterations", "error, %")]
    columns = ("weight before normalization", *ways)
    return [*found, Table("Power iteration from the vectors kept and from random ones", columns, rows, [note])]


def ranks(runs: Sequence[Row], when: str) -> list[float | None]:
    """The second layer's stable rank before (``"first"``) or after training (``"last"``); a run that diverged has none."""
    return [stable_rank(run["spectra"][when][1]) if run["spectra"] else None for run in runs]


def memory_of(result: dict[str, Any], kind: str, layer: int) -> list[tuple[float | None, float | None]]:
    """Mean iterations and mean error in percent, from kept and from fresh vectors."""
    rows = [row for run in where(result["runs"], kind=kind) for row in run["rows"]]
    looks = [[row[way][layer] for row in rows] for way in ("kept", "fresh")]
    errors = [mean(100 * error for error in known(look["error"] for look in some)) for some in looks]
    return [(mean(look["iterations"] for look in some), error) for some, error in zip(looks, errors, strict=True)]


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for loss, title in LOSSES.items():
        for kind, why in (("sn", " (one power iteration lags behind the weights)"), ("hard", "")):
            rows = [row for run in where(result["runs"], loss=loss, kind=kind) for row in run["rows"]]
            sigmas = [sigma for row in rows for sigma in known(row["sigmas"])]
            bounds, slopes = (known(row[what] for row in rows) for what in ("bound", "steepest"))
            if sigmas and bounds and slopes:
                # The product is what holds for certain; a slope that was found says only how steep the network is at least.
                said.append(
                    f"{title}, {KINDS[kind]}: a layer's sigma was up to {max(sigmas):.4f} along training{why}, so the guaranteed "
                    f"bound, their product, is up to {max(bounds):.4f}; the steepest gradient found, a lower estimate, was "
                    f"{max(slopes):.3f}, {'below' if max(slopes) < 1 else 'not below'} 1."
                )
        free = [run["rows"][-1]["bound"] for run in where(result["runs"], loss=loss, kind="none", status=OK)]
        if known(free):
            most = max(known(free))
            said.append(f"{title}, nothing: the product of sigmas, which nothing holds, ends at up to {most:.3g}.")
        # A generator that diverged covers nothing.
        modes = {kind: mean(run["modes"] or 0 for run in where(result["runs"], loss=loss, kind=kind)) for kind in KINDS}
        names = ", ".join(f"{KINDS[kind]} {count:.1f}" for kind, count in modes.items() if count is not None)
        said.append(f"{title}: modes covered of 8, mean over seeds: {names}.")
    for kind in ("sn", "hard"):
        first, last = (mean(ranks(where(result["runs"], kind=kind), when)) for when in ("first", "last"))
        if first is not None and last is not None:
            said.append(
                f"{KINDS[kind]}: only the largest singular value is held; the stable rank of the second layer, which the others "
                f"make, goes from {first:.1f} to {last:.1f}."
            )
    flat = [value for run in where(result["runs"], kind="sn") for row in run.get("field") or () for value in row]
    if flat and all(value is not None and abs(value) < 1 for value in flat):
        said.append(
            "spectral norm: at the end the first seed's discriminators are within -1 and 1 on the plane, where the hinge loss is "
            "the Wasserstein loss plus 2: as long as that is so, both losses give the same training but for rounding."
        )
    for kind in FOLLOWED:
        (kept, lag), (fresh, far) = memory_of(result, kind, 1)
        if None not in (kept, lag, fresh, far):
            said.append(
                f"Keeping u and v, second layer, {KINDS[kind]}: one iteration per step errs by {lag:.2g} % in sigma, one from "
                f"random vectors by {far:.2g} %; a thousandth takes {kept:.1f} iterations against {fresh:.1f}."
            )
    return [*said, diverged(result["runs"])]


@drawn(
    "points",
    "Points made by the generators of the first seed (dots), the centres of the eight Gaussians that they learn "
    "(circles), and level lines of their discriminators. Columns say what is done to the discriminator's weights, where "
    "reassignment divides them by their largest singular value after each step; the number counts the Gaussians that "
    "were found, which have at least a fiftieth of the points within three standard deviations.",
)
def _points(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(drawing.FULL, 3.15), layout="constrained")
    grid = figure.subplots(len(LOSSES), len(KINDS), sharex=True, sharey=True, squeeze=False)
    for row, (loss, title) in enumerate(LOSSES.items()):
        for axis, (kind, name) in zip(grid[row], KINDS.items(), strict=True):
            axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=(), yticks=())
            axis.grid(visible=False)
            for side in axis.spines.values():
                side.set_visible(True)
            if row == 0:
                axis.set_title(name, color=HUES[kind])
            runs = [run for run in where(result["runs"], loss=loss, kind=kind) if "field" in run]
            if not runs:
                continue
            run = runs[0]
            if run["field"] is None:
                axis.text(0, 0, "diverged", ha="center", va="center", fontsize=7)
                continue
            field = np.array([[np.nan if value is None else value for value in line] for line in run["field"]])
            ticks = np.linspace(-3, 3, len(field))
            if np.isfinite(field).all() and np.ptp(field) > 0:
                axis.contour(ticks, ticks, field, levels=12, colors="#b9c4cf", linewidths=0.5, linestyles="solid")
            made = np.array(run["points"], dtype=float)
            axis.scatter(made[:, 0], made[:, 1], s=3, color=HUES[kind], alpha=0.35, linewidths=0)
            middle = centres().numpy()
            axis.scatter(middle[:, 0], middle[:, 1], s=30, facecolors="none", edgecolors=drawing.INK, linewidths=0.7)
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axis.text(0, 0, f"{run['modes']} of 8", ha="center", va="center", fontsize=7, bbox=ground)
        grid[row][0].set_ylabel(title)
    return figure


@drawn(
    "lipschitz",
    "Bounds on how fast the discriminator D changes, along training: from above the product of its layers' largest "
    f"singular values (solid), from below the steepest gradient found (dotted); {drawing.SEEDS}. The horizontal line is 1: look "
    "at which solid lines stay there, and how far below each its dotted line runs.",
)
def _lipschitz(result: dict[str, Any]) -> Figure:
    figure, axes = titled(2.8, *LOSSES.values(), sharey=True)
    for axis, loss in zip(axes, LOSSES, strict=True):
        rows = {kind: [run["rows"] for run in where(result["runs"], loss=loss, kind=kind)] for kind in KINDS}
        curves = [drawing.Curve(name, HUES[kind], rows[kind]) for kind, name in KINDS.items()]
        ends = drawing.along(axis, curves, lambda row: row["bound"], "steps of the generator")
        for kind, some in rows.items():
            steps, steepest, *_ = by_step(some, lambda row: row["steepest"])
            axis.plot(steps, steepest, color=HUES[kind], linestyle=drawing.DOTTED, linewidth=1.1)
        axis.axhline(1, color=drawing.INK, linewidth=0.6, zorder=1)
        axis.set_yscale("log")
        drawing.name_ends(axis, ends)
    axes[0].set_ylabel("change of D per unit of distance")
    labels = ["product of the layers' largest singular values", "steepest gradient found"]
    figure.legend(
        [drawing.key(drawing.FAINT), drawing.key(drawing.FAINT, linestyle=drawing.DOTTED)],
        labels,
        loc="outside upper left",
        ncols=2,
    )
    return figure


@drawn(
    "singular_values",
    "All singular values of the discriminator's second layer under the hinge loss, the largest first, before training "
    "(light grey) and after it (in colour), a line for each seed. The horizontal line is 1; the faster a line falls, "
    "the fewer directions the layer still passes on.",
)
def _singular_values(result: dict[str, Any]) -> Figure:
    figure, axes = drawing.panels(len(KINDS), drawing.FULL, 1.9, sharey=True)
    there = [run for run in result["runs"] if run["spectra"]]  # a run that diverged has none
    for axis, (kind, name) in zip(axes, KINDS.items(), strict=True):
        for run in where(there, loss="hinge", kind=kind):
            for when, colour in (("first", drawing.FAINT), ("last", HUES[kind])):
                values = run["spectra"][when][1]
                axis.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.9)
        axis.axhline(1, color=drawing.INK, linewidth=0.6, zorder=1)
        axis.set_title(name, color=HUES[kind])
        axis.set_yscale("log")
        axis.set_xlabel("rank")
    low = min((value for run in there for value in run["spectra"]["last"][1][:-8]), default=0.01)
    axes[0].set_ylim(bottom=max(low, 1e-3))
    axes[0].set_ylabel("singular value, layer 2")
    for y, word, colour in ((0.16, "before training", drawing.FAINT), (0.06, "after", HUES["none"])):
        axes[0].text(0.05, y, word, color=colour, transform=axes[0].transAxes, fontsize=7)
    return figure


@drawn(
    "memory",
    "Power iteration on the discriminator's second weight, before any normalization of it: the relative error of the "
    "largest singular value sigma after one iteration (left) and the number of iterations to an error of 0.001 (right), "
    "from vectors kept from step to step (solid) or from random ones (dashed), as means over seeds and losses. The gap "
    "between the solid and the dashed line of a colour is what keeping the vectors is worth.",
)
def _memory(result: dict[str, Any]) -> Figure:
    labels = {"error": "error of sigma after one iteration", "iterations": "iterations to an error of 0.001"}
    figure, axes = titled(2.5, *labels.values())
    for axis, what in zip(axes, labels, strict=True):
        ends = []
        for kind in FOLLOWED:
            rows = [run["rows"] for run in where(result["runs"], kind=kind)]
            for way, word, style in (("kept", "kept", "-"), ("fresh", "random", "--")):
                steps, middle, *_ = by_step(rows, lambda row, way=way, what=what: row[way][1][what])
                # In single precision an error below the unit of rounding is none.
                middle = [max(value, 1e-7) for value in middle]
                axis.plot(steps, middle, color=HUES[kind], linestyle=style)
                ends += [(value, f"{KINDS[kind]}, {word}", HUES[kind]) for value in middle[-1:]]
        drawing.along(axis, [], lambda row: None, "steps of the generator")
        axis.set_yscale("log")
        drawing.name_ends(axis, ends)
    return figure


EXPERIMENT = Experiment(
    "gan", "claim", "Spectral normalization of a discriminator, on eight Gaussians",
    "Dividing each weight of a discriminator by its largest singular value makes it Lipschitz with constant 1, leaves the "
        "other singular values free, and costs one power iteration per step if u and v are kept.",
    method("spectral_norm").paper, run, tables,
    drawings(_points, _lipschitz, _singular_values, _memory), remarks,
)  # fmt: skip
