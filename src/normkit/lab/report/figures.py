"""Figures of a comparison in files, fit for a paper: one concept each."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from normkit.lab.report.bands import marked, rows_of
from normkit.lab.report.canvas import COLUMN, DOTTED, FAINT, FULL, INK, folded, log, panels, plain
from normkit.lab.report.palette import Style, styles
from normkit.lab.report.series import Line, Panel, Picture
from normkit.lab.report.wording import number


def figure(picture: Picture, result: dict[str, Any]) -> Figure:
    """Draws one figure."""
    first = picture.panels[0]
    recipes = [recipe["recipe"] for recipe in result["recipes"]]
    looks, names = styles(recipes, result["baseline"]), [*map(folded, recipes)]
    if not first.lines:
        height = 0.75 + (0.27 if first.bars else 0.34) * max(1, len(first.rows))
        made, axes = panels(len(picture.panels), FULL if first.bars else COLUMN, height, sharey=True)
        for axis, panel in zip(axes, picture.panels, strict=True):
            _rows(axis, panel, looks, names)
        return made
    views = [(panel, False) for panel in picture.panels] + [(panel, True) for panel in picture.panels if panel.close]
    shared = len(picture.panels) > 1
    made, axes = panels(len(views), COLUMN if len(views) == 1 else FULL, 2.5 if shared else 2.6, sharey=shared)
    for axis, (panel, enlarged) in zip(axes, views, strict=True):
        (_tried if panel.ticks else _lines)(axis, panel, looks)
        if panel.close and enlarged:
            axis.set_xlim(*panel.close[0])
            axis.set_ylim(*panel.close[1])
        if len(views) > 1:
            axis.set_title(plain("end of training" if enlarged else panel.title), loc="left")
        axis.set_xlabel(panel.x)
    if first.log:
        log(*axes, limit=first.limit)
    axes[0].set_ylabel(plain(first.y))
    if first.target is not None:
        # Just below the line's left end, where scores have yet to rise.
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "top"}
        text = f"target {number(first.target, 'score')}"
        axes[0].annotate(text, (0, first.target), (3, -3), fontsize=6.5, color="#666666", **place)
    raw = any(line.kind == "raw" for panel in picture.panels for line in panel.lines)
    _legend(made, looks, names, "raw weight (solid: effective)" if raw else "")
    return made


def _lines(axis: Axes, panel: Panel, looks: list[Style]) -> None:
    for line in panel.lines:
        style, y = looks[line.recipe], _gapped(line)
        if line.kind == "lost":
            axis.plot(line.x, y, color=style.light, linewidth=0.7)
            axis.plot(line.x[-1:], y[-1:], "x", color=style.light, markersize=5)
        elif line.kind == "raw":
            axis.plot(line.x, y, color=style.light, linestyle=DOTTED, linewidth=0.9)
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
        axis.text(0.5, 0.5, "nothing recorded", transform=axis.transAxes, ha="center", va="center", color=FAINT)
    if panel.target is not None:
        axis.axhline(panel.target, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if panel.note:
        axis.text(0.02, 0.98, plain(panel.note), transform=axis.transAxes, va="top", fontsize=6.5, color="#666666")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.margins(x=0.02)


def _tried(axis: Axes, panel: Panel, looks: list[Style]) -> None:
    for line in panel.lines:
        style = looks[line.recipe]
        hollow: dict[str, Any] = {"marker": style.marker, "markerfacecolor": "white", "markersize": 4.5}
        axis.plot(line.x, _gapped(line), linestyle=style.line, color=style.light, **hollow)
        for x, y in zip(line.x, line.y, strict=True):
            if y is None:
                axis.plot([x], [0.03], "x", color=style.light, transform=axis.get_xaxis_transform(), clip_on=False)
            elif x == line.chosen:
                axis.plot([x], [y], style.marker, color=style.light, markersize=6)
    marked(axis, panel.ticks[:: -(-len(panel.ticks) // 7)])
    axis.set_xlim(panel.ticks[0] / 1.25, panel.ticks[-1] * 1.25)


def _rows(axis: Axes, panel: Panel, looks: list[Style], names: list[str]) -> None:
    for y, row in enumerate(panel.rows):
        colour, ends = looks[row.recipe].light, [end for end in (row.low, row.high) if end is not None]
        if panel.bars:
            axis.barh(y, row.value or 0, height=0.62, color=colour)
            axis.plot(ends, [y] * len(ends), color=INK, linewidth=0.9, solid_capstyle="butt")
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
            axis.annotate("no score", (0, y), (4, 0), color=FAINT, **nothing)
    if panel.bars:
        # Room to the right of the longest bar or whisker for the widest number.
        ends = [end for row in panel.rows for end in (row.value, row.high) if end is not None]
        axis.set_xlim(0, (1.08 + 0.05 * max(len(row.text) for row in panel.rows)) * max([*ends, 1e-9]))
    else:
        axis.axvline(0, color=INK, linewidth=0.8, zorder=1)
        axis.spines["left"].set_visible(False)
    axis.set_xlabel(plain(panel.x))
    rows_of(axis, [names[row.recipe] for row in panel.rows])
    axis.xaxis.set_major_locator(MaxNLocator(5))


def _legend(figure: Figure, looks: list[Style], names: list[str], note: str = "") -> None:
    """Names above the panels, where no curve can run into them; `note` names the fine dotted lines."""
    handles = [
        Line2D([], [], color=style.light, linestyle=style.line, marker=style.marker, markersize=3.6) for style in looks
    ]
    labels = list(names)
    if note:
        handles.append(Line2D([], [], color=FAINT, linestyle=DOTTED, linewidth=0.9))
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
