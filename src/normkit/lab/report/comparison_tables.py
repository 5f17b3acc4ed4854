"""The tables of a comparison, the remarks on them, and the context of its page."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from normkit.lab.experiment import Cell, Table
from normkit.lab.report import wording
from normkit.lab.report.wording import at, duration, finite, judge, listing, number, score_name, verdict
from normkit.lab.say import counted
from normkit.lab.stats import detectable, seeds_for

Columns = dict[str, Callable[[dict[str, Any]], Cell]]  # what stands in each, of a recipe


def main_tables(result: dict[str, Any]) -> list[Table]:
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
        f"minus {base}\n{wording.level(at(recipes[-1], 'paired'))} interval": lambda r: difference(r, base),
        "verdict": lambda r: verdict(r, result),
    }
    costs: Columns = {
        f"steps\nto {target}": lambda r: reached(r, "steps_to_target", "count"),
        f"time\nto {target}": lambda r: reached(r, "seconds_to_target", "seconds"),
        "ms\nper step": lambda r: number(wording.ms_per_step(r, result)[0], "ms"),
        f"time per step\nover {base}'s": wording.ratio,
        "MB\nper step": lambda r: number(at(r, "cost.mb_per_step"), "mb"),
    }
    conditions: Columns = {
        name: lambda r, place=place: number((at(r, f"condition.{place}.effective") or [None])[-1], "condition")
        for place, name in wording.layer_names(result).items()
    }
    changes: Columns = {
        "parameters": lambda r: number(r.get("parameters"), "count"),
        "changed": lambda r: wording.changed(r.get("changes") or []) or "nothing",
        **({"passed over": lambda r: _few(r.get("passed_over") or [])} if passed else {}),
    }
    said = [f"{'; '.join(wording.words(names))}."] if wording.words(names) else []
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


def _few(lines: list[str]) -> str | None:
    return "\n".join(lines if len(lines) < 4 else [*lines[:2], f"and {len(lines) - 2} more"]) or None


def mean_score(recipe: dict[str, Any], count: int) -> str:
    """Mean and spread, with the number of seeds where some were lost."""
    text = number(at(recipe, "test_score.mean"), "score")
    if at(recipe, "test_score.std") is not None:
        text += f"\n± {number(at(recipe, 'test_score.std'), 'score')}"
    if 0 < wording.kept(recipe) < count:
        text += f" ({wording.kept(recipe)}/{count})"
    return text


def difference(recipe: dict[str, Any], baseline: str) -> str:
    """The paired difference above its interval."""
    if recipe["recipe"] == baseline or at(recipe, "paired.mean") is None:
        return wording.ABSENT
    text = number(recipe["paired"]["mean"], "difference")
    if at(recipe, "paired.low") is not None:
        text += f"\n{wording.interval(recipe['paired'])}"
    return text


def reached(recipe: dict[str, Any], key: str, kind: str) -> str:
    """The median over seeds, and how many reached the target where not all did."""
    middle, count = wording.over_seeds(recipe, key)
    short = "" if count in (0, len(recipe["runs"])) else f" ({count}/{len(recipe['runs'])})"
    return number(middle, kind) + short


def further_tables(result: dict[str, Any]) -> list[Table]:
    """Scores at equal time, hours of a full training, and verdicts on all recipes together."""
    return [*_equal_time(result), *_full(result), *_together(result)]


def reading_notes(result: dict[str, Any]) -> list[str]:
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
        told = single if single in ("better", "worse") and chance <= 1 - level else "no difference shown"
        rows.append([recipe["recipe"], f"{recipe['paired']['p']:.2g}", f"{chance:.2g}", told])
    note = (
        f"Of {len(judged)} comparisons with {result['baseline']} one may look better by chance. At most "
        f"{100 * (1 - level):.2g}% of such tables hold a wrong verdict (Holm 1979)."
    )
    return [Table("All recipes judged together", ["recipe", "p", "p adjusted", "verdict"], rows, [note])]


def all_tables(result: dict[str, Any]) -> list[Table]:
    """All tables of a comparison."""
    return [*main_tables(result), *further_tables(result)]


def all_remarks(result: dict[str, Any]) -> list[str]:
    """What was found, and what a reader must know before trusting it."""
    told = *wording.findings(result), *wording.cautions(result)
    return [*told, *reading_notes(result), *result["task"].get("notes", ())]


def page_context(result: dict[str, Any]) -> dict[str, Any]:
    """What ``comparison.html`` is given, next to the result."""
    from normkit.lab.report import figures
    from normkit.lab.report.drawing import styles

    names = [recipe["recipe"] for recipe in result["recipes"]]
    seeds = sorted({str(entry["seed"]) for recipe in result["recipes"] for entry in recipe["sweep"]}, key=len)
    scores, costs, *conditioned, changes = main_tables(result)
    further, notes = further_tables(result), reading_notes(result)
    return {
        "looks": dict(zip(names, styles(names, result["baseline"]), strict=True)),
        "pictures": {picture.name or "time": picture for picture in figures.pictures(result)},
        "tables": {"scores": scores, "costs": costs, "conditioned": conditioned, "changes": changes},
        "lists": {"sweeps": rates_table(result), "runs": runs_table(result), "further": further, "more": notes},
        "swept": f"{'seed' if len(seeds) == 1 else 'seeds'} {listing(seeds) if seeds else 'none'}",
        "wording": wording,
    }


def rates_table(result: dict[str, Any]) -> Table:
    """The learning rates that were tried."""
    columns = ["recipe", "learning rate", "seed", f"validation {score_name(result)}", "status", "records"]
    rows = [
        [
            recipe["recipe"],
            number(entry["rate"], "rate"),
            number(entry["seed"], "count"),
            number(entry.get("val_score"), "score"),
            entry["status"] + (", kept" if entry["rate"] == recipe.get("rate") else ""),
            entry["run"],
        ]
        for recipe in result["recipes"]
        for entry in recipe["sweep"]
    ]
    return Table("Learning rates tried", columns, rows, [f"Validation {score_name(result)} after the last epoch."])


def runs_table(result: dict[str, Any]) -> Table:
    """Every run at the rate that was kept."""
    score = score_name(result)
    kinds = {
        "seed": ("seed", "count"),
        f"validation {score}": ("val_score", "score"),
        f"test {score}": ("test_score", "score"),
        "test loss": ("test_loss", "score"),
        "steps to target": ("steps_to_target", "count"),
        "time to target": ("seconds_to_target", "seconds"),
    }
    rows = [
        [recipe["recipe"], *(number(run.get(key), kind) for key, kind in kinds.values()), run["status"], run["run"]]
        for recipe in result["recipes"]
        for run in recipe["runs"]
    ]
    note = (
        "Each seed at the learning rate kept. The folder holds its settings, its metrics epoch by epoch and its result."
    )
    return Table("Runs", ["recipe", *kinds, "status", "records"], rows, [note])
