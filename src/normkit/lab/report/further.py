"""What a comparison says beyond its scores and costs: further rates, equal time, full trainings, and what its seeds can show."""

import math
from statistics import fmean, stdev
from typing import Any

from normkit.lab.experiment import Table
from normkit.lab.report.table import difference, mean_score
from normkit.lab.report.wording import at, duration, finite, judge, listing, number, score_name, verdict
from normkit.lab.say import counted
from normkit.lab.stats import detectable, seeds_for


def tables(result: dict[str, Any]) -> list[Table]:
    """Scores at equal time, hours of a full training, and verdicts on all recipes together."""
    return [*_equal_time(result), *_full(result), *_together(result)]


def remarks(result: dict[str, Any]) -> list[str]:
    """How to read them, and what this many seeds can and can't show."""
    said, more = [], {recipe["recipe"]: recipe["extended"] for recipe in result["recipes"] if recipe.get("extended")}
    if more:
        tried = listing([f"{name} ({', '.join(f'{rate:g}' for rate in rates)})" for name, rates in more.items()])
        said.append(f"The sweep went on beyond the rates given, where the best lay at its edge: {tried}.")
    if any("test samples" in (at(recipe, "paired.covers") or ()) for recipe in result["recipes"]):
        said.append(
            "Intervals cover the draw of the test samples as well as that of the seeds: the standard error is from a bootstrap "
            "of both, judged by Student's t."
        )
    return [*said, *_power(result)]


def _power(result: dict[str, Any]) -> list[str]:
    """What the spread of the differences lets this many seeds show."""
    base, level = result["baseline"], finite(result.get("level")) or 0.95
    known = [at(recipe, "paired.differences") or [] for recipe in result["recipes"] if recipe["recipe"] != base]
    spreads = [stdev(each) for each in known if len(each) > 1]
    spread = math.sqrt(fmean(each**2 for each in spreads)) if spreads else 0.0
    if not spread:
        return []
    count = max(map(len, known))
    least = detectable(spread, count, level)
    said = (
        f"With {counted(count, 'seed')} and differences that spread as these do (standard deviation {number(spread, 'score')}), "
        f"a true difference of {number(least, 'score')} in {score_name(result)} is found in four of five comparisons, a smaller "
        "one less often: no difference shown is not equality."
    )
    if more := seeds_for(least / 2, spread, level):
        said += f" Half of it takes {more} seeds."
    return [said]


def _equal_time(result: dict[str, Any]) -> list[Table]:
    rows, base = [], result["baseline"]
    for recipe in result["recipes"]:
        if (found := recipe.get("equal_time")) is None:
            return []
        if not found["epochs"]:
            rows.append([recipe["recipe"], 0, None, None, f"no epoch fits {base}'s time"])
            continue
        judged = {**recipe, **found, "runs": recipe["runs"]}
        alike = {**result, "recipes": [{**each, "rate_at_edge": False} for each in result["recipes"]]}
        scores = [mean_score(judged, len(found["runs"])), difference(judged, base), verdict(judged, alike)]
        rows.append([recipe["recipe"], found["epochs"], *scores])
    columns = ["recipe", "epochs", f"test {score_name(result)}", f"minus {base}", "verdict"]
    note = (
        "Each recipe at its learning rate, in a training of its own, with its whole schedule, of as many epochs as take no "
        f"longer than {base}'s; times within 2% count as the same, and so do those whose ratio's interval holds 1."
    )
    return [Table(f"At {base}'s training time", columns, rows, [note])]


def _full(result: dict[str, Any]) -> list[Table]:
    hours = [(recipe["recipe"], finite(recipe.get("full_hours"))) for recipe in result["recipes"]]
    if not all(each for _, each in hours):
        return []
    base = hours[0][1] or 1.0
    rows = [[name, duration(3600 * (each or 0)), f"{100 * ((each or 0) / base - 1):+.0f}%"] for name, each in hours]
    title = f"A full training of {counted(result['full_epochs'], 'epoch')} on this machine, estimated"
    note = "Training steps alone, as timed side by side; validation and checkpoints come on top."
    return [Table(title, ["recipe", "time", f"over {result['baseline']}'s"], [[*rows[0][:2], None], *rows[1:]], [note])]


def _together(result: dict[str, Any]) -> list[Table]:
    """Verdicts by Holm's procedure, where several recipes are judged."""
    known = [recipe for recipe in result["recipes"] if at(recipe, "paired.holm") is not None]
    judged = [recipe for recipe in known if judge(recipe, result["baseline"]) != "part"]
    if len(judged) < 2:
        return []
    level = finite(result.get("level")) or 0.95
    rows = []
    for recipe in judged:
        single, chance = judge(recipe, result["baseline"]), recipe["paired"]["holm"]
        shown = single if single in ("better", "worse") and chance <= 1 - level else "no difference shown"
        rows.append([recipe["recipe"], f"{recipe['paired']['p']:.2g}", f"{chance:.2g}", shown])
    note = (
        f"Of {len(judged)} comparisons with {result['baseline']} one may look better by chance. At most "
        f"{100 * (1 - level):.2g}% of such tables hold a wrong verdict (Holm 1979)."
    )
    return [Table("All recipes judged together", ["recipe", "p", "p adjusted", "verdict"], rows, [note])]
