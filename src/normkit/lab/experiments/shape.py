"""Shape modelling of weight conditioning: occupancy fields of solids, with and without it.

A perceptron of four layers of 256 tells whether a point is inside: with Gaussian activations, sines, or ReLU behind a
positional encoding. Half of the training points are uniform in the cube, half lie about the surface; binary cross-entropy,
Adam, 200 epochs of 1,000,000 points, 50,000 per step. E changes the scale of what the activation sees and the effective rate, so
each row and activation takes the best of some rates, chosen with the first seed on the first solid by 20,000 points near the
surface that neither train nor test; 1e-4 is the published one. At small scale: 96 wide, 100,000 points, 5,000 per step, 12
epochs; sine and ReLU with the first solid and seed alone.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from normkit.catalogue.methods import method
from normkit.lab.data import solid as shapes
from normkit.lab.data.root import VARIABLE, data_root
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments import runs as trials
from normkit.lab.experiments.runs import drawn
from normkit.lab.fields.occupancy import OccupancyJob, learn_solid, measure_solid
from normkit.lab.fields.radiance import decode
from normkit.lab.models.nerf import Kind
from normkit.lab.report.drawing import FAINT, FULL, SEEDS, along, name_ends, plain
from normkit.lab.report.experiment_tables import edges, lowered, rates_table, time_table
from normkit.lab.stats import mean, spread, tell, where

PAPER = method("weight_conditioning").paper
MESHES = ("bunny", "armadillo", "dragon", "happy", "lucy", "spot")
PLAIN, CONDITIONED, KEPT = "plain", "E", "E, kept scale"
ROWS = {
    PLAIN: trials.Trial("plain", "none"),
    CONDITIONED: trials.Trial("e", "none+e@re:trunk"),
    KEPT: trials.Trial("e-kept", "none", "kept"),
}
STUDY = trials.Study(ROWS, learn_solid, measure_solid, ("solid", "kind"))
KINDS: dict[Kind, str] = {"gaussian": "Gaussian", "sine": "sine", "relu": "ReLU + PE"}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 8, "depth": 2, "points": 400, "batch": 100, "epochs": 1, "every": 1, "grid": 8},
    "small": {"width": 96, "points": 100_000, "batch": 5_000, "epochs": 12, "every": 1, "grid": 96},
    "full": {},
}
RATES = {"tiny": (1e-3, 1e30), "small": (1e-4, 3e-4, 1e-3, 3e-3), "full": (1e-5, 1e-4, 1e-3)}


def solids(bench: Bench) -> tuple[str, ...]:
    """Names what is learned: at small scale two solids, else all; analytic shapes where no folder of data is given at all."""
    if bench.scale == "tiny":
        found = tuple(shapes.SHAPES)
    elif bench.data_root is None and not os.environ.get(VARIABLE):
        bench.watch(f"neither --data-root nor {VARIABLE} is given: analytic shapes are learned in place of meshes")
        found = tuple(shapes.SHAPES)
    else:
        folder = data_root(bench.data_root) / shapes.FOLDER
        there = {path.stem for path in folder.glob("*") if path.suffix in shapes.ENDINGS}
        # Where none of them is there, reading the first says what to do.
        found = tuple(name for name in MESHES if name in there) or MESHES[:1]
    return found if bench.scale == "full" else found[:2]


def sweeps(bench: Bench, solid: str) -> dict[str, list[OccupancyJob]]:
    """Lists what each activation and row tries: all rates, with the first seed."""
    first, rates = bench.seeds[0], RATES[bench.scale]
    size = SIZES[bench.scale] | ({} if bench.epochs is None else {"epochs": bench.epochs})
    return {
        f"{kind} {name}": [
            OccupancyJob(solid, row[0], row[1], kind, first, row[2], rate=rate, **size) for rate in rates
        ]
        for kind in KINDS
        for name, row in ROWS.items()
    }


def jobs(bench: Bench, solids: Sequence[str], chosen: Mapping[str, OccupancyJob]) -> list[OccupancyJob]:
    """Lists the runs; at small scale other activations than the Gaussian have the first solid and seed alone."""
    few = {kind: bench.scale != "full" and kind != "gaussian" for kind in KINDS}
    return [
        replace(chosen[f"{kind} {name}"], solid=solid, seed=seed)
        for kind in KINDS
        for solid in (solids[:1] if few[kind] else solids)
        for name in ROWS
        for seed in (bench.seeds[:1] if few[kind] else bench.seeds)
    ]


def run(bench: Bench) -> dict[str, Any]:
    learnt = solids(bench)
    rates, chosen = STUDY.choose(bench, sweeps(bench, learnt[0]), _seen)
    wanted = jobs(bench, learnt, chosen)
    runs, pictures = STUDY.train(bench, wanted)
    return {
        "scale": bench.scale,
        "settings": trials.settings_of(wanted[0]),
        "rates": {kind: {name: rates[f"{kind} {name}"] for name in ROWS} for kind in KINDS},
        "costs": {kind: STUDY.cost(bench, (chosen[f"{kind} {name}"] for name in ROWS)) for kind in KINDS},
        "runs": runs,
        "pictures": pictures,
    }


def _seen(found: Mapping[str, Any]) -> dict[str, Any]:
    end = found["curve"][-1] if found["curve"] else {"epoch": 0}
    return {"status": found["status"], "score": end.get("iou_held"), "loss": end.get("loss"), "reached": end["epoch"]}


NEAR = (
    "Mean ± standard deviation over seeds, of 100,000 points about the surface (standard deviation 0.01), which all seeds "
    "share. Minus plain: the mean of differences paired by seed, with its 95 % interval where there are two seeds or more.",
    "The paper's numbers are in a supplement that is not public.",
)
WHOLE = (
    "IoU: of 100,000 points anywhere in the cube. Volume: of the extracted surface minus the solid's. κ: condition number "
    "of the weights that are trained and of those that the trunk multiplies with, geometric mean over its layers, at the "
    "end.",
)


def tables(result: Mapping[str, Any]) -> list[Table]:
    scores, more = [], []
    for (solid, kind), all_runs in STUDY.subjects(result).items():
        for name in ROWS:
            runs = where(all_runs, row=name)
            head = (f"{solid}, {KINDS[kind]}", name)
            told = None if name == PLAIN else tell(trials.gained(all_runs, ROWS, name, "iou_near")[0], "+.3f")
            rate = result["rates"][kind][name]["rate"]
            scores.append([*head, spread([run["iou_near"] for run in runs], ".3f"), told, rate, len(runs)])
            excess = mean(run["volume"] / run["true_volume"] - 1 for run in runs)
            inner = [mean(end[key] for end in trials.ends(runs)) for key in ("raw_condition", "condition")]
            volume = None if excess is None else f"{100 * excess:+.1f} %"
            more.append([*head, spread([run["iou"] for run in runs], ".3f"), volume, *inner])
    size = f"{result['scale']} scale"
    each = [(f"{KINDS[k]}, {name}", row) for k, rows in result["rates"].items() for name, row in rows.items()]
    swept = [{"name": name, **row} for name, row in each]
    columns = ("solid", "network", "IoU near", "minus plain", "rate", "seeds")
    wide = ("solid", "network", "IoU", "volume", "κ trained", "κ effective")
    note = "IoU near the surface at the end, first solid and seed, of the points that choose the rate."
    return [
        Table(f"IoU near the surface, {size}", columns, scores, [*NEAR, *edges(swept)]),
        Table(f"The whole body, {size}", wide, more, WHOLE),
        *rates_table("Learning rates", swept, note, form=".3f", scale=1.0),
        *(_time(result, kind) for kind in result["costs"]),
    ]


def _time(result: Mapping[str, Any], kind: Kind) -> Table:
    solid = next(iter(STUDY.subjects(result)))[0]
    settings = result["settings"]

    def score(name: str, epoch: int) -> list[float | None]:
        found = [run["curve"] for run in where(result["runs"], solid=solid, kind=kind, row=name)]
        return [mean(point["iou_near"] for point in curve if point["epoch"] == epoch) for curve in found]

    return time_table(
        f"Equal time and equal epochs, {solid}, {KINDS[kind]}", result["costs"][kind], settings["epochs"], score,
        what="IoU near", every=settings["every"], form=".3f", scale=1.0,
    )  # fmt: skip


def remarks(result: Mapping[str, Any]) -> list[str]:
    said = []
    for (solid, kind), runs in STUDY.subjects(result).items():
        found = {name: trials.gained(runs, ROWS, name, "iou_near") for name in (CONDITIONED, KEPT)}
        parts = [f"{name} {told}, {word}" for name, (gap, word) in found.items() if (told := tell(gap, "+.3f"))]
        told = "; ".join(parts) or "nothing to compare"
        said.append(f"{solid}, {KINDS[kind]}: IoU near the surface minus plain: {told}.")
    said += lowered([run for run in result["runs"] if run["row"] in (CONDITIONED, KEPT)])
    named = [{**run, "kind": KINDS[run["kind"]]} for run in result["runs"]]
    said += trials.lost(named, "{row} of {solid} with {kind}, seed {seed}")
    if analytic := [solid for solid in dict.fromkeys(run["solid"] for run in result["runs"]) if solid in shapes.SHAPES]:
        said.append(f"No meshes were given: the solids are analytic shapes ({', '.join(analytic)}).")
    said.append(f"{result['scale'].capitalize()} scale: {_size(result['settings'])}.")
    if result["scale"] == "small":
        full = {key: OccupancyJob.__dataclass_fields__[key].default for key in result["settings"]}
        said.append(f"Full scale: {_size(full)}. Differences at small scale are those of early training.")
    return [
        *said,
        "Unit rows change what the activation sees: rows of PyTorch's start have norm 0.58, hidden rows of SIREN's 0.047, so E "
        "makes a Gaussian bump 1.7 times and a hidden sine 21 times as fast as it was meant to be. With its "
        "scale kept, E has rows of one norm too, but that of the start.",
        "The paper names no network for shapes; ours follows the same group's published settings for occupancy: three inputs, "
        "four layers, a Gaussian of width 0.09, Adam, binary cross-entropy. The trunk is conditioned, the last layer is not.",
        "A point counts as inside at a probability above 1/2, a logit above 0; a logit above 1/2, as in that group's code, "
        "would ask for 0.62.",
    ]


def _size(settings: Mapping[str, Any]) -> str:
    return (
        f"width {settings['width']}, {settings['points']:,} points, {settings['batch']:,} per step, {settings['epochs']} epochs "
        f"of Adam, marching cubes at {settings['grid']}^3"
    )


SURFACES = (
    "The solid, and the surfaces that {} networks of the first seed "
    "learned: plain, with conditioned weights (E), and with E at the scale of the start (kept scale). IoU, "
    "intersection over union, is 1 where a surface encloses just what the solid does; it is taken over the whole "
    "cube and near the surface, where details count."
)


def figures(result: Mapping[str, Any]) -> list[Drawing]:
    drawn = [
        Drawing(
            f"surfaces-{kind}",
            partial(_surfaces, result, kind),
            SURFACES.format(words.replace("PE", "positional encoding")),
        )
        for kind, words in KINDS.items()
        if where(result["runs"], kind=kind)
    ]
    return [*drawn, _curves(result)]


def _surfaces(result: Mapping[str, Any], kind: Kind) -> Figure:
    subjects = {solid: runs for (solid, of), runs in STUDY.subjects(result).items() if of == kind}
    columns = 1 + len(ROWS)
    figure, axes = trials.picture_grid(len(subjects), columns, (FULL / columns + 0.45) * len(subjects))
    for row, (solid, runs) in zip(axes, subjects.items(), strict=True):
        shown = result["pictures"][f"{solid} {kind}"]
        row[0].imshow(decode(next(iter(shown.values()))["truth"]))
        row[0].set_title(plain(solid))
        for axis, name in zip(row[1:], ROWS, strict=True):
            if name not in shown:
                continue
            run = trials.first_seed(runs, name)
            axis.imshow(decode(shown[name]["learnt"]))
            score = "diverged" if run["iou"] is None else f"IoU {run['iou']:.3f}, near {run['iou_near']:.3f}"
            axis.set_title(plain(f"{KINDS[kind]}, {name}\n{score}"))
            if run["volume"] < 1e-3 * run["true_volume"]:
                axis.text(0.5, 0.5, "no surface", transform=axis.transAxes, ha="center", va="center", color=FAINT)
    return figure


@drawn(
    "iou",
    f"IoU, intersection over union with the solid, near its surface along training (PE: positional encoding); {SEEDS}, "
    "and a line without a band is one seed. Look at how far E is from plain, and whether it still is when E keeps the "
    "scale of the start.",
)
def _curves(result: Mapping[str, Any]) -> Figure:
    subjects = STUDY.subjects(result)
    across = min(4, len(subjects))
    down = -(-len(subjects) // across)
    figure = Figure(figsize=(FULL, 0.4 + 2.2 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    for axis in axes.ravel()[len(subjects) :]:
        axis.set_axis_off()
    for axis, ((solid, kind), runs) in zip(axes.ravel(), subjects.items(), strict=False):
        found = along(axis, trials.curves(runs, ROWS, "epoch"), lambda row: row["iou_near"], "epoch")
        axis.set_title(plain(f"{solid}, {KINDS[kind]}"), loc="left")
        axis.set_ylim(0, 1)
        name_ends(axis, found)
    for axis in axes[:, 0]:
        axis.set_ylabel("IoU near the surface")
    return figure


EXPERIMENT = Experiment(
    "shape", "reproduce", "Weight conditioning of occupancy fields (3D shape modelling)",
    "Conditioning the weights of a network that models a 3D shape improves it; the figures stand in the supplement.",
    PAPER, run, tables, figures, remarks,
)  # fmt: skip
