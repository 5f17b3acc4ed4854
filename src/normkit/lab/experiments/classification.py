"""A table of a paper on classification: the study that fills it, the table next to the printed one, remarks and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from normkit.catalogue.methods import method
from normkit.lab.data.cifar import download_missing, source
from normkit.lab.experiment import Bench, Drawing, Table
from normkit.lab.experiments.runs import SEEDS_ALONE
from normkit.lab.report import drawing
from normkit.lab.report.experiment_tables import edges, rates_table, time_table
from normkit.lab.say import counted
from normkit.lab.stats import BETTER, WORSE, gain, judge_runs, mean, scored, spread, tell, tune, where
from normkit.lab.train.cost import Costs
from normkit.lab.train.learning import Same, Training, compare_same, folder_name, images, learn, measure
from normkit.lab.train.trainer import OK, validation

PAPER = method("weight_conditioning").paper
# What is looked at: each row at the one rate that the paper gives, or each at the best of its own sweep.
GIVEN, TUNED = "given", "tuned"
Learn = Callable[[Training, Path], dict[str, Any]]
# Of a panel: what of a curve it shows, by what that is multiplied, and what it is called.
PANELS = (("train_loss", 1, "training loss"), ("val_score", 100, "validation Top-1 in %"))


@dataclass(frozen=True)
class Row:
    """A method in a table, named as the paper writes it; the first row is the baseline."""

    name: str
    recipe: str
    unit: str = ""  # where the rows of layers begin with norm 1: "first_last" or "all"
    like: str = ""  # the row whose learning rate it takes, for a control; it has no sweep of its own
    conditioning: tuple[tuple[str, Any], ...] = ()  # options of one that is put on after the recipe
    once: bool = False  # it is run with the first seed alone
    optimizer: str = ""  # in the place of the plan's
    rates: tuple[float, ...] = ()  # likewise
    printed: tuple[float, float] | None = None  # Top-1 and Top-5 in percent


@dataclass(frozen=True)
class Plan:
    label: str
    base: Training  # all but row, rate and seed
    rows: tuple[Row, ...]
    controls: tuple[Row, ...] = ()  # that tell where an effect comes from
    rates: tuple[float, ...] = ()  # that each row tries with the first seed
    rate: float | None = None  # that the paper gives; None where the small scale has too few steps for it
    borrow: str = ""  # the label of the plan whose chosen rates are taken over in the place of a sweep
    same: bool = False  # show that E is weight norm with its lengths frozen at 1
    costs: float = 20.0  # seconds for measuring what a step of each row costs; 0 for not
    beyond: bool = False  # where the best rate is the smallest or largest that was tried, try further ones

    def job(self, row: Row, rate: float, seed: int) -> Training:
        """The training of a row."""
        how: dict[str, Any] = {key: getattr(row, key) for key in ("name", "recipe", "unit", "conditioning")}
        return replace(self.base, rate=rate, seed=seed, optimizer=row.optimizer or self.base.optimizer, **how)


def study(bench: Bench, plans: Sequence[Plan], learn: Learn = learn) -> dict[str, Any]:
    """Does what is missing of some plans; those that borrow rates come after those that they borrow from."""
    if bench.scale == "tiny":
        plans = [tiny(plan) for plan in plans]
    names = dict.fromkeys(plan.base.data for plan in plans)
    for name in names if bench.download else ():
        download_missing(name)
    parts: dict[str, dict[str, Any]] = {}
    for plan in plans:
        epochs = bench.epochs or plan.base.epochs
        warmup = plan.base.warmup * epochs / plan.base.epochs
        plan = replace(plan, base=replace(plan.base, epochs=epochs, warmup=warmup))
        length = f"{counted(epochs, 'epoch')} per run"
        bench.watch(f"{plan.label}: {len(plan.rows)} rows, {len(plan.controls)} controls, {length}")
        parts[plan.label] = _part(bench, plan, parts, learn)
    device = ", ".join(sorted(bench.devices))
    where_from = source(names, bench.data_root)
    return {"scale": bench.scale, "device": device, "threads": bench.threads, "source": where_from, "parts": parts}


def tiny(plan: Plan) -> Plan:
    """The same rows on digits for an epoch, one of their two rates far too large: for tests."""
    base = plan.base
    if base.data != "digits":
        base = Training("digits", "inception", "", "", 0.0, 0, 1, optimizer=base.optimizer, condition=base.condition)
    some: dict[str, Any] = {"rates": (0.1, 1e30) if plan.rates else (), "rate": 0.1 if plan.rate else None}
    some |= {key: tuple(replace(row, rates=()) for row in getattr(plan, key)) for key in ("rows", "controls")}
    return replace(plan, base=replace(base, epochs=1, batch_size=64), costs=min(plan.costs, 0.1), beyond=False, **some)


def _part(bench: Bench, plan: Plan, parts: Mapping[str, Mapping[str, Any]], learn: Learn) -> dict[str, Any]:
    rows = (*plan.rows, *plan.controls)
    swept = sweep(bench, learn, plan, [row for row in rows if not row.like])
    rates = {name: row["rate"] for name, row in swept.items()}
    if plan.borrow:
        rates = {row["name"]: row["rate"] for row in parts[plan.borrow]["sets"][TUNED]}
    elif not plan.rates:
        assert plan.rate is not None
        rates = {row.name: plan.rate for row in rows}
    for row in plan.controls:
        if row.like:
            rates[row.name] = rates[row.like]
    sets = {}
    if plan.rates or plan.borrow:
        sets[TUNED] = _repeat(bench, learn, plan, rates, swept)
    if plan.rate is not None:
        sets[GIVEN] = _repeat(bench, learn, plan, {row.name: plan.rate for row in rows}, swept)
    found: dict[str, Any] = {"base": asdict(plan.base), "rates": list(plan.rates), "sets": sets}
    data = images(plan.base.data, plan.base.size, plan.base.train, plan.base.val, plan.base.test)
    found["samples"] = {name: len(split) for name, split in data.splits.items()}
    found["borrowed"] = plan.borrow
    jobs = tuple(plan.job(row, rates[row.name], bench.seeds[0]) for row in plan.rows)
    if plan.costs:
        (found["costs"],) = bench.sweep(measure, [Costs(jobs, plan.costs)])
    if plan.same:
        (found["same"],) = bench.sweep(compare_same, [Same(replace(jobs[0], epochs=1))])
    return found


def sweep(bench: Bench, learn: Learn, plan: Plan, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Tries the rates of each row with the first seed."""
    first, named = bench.seeds[0], {row.name: row for row in rows}
    jobs = {row.name: [plan.job(row, rate, first) for rate in row.rates or plan.rates] for row in rows}
    beyond = (lambda name, rate: plan.job(named[name], rate, first)) if plan.beyond else None
    return tune(bench, learn, jobs, validation, beyond) if plan.rates else {}


