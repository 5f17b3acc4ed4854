"""The rounds of a comparison: rates, costs, every seed, runs of equal time; their result; and what a budget of time fits."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from normkit.core.errors import OptionError
from normkit.lab import folder as folders
from normkit.lab import record, task
from normkit.lab.experiment import Bench
from normkit.lab.say import counted
from normkit.lab.settings import Settings
from normkit.lab.stats import OK, Tried, at_edge, differences, holm, over_seeds, over_seeds_and_samples, tune
from normkit.lab.study import MARKS_FILE, Made, Run, Steps, Study
from normkit.lab.sweep import finished
from normkit.lab.train.cost import RATE, measure_costs
from normkit.lab.train.trainer import Trainer, read_run, validation

# Rates and seeds; the first that fit are taken. Seeds narrow the intervals, so they come before more epochs than asked for.
PLANS = ((4, 10), (4, 5), (4, 3), (3, 3))
SLACK = 1.25  # checkpoints, sweeps that go on beyond one rate, a machine that is busier later
COSTS = 10.0  # seconds, to time steps side by side
LOOKED = 4  # batches of validation data that are timed
OWN_RULE = "the highest validation score that every recipe reached in every seed"
KEPT = ("status", "val_score", "best_val_score", "test_score", "test_loss")


def fit(settings: Settings, seconds: Mapping[str, float]) -> Settings:
    """Chooses epochs, rates and seeds so that all trainings take no longer than the budget.

    Of rates as many of those given as the plan has, from the middle; epochs as given, and fewer where even the smallest
    plan does not fit with them. `seconds` are of an epoch of each recipe, its validation included.
    """
    assert settings.budget is not None
    rates = seeds = runs = 0
    epoch, left = SLACK * sum(seconds.values()), settings.budget - COSTS
    for most, seeds in PLANS:
        rates = min(most, len(settings.rates))
        further = settings.extend and rates > 1
        # The run of the first seed at the chosen rate is one of the sweep.
        runs = rates + further + seeds - 1 + settings.equal_time * seeds
        if epoch * runs * settings.epochs <= left:
            break
    epochs = min(settings.epochs, int(left / (epoch * runs)))
    if epochs < 1:
        raise OptionError(
            f"budget is {settings.budget:g} s; {rates} rates and {seeds} seeds of every recipe, for one epoch, take about "
            f"{epoch * runs + COSTS:.0f} s; wanted at least that, or fewer recipes"
        )
    start = (len(settings.rates) - rates) // 2
    return replace(
        settings,
        epochs=epochs,
        warmup=settings.warmup * epochs / settings.epochs,
        rates=settings.rates[start : start + rates],
        seeds=tuple(range(seeds)),
    )


def fitted(settings: Settings) -> str:
    """Says what a budget chose."""
    counts = [
        counted(settings.epochs, "epoch"),
        counted(len(settings.rates), "rate"),
        counted(len(settings.seeds), "seed"),
    ]
    return f"a budget of {settings.budget:g} s fits {counts[0]} per run, {counts[1]} and {counts[2]} of each recipe"


def measure(made: Made) -> dict[str, float]:
    """Measures what an epoch of each recipe takes, with validation and condition numbers, by a few steps."""
    settings, data, fabric = made.settings, made.data, made.fabric
    seed = settings.seeds[0]
    models = {recipe: made.apply(seed, recipe)[0] for recipe in settings.recipes}
    costs = measure_costs(models, settings, data, fabric, budget=2.0, rounds=(3, 10), warm_up=2)
    part = data.val.take(torch.arange(min(len(data.val), LOOKED * 4 * settings.batch_size)))
    steps, found = max(1, len(data.train) // settings.batch_size), {}
    for recipe in settings.recipes:
        trainer = Trainer(RATE, seed, settings, made.apply(seed, recipe)[0], data, fabric, Path())
        taken = []
        for look in (lambda one=trainer: one.evaluate(part), trainer.conditions):
            begun = time.perf_counter()
            look()
            taken.append(time.perf_counter() - begun)
        found[recipe] = steps * costs[recipe]["ms_per_step"] / 1e3 + taken[0] * len(data.val) / len(part) + taken[1]
    return found


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    seed: int
    path: str  # of its folder, within that of the comparison
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # a row per epoch
    timing: Sequence[Mapping[str, Any]]  # likewise
    marks: np.ndarray = field(default_factory=lambda: np.zeros(0))  # what each test sample adds to the score

    def row(self, target: float | None) -> dict[str, Any]:
        """What a result says of it."""
        reached = next((line for line in self.metrics if target is not None and line["val_score"] >= target), None)
        seconds = [line["seconds"] for line in self.timing]
        return {
            "seed": self.seed,
            "run": self.path,
            **{key: self.result[key] for key in KEPT},
            "steps_to_target": reached["step"] if reached else None,
            "seconds_to_target": sum(seconds[: reached["epoch"]]) if reached else None,
            "curve": {key: [line[key] for line in self.metrics] for key in ("train_loss", "val_score")}
            | {"seconds": seconds},
        }


def find_target(runs: Iterable[Trained], given: float | None) -> dict[str, Any]:
    """Finds the score whose time is taken: the lowest of the runs' best scores, or the one given."""
    if given is not None:
        return {"score": given, "rule": "the score given with --target"}
    found = [run.result for run in runs]
    reached = [result["best_val_score"] for result in found if result["status"] == OK]
    rule = OWN_RULE if len(reached) == len(found) else f"{OWN_RULE}, runs that diverged left out"
    return {"score": min(reached, default=None), "rule": rule}


