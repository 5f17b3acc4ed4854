"""The tables of a comparison: scores, costs, and what each recipe changed."""

from collections.abc import Callable, Sequence
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

Columns = dict[str, Callable[[dict[str, Any]], Cell]]  # what stands in each, of a recipe


def tables(result: dict[str, Any]) -> list[Table]:
    """Scores, costs, condition numbers and changes of each recipe."""
    recipes, base, target = result["recipes"], result["baseline"], number(at(result, "target.score"), "score")
    names, count = [recipe["recipe"] for recipe in recipes], max(len(recipe["runs"]) for recipe in recipes)
    passed = any(recipe.get("passed_over") for recipe in recipes)

    def table(title: str, notes: Sequence[str], columns: Columns) -> Table:
        rows = [[recipe["recipe"], *(column(recipe) for column in columns.values())] for recipe in recipes]
        return Table(title, ["recipe", *columns], rows, notes)

    scores: Columns = {
        "learning\nrate": lambda r: number(r.get("rate"), "rate") + ("†" if r.get("rate_at_edge") else ""),
        f"test\n{score_name(result)}": lambda r: mean_score(r, count),
        f"minus {base}\n{level(at(recipes[-1], 'paired'))} interval": lambda r: difference(r, base),
        "verdict": lambda r: verdict(r, result),
    }
    costs: Columns = {
        f"steps\nto {target}": lambda r: reached(r, "steps_to_target", "count"),
        f"time\nto {target}": lambda r: reached(r, "seconds_to_target", "seconds"),
        "ms\nper step": lambda r: number(ms_per_step(r, result)[0], "ms"),
        f"time per step\nover {base}'s": ratio,
        "MB\nper step": lambda r: number(at(r, "cost.mb_per_step"), "mb"),
    }
    conditions: Columns = {
        name: lambda r, place=place: number((at(r, f"condition.{place}.effective") or [None])[-1], "condition")
        for place, name in layer_names(result).items()
    }
    changes: Columns = {
        "parameters": lambda r: number(r.get("parameters"), "count"),
        "changed": lambda r: changed(r.get("changes") or []) or "nothing",
        **({"passed over": lambda r: "\n".join(_first(r.get("passed_over") or [])) or None} if passed else {}),
    }
    said = [f"{'; '.join(words(names))}."] if words(names) else []
    found = [
        table(f"Scores, mean ± standard deviation over {counted(count, 'seed')}", said, scores),
        table("Costs", cost_notes(result), costs),
    ]
    if any(at(recipe, "condition") for recipe in recipes):
        note = "Of the weight that the layer computes with: its largest singular value over its smallest."
        found.append(table("Condition numbers after the last epoch", [note], conditions))
    return [*found, table("What each recipe changed", (), changes)]


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