def _repeat(
    bench: Bench, learn: Learn, plan: Plan, rates: Mapping[str, float], swept: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows, keys = (*plan.rows, *plan.controls), ("status", "val_score", "test_score", "test_top5", "test_loss")
    pairs = [(row, seed) for seed in bench.seeds for row in rows if seed == bench.seeds[0] or not row.once]
    jobs = [plan.job(row, rates[row.name], seed) for row, seed in pairs]
    runs, parameters = dict[str, list[dict[str, Any]]](), {}
    for job, found in zip(jobs, bench.sweep(learn, jobs), strict=True):
        kept = {key: found[key] for key in (*keys, "condition", "curve")}
        runs.setdefault(job.name, []).append({"seed": job.seed, **kept})
        parameters[job.name] = found["parameters"]
    return [
        {
            "name": row.name,
            "recipe": row.recipe,
            "control": row in plan.controls,
            "printed": row.printed,
            "rate": rates[row.name],
            "parameters": parameters[row.name],
            "runs": runs[row.name],
            "sweep": swept.get(row.name, {}).get("sweep", []),
            "edge": swept.get(row.name, {}).get("edge", False) and swept[row.name]["rate"] == rates[row.name],
        }
        for row in rows
    ]


def tables(result: Mapping[str, Any]) -> list[Table]:
    found = []
    note = "Validation accuracy in % after the last epoch, first seed; it chooses the rate. Test images choose nothing."
    for label, part in result["parts"].items():
        for kind in (GIVEN, TUNED):
            if kind in part["sets"]:
                found += _scores(result, label, part, kind)
        found += rates_table(f"{label}: learning rates", next(iter(part["sets"].values())), note)
        if part.get("costs"):
            found.append(_time(label, part))
    return found


def _scores(result: Mapping[str, Any], label: str, part: Mapping[str, Any], kind: str) -> list[Table]:
    rows = part["sets"][kind]
    base = rows[0]
    best = kind == TUNED and (part["rates"] or part["borrowed"])
    how = "each at the best of its rates" if best else f"rate {base['rate']:g}"
    ours = ["ours: Top-1", f"minus {base['name']} [95 %]", "Top-5", "rate", "κ last layer", "seeds"]
    printed = ["paper: Top-1", f"minus {base['name']}", "Top-5"] if any(row["printed"] for row in rows) else []
    notes = [describe(result, part), SEEDS_ALONE, *filter(None, [result.get("source")])]
    if part["borrowed"]:
        notes.append(f"Rates are those chosen on {part['borrowed']}.")
    title = f"{label}: test accuracy in %, {result['scale']} scale, {how}"
    main, controls = (where(rows, control=control) for control in (False, True))
    shown = [[row["name"], *(_printed(row, base) if printed else ()), *_score_row(row, base)] for row in main]
    found = [Table(title, ["method", *printed, *ours], shown, [*notes, *edges(rows)])]
    if controls:
        rest = [[row["name"], *_score_row(row, base)] for row in controls]
        title = f"{label}: controls, {how}"
        found.append(Table(title, ["control", *ours], rest, ["As in the table above, same seeds."]))
    return found


def _printed(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[Any]:
    first, five = row["printed"] or (None, None)
    known = row is not base and first is not None and base["printed"]
    return [first, f"{first - base['printed'][0]:+.1f}" if known else None, five]


def _score_row(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[Any]:
    runs = row["runs"]
    return [
        spread([run["test_score"] for run in runs], ".1f", 100),
        None if row is base else tell(gain(runs, base["runs"], "test_score"), scale=100),
        spread([run["test_top5"] for run in runs], ".1f", 100),
        row["rate"],
        mean(run["condition"]["last"][1] for run in runs if run["condition"]),
        len(runs),
    ]


def _time(label: str, part: Mapping[str, Any]) -> Table:
    rows = part["sets"].get(TUNED, part["sets"].get(GIVEN))
    notes = ["Validation accuracy in %."]
    if part["base"]["schedule"] != "constant":
        notes.append("A run that is read before its end is read in the middle of its schedule, to its disadvantage.")

    def score(name: str, epoch: int) -> list[float | None]:
        return [at(run, epoch) for run in where(rows, name=name)[0]["runs"]]

    title = f"{label}: equal time and equal epochs"
    return time_table(title, part["costs"], part["base"]["epochs"], score, what="val", notes=notes)


def at(run: Mapping[str, Any], epoch: int) -> float | None:
    """The validation score after an epoch."""
    scores = run["curve"]["val_score"]
    return scores[epoch - 1] if 0 < epoch <= len(scores) else None


def describe(result: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """The protocol in a sentence."""
    base, samples = part["base"], part["samples"]
    size = f" at {base['size']}x{base['size']} pixels" if base["size"] else ""
    warm = f"{base['warmup']:g} epochs of warm-up" if base["warmup"] else ""
    schedule = "" if base["schedule"] == "constant" else f"{base['schedule']} schedule"
    how = (
        base["model"].rpartition(":")[2] + (f", width x{base['width']:g}" if base["width"] != 1 else ""),
        f"SGD, momentum {base['momentum']:g}" if base["optimizer"] == "sgd" else base["optimizer"],
        f"weight decay {base['weight_decay']:g}",
        *([warm, schedule] if warm or schedule else ["constant rate"]),
        base["clip"] and f"clip {base['clip']:g}",
        base["label_smoothing"] and f"label smoothing {base['label_smoothing']:g}",
        base["precision"] != "32-true" and base["precision"],
        f"batch {base['batch_size']}, {counted(base['epochs'], 'epoch')}",
    )
    return (
        "Mean ± standard deviation over seeds; differences are paired by seed, with their 95 % interval. "
        f"{samples['train']:,} images{size} to learn from, {samples['val']:,} to choose rates, {samples['test']:,} to judge; "
        f"{', '.join(text for text in how if text)}. On {result['device']}, {counted(result['threads'], 'thread')} per run."
    )


def early(result: Mapping[str, Any], words: str) -> list[str]:
    """At small scale a remark on what was trained, `words` after the epochs, steps and seeds as they were configured."""
    if result["scale"] != "small":
        return []
    parts = list(result["parts"].values())
    epochs, batch = parts[0]["base"]["epochs"], parts[0]["base"]["batch_size"]
    steps = parts[0]["samples"]["train"] // batch * epochs
    seeds = max(len(row["runs"]) for part in parts for rows in part["sets"].values() for row in rows)
    return [f"Small scale: {counted(epochs, 'epoch')}, {counted(steps, 'step')}, {counted(seeds, 'seed')}{words}"]


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """What our runs show of each difference that the paper prints, and whether E and frozen weight norm are the same training."""
    said = []
    for label, part in result["parts"].items():
        for kind, rows in part["sets"].items():
            base = rows[0]
            where = f"{label}{', at the rate of the paper' if kind == GIVEN and TUNED in part['sets'] else ''}"
            judged = [_verdict(row, base) for row in rows if not row["control"] and row is not base]
            said.append(f"{where}, test Top-1 minus {base['name']}'s: {'; '.join(judged)}.")
            lost = {row["name"]: [run["status"] != OK for run in row["runs"]] for row in rows}
            if told := [f"{name} ({sum(runs)} of {len(runs)})" for name, runs in lost.items() if any(runs)]:
                said.append(f"{where}: runs that diverged: {', '.join(told)}.")
        if same := part.get("same"):
            said.append(_same(label, same))
    return said


def _verdict(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    compared = row["runs"], base["runs"], "test_score"
    text, both = tell(gain(*compared), scale=100), row["printed"] and base["printed"]
    if text is None:
        return f"{row['name']} has no score to compare"
    printed = f" (printed {row['printed'][0] - base['printed'][0]:+.1f})" if both else ""
    return f"{row['name']} {text}, {judge_runs(*compared)}{printed}"


def _same(label: str, same: Mapping[str, Any]) -> str:
    if same["same_metrics"] and same["greatest_difference"] == 0:
        return (
            f"{label}: E and weight norm on the same two layers with its lengths frozen at 1 are the same training: after "
            f"{same['steps']} steps every loss and every weight is equal to the last bit (sha256 {same['sha256'][0][:12]})."
        )
    return (
        f"{label}: E and weight norm with lengths frozen at 1 should be the same training, but after {same['steps']} steps the "
        f"weights differ by up to {same['greatest_difference']:.2g}."
    )


def difference(result: Mapping[str, Any], label: str, one: str, other: str) -> str | None:
    """The paired difference in Top-1 between two rows, at their best rates, as text that says whether it shows one."""
    rows = result["parts"][label]["sets"].get(TUNED) or result["parts"][label]["sets"][GIVEN]
    runs = {row["name"]: row["runs"] for row in rows}
    if one not in runs or other not in runs:
        return None
    compared = runs[one], runs[other], "test_score"
    text, word = tell(gain(*compared), scale=100), judge_runs(*compared)
    return text if text is None or word in (BETTER, WORSE) else f"{text} ({word})"


CROWD = 1 + len(drawing.HUES)  # with more methods than that, lines share colours and hide one another
CAPTIONS = {
    "curves": f"training loss, on a log scale, and validation Top-1 along training; {drawing.SEEDS}. Compare the distance "
    "between lines with the width of their bands.",
    "ends": "training loss and validation Top-1 of the last epoch; a dot is a seed, a bar the mean over seeds, and the vertical "
    "line that of the first row. Look for methods whose dots are all on one side of the line; a seed that diverged has no dot.",
    "rates": "validation Top-1 at the end of training against the learning rate, a point per run of the first "
    "seed; a cross at the bottom is a run that diverged. The highest point of a line is the rate chosen for "
    "that method; where it is the last on either side, a better rate may lie beyond.",
}


def figures(result: Mapping[str, Any]) -> list[Drawing]:
    drawn = []
    for label, part in result["parts"].items():
        for kind in (TUNED, GIVEN):
            if kind in part["sets"]:
                rows = where(part["sets"][kind], control=False)
                end = "" if kind == TUNED or TUNED not in part["sets"] else "-given-rate"
                rate = "each method at its chosen rate" if kind == TUNED else f"all methods at rate {rows[0]['rate']:g}"
                form, draw = ("ends", _ends) if len(rows) > CROWD else ("curves", _curves)
                caption = f"{label}, {rate}: {CAPTIONS[form]}"
                drawn.append(Drawing(f"{folder_name(label)}{end}-{form}", partial(draw, rows), caption))
        rows = next(iter(part["sets"].values()))
        if any(row["sweep"] for row in rows):
            name = f"{folder_name(label)}-rates"
            drawn.append(Drawing(name, partial(_rates, rows), f"{label}: {CAPTIONS['rates']}"))
    return drawn


def curve(row: Mapping[str, Any], look: drawing.Style, key: str, times: float = 1.0) -> drawing.Curve:
    """The line of a row: a measure of its runs after each epoch."""
    lines = [[{"step": n, "x": x and times * x} for n, x in enumerate(run["curve"][key], 1)] for run in row["runs"]]
    return drawing.Curve(row["name"], look.light, lines, {"linestyle": look.line})


def _curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = drawing.panels(2, drawing.FULL, 2.6)
    looks = drawing.styles([row["name"] for row in rows], rows[0]["name"])
    found = []
    for axis, (key, times, words) in zip(axes, PANELS, strict=True):
        lines = [curve(row, look, key, times) for row, look in zip(rows, looks, strict=True)]
        found.append(drawing.along(axis, lines, lambda point: point["x"], "epoch"))
        axis.set_ylabel(words)
    drawing.log(axes[0])
    # Positions of names need final limits.
    figure.canvas.draw()
    for axis, names in zip(axes, found, strict=True):
        drawing.name_ends(axis, names)
    return figure


def _ends(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = drawing.panels(2, drawing.FULL, 0.6 + 0.17 * len(rows), sharey=True)
    for axis, (key, times, words) in zip(axes, PANELS, strict=True):
        for y, row in enumerate(rows):
            values = [times * run["curve"][key][-1] for run in row["runs"] if run["status"] == OK]
            drawing.dots(axis, y, values, drawing.COLOURS[0] if y else drawing.GREY)
            if values and not y:
                axis.axvline(mean(values) or 0.0, color=drawing.FAINT, linewidth=0.8)
        axis.set_xlabel(words)
        drawing.rows_of(axis, [drawing.plain(row["name"]) for row in rows])
    return figure


def _rates(rows: Sequence[Mapping[str, Any]]) -> Figure:
    rows = [row for row in rows if row["sweep"]]
    figure, (axis,) = drawing.panels(1, drawing.FULL * 0.62, 2.6)
    names = []
    for row, look in zip(rows, drawing.styles([row["name"] for row in rows], rows[0]["name"]), strict=True):
        good = {run["rate"]: [100 * run["score"]] for run in row["sweep"] if scored(run)}
        names += drawing.across(
            axis, row["name"], look.light, good, marker=look.marker, linestyle=look.line, markersize=4
        )
        lost = [run["rate"] for run in row["sweep"] if run["status"] != OK]
        axis.plot(lost, [0.03] * len(lost), "x", color=look.light, transform=axis.get_xaxis_transform())
    tried = sorted({run["rate"] for row in rows for run in row["sweep"]})
    ticks = tried[:1]
    for rate in tried:
        ticks += [rate] if rate > ticks[-1] * (tried[-1] / tried[0]) ** 0.12 else []  # as much room as a number needs
    drawing.marked(axis, ticks)
    axis.set(xlabel="learning rate", ylabel=drawing.plain("validation Top-1 in %"))
    figure.canvas.draw()
    drawing.name_ends(axis, names)
    return figure
