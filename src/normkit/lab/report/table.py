"""The tables of a comparison: scores, costs, and what each recipe changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from normkit.lab.experiment import Cell, Table
from normkit.lab.report.wording import (
    ABSENT,
    at,
    changed,
    interval,
    kept,
    layer_names,
    level,
    ms_per_step,
    number,
    over_seeds,
    ratio,
    score_name,
    verdict,
    words,
)
from normkit.lab.say import counted


def tables(result: dict[str, Any]) -> list[Table]:
    """Scores, costs, condition numbers and changes of each recipe."""
    names = [recipe["recipe"] for recipe in result["recipes"]]

    def table(title: str, columns: Mapping[str, Sequence[Cell]], notes: Sequence[str] = ()) -> Table:
        return Table(title, ["recipe", *columns], list(zip(names, *columns.values(), strict=True)), notes)

    said = [f"{'; '.join(words(names))}."] if words(names) else []
    count = max(len(recipe["runs"]) for recipe in result["recipes"])
    found = [
        table(f"Scores, mean ± standard deviation over {counted(count, 'seed')}", score_columns(result), said),
        table("Costs", cost_columns(result), cost_notes(result)),
        table("What each recipe changed", change_columns(result)),
    ]
    if any(at(recipe, "condition") for recipe in result["recipes"]):
        note = "Of the weight that the layer computes with: its largest singular value over its smallest."
        found.insert(2, table("Condition numbers after the last epoch", condition_columns(result), [note]))
    return found


def score_columns(result: dict[str, Any]) -> dict[str, list[str]]:
    """Chosen rate, test score, paired difference and verdict."""
    recipes, baseline, name = result["recipes"], result["baseline"], score_name(result)
    count = max(len(recipe["runs"]) for recipe in recipes)
    return {
        "learning\nrate": [number(r.get("rate"), "rate") + ("†" if r.get("rate_at_edge") else "") for r in recipes],
        f"test\n{name}": [mean_score(r, count) for r in recipes],
        f"minus {baseline}\n{level(at(recipes[-1], 'paired'))} interval": [difference(r, baseline) for r in recipes],
        "verdict": [verdict(r, result) for r in recipes],
    }


def cost_columns(result: dict[str, Any]) -> dict[str, list[str]]:
    """What a step takes, how soon the target is reached, and how conditioned the weights end."""
    recipes = result["recipes"]
    target = number(at(result, "target.score"), "score")
    return {
        f"steps\nto {target}": [reached(r, "steps_to_target", "count") for r in recipes],
        f"time\nto {target}": [reached(r, "seconds_to_target", "seconds") for r in recipes],
        "ms\nper step": [number(ms_per_step(r, result)[0], "ms") for r in recipes],
        f"time per step\nover {result['baseline']}'s": [ratio(r) for r in recipes],
        "MB\nper step": [number(at(r, "cost.mb_per_step"), "mb") for r in recipes],
    }


def condition_columns(result: dict[str, Any]) -> dict[str, list[str]]:
    """How conditioned the weights end."""
    return {
        name: [number((at(r, f"condition.{place}.effective") or [None])[-1], "condition") for r in result["recipes"]]
        for place, name in layer_names(result).items()
    }


def cost_notes(result: dict[str, Any]) -> list[str]:
    """How to read the costs."""
    notes = []
    if at(result, "target.score") is not None:
        reach = f"{number(result['target']['score'], 'score')} is {result['target'].get('rule', 'the target')}"
        notes.append(f"Target: {reach}; steps and time to it are medians over seeds.")
    if at(result["recipes"][0], "cost") is not None:
        notes.append(
            f"Time per step over {result['baseline']}'s: median over rounds in which all recipes take a step in turn, with its "
            f"95% interval. ms per step is {result['baseline']}'s median times it: medians of each recipe's own steps, which "
            "result.json also holds, shift with how busy the machine was."
        )
    return notes


def change_columns(result: dict[str, Any]) -> dict[str, list[Cell]]:
    """Parameters, and which layers a recipe changed and which it passed over."""
    recipes = result["recipes"]
    columns: dict[str, list[Cell]] = {
        "parameters": [number(recipe.get("parameters"), "count") for recipe in recipes],
        "changed": [changed(recipe.get("changes") or []) or "nothing" for recipe in recipes],
    }
    if any(recipe.get("passed_over") for recipe in recipes):
        columns["passed over"] = ["\n".join(_first(recipe.get("passed_over") or [])) or None for recipe in recipes]
    return columns


def _first(lines: list[str], most: int = 3) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more"]


def mean_score(recipe: dict[str, Any], count: int) -> str:
    """Mean and spread, with the number of seeds where some were lost."""
    text = number(at(recipe, "test_score.mean"), "score")
    if at(recipe, "test_score.std") is not None:
        text += f"\n± {number(at(recipe, 'test_score.std'), 'score')}"
    if 0 < kept(recipe) < count:
        text += f" ({kept(recipe)}/{count})"
    return text


def difference(recipe: dict[str, Any], baseline: str) -> str:
    """The paired difference above its interval."""
    if recipe["recipe"] == baseline or at(recipe, "paired.mean") is None:
        return ABSENT
    text = number(recipe["paired"]["mean"], "difference")
    if at(recipe, "paired.low") is not None:
        text += f"\n{interval(recipe['paired'])}"
    return text


def reached(recipe: dict[str, Any], key: str, kind: str) -> str:
    """The median over seeds, and how many reached the target where not all did."""
    middle, count = over_seeds(recipe, key)
    short = "" if count in (0, len(recipe["runs"])) else f" ({count}/{len(recipe['runs'])})"
    return number(middle, kind) + short
