"""A table of a paper on classification: the study that fills it, the table next to the printed one, remarks and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from normkit.catalogue.methods import method
from normkit.lab.data.cifar import download_missing, source
from normkit.lab.experiment import Bench, Table
from normkit.lab.experiments.runs import SEEDS_ALONE
from normkit.lab.report.tables import edges, rates_table, time_table
from normkit.lab.say import counted
from normkit.lab.stats import BETTER, WORSE, gain, judge_runs, mean, spread, tell, tune, where
from normkit.lab.train.cost import Costs
from normkit.lab.train.learning import Same, Training, compare_same, images, learn, measure
from normkit.lab.train.trainer import OK, validation

PAPER = method("weight_conditioning").paper
# What is looked at: each row at the one rate that the paper gives, or each at the best of its own sweep.
GIVEN, TUNED = "given", "tuned"
Learn = Callable[[Training, Path], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A method in a table.

    Args:
        name: as the paper writes it; the first row is the baseline.
        recipe: its recipe.
        unit: where the rows of layers begin with norm 1: ``"first_last"`` or ``"all"``. Default: nowhere.
        like: the row whose learning rate it takes, for a control. Default: none, it has a sweep of its own.
        conditioning: options of a conditioning that is put on after the recipe. Default: none.
        once: it is run with the first seed alone. Default: False.
        optimizer: in place of the plan's. Default: the plan's.
        rates: that it tries, in place of the plan's. Default: the plan's.
        printed: Top-1 and Top-5 in percent. Default: none.
    """

    name: str
    recipe: str
    unit: str = ""
    like: str = ""
    conditioning: tuple[tuple[str, Any], ...] = ()
    once: bool = False
    optimizer: str = ""
    rates: tuple[float, ...] = ()
    printed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """One data set and model of a table.

    Args:
        label: of the data set and model, for headings.
        base: all but row, rate and seed.
        rows: of the paper.
        controls: rows that tell where an effect comes from.
        rates: that each row tries with the first seed.
        rate: that the paper gives; None where the small scale has too few steps for it.
        borrow: the label of the plan whose chosen rates are taken over in place of a sweep. Default: none.
        same: show that E is weight norm with its lengths frozen at 1. Default: False.
        costs: seconds for measuring what a step of each row costs; 0 for not. Default: 20.
        beyond: where the best rate is the smallest or largest that was tried, try further ones. Default: False.
    """

    label: str
    base: Training
    rows: tuple[Row, ...]
    controls: tuple[Row, ...] = ()
    rates: tuple[float, ...] = ()
    rate: float | None = None
    borrow: str = ""
    same: bool = False
    costs: float = 20.0
    beyond: bool = False


def study(bench: Bench, plans: Sequence[Plan], learn: Learn = learn) -> dict[str, Any]:
    """Does what is missing of some plans.

    Args:
        bench: where.
        plans: those that borrow rates come after those that they borrow from.
        learn: does one training. Default: :func:`normkit.lab.train.learning.learn`.

    Returns:
        What tables, remarks and figures are made of.
    """
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
    swept = _sweep(bench, learn, plan, [row for row in rows if not row.like])
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
    if plan.costs:
        jobs = tuple(_job(plan, row, rates[row.name], bench.seeds[0]) for row in plan.rows)
        (found["costs"],) = bench.sweep(measure, [Costs(jobs, plan.costs)])
    if plan.same:
        first = plan.rows[0]
        job = Same(replace(_job(plan, first, rates[first.name], bench.seeds[0]), epochs=1))
        (found["same"],) = bench.sweep(compare_same, [job])
    return found


