"""The figures of a comparison as data: drawn in files by ``figures.py`` and on the page by ``page.js``."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log
from statistics import median
from typing import Any

from normkit.lab.report.wording import RESOLVED, at, finite, layer_names, ms_per_step, number, score_name

Range = tuple[float, float]
ENLARGED = 6  # epochs from which the end is worth a second look
LAST = 0.75  # of training, from which on lines say how high the enlarged view reaches
FAR = 10.0  # times the median distance from the median, beyond which a line does not stretch the enlarged view
ROOM = 0.06  # of a panel's height, above and below what is enlarged


@dataclass(frozen=True)
class Line:
    """A line."""

    recipe: int  # its place among the recipes, which gives colour, marker and dash
    x: Sequence[float]
    y: Sequence[float | None]  # None leaves a gap
    low: Sequence[float] = ()  # of the band over seeds
    high: Sequence[float] = ()  # likewise
    # "mean", "lost" of a seed that diverged, or "raw" of a weight before its parametrization
    kind: str = "mean"
    seed: int | None = None  # of what diverged
    epochs: Sequence[int] = ()  # of the points, where x is not the epoch
    chosen: float | None = None  # the x whose mark is filled, where the others are hollow


@dataclass(frozen=True)
class Row:
    """A value with its interval."""

    recipe: int  # its place among the recipes
    value: float | None  # None where there is none
    low: float | None = None
    high: float | None = None
    each: Sequence[float] = ()  # the values of single seeds
    text: str = ""  # the value as it is said


@dataclass(frozen=True)
class Panel:
    """Lines against one another, or rows below one another."""

    place: str  # its id on the page
    x: str  # label of the axis
    y: str = ""
    lines: Sequence[Line] = ()
    rows: Sequence[Row] = ()
    bars: bool = False  # see `rows`
    title: str = ""  # above it, where there are several
    log: bool = False  # of the y axis
    limit: float | None = None  # values beyond it are cut off
    target: float | None = None  # a value to be reached, a dotted line
    note: str = ""  # in the corner
    # the x range and the y range of the end of training, where lines lie close; the page opens with it
    close: tuple[Range, Range] | None = None
    ticks: Sequence[float] = ()  # of the x axis, which is logarithmic then


@dataclass(frozen=True)
class Picture:
    """Panels that belong together."""

    name: str  # of its files; empty for what is on the page alone
    panels: tuple[Panel, ...]


def pictures(result: dict[str, Any]) -> list[Picture]:
    """Every figure of a comparison."""
    score, goal = f"validation {score_name(result)}", finite(at(result, "target.score"))
    curves, losses = [along(result, field) for field in ("val_score", "train_loss")]
    times, half = against_time(result, curves), "whole training"
    by_time: dict[str, Any] = {"target": goal, "close": close(times, goal), "title": half}
    costs = {"milliseconds": ("ms per step", "ms"), "megabytes": ("MB per step", "mb")}
    return [
        Picture(
            "validation_score",
            (Panel("validation", "epoch", score, curves, target=goal, close=close(curves, goal), title=half),),
        ),
        Picture("", (Panel("time", "training time, s", score, times, **by_time),)),
        Picture(
            "training_loss",
            (
                Panel(
                    "loss", "epoch", "training loss", losses, log=True, close=close(losses, log_scale=True), title=half
                ),
            ),
        ),
        Picture("paired_differences", (differences(result),)),
        Picture("learning_rates", (rates(result),)),
        Picture("condition_numbers", tuple(condition(result, *place) for place in layer_names(result).items())),
        Picture("cost", tuple(cost(result, *said) for said in ((key, *said) for key, said in costs.items()))),
    ]


def along(result: dict[str, Any], field: str) -> list[Line]:
    """A logged value ("val_score" or "train_loss") by epoch: mean and range over the seeds, and apart what diverged.

    An epoch counts only where every complete run has the value, so that the mean never jumps because a run left it.
    """
    lines = []
    for place, recipe in enumerate(result["recipes"]):
        curves = [(run, [finite(value) for value in run["curve"][field]]) for run in recipe["runs"]]
        whole = [values for run, values in curves if run["status"] == "ok"]
        known = [(epoch, [*values]) for epoch, values in enumerate(zip(*whole, strict=False), 1) if None not in values]
        if known:
            means = [sum(values) / len(values) for _, values in known]
            ends = [min(values) for _, values in known], [max(values) for _, values in known]
            lines.append(Line(place, [epoch for epoch, _ in known], means, *ends))
        for run, values in curves:
            if run["status"] != "ok":
                there = {epoch: value for epoch, value in enumerate(values, 1) if value is not None}
                lines.append(Line(place, [*there], [*there.values()], kind="lost", seed=run["seed"]))
    return lines


def against_time(result: dict[str, Any], curves: Sequence[Line]) -> list[Line]:
    """The mean validation score against the mean time spent in training up to that epoch."""
    lines = []
    for line in (line for line in curves if line.kind == "mean"):
        runs = result["recipes"][line.recipe]["runs"]
        whole = [run["curve"]["seconds"] for run in runs if run["status"] == "ok"]
        count = min([*map(len, whole), len(line.x)])
        passed = [sum(sum(seconds[: last + 1]) for seconds in whole) / len(whole) for last in range(count)]
        lines.append(Line(line.recipe, passed, line.y[:count], epochs=[int(x) for x in line.x[:count]]))
    return lines


def close(lines: Sequence[Line], goal: float | None = None, log_scale: bool = False) -> tuple[Range, Range] | None:
    """The second half of training, as high as its last quarter, where curves lie close; None where training is short.

    Of four recipes or more, one that lies far from the others does not stretch the view. Of four recipes or more, one
    that lies far from the others does not stretch the view; a `goal` stays in it if lines come near.
    """
    means = [line for line in lines if line.kind == "mean" and len(line.x) >= ENLARGED]
    if not means:
        return None
    ends = [line.x[-1] for line in means]
    late: list[list[float]] = []
    for line in means:
        band = zip(line.x, line.low or line.y, line.high or line.y, strict=True)
        kept = [float(y) for x, *both in band if x >= LAST * min(ends) for y in both if y is not None]
        late.append([log(end) for end in kept if end > 0] if log_scale else kept)
    middles = [median(values) for values in late if values]
    if not middles:
        return None
    middle = median(middles)
    reach = FAR * median(abs(value - middle) for value in middles) if len(middles) > 3 else inf
    shown = [value for values in late if values and abs(median(values) - middle) <= reach for value in values]
    low, high = min(shown), max(shown)
    if goal is not None and abs(goal - (low + high) / 2) < high - low:
        low, high = min(low, goal), max(high, goal)
    room = ROOM * (high - low) or 0.01
    low, high = low - room, high + room
    return (0.49 * min(ends), 1.01 * max(ends)), (exp(low), exp(high)) if log_scale else (low, high)


def differences(result: dict[str, Any]) -> Panel:
    """Paired differences from the baseline: mean, interval and each seed."""
    rows = []
    for place, recipe in enumerate(result["recipes"]):
        if recipe["recipe"] != result["baseline"]:
            mean, low, high = (finite(at(recipe, f"paired.{key}")) for key in ("mean", "low", "high"))
            each = [value for value in map(finite, at(recipe, "paired.differences") or []) if value is not None]
            rows.append(Row(place, mean, low, high, each))
    return Panel("differences", f"test {score_name(result)} minus {result['baseline']}'s, same seed", rows=rows)


def rates(result: dict[str, Any]) -> Panel:
    """The validation score after the last epoch at each rate tried; None where no run came through."""
    lines, tried = [], set()
    for place, recipe in enumerate(result["recipes"]):
        scores: dict[float, list[float]] = {}
        for entry in recipe["sweep"]:
            known = scores.setdefault(float(entry["rate"]), [])
            if entry["status"] == "ok" and (score := finite(entry.get("val_score"))) is not None:
                known.append(score)
        means = [sum(known) / len(known) if known else None for _, known in sorted(scores.items())]
        lines.append(Line(place, sorted(scores), means, chosen=finite(recipe.get("rate"))))
        tried |= scores.keys()
    score = f"validation {score_name(result)}, last epoch"
    return Panel("rates", "learning rate", score, lines, ticks=sorted(tried))


def condition(result: dict[str, Any], place: str, title: str) -> Panel:
    """Condition numbers along training of one layer or of the mean over layers."""
    lines, beyond = [], []
    for index, recipe in enumerate(result["recipes"]):
        found = at(recipe, f"condition.{place}") or {}
        raw, effective = ([finite(value) for value in found.get(key) or []] for key in ("raw", "effective"))
        beyond += [recipe["recipe"]] if any(value and value > RESOLVED for value in effective) else []
        if raw != effective:
            lines.append(Line(index, range(1, len(raw) + 1), raw, kind="raw"))
        lines.append(Line(index, range(1, len(effective) + 1), effective))
    note = f"beyond {RESOLVED:.0e}: {', '.join(beyond)}" if beyond else ""
    about: dict[str, Any] = {"title": title, "log": True, "limit": RESOLVED, "note": note}
    return Panel(f"condition-{place}", "epoch", "condition number", lines, **about)


def cost(result: dict[str, Any], place: str, label: str, kind: str) -> Panel:
    """What a step costs, with the interval of its time relative to the baseline's."""
    rows = []
    for index, recipe in enumerate(result["recipes"]):
        if kind == "ms":
            value, low, high = ms_per_step(recipe, result)
        else:
            value, low, high = finite(at(recipe, "cost.mb_per_step")), None, None
        rows.append(Row(index, value, low, high, text=number(value, kind)))
    return Panel(place, label, rows=rows, bars=True)
