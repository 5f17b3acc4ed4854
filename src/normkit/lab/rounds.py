"""The rounds of a comparison: every rate with the first seed, costs, every seed at the chosen rates, and runs of equal time."""

from collections.abc import Mapping
from typing import Any

from normkit.lab import folder as folders
from normkit.lab import record, task
from normkit.lab.budget import fitted
from normkit.lab.experiment import Bench
from normkit.lab.result import Judge, Trained, adjust, find_target, summarize
from normkit.lab.say import counted
from normkit.lab.settings import Settings
from normkit.lab.stats import tune
from normkit.lab.study import MARKS_FILE, Made, Run, Steps, Study
from normkit.lab.sweep import finished
from normkit.lab.train.trainer import read_run, validation


def said(name: str) -> str:
    """Names a model or data; what was given from Python without a name of its own, by its type."""
    kind = name.removeprefix("builtins:")
    return name if kind == name else f"a {kind}"


def run(study: Study, made: Made, bench: Bench, device: str) -> dict[str, Any]:
    """Does what is missing, and gives the result."""
    settings = study.settings
    recipes, seeds, rates = settings.recipes, settings.seeds, settings.rates
    counts = ", ".join(counted(len(getattr(settings, f"{noun}s")), noun) for noun in ("recipe", "rate", "seed"))
    length = f"{counted(settings.epochs, 'epoch')} per run"
    bench.watch(f"{said(settings.model)} on {said(settings.data)}: {counts}, {length}; records in {bench.output}")
    sweeps = {recipe: [made.run(recipe, rate, seeds[0], device) for rate in rates] for recipe in recipes}

    def beyond(recipe: str, rate: float) -> Run:
        bench.watch(f"{recipe}: the best rate lies at the edge of the sweep; {rate:g} is tried as well")
        return made.run(recipe, rate, seeds[0], device)

    tuned = tune(bench, study.learn, sweeps, validation, beyond if settings.extend else None)
    for recipe, row in tuned.items():
        tried = ", ".join(f"{run['rate']:g}" for run in row["sweep"])
        bench.watch(f"{recipe}: rate {row['rate']:g} is the best of {tried}")
    (costs,) = bench.sweep(study.measure, [Steps(recipes, made.origin(seeds[0], device))])
    chosen = {recipe: row["rate"] for recipe, row in tuned.items()}
    jobs = [made.run(recipe, chosen[recipe], seed, device) for seed in seeds for recipe in recipes]
    lengths = _lengths(settings, costs)
    short = [made.run(name, chosen[name], seed, device, n) for seed in seeds for name, n in lengths.items() if n]
    results = [*bench.sweep(study.learn, jobs), *(bench.sweep(study.learn, short) if short else ())]

    def summary() -> dict[str, Any]:
        runs: dict[tuple[str, int], list[Trained]] = {}
        for job, result in zip([*jobs, *short], results, strict=True):
            place = bench.output / folders.RUNS / job.path
            marks = record.read_numbers(place / MARKS_FILE) if settings.resample else None
            logs = read_run(place, result["epochs"])
            run = Trained(job.seed, f"{folders.RUNS}/{job.path}", result, *logs, marks)
            runs.setdefault((job.recipe, job.epochs), []).append(run)
        full = [run for recipe in recipes for run in runs[recipe, 0]]
        target, base, data = find_target(full, settings.target), runs[recipes[0], 0], made.data
        resampled = {"sizes": task.sizes(data.test.targets).numpy(), "sign": -1 if data.score == "r2" else 1}
        judge = Judge(recipes[0], base, settings.level, **(resampled if settings.resample else {}))
        steps = next((run.result["steps"] / run.result["epochs"] for run in full if run.result["epochs"]), None)
        rows = []
        for recipe in recipes:
            tried = [_tried(made.run(recipe, row["rate"], seeds[0], device), row) for row in tuned[recipe]["sweep"]]
            known = {"parameters": made.parameters[recipe], **made.changes[recipe], "cost": costs[recipe]}
            known["extended"] = [row["rate"] for row in tried if row["rate"] not in rates]
            ms = costs[recipes[0]]["ms_per_step"] * costs[recipe]["ratio"]
            known["full_hours"] = steps and ms * steps * settings.full_epochs / 3.6e6
            found = {"recipe": recipe, **known}
            found |= summarize(runs[recipe, 0], judge, chosen[recipe], tried, target["score"])
            if settings.equal_time:
                found["equal_time"] = _equal_time(settings, runs, recipe, lengths.get(recipe), judge)
            rows.append(found)
        adjust(rows)
        sizes = {name: len(split) for name, split in data.splits.items()}
        about = {"kind": data.kind, "score": data.score, **sizes, "notes": list(data.notes)}
        asked: dict[str, Any] = {"level": settings.level, "full_epochs": settings.full_epochs}
        if len(seeds) > 1 and len({job.origin["init_sha256"] for job in jobs}) == 1:
            about["notes"].append(
                "every seed begins with the same weights, as the model's are pretrained, made once or seeded by its factory: "
                "intervals cover the order of the data and what training draws, not the initial weights"
            )
        about["notes"] += [fitted(settings)] if settings.budget is not None else []
        return {"task": about, "baseline": recipes[0], "target": target, **asked, "recipes": rows}

    return bench.group.share(summary)


def _lengths(settings: Settings, costs: Mapping[str, Any]) -> dict[str, int]:
    """How many epochs recipes with slower steps come through in the baseline's time."""
    from normkit.lab.report.tables import within

    if not settings.equal_time:
        return {}
    ratios = {recipe: (cost["ratio"], 1, cost["ratio_interval"]) for recipe, cost in costs.items()}
    found = {recipe: within(settings.epochs, *how) for recipe, how in ratios.items()}
    return {recipe: count for recipe, count in found.items() if count < settings.epochs}


def _equal_time(
    settings: Settings, runs: Mapping[tuple[str, int], list[Trained]], recipe: str, length: int | None, judge: Judge
) -> dict[str, Any]:
    epochs = settings.epochs if length is None else length
    if not epochs:
        return {"epochs": 0, "runs": [], "test_score": None, "paired": None}
    done = runs[recipe, length or 0]
    return {"epochs": epochs, "runs": [{"seed": run.seed, "run": run.path} for run in done], **judge.scores(done)}


def _tried(job: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    place = {"seed": job.seed, "run": f"{folders.RUNS}/{job.path}"}
    return {**place, "rate": job.rate, "status": row["status"], "val_score": row["score"], "val_loss": row["loss"]}


def whole(study: Study, made: Made, bench: Bench, device: str, result: Mapping[str, Any]) -> bool:
    """Whether the runs of a result are all there, of these data and this code."""
    for recipe in result["recipes"]:
        equal = recipe.get("equal_time") or {"runs": [], "epochs": 0}
        short = equal["epochs"] if equal["epochs"] < study.settings.epochs else 0
        found = [(row["rate"], row["seed"], 0) for row in recipe["sweep"]]
        found += [(recipe["rate"], run["seed"], 0) for run in recipe["runs"]]
        found += [(recipe["rate"], run["seed"], short) for run in equal["runs"]]
        for rate, seed, epochs in found:
            job = made.run(recipe["recipe"], rate, seed, device, epochs)
            place = bench.output / folders.RUNS / job.path
            if (done := finished(study.learn, job, place)) is None:
                return False
            read_run(place, done["epochs"])
    return True
