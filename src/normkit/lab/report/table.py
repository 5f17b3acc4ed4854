"""The tables of a comparison."""

from collections.abc import Sequence
from typing import Any

from normkit.lab.experiment import Table
from normkit.lab.report.comparison import at
from normkit.lab.report.wording import (
    ABSENT,
    interval,
    kept,
    level,
    number,
    over_seeds,
    score_name,
    verdict,
)


def tables_of(result: dict[str, Any]) -> list[Table]:
    """Scores and costs of each recipe."""
    notes = []
    if at(result, "target.score") is not None:
        reach = f"{number(result['target']['score'], 'score')} is {result['target'].get('rule', 'the target')}"
        notes.append(f"Target: {reach}; steps and time to it are medians over seeds.")
    names = [recipe["recipe"] for recipe in result["recipes"]]

    def table(title: str, columns: dict[str, list[str]], notes: Sequence[str] = ()) -> Table:
        return Table(title, ["recipe", *columns], list(zip(names, *columns.values(), strict=True)), notes)

    return [table("Scores", score_columns(result)), table("Costs", cost_columns(result), notes)]


def score_columns(result: dict[str, Any]) -> dict[str, list[str]]:
    """Chosen rate, test score, paired difference and verdict."""
    recipes, baseline, name = result["recipes"], result["baseline"], score_name(result)
    count = max(len(recipe["runs"]) for recipe in recipes)
    return {
        "rate": [number(r.get("rate"), "rate") + ("†" if r.get("rate_at_edge") else "") for r in recipes],
        f"test {name}\nmean ± std, n = {count}": [mean_score(r, count) for r in recipes],
        f"minus {baseline}\n{level(at(recipes[-1], 'paired'))} interval": [difference(r, baseline) for r in recipes],
        "verdict": [verdict(r, baseline) for r in recipes],
    }


def cost_columns(result: dict[str, Any]) -> dict[str, list[str]]:
    """What a step takes, how soon the target is reached, and how conditioned the weights end."""
    recipes = result["recipes"]
    target = number(at(result, "target.score"), "score")
    return {
        f"steps\nto {target}": [reached(r, "steps_to_target", "count") for r in recipes],
        f"time\nto {target}": [reached(r, "seconds_to_target", "seconds") for r in recipes],
        "ms\nper step": [number(at(r, "cost.ms_per_step"), "ms") for r in recipes],
        "ratio": [number(at(r, "cost.ratio"), "ratio") for r in recipes],
        "MB\nper step": [number(at(r, "cost.mb_per_step"), "mb") for r in recipes],
        "condition, end\nfirst / last": [condition(r) for r in recipes],
    }


def mean_score(recipe: dict[str, Any], count: int) -> str:
    """Mean and spread, with the number of seeds where some were lost."""
    text = number(at(recipe, "test_score.mean"), "score")
    if at(recipe, "test_score.std") is not None:
        text += f" ± {number(at(recipe, 'test_score.std'), 'score')}"
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


def condition(recipe: dict[str, Any]) -> str:
    """The effective condition numbers of the first and the last layer after the last epoch."""
    ends = [(at(recipe, f"condition.{place}.effective") or [None])[-1] for place in ("first", "last")]
    return " / ".join(number(end, "condition") for end in ends)
