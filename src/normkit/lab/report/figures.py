"""The figures of a comparison: as data, which ``page.js`` draws on the page, and in files, fit for a paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, inf, log
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from normkit.lab.experiment import Drawing
from normkit.lab.report import drawing
from normkit.lab.report.wording import RESOLVED, at, finite, layer_names, ms_per_step, number, score_name

Range = tuple[float, float]
ENLARGED = 6  # epochs from which the end is worth a second look
LAST = 0.75  # of training, from which on lines say how high the enlarged view reaches
FAR = 10.0  # times the median distance from the median, beyond which a line does not stretch the enlarged view
ROOM = 0.06  # of a panel's height, above and below what is enlarged
CAPTIONS = {
    "validation_score": "Validation score against epochs: mean over seeds, in a band from the lowest seed to the highest.",
    "training_loss": "Training loss against epochs: mean over seeds, in a band from the lowest seed to the highest.",
    "paired_differences": "Test score less the baseline's of the same seed: mean, interval, and each seed as a dot.",
    "learning_rates": "Validation score after the last epoch at each learning rate tried; the filled mark is the one chosen.",
    "condition_numbers": "Condition number of the weights after each epoch, geometric mean over seeds.",
    "cost": "Milliseconds per step, with the interval of their ratio to the baseline's, and megabytes per step.",
}


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
    bars: bool = False  # rows are bars from 0, else marks about 0
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
    """A logged value ("val_score" or "train_loss") by epoch: mean and range over the seeds, and apart what diverged."""
    # An epoch counts only where every complete run has the value, so that the mean never jumps because a run left it.
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

    Of four recipes or more, one that lies far from the others does not stretch the view; a `goal` stays in it if lines come near.
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
    """The validation score after the last epoch at each rate tried; None where the run did not come through."""
    lines, tried = [], set()
    for place, recipe in enumerate(result["recipes"]):
        swept = sorted(recipe["sweep"], key=lambda entry: entry["rate"])
        scores = [finite(entry.get("val_score")) if entry["status"] == "ok" else None for entry in swept]
        lines.append(Line(place, [entry["rate"] for entry in swept], scores, chosen=finite(recipe.get("rate"))))
        tried |= {entry["rate"] for entry in swept}
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


def drawings(result: dict[str, Any]) -> list[Drawing]:
    """The figures in files: curves, differences, rates, condition numbers and costs."""
    named = [picture for picture in pictures(result) if picture.name]
    return [Drawing(each.name, partial(figure, each, result), CAPTIONS[each.name]) for each in named]


def figure(picture: Picture, result: dict[str, Any]) -> Figure:
    """Draws one figure."""
    first = picture.panels[0]
    recipes = [recipe["recipe"] for recipe in result["recipes"]]
    looks, names = drawing.styles(recipes, result["baseline"]), [*map(drawing.folded, recipes)]
    if not first.lines:
        height = 0.75 + (0.27 if first.bars else 0.34) * max(1, len(first.rows))
        made, axes = drawing.panels(
            len(picture.panels), drawing.FULL if first.bars else drawing.COLUMN, height, sharey=True
        )
        for axis, panel in zip(axes, picture.panels, strict=True):
            _rows(axis, panel, looks, names)
        return made
    views = [(panel, False) for panel in picture.panels] + [(panel, True) for panel in picture.panels if panel.close]
    shared = len(picture.panels) > 1
    made, axes = drawing.panels(
        len(views), drawing.COLUMN if len(views) == 1 else drawing.FULL, 2.5 if shared else 2.6, sharey=shared
    )
    for axis, (panel, enlarged) in zip(axes, views, strict=True):
        (_tried if panel.ticks else _lines)(axis, panel, looks)
        if panel.close and enlarged:
            axis.set_xlim(*panel.close[0])
            axis.set_ylim(*panel.close[1])
        if len(views) > 1:
            axis.set_title(drawing.plain("end of training" if enlarged else panel.title), loc="left")
        axis.set_xlabel(panel.x)
    if first.log:
        drawing.log(*axes, limit=first.limit)
    axes[0].set_ylabel(drawing.plain(first.y))
    if first.target is not None:
        # Just below the line's left end, where scores have yet to rise.
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "top"}
        text = f"target {number(first.target, 'score')}"
        axes[0].annotate(text, (0, first.target), (3, -3), fontsize=6.5, color="#666666", **place)
    raw = any(line.kind == "raw" for panel in picture.panels for line in panel.lines)
    _legend(made, looks, names, "raw weight (solid: effective)" if raw else "")
    return made


def _lines(axis: Axes, panel: Panel, looks: list[drawing.Style]) -> None:
    for line in panel.lines:
        style, y = looks[line.recipe], _gapped(line)
        if line.kind == "lost":
            axis.plot(line.x, y, color=style.light, linewidth=0.7)
            axis.plot(line.x[-1:], y[-1:], "x", color=style.light, markersize=5)
        elif line.kind == "raw":
            axis.plot(line.x, y, color=style.light, linestyle=drawing.DOTTED, linewidth=0.9)
        else:
            if line.low:
                axis.fill_between(
                    line.x, line.low, line.high, color=style.light, alpha=0.16 if len(looks) <= 6 else 0.07, linewidth=0
                )
            # A few markers, at other places for each recipe so that they do not hide one another.
            every = max(1, len(y) // 5)
            marks = (min(line.recipe * every // 4, len(y)) % every, every)
            how: dict[str, Any] = {"color": style.light, "linestyle": style.line, "marker": style.marker}
            if y:
                axis.plot(line.x, y, markersize=3.2, markevery=marks, **how)
    if not axis.get_lines():
        axis.text(0.5, 0.5, "nothing recorded", transform=axis.transAxes, ha="center", va="center", color=drawing.FAINT)
    if panel.target is not None:
        axis.axhline(panel.target, color=drawing.FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if panel.note:
        axis.text(
            0.02, 0.98, drawing.plain(panel.note), transform=axis.transAxes, va="top", fontsize=6.5, color="#666666"
        )
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.margins(x=0.02)


def _tried(axis: Axes, panel: Panel, looks: list[drawing.Style]) -> None:
    for line in panel.lines:
        style = looks[line.recipe]
        hollow: dict[str, Any] = {"marker": style.marker, "markerfacecolor": "white", "markersize": 4.5}
        axis.plot(line.x, _gapped(line), linestyle=style.line, color=style.light, **hollow)
        for x, y in zip(line.x, line.y, strict=True):
            if y is None:
                axis.plot([x], [0.03], "x", color=style.light, transform=axis.get_xaxis_transform(), clip_on=False)
            elif x == line.chosen:
                axis.plot([x], [y], style.marker, color=style.light, markersize=6)
    drawing.marked(axis, panel.ticks[:: -(-len(panel.ticks) // 7)])
    axis.set_xlim(panel.ticks[0] / 1.25, panel.ticks[-1] * 1.25)


def _rows(axis: Axes, panel: Panel, looks: list[drawing.Style], names: list[str]) -> None:
    for y, row in enumerate(panel.rows):
        colour, ends = looks[row.recipe].light, [end for end in (row.low, row.high) if end is not None]
        if panel.bars:
            axis.barh(y, row.value or 0, height=0.62, color=colour)
            axis.plot(ends, [y] * len(ends), color=drawing.INK, linewidth=0.9, solid_capstyle="butt")
            place = (max([row.value or 0, *ends]), y)
            axis.annotate(row.text, place, (4, 0), textcoords="offset points", va="center")
            continue
        dots: dict[str, Any] = {"markersize": 2.4, "alpha": 0.55, "markeredgewidth": 0}
        axis.plot(row.each, [y + 0.24] * len(row.each), "o", color=colour, **dots)
        axis.plot(ends, [y] * len(ends), color=colour, linewidth=1.6, solid_capstyle="butt")
        if row.value is not None:
            axis.plot([row.value], [y], looks[row.recipe].marker, color=colour, markersize=5)
        else:
            nothing: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 6.5}
            axis.annotate("no score", (0, y), (4, 0), color=drawing.FAINT, **nothing)
    if panel.bars:
        # Room to the right of the longest bar or whisker for the widest number.
        ends = [end for row in panel.rows for end in (row.value, row.high) if end is not None]
        axis.set_xlim(0, (1.08 + 0.05 * max(len(row.text) for row in panel.rows)) * max([*ends, 1e-9]))
    else:
        axis.axvline(0, color=drawing.INK, linewidth=0.8, zorder=1)
        axis.spines["left"].set_visible(False)
    axis.set_xlabel(drawing.plain(panel.x))
    drawing.rows_of(axis, [names[row.recipe] for row in panel.rows])
    axis.xaxis.set_major_locator(MaxNLocator(5))


def _legend(figure: Figure, looks: list[drawing.Style], names: list[str], note: str = "") -> None:
    """Names above the panels, where no curve can run into them; `note` names the fine dotted lines."""
    handles = [
        Line2D([], [], color=style.light, linestyle=style.line, marker=style.marker, markersize=3.6) for style in looks
    ]
    labels = list(names)
    if note:
        handles.append(Line2D([], [], color=drawing.FAINT, linestyle=drawing.DOTTED, linewidth=0.9))
        labels.append(note)
    # Names in one row where they fit, else in as many columns as the longest allows; 0.06 inch a letter of 7 points.
    widths = [0.5 + 0.06 * max(map(len, text.split("\n"))) for text in labels]
    room = figure.get_figwidth()
    columns = len(labels) if sum(widths) < room else max(1, int(room / max(widths)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * (rows - 1 + sum(text.count("\n") for text in labels)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.4, borderaxespad=0.2)


def _gapped(line: Line) -> list[float]:
    # NaN leaves a gap.
    return [math.nan if value is None else value for value in line.y]
