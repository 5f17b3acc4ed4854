"""Writes the folder of records of an invented but plausible comparison; the same arguments write the same bytes."""

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

RECIPES = ("bn", "bn+ws", "bn+wn", "bn+e")
RATES = (0.03, 0.1, 0.3)
LAYERS = ("stem.conv", "inception1.branch3.conv", "inception2.branch3.conv", "head.linear")
# What each recipe is given to start from: best score reachable, epochs to get near it, conditioning, ms and MB a step.
TRAITS = {
    "bn": (0.9790, 2.6, 1.0, 11.84, 9.13),
    "bn+ws": (0.9768, 3.1, 0.8, 12.91, 9.82),
    "bn+wn": (0.9783, 2.4, 0.9, 12.37, 9.55),
    "bn+e": (0.9868, 1.9, 0.25, 12.02, 9.31),
}
STUDENT_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def write_comparison(
    out: Path,
    *,
    recipes: tuple[str, ...] = RECIPES,
    seeds: int = 3,
    epochs: int = 20,
    diverged: tuple[tuple[str, int], ...] = (),
    title: str | None = None,
) -> dict[str, Any]:
    """Writes OUT/result.json and the run folders it names; `diverged` holds (recipe, seed) pairs that fail half-way."""
    runs: dict[tuple[str, float, int], dict[str, Any]] = {}
    for order, recipe in enumerate(recipes):
        for rate in RATES:
            for seed in range(seeds if rate == best_rate(order) else 1):
                failed = (recipe, seed) in diverged and rate == best_rate(order)
                runs[recipe, rate, seed] = write_run(out, recipe, rate, seed, order, epochs, failed)
    result = summarize(recipes, seeds, epochs, runs)
    result["title"] = title or f"{', '.join(recipes)} on digits"
    (out / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


def best_rate(order: int) -> float:
    """The last recipe learns best at the edge of the sweep, the others in its middle."""
    return RATES[-1] if order == 3 else RATES[1]


def run_folder(recipe: str, rate: float, seed: int) -> str:
    return f"runs/{recipe.replace('/', '_')}/rate={rate:g}/seed={seed}"


def write_run(out: Path, recipe: str, rate: float, seed: int, order: int, epochs: int, failed: bool) -> dict[str, Any]:
    ceiling, pace, shape, milliseconds, _ = TRAITS.get(recipe, TRAITS["bn"])
    noise = random.Random(f"{recipe} {rate} {seed}")
    shared = random.Random(f"seed {seed}")  # what a seed does to every recipe alike, so that pairing helps
    off = abs(math.log10(rate / best_rate(order)))
    ceiling = ceiling - 0.012 * off + shared.gauss(0, 0.004) + noise.gauss(0, 0.0012)
    pace = pace * (1 + 0.6 * off)
    folder = out / run_folder(recipe, rate, seed)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, timing = [], []
    last = epochs // 2 if failed else epochs
    for epoch in range(1, last + 1):
        done = epoch / epochs
        score = ceiling - 0.75 * math.exp(-epoch / pace) + noise.gauss(0, 0.004 * (1.1 - done))
        score = round(score * 360) / 360
        loss = 2.3 * math.exp(-epoch / pace) + 0.02 * (1 - done) ** 2 + 0.004
        loss *= math.exp(noise.gauss(0, 0.08))
        condition = {}
        for depth, layer in enumerate(LAYERS):
            raw = (6 + 9 * depth) * (1 + 1.5 * shape * done) * math.exp(0.03 * noise.gauss(0, 1))
            tamed = depth in (0, len(LAYERS) - 1) if recipe.endswith("+e") else False
            condition[layer] = [raw, raw**0.55 if tamed else raw]
        lost = failed and epoch == last
        metrics.append(
            {
                "epoch": epoch,
                "step": 17 * epoch,
                "rate": rate * 0.5 * (1 + math.cos(math.pi * done)),
                "train_loss": None if lost else loss,
                "val_loss": None if lost else loss * 1.3 + 0.05,
                "val_score": None if lost else score,
                "condition": condition,
            }
        )
        timing.append({"epoch": epoch, "seconds": round(17 * milliseconds / 1000 * noise.uniform(0.97, 1.06), 4)})
        if lost:
            metrics.pop()
            timing.pop()
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "timing.jsonl", timing)
    scores = [line["val_score"] for line in metrics]
    test = None if failed else round((scores[-1] - 0.004 + noise.gauss(0, 0.0015)) * 360) / 360
    result = {
        "status": "diverged" if failed else "ok",
        "best_val_score": max(scores),
        "val_score": None,
        "val_loss": None,
    }
    if not failed:
        result |= {"val_score": scores[-1], "val_loss": metrics[-1]["val_loss"]}
    result |= {"test_score": test, "test_loss": None if failed else metrics[-1]["val_loss"]}
    result |= {"epochs": len(metrics), "steps": 17 * len(metrics)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return {
        "status": "diverged" if failed else "ok",
        "folder": run_folder(recipe, rate, seed),
        "best": max(scores),
        "final": None if failed else scores[-1],
        "test": test,
        "metrics": metrics,
        "timing": timing,
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def summarize(
    recipes: tuple[str, ...], seeds: int, epochs: int, runs: dict[tuple[str, float, int], dict[str, Any]]
) -> dict[str, Any]:
    chosen = {recipe: best_rate(order) for order, recipe in enumerate(recipes)}
    kept = [runs[recipe, chosen[recipe], seed] for recipe in recipes for seed in range(seeds)]
    reached = [run["best"] for run in kept if run["status"] == "ok"]
    target = min(reached) if reached else None
    baseline = {seed: runs[recipes[0], chosen[recipes[0]], seed] for seed in range(seeds)}
    rows = []
    for recipe in recipes:
        rate = chosen[recipe]
        group = {seed: runs[recipe, rate, seed] for seed in range(seeds)}
        rows.append(
            {
                "recipe": recipe,
                "parameters": 20_746,
                "changes": changes_of(recipe),
                "sweep": [
                    {
                        "rate": tried,
                        "seed": 0,
                        "val_score": runs[recipe, tried, 0]["final"],
                        "status": runs[recipe, tried, 0]["status"],
                        "run": runs[recipe, tried, 0]["folder"],
                    }
                    for tried in RATES
                ],
                "rate": rate,
                "rate_at_edge": rate in (RATES[0], RATES[-1]),
                "runs": [run_summary(seed, run, target) for seed, run in group.items()],
                "test_score": moments([run["test"] for run in group.values()]),
                "paired": pair(recipes[0], group, baseline),
                "cost": cost_of(recipe, recipes[0]),
                "condition": conditions(list(group.values()), epochs),
            }
        )
    return {
        "schema": 1,
        "command": f"normkit compare --model digits_inception --data digits --recipes {','.join(recipes)} "
        f"--rates 0.03,0.1,0.3 --seeds {seeds} --epochs {epochs} --output out",
        "started": "2026-11-21T03:10:04+00:00",
        "finished": "2026-11-21T03:12:21+00:00",
        "seconds": 137.2,
        "config": {
            "model": "digits_inception",
            "data": "digits",
            "recipes": list(recipes),
            "rates": list(RATES),
            "seeds": list(range(seeds)),
            "epochs": epochs,
            "batch_size": 64,
            "optimizer": "sgd",
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "precision": "32-true",
            "device": "cpu",
            "level": 0.95,
            "target": None,
        },
        "environment": {
            "normkit": "0.1.0",
            "python": "3.13.1",
            "torch": "2.13.0+cpu",
            "lightning_fabric": "2.6.0",
            "numpy": "2.4.6",
            "platform": "Linux-6.8-x86_64",
            "processor": "x86_64",
            "cores": 2,
            "threads": 2,
            "device": "cpu",
            "precision": "32-true",
        },
        "task": {"kind": "classification", "score": "accuracy", "train": 1077, "val": 360, "test": 360},
        "baseline": recipes[0],
        "target": {"score": target, "rule": "the highest validation score that every recipe reached in every seed"},
        "recipes": rows,
    }


def changes_of(recipe: str) -> list[str]:
    after = {"ws": "WeightStandardization", "wn": "WeightNorm", "e": "WeightConditioning(row)"}
    word = recipe.partition("+")[2]
    return [f"{layer}: Conv2d -> Conv2d with {after[word]}" for layer in LAYERS] if word in after else []


def run_summary(seed: int, run: dict[str, Any], target: float | None) -> dict[str, Any]:
    hit = next((i for i, line in enumerate(run["metrics"]) if target and (line["val_score"] or 0) >= target), None)
    ok = run["status"] == "ok"
    return {
        "seed": seed,
        "run": run["folder"],
        "status": run["status"],
        "val_score": run["final"],
        "best_val_score": run["best"],
        "test_score": run["test"],
        "test_loss": run["metrics"][-1]["val_loss"] if ok else None,
        "steps_to_target": None if hit is None or not ok else run["metrics"][hit]["step"],
        "seconds_to_target": None if hit is None or not ok else sum(t["seconds"] for t in run["timing"][: hit + 1]),
    }


def moments(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def pair(name: str, group: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> dict[str, Any]:
    both = [(group[seed]["test"], baseline[seed]["test"]) for seed in group]
    differences = [a - b for a, b in both if a is not None and b is not None]
    mean = statistics.fmean(differences) if differences else None
    low = high = None
    if mean is not None and len(differences) > 1:
        half = STUDENT_975[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
        low, high = mean - half, mean + half
    return {
        "against": name,
        "mean": mean,
        "low": low,
        "high": high,
        "level": 0.95,
        "n": len(differences),
        "differences": differences,
    }


def cost_of(recipe: str, baseline: str) -> dict[str, Any]:
    *_, milliseconds, megabytes = TRAITS.get(recipe, TRAITS["bn"])
    return {
        "ms_per_step": milliseconds,
        "ms_quartiles": [milliseconds - 0.31, milliseconds + 0.44],
        "ratio": milliseconds / TRAITS.get(baseline, TRAITS["bn"])[-2],
        "mb_per_step": megabytes,
    }


def conditions(group: list[dict[str, Any]], epochs: int) -> dict[str, Any] | None:
    whole = [run for run in group if run["status"] == "ok"]

    def along(names: tuple[str, ...], which: int) -> list[float]:
        return [
            statistics.geometric_mean(
                [run["metrics"][epoch]["condition"][name][which] for run in whole for name in names]
            )
            for epoch in range(epochs)
        ]

    places = {"first": LAYERS[:1], "last": LAYERS[-1:], "mean": LAYERS}
    if not whole:
        return None
    return {
        place: {
            **({"name": names[0]} if len(names) == 1 else {"layers": len(names)}),
            "raw": along(names, 0),
            "effective": along(names, 1),
        }
        for place, names in places.items()
    }