def _sweep(bench: Bench, learn: Learn, plan: Plan, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    if not plan.rates:
        return {}
    jobs = {row.name: [_job(plan, row, rate, bench.seeds[0]) for rate in row.rates or plan.rates] for row in rows}
    named = {row.name: row for row in rows}

    def beyond(name: str, rate: float) -> Training:
        return _job(plan, named[name], rate, bench.seeds[0])

    return tune(bench, learn, jobs, validation, beyond if plan.beyond else None)


def _repeat(
    bench: Bench, learn: Learn, plan: Plan, rates: Mapping[str, float], swept: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = (*plan.rows, *plan.controls)
    pairs = [(row, seed) for seed in bench.seeds for row in rows if seed == bench.seeds[0] or not row.once]
    jobs = [_job(plan, row, rates[row.name], seed) for row, seed in pairs]
    runs: dict[str, list[dict[str, Any]]] = {}
    keys = ("status", "val_score", "test_score", "test_top5", "test_loss", "condition", "curve")
    parameters = {}
    for job, found in zip(jobs, bench.sweep(learn, jobs), strict=True):
        runs.setdefault(job.name, []).append({"seed": job.seed, **{key: found[key] for key in keys}})
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


def _job(plan: Plan, row: Row, rate: float, seed: int) -> Training:
    how: dict[str, Any] = {"recipe": row.recipe, "unit": row.unit, "conditioning": row.conditioning}
    how["optimizer"] = row.optimizer or plan.base.optimizer
    return replace(plan.base, name=row.name, rate=rate, seed=seed, **how)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """For each data set: our numbers next to the printed ones, controls, learning rates, and equal time and equal epochs."""
    found = []
    for label, part in result["parts"].items():
        for kind in (GIVEN, TUNED):
            if kind in part["sets"]:
                found += _scores(result, label, part, kind)
        found += [*_rates(label, part), *_time(label, part)]
    return found


def _scores(result: Mapping[str, Any], label: str, part: Mapping[str, Any], kind: str) -> list[Table]:
    rows = part["sets"][kind]
    base = rows[0]
    best = kind == TUNED and (part["rates"] or part["borrowed"])
    how = "each at the best of its rates" if best else f"rate {base['rate']:g}"
    printed = ["paper: Top-1", f"minus {base['name']}", "Top-5"]
    ours = ["ours: Top-1", f"minus {base['name']} [95 %]", "Top-5", "rate", "κ last layer", "seeds"]
    lines = {row["name"]: _score_row(row, base) for row in rows}
    main = [row["name"] for row in rows if not row["control"]]
    controls = [row["name"] for row in rows if row["control"]]
    if not any(row["printed"] for row in rows):
        printed = []
    notes = [describe(result, part), SEEDS_ALONE, *filter(None, [result.get("source")])]
    if part["borrowed"]:
        notes.append(f"Rates are those chosen on {part['borrowed']}.")
    title = f"{label}: test accuracy in %, {result['scale']} scale, {how}"
    shown = [[name, *(_printed(rows, base, name) if printed else ()), *lines[name]] for name in main]
    found = [Table(title, ["method", *printed, *ours], shown, [*notes, *edges(rows)])]
    if controls:
        about = ["As in the table above, same seeds."]
        rest = [[name, *lines[name]] for name in controls]
        found.append(Table(f"{label}: controls, {how}", ["control", *ours], rest, about))
    return found


def _printed(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any], name: str) -> list[Any]:
    (row,) = where(rows, name=name)
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


def _rates(label: str, part: Mapping[str, Any]) -> list[Table]:
    note = "Validation accuracy in % after the last epoch, first seed; it chooses the rate. Test images choose nothing."
    return rates_table(f"{label}: learning rates", next(iter(part["sets"].values())), note)


def _time(label: str, part: Mapping[str, Any]) -> list[Table]:
    costs = part.get("costs")
    if not costs:
        return []
    rows = {row["name"]: row for row in part["sets"].get(TUNED, part["sets"].get(GIVEN))}
    notes = ["Validation accuracy in %."]
    if part["base"]["schedule"] != "constant":
        notes.append("A run that is read before its end is read in the middle of its schedule, to its disadvantage.")

    def score(name: str, epoch: int) -> list[float | None]:
        return [at(run, epoch) for run in rows[name]["runs"]]

    title = f"{label}: equal time and equal epochs"
    return [time_table(title, costs, part["base"]["epochs"], score, what="val", notes=notes)]


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


def steps_of(result: Mapping[str, Any]) -> int:
    """Steps of training of a run of the first part."""
    part = next(iter(result["parts"].values()))
    return part["samples"]["train"] // part["base"]["batch_size"] * part["base"]["epochs"]


def length_of(result: Mapping[str, Any]) -> str:
    """What was trained, for remarks: epochs, steps and seeds as they were configured."""
    parts = list(result["parts"].values())
    seeds = max(len(row["runs"]) for part in parts for rows in part["sets"].values() for row in rows)
    return (
        f"{counted(parts[0]['base']['epochs'], 'epoch')}, {counted(steps_of(result), 'step')}, {counted(seeds, 'seed')}"
    )


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """What our runs show of each difference that the paper prints, and whether E and frozen weight norm are the same training."""
    said = []
    for label, part in result["parts"].items():
        for kind, rows in part["sets"].items():
            base = rows[0]
            where = f"{label}{', at the rate of the paper' if kind == GIVEN and TUNED in part['sets'] else ''}"
            judged = [_verdict(row, base) for row in rows if not row["control"] and row is not base]
            said.append(f"{where}, test Top-1 minus {base['name']}'s: {'; '.join(judged)}.")
            lost = [f"{row['name']} ({n} of {len(row['runs'])})" for row in rows if (n := _lost(row))]
            if lost:
                said.append(f"{where}: runs that diverged: {', '.join(lost)}.")
        if same := part.get("same"):
            said.append(_same(label, same))
    return said


def _lost(row: Mapping[str, Any]) -> int:
    return sum(run["status"] != OK for run in row["runs"])


def _verdict(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    compared = row["runs"], base["runs"], "test_score"
    text = tell(gain(*compared), scale=100)
    if text is None:
        return f"{row['name']} has no score to compare"
    printed = ""
    if row["printed"] and base["printed"]:
        printed = f" (printed {row['printed'][0] - base['printed'][0]:+.1f})"
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
    first, second = where(rows, name=one), where(rows, name=other)
    if not first or not second:
        return None
    compared = first[0]["runs"], second[0]["runs"], "test_score"
    text, word = tell(gain(*compared), scale=100), judge_runs(*compared)
    return text if text is None or word in (BETTER, WORSE) else f"{text} ({word})"