@dataclass(frozen=True)
class Judge:
    """How recipes are compared with the baseline."""

    against: str  # the baseline's name
    baseline: Sequence[Trained]  # its runs, one a seed
    level: float  # coverage of the intervals
    # (samples,) of the test split, see sizes, so that intervals cover the draw of its samples too
    sizes: np.ndarray | None = None
    sign: int = 1  # 1 where marks count for a recipe, -1 where against it

    def scores(self, runs: Sequence[Trained]) -> dict[str, Any]:
        """Mean and spread of the test scores, and the paired difference from the baseline."""
        ours, theirs = ([run.result["test_score"] for run in of] for of in (runs, self.baseline))
        tests = [score for score in ours if score is not None]
        found = differences(ours, theirs, self.level)
        paired = {"against": self.against, "n": len(found.differences), **asdict(found), "covers": ["seeds"]}
        spread = over_seeds(found.differences)
        if self.sizes is not None and spread is not None:
            pairs = zip(runs, self.baseline, ours, theirs, strict=True)
            gains = [self.sign * (one.marks - other.marks) for one, other, *scored in pairs if None not in scored]
            spread = over_seeds_and_samples(np.stack(gains), self.sizes)
            assert spread is not None
            low, high = spread.ends(self.level)
            paired |= {"low": low, "high": high, "covers": ["seeds", "test samples"]}
        return {
            "test_score": {
                "mean": fmean(tests) if tests else None,
                "std": stdev(tests) if len(tests) > 1 else None,
                "n": len(tests),
            },
            "paired": {**paired, "p": spread and spread.p},
        }


def summarize(
    runs: Sequence[Trained], judge: Judge, rate: float, sweep: Sequence[Tried], target: float | None
) -> dict[str, Any]:
    """Gathers what the runs say of one recipe: those at the chosen rate, and the sweep of all rates that were tried."""
    return {
        "sweep": sweep,
        "rate": rate,
        "rate_at_edge": at_edge(rate, sweep),
        "runs": [run.row(target) for run in runs],
        **judge.scores(runs),
        "condition": _condition([run.metrics for run in runs if run.result["status"] == OK]),
    }


def adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to the paired difference of each recipe its p-value among all that are compared, by Holm's procedure."""
    adjusted = holm({row["recipe"]: row["paired"]["p"] for row in rows[1:]})
    for row in rows:
        row["paired"]["holm"] = adjusted.get(row["recipe"])


def _condition(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    if not runs or not all(run and run[0]["condition"] for run in runs):
        return None
    names = list(runs[0][0]["condition"])
    epochs = range(len(runs[0]))

    def curve(layers: Sequence[str], side: int) -> list[float | None]:
        return [_geometric(run[epoch]["condition"][name][side] for run in runs for name in layers) for epoch in epochs]

    def both(layers: Sequence[str]) -> dict[str, Any]:
        return {"raw": curve(layers, 0), "effective": curve(layers, 1)}

    return {
        "first": {"name": names[0], **both(names[:1])},
        "last": {"name": names[-1], **both(names[-1:])},
        "mean": {"layers": len(names), **both(names)},
    }


def _geometric(values: Iterable[float | None]) -> float | None:
    logs = [math.log(value) for value in values if value]
    return math.exp(fmean(logs)) if logs else None


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
            marks = [record.read_numbers(place / MARKS_FILE)] if settings.resample else []
            run = Trained(job.seed, f"{folders.RUNS}/{job.path}", result, *read_run(place, result["epochs"]), *marks)
            runs.setdefault((job.recipe, job.epochs), []).append(run)
        full = [run for recipe in recipes for run in runs[recipe, 0]]
        target, base, data = find_target(full, settings.target), runs[recipes[0], 0], made.data
        resampled = {"sizes": task.sizes(data.test.targets).numpy(), "sign": -1 if data.score == "r2" else 1}
        judge = Judge(recipes[0], base, settings.level, **(resampled if settings.resample else {}))
        steps = next((run.result["steps"] / run.result["epochs"] for run in full if run.result["epochs"]), None)
        rows = []
        for recipe in recipes:
            tried = [
                {
                    "seed": seeds[0],
                    "run": f"{folders.RUNS}/{made.run(recipe, row['rate'], seeds[0], device).path}",
                    "rate": row["rate"],
                    "status": row["status"],
                    "val_score": row["score"],
                    "val_loss": row["loss"],
                }
                for row in tuned[recipe]["sweep"]
            ]
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
    from normkit.lab.report.experiment_tables import within

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
