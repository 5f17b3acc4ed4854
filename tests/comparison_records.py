"""The records of an invented but plausible comparison; the same arguments write the same bytes."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from normkit.lab import record
from normkit.lab.comparison import EXPERIMENT
from normkit.lab.rounds import Judge, Trained, adjust, find_target, summarize
from normkit.lab.settings import Settings
from normkit.lab.sweep import plain

RECIPES = ("bn", "bn+ws", "bn+wn", "bn+e")
RATES = (0.03, 0.1, 0.3)
LAYERS = ("stem.conv", "inception1.branch3.conv", "inception2.branch3.conv", "head.linear")
# What each recipe is given to start from: best score reachable, epochs to get near it, conditioning, ms and MB per step.
TRAITS = {
    "bn": (0.9790, 2.6, 1.0, 11.84, 9.13),
    "bn+ws": (0.9768, 3.1, 0.8, 12.91, 9.82),
    "bn+wn": (0.9783, 2.4, 0.9, 12.37, 9.55),
    "bn+e": (0.9868, 1.9, 0.25, 12.02, 9.31),
}


def write_comparison(
    out: Path,
    *,
    recipes: tuple[str, ...] = RECIPES,
    seeds: int = 3,
    epochs: int = 20,
    diverged: tuple[tuple[str, int], ...] = (),
) -> dict[str, Any]:
    """Writes the run folders of OUT and gives the result; `diverged` holds (recipe, seed) pairs that fail half-way."""
    runs: dict[str, list[Trained]] = {}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for order, recipe in enumerate(recipes):
        for rate in RATES:
            best = rate == best_rate(order)
            tried = [
                write_run(out, recipe, rate, seed, order, epochs, best and (recipe, seed) in diverged)
                for seed in range(seeds if best else 1)
            ]
            shown = {key: tried[0].result[key] for key in ("status", "val_score")}
            sweeps.setdefault(recipe, []).append({"rate": rate, "seed": 0, "run": tried[0].path, **shown})
            if best:
                runs[recipe] = tried
    target = find_target((run for of in runs.values() for run in of), None)
    rows = []
    for order, recipe in enumerate(recipes):
        how = (Judge(recipes[0], runs[recipes[0]], 0.95), best_rate(order), sweeps[recipe], target["score"])
        known = {"parameters": 20_746, "changes": changes_of(recipe), "cost": cost_of(recipe, recipes[0])}
        rows.append({"recipe": recipe, **known, **summarize(runs[recipe], *how)})
    adjust(rows)
    task = {"kind": "classification", "score": "accuracy", "train": 1077, "val": 360, "test": 360}
    return plain({"task": task, "baseline": recipes[0], "target": target, "recipes": rows})


def record_of(result: dict[str, Any], title: str | None = None) -> dict[str, Any]:
    """What ``result.json`` of a comparison holds."""
    recipes = [recipe["recipe"] for recipe in result["recipes"]]
    about = {key: getattr(EXPERIMENT, key) for key in ("name", "kind", "claim", "paper")}
    seeds = [run["seed"] for run in result["recipes"][0]["runs"]]
    of = Settings(rates=RATES, seeds=tuple(seeds), epochs=20)
    return {
        "schema": 1,
        "experiment": {**about, "title": title or f"{', '.join(recipes)} on digits"},
        "command": f"normkit compare --data digits --rates 0.03,0.1,0.3 --seeds {len(seeds)} --output out",
        "started": "2026-11-21T03:10:04+00:00",
        "finished": "2026-11-21T03:12:21+00:00",
        "seconds": 137.2,
        "config": {"experiment": "compare", **of.record("cpu"), "threads": 2},
        "environment": {"torch": "2.13.0+cpu", "processor": "x86_64", "cores": 2, "devices": ["x86_64"]},
        "result": result,
    }


def best_rate(order: int) -> float:
    """The last recipe learns best at the edge of the sweep, the others in its middle."""
    return RATES[-1] if order == 3 else RATES[1]


def run_folder(recipe: str, rate: float, seed: int) -> str:
    return f"runs/{recipe.replace('/', '_')}/rate={rate:g}/seed={seed}"


def write_run(out: Path, recipe: str, rate: float, seed: int, order: int, epochs: int, failed: bool) -> Trained:
    ceiling, pace, shape, milliseconds, _ = TRAITS.get(recipe, TRAITS["bn"])
    noise = random.Random(f"{recipe} {rate} {seed}")
    shared = random.Random(f"seed {seed}")  # what a seed does to every recipe alike, so that pairing helps
    off = abs(math.log10(rate / best_rate(order)))
    ceiling = ceiling - 0.012 * off + shared.gauss(0, 0.004) + noise.gauss(0, 0.0012)
    pace = pace * (1 + 0.6 * off)
    folder = out / run_folder(recipe, rate, seed)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, timing = [], []
    for epoch in range(1, epochs // 2 if failed else epochs + 1):
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
        metrics.append(
            {
                "epoch": epoch, "step": 17 * epoch, "rate": rate * 0.5 * (1 + math.cos(math.pi * done)),
                "train_loss": loss, "val_loss": loss * 1.3 + 0.05, "val_score": score, "condition": condition,
            }
        )  # fmt: skip
        timing.append({"epoch": epoch, "seconds": round(17 * milliseconds / 1000 * noise.uniform(0.97, 1.06), 4)})
    record.write_lines(folder / "metrics.jsonl", metrics)
    scores = [line["val_score"] for line in metrics]
    test = None if failed else round((scores[-1] - 0.004 + noise.gauss(0, 0.0015)) * 360) / 360
    result = {
        "status": "diverged" if failed else "ok",
        "best_val_score": max(scores),
        "val_score": None if failed else scores[-1],
        "val_loss": None if failed else metrics[-1]["val_loss"],
        "test_score": test,
        "test_loss": None if failed else metrics[-1]["val_loss"],
    }
    return Trained(seed, run_folder(recipe, rate, seed), result, metrics, timing)


def changes_of(recipe: str) -> list[str]:
    after = {"ws": "WeightStandardization", "wn": "WeightNorm", "e": "WeightConditioning(row)"}
    word = recipe.partition("+")[2]
    return [f"{layer}: Conv2d -> Conv2d with {after[word]}" for layer in LAYERS] if word in after else []


def cost_of(recipe: str, baseline: str) -> dict[str, Any]:
    *_, milliseconds, megabytes = TRAITS.get(recipe, TRAITS["bn"])
    return {
        "ms_per_step": milliseconds,
        "ms_quartiles": [milliseconds - 0.31, milliseconds + 0.44],
        "ratio": milliseconds / TRAITS.get(baseline, TRAITS["bn"])[-2],
        "mb_per_step": megabytes,
    }


def charts(page: str) -> dict[str, Any]:
    """The data of the page's charts."""
    return json.loads(page.partition('id="charts">')[2].partition("</script>")[0])


class Page(HTMLParser):
    """What a page fetches and links, the numbers that it marks, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetches: list[str] = []
        self.numbers: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open: dict[str, str | None] | None = None
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name == "href" and tag == "a"]
        self.fetches += [value or "" for name, value in attrs if name in ("src", "srcset", "poster", "data")]
        self.fetches += [found.get("href") or ""] if tag in ("link", "base", "image", "use") else []
        self._open = found if tag == "data" else None
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.numbers.append((self._open["value"] or "", self._open["title"] or "", data))
            self._open = None
        (self.scripts if self._inside in ("script", "style") else self.words).append(data)
