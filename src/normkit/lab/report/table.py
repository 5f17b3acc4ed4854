"""The result of a comparison as a table in the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normkit.lab.report.comparison import at
from normkit.lab.report.wording import (
    ABSENT,
    MINUS,
    TIMES,
    cautions,
    findings,
    interval,
    judge,
    kept,
    level,
    number,
    over_seeds,
    score_name,
    verdict,
)

WIDE = 150
ASCII = str.maketrans({MINUS: "-", ABSENT: "-", TIMES: "x", "±": "+-", "†": "*", "²": "2"})
COLOURS = {"better": "green", "worse": "red", "failed": "red"}


def print_table(result: dict[str, Any], console: Console) -> None:
    """Prints the scores and the costs of each recipe, and what was found.

    On a terminal of 150 columns or more it is one table, on a narrower one two, one below the other.

    Args:
        result: the content of result.json.
        console: where to print.
    """
    scores, costs = score_columns(result), cost_columns(result)
    names = [("recipe", [Text(r["recipe"], style="bold", overflow="fold") for r in result["recipes"]])]
    groups = [names + scores + costs] if console.width >= WIDE else [names + scores, names + costs]
    lines = [Text(" ".join(findings(result))), *(Text(note, style="dim") for note in cautions(result))]
    if at(result, "target.score") is not None:
        reach = f"{number(result['target']['score'], 'score')} is {result['target'].get('rule', 'the target')}"
        lines.append(Text(f"Target: {reach}; steps and time to it are medians over seeds.", style="dim"))
    console.print()
    console.print(spelled(Text(str(result.get("title", "")), style="bold"), console))
    for columns in groups:
        console.print()
        console.print(grid([(title, [spelled(cell, console) for cell in cells]) for title, cells in columns], console))
    console.print()
    for line in lines:
        console.print(spelled(line, console))


def spelled(text: Text, console: Console) -> Text:
    """The text in the letters that the terminal can write; some pipes and Windows consoles have no UTF-8."""
    if not console.options.ascii_only:
        return text
    return Text(text.plain.translate(ASCII), style=text.style, overflow=text.overflow)


def grid(columns: list[tuple[str, list[Text]]], console: Console) -> Table:
    """A table from its columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name, _ in columns:
        words = name.startswith(("recipe", "verdict"))
        title = spelled(Text(name, style="bold"), console)
        table.add_column(title, justify="left" if words else "right", overflow="fold", vertical="top")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def score_columns(result: dict[str, Any]) -> list[tuple[str, list[Text]]]:
    """Chosen rate, test score, paired difference and verdict."""
    recipes, baseline, name = result["recipes"], result["baseline"], score_name(result)
    count = max(len(recipe["runs"]) for recipe in recipes)
    return [
        ("rate", [Text(number(r.get("rate"), "rate") + ("†" if r.get("rate_at_edge") else "")) for r in recipes]),
        (f"test {name}\nmean ± std, n = {count}", [mean_score(r, count) for r in recipes]),
        (f"minus {baseline}\n{level(at(recipes[-1], 'paired'))} interval", [difference(r, baseline) for r in recipes]),
        ("verdict", [Text(verdict(r, baseline), style=COLOURS.get(judge(r, baseline), "")) for r in recipes]),
    ]


def cost_columns(result: dict[str, Any]) -> list[tuple[str, list[Text]]]:
    """What a step takes, how soon the target is reached, and how conditioned the weights end."""
    recipes = result["recipes"]
    target = number(at(result, "target.score"), "score")
    return [
        (f"steps\nto {target}", [Text(reached(r, "steps_to_target", "count")) for r in recipes]),
        (f"time\nto {target}", [Text(reached(r, "seconds_to_target", "seconds")) for r in recipes]),
        ("ms\nper step", [Text(number(at(r, "cost.ms_per_step"), "ms")) for r in recipes]),
        ("ratio", [Text(number(at(r, "cost.ratio"), "ratio")) for r in recipes]),
        ("MB\nper step", [Text(number(at(r, "cost.mb_per_step"), "mb")) for r in recipes]),
        ("condition, end\nfirst / last", [Text(condition(r)) for r in recipes]),
    ]


def mean_score(recipe: dict[str, Any], count: int) -> Text:
    """Mean and spread, with the number of seeds where some were lost."""
    text = number(at(recipe, "test_score.mean"), "score")
    if at(recipe, "test_score.std") is not None:
        text += f" ± {number(at(recipe, 'test_score.std'), 'score')}"
    if 0 < kept(recipe) < count:
        text += f" ({kept(recipe)}/{count})"
    return Text(text)


def difference(recipe: dict[str, Any], baseline: str) -> Text:
    """The paired difference above its interval."""
    if recipe["recipe"] == baseline or at(recipe, "paired.mean") is None:
        return Text(ABSENT)
    text = number(recipe["paired"]["mean"], "difference")
    if at(recipe, "paired.low") is not None:
        text += f"\n{interval(recipe['paired'])}"
    return Text(text)


def reached(recipe: dict[str, Any], key: str, kind: str) -> str:
    """The median over seeds, and how many reached the target where not all did."""
    middle, count = over_seeds(recipe, key)
    short = "" if count in (0, len(recipe["runs"])) else f" ({count}/{len(recipe['runs'])})"
    return number(middle, kind) + short


def condition(recipe: dict[str, Any]) -> str:
    """The effective condition numbers of the first and the last layer after the last epoch."""
    ends = [(at(recipe, f"condition.{place}.effective") or [None])[-1] for place in ("first", "last")]
    return " / ".join(number(end, "condition") for end in ends)
