"""Figures of a comparison fit for a paper: one concept each, as PNG at 300 dpi and as SVG."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from normkit.lab.experiment import Drawing
from normkit.lab.report.canvas import (
    COLUMN,
    DOTTED,
    FAINT,
    FULL,
    INK,
    along,
    blank,
    gapped,
    label,
    legend,
    log,
    looks,
    panels,
    plain,
    trace,
)
from normkit.lab.report.comparison import Comparison, at, finite, read_comparison
from normkit.lab.report.curves import curve, sweep
from normkit.lab.report.drawing import save
from normkit.lab.report.wording import RESOLVED, number, score_name

DPI = 300
ENLARGED = 6  # epochs from which the end is worth a second look


def draw(out: Path) -> list[Path]:
    """Draws the figures of a comparison into OUT/figures.

    Args:
        out: the folder that `normkit compare --output` wrote.

    Returns:
        The files written: for each figure its PNG and its SVG. The same records and the same matplotlib give the same
        bytes.

    Raises:
        RecordError: a record is missing or corrupt, or the folder cannot be written.
    """
    comparison = read_comparison(out)
    drawn = [Drawing(name, partial(make, comparison), "") for name, make in FIGURES.items()]
    return save(drawn, out / "figures", DPI)


def validation(comparison: Comparison) -> Figure:
    """Validation score along training: mean over seeds and range as a band; the second half again, enlarged."""
    last = max((epoch for runs in comparison.runs for run in runs for epoch in run.epochs), default=0)
    figure, axes = panels(1 if last < ENLARGED else 2, COLUMN if last < ENLARGED else FULL, 2.6)
    goal = finite(at(comparison.result, "target.score"))
    for axis in axes:
        along(axis, comparison, "val_score")
        axis.set_xlabel("epoch")
        if goal is not None:
            axis.axhline(goal, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    axes[0].set_ylabel(plain(f"validation {score_name(comparison.result)}"))
    if last >= ENLARGED:
        lines = [curve(runs, "val_score") for runs in comparison.runs]
        late = [
            y for c in lines for x, *ends in zip(c.epochs, c.low, c.high, strict=True) if x >= last / 2 for y in ends
        ]
        late += [goal] if goal is not None and late else []
        if late:
            room = 0.05 * (max(late) - min(late)) or 0.01
            axes[1].set_ylim(min(late) - room, max(late) + room)
        axes[1].set_xlim(math.ceil(last / 2), last + 0.02 * last)
        axes[1].set_title("second half, enlarged", loc="left")
        axes[0].set_title("all epochs", loc="left")
    if goal is not None:
        label(axes[0], goal, f"target {number(goal, 'score')}")
    legend(figure, comparison)
    return figure


def training(comparison: Comparison) -> Figure:
    """Training loss along training, on a log scale."""
    figure, axes = panels(1, COLUMN, 2.6)
    along(axes[0], comparison, "train_loss")
    axes[0].set(xlabel="epoch", ylabel="training loss")
    log(axes[0])
    legend(figure, comparison)
    return figure


def differences(comparison: Comparison) -> Figure:
    """Paired differences from the baseline: mean, interval and each seed."""
    result = comparison.result
    rows = [
        (recipe, style)
        for recipe, style in zip(result["recipes"], looks(comparison), strict=True)
        if recipe["recipe"] != result["baseline"]
    ]
    figure, (axis,) = panels(1, COLUMN, 0.75 + 0.34 * max(1, len(rows)))
    axis.axvline(0, color=INK, linewidth=0.8, zorder=1)
    for y, (recipe, style) in enumerate(rows):
        mean, low, high = (finite(at(recipe, f"paired.{key}")) for key in ("mean", "low", "high"))
        each = [value for value in map(finite, at(recipe, "paired.differences") or []) if value is not None]
        axis.plot(each, [y + 0.24] * len(each), "o", markersize=2.4, color=style.light, alpha=0.55, markeredgewidth=0)
        if low is not None and high is not None:
            axis.plot([low, high], [y, y], color=style.light, linewidth=1.6, solid_capstyle="butt")
        if mean is not None:
            axis.plot([mean], [y], style.marker, color=style.light, markersize=5)
        else:
            axis.annotate(
                "no score", (0, y), (4, 0), textcoords="offset points", va="center", color=FAINT, fontsize=6.5
            )
    axis.set_yticks(range(len(rows)), [plain(recipe["recipe"]) for recipe, _ in rows])
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel(plain(f"test {score_name(result)} minus {result['baseline']}'s, same seed"))
    return figure


def rates(comparison: Comparison) -> Figure:
    """Learning-rate sweep: validation score after the last epoch at each rate tried; the chosen one is filled."""
    figure, (axis,) = panels(1, COLUMN, 2.6)
    tried: set[float] = set()
    for recipe, style in zip(comparison.result["recipes"], looks(comparison), strict=True):
        points = sweep(recipe["sweep"])
        tried.update(rate for rate, _ in points)
        scores = [math.nan if score is None else score for _, score in points]
        hollow: dict[str, Any] = {"marker": style.marker, "markerfacecolor": "white", "markersize": 4.5}
        axis.plot([rate for rate, _ in points], scores, linestyle=style.line, color=style.light, **hollow)
        for rate, score in points:
            if score is None:
                axis.plot([rate], [0.03], "x", color=style.light, transform=axis.get_xaxis_transform(), clip_on=False)
            elif rate == recipe.get("rate"):
                axis.plot([rate], [score], style.marker, color=style.light, markersize=6)
    if tried:
        axis.set_xscale("log")
        shown = sorted(tried) if len(tried) <= 7 else sorted(tried)[:: -(-len(tried) // 7)]
        axis.set_xticks(shown, [f"{rate:g}" for rate in shown])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", which="minor", bottom=False)
        axis.set_xlim(min(tried) / 1.25, max(tried) * 1.25)
    axis.set(xlabel="learning rate", ylabel=plain(f"validation {score_name(comparison.result)}, last epoch"))
    legend(figure, comparison)
    return figure


def conditions(comparison: Comparison) -> Figure:
    """Condition numbers of the weights along training, of the first layer, the last and the mean over layers."""
    figure, axes = panels(3, FULL, 2.5, sharey=True)
    differ = False
    for axis, place in zip(axes, ("first", "last", "mean"), strict=True):
        names, beyond = [], []
        for index, (recipe, style) in enumerate(zip(comparison.result["recipes"], looks(comparison), strict=True)):
            record = at(recipe, f"condition.{place}") or {}
            names.append(str(record.get("name") or ""))
            raw, effective = (gapped(record.get(key)) for key in ("raw", "effective"))
            beyond += [recipe["recipe"]] if any(value > RESOLVED for value in effective) else []
            if str(raw) != str(effective):  # NaN equals itself in print alone
                differ = True
                axis.plot(range(1, len(raw) + 1), raw, color=style.light, linestyle=DOTTED, linewidth=0.9)
            trace(axis, list(range(1, len(effective) + 1)), effective, style, index)
        title = {"first": "first layer", "last": "last layer", "mean": "mean over layers"}[place]
        name = names[0] if len(set(names)) == 1 and place != "mean" else ""
        if not axis.get_lines():
            blank(axis)
        if beyond:
            note = plain(f"beyond {RESOLVED:.0e}: {', '.join(beyond)}")
            axis.text(0.02, 0.98, note, transform=axis.transAxes, va="top", fontsize=6.5, color="#666666")
        axis.set_title(plain(f"{title}, {name}" if name else title), loc="left")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    log(*axes, limit=RESOLVED)
    axes[0].set_ylabel("condition number")
    legend(figure, comparison, "raw weight (solid: effective)" if differ else "")
    return figure


def costs(comparison: Comparison) -> Figure:
    """Cost of a step: milliseconds (median and quartiles) and megabytes."""
    result = comparison.result
    recipes = result["recipes"]
    figure, axes = panels(2, FULL, 0.75 + 0.27 * len(recipes), sharey=True)
    for axis, key, unit in zip(axes, ("ms_per_step", "mb_per_step"), ("ms a step", "MB a step"), strict=True):
        values = [finite(at(recipe, f"cost.{key}")) for recipe in recipes]
        for y, (recipe, style, value) in enumerate(zip(recipes, looks(comparison), values, strict=True)):
            axis.barh(y, value or 0, height=0.62, color=style.light)
            end, kind = value or 0, "ms" if key == "ms_per_step" else "mb"
            quartiles = at(recipe, "cost.ms_quartiles") if key == "ms_per_step" else None
            if quartiles and value is not None:
                axis.plot(quartiles, [y, y], color=INK, linewidth=0.9, solid_capstyle="butt")
                end = max(value, quartiles[1])
            axis.annotate(number(value, kind), (end, y), (4, 0), textcoords="offset points", va="center")
        axis.set_xlim(0, 1.18 * max([value or 0 for value in values] + [1e-9]))
        axis.set_xlabel(unit)
        axis.set_yticks(range(len(recipes)), [plain(recipe["recipe"]) for recipe in recipes])
        axis.set_ylim(len(recipes) - 0.45, -0.55)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    return figure


FIGURES: dict[str, Callable[[Comparison], Figure]] = {
    "validation_score": validation,
    "training_loss": training,
    "paired_differences": differences,
    "learning_rates": rates,
    "condition_numbers": conditions,
    "cost": costs,
}
