"""The interactive charts of the page, as plotly reads them.

A colour is given by its name on the page ("@series-0", "@ink", with an opacity after a slash), because the page alone
knows whether its ground is light or dark.
"""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, inf, log10
from typing import Any

from normkit.lab.report.comparison import Comparison
from normkit.lab.report.palette import Style, styles
from normkit.lab.report.series import Line, Panel, pictures

Chart = dict[str, Any]
Look = tuple[str, Style, str]  # name, style and colour of a recipe
SHORT = 10  # epochs up to which each has its tick


def charts(comparison: Comparison) -> dict[str, Chart]:
    """Every chart of the page by the id of its place."""
    chosen = styles(comparison.names, comparison.result["baseline"])
    looks = [
        (marked(name), style, f"@series-{k}")
        for k, (name, style) in enumerate(zip(comparison.names, chosen, strict=True))
    ]
    found = {}
    for picture in pictures(comparison):
        drawn = [chart(panel, looks) for panel in picture.panels]
        if len(drawn) > 1 and picture.panels[0].log:
            # Panels side by side share their scale, and the legend of those above.
            values = [y for panel in picture.panels for line in panel.lines for y in line.y]
            for made in drawn:
                made["layout"]["yaxis"].update(logarithmic(values, picture.panels[0].limit))
                made["layout"].update(showlegend=False, height=300)
        found |= {panel.place: made for panel, made in zip(picture.panels, drawn, strict=True)}
    return found


def marked(text: str) -> str:
    """Text as plotly's markup, which knows no entity for quotes; it reads names as markup, so they are escaped."""
    return escape(text, quote=False)


def chart(panel: Panel, looks: Sequence[Look]) -> Chart:
    """A chart of lines with a legend above it, or of rows."""
    layout: Chart = {
        "xaxis": {"title": {"text": marked(panel.x)}, "gridcolor": "@rule", "zeroline": False},
        "yaxis": {
            "title": {"text": marked(panel.y), "standoff": 10},
            "gridcolor": "@rule",
            "zeroline": False,
            "automargin": True,
        },
        "hovermode": "x unified",
        "showlegend": True,
        "height": 380,
    }
    layout["yaxis"]["automargin"] = True
    made: Chart = {"data": [], "layout": layout, "views": []}
    if not panel.lines:
        _fill_rows(made, panel, looks)
        return made
    for line in panel.lines:
        made["data"] += _traces(line, looks[line.recipe], panel)
    _name_lost_once(made["data"])
    if panel.log:
        layout["yaxis"].update(logarithmic([y for line in panel.lines for y in line.y], panel.limit))
    if panel.ticks:
        shown = {"tickvals": list(panel.ticks), "ticktext": [f"{rate:g}" for rate in panel.ticks]}
        layout["xaxis"].update(type="log", unifiedhovertitle={"text": "rate %{x:g}"}, **shown)
    elif panel.x != "epoch":
        layout["hovermode"] = "closest"
    elif max((max(line.x, default=0) for line in panel.lines), default=0) <= SHORT:
        layout["xaxis"]["dtick"] = 1
    if panel.target is not None:
        layout["shapes"] = [straight("y", panel.target)]
    if panel.note:
        corner = {"xref": "paper", "yref": "paper", "x": 0.02, "y": 0.99, "xanchor": "left", "yanchor": "top"}
        note = {"text": marked(panel.note), "font": {"color": "@soft", "size": 11}, "showarrow": False}
        layout["annotations"] = [{**note, **corner}]
    if panel.close:
        near = {f"{axis}axis.range": list(ends) for axis, ends in zip("xy", panel.close, strict=True)}
        whole = {"xaxis.autorange": True, "yaxis.autorange": True}
        made["views"] = [{"label": "all epochs", "layout": whole}, {"label": "second half", "layout": near}]
    return made


def _traces(line: Line, look: Look, panel: Panel) -> list[Chart]:
    name, style, colour = look
    x, y = list(line.x), list(line.y)
    if line.kind == "raw":
        fine = {"mode": "lines", "line": {"color": colour, "width": 1.5, "dash": "dot"}}
        return [{"x": x, "y": y, "name": f"{name}, raw", "hovertemplate": "%{y:.3~g}", **fine}]
    if line.kind == "lost":
        rest = max(0, len(x) - 1)
        marks = {"color": colour, "symbol": ["circle"] * rest + ["x"], "size": [0] * rest + [9]}
        known = {
            "name": f"{name}, diverged",
            "legendgroup": f"{name}, diverged",
            "mode": "lines+markers",
            "marker": marks,
        }
        dots = {"line": {"color": colour, "width": 1, "dash": "dot"}}
        return [{**known, **dots, "x": x, "y": y, "hovertemplate": f"%{{y:.4~g}} (seed {line.seed})"}]
    marker: Chart = {"color": colour, "symbol": style.symbol, "size": 5}
    trace: Chart = {"name": name, "legendgroup": name, "mode": "lines+markers", "x": x, "y": y, "marker": marker}
    trace |= {"line": {"color": colour, "width": 2, "dash": style.dash}, "hovertemplate": "%{y:.4~g}"}
    if panel.ticks:
        chosen = [rate == line.chosen for rate in x]
        marker["color"] = [colour if kept else "@ground" for kept in chosen]
        marker |= {"size": [11 if kept else 8 for kept in chosen], "line": {"color": colour, "width": 2}}
        trace |= {"text": ["chosen" if kept else "" for kept in chosen], "hovertemplate": "%{y:.4~g} %{text}"}
    elif line.epochs:
        hover = "%{y:.4~g} after %{x:.3~g} s (epoch %{customdata})"
        trace |= {"customdata": list(line.epochs), "hovertemplate": hover}
    if not line.low:
        return [trace]
    ends = [list(pair) for pair in zip(line.low, line.high, strict=True)]
    trace |= {"customdata": ends, "hovertemplate": "%{y:.4~g}  (seeds %{customdata[0]:.4~g} to %{customdata[1]:.4~g})"}
    band = {"x": x + x[::-1], "y": [*line.high, *line.low[::-1]], "fill": "toself", "fillcolor": f"{colour}/0.18"}
    band |= {"line": {"width": 0}, "mode": "lines", "showlegend": False, "hoverinfo": "skip"}
    return [{**band, "name": name, "legendgroup": name}, trace]


def _name_lost_once(data: list[Chart]) -> None:
    named = set()
    for trace in data:
        if trace["name"].endswith(", diverged"):
            trace["showlegend"] = trace["name"] not in named
            named.add(trace["name"])


def _fill_rows(made: Chart, panel: Panel, looks: Sequence[Look]) -> None:
    layout, names = made["layout"], [looks[row.recipe][0] for row in panel.rows]
    (_fill_bars if panel.bars else _fill_marks)(made, panel, looks)
    layout.update(hovermode="closest", showlegend=False)
    half = 0.5 if panel.bars else 0.6
    layout["yaxis"].update(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[len(names) - 1 + half, -half],
        showgrid=False,
        fixedrange=True,
        ticklabelstandoff=6,
    )


def _fill_bars(made: Chart, panel: Panel, looks: Sequence[Look]) -> None:
    values = [row.value for row in panel.rows]
    bar: Chart = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": list(range(len(values))),
        "marker": {"color": [looks[row.recipe][2] for row in panel.rows]},
        "customdata": [looks[row.recipe][0] for row in panel.rows],
        "text": [row.text for row in panel.rows],
        "textposition": "inside",
        "insidetextanchor": "start",
        "textangle": 0,
        "insidetextfont": {"color": "@ground"},
        "hovertemplate": f"%{{customdata}}: %{{x:.4~g}} {marked(panel.x)}<extra></extra>",
    }
    ends = [(row.low, row.value, row.high) for row in panel.rows if None not in (row.low, row.value, row.high)]
    if ends and len(ends) == len(values):
        bar["error_x"] = {**_reach(ends), "color": "@ink", "thickness": 1.5, "width": 0}
    made["data"].append(bar)
    made["layout"].update(height=90 + 34 * len(values), bargap=0.35)
    made["layout"]["xaxis"].update(rangemode="tozero", nticks=6)


def _fill_marks(made: Chart, panel: Panel, looks: Sequence[Look]) -> None:
    for y, row in enumerate(panel.rows):
        name, style, colour = looks[row.recipe]
        dots = {"color": colour, "size": 6, "opacity": 0.55}
        hover = "%{fullData.name}, one seed: %{x:+.4f}<extra></extra>"
        shared = {"mode": "markers", "name": name}
        each = list(row.each)
        made["data"].append({**shared, "x": each, "y": [y + 0.26] * len(each), "marker": dots, "hovertemplate": hover})
        if row.value is None:
            continue
        point: Chart = {
            **shared,
            "x": [row.value],
            "y": [y],
            "marker": {"color": colour, "symbol": style.symbol, "size": 11},
        }
        ends = ""
        if row.low is not None and row.high is not None:
            ends = f"<br>interval {row.low:+.4f} to {row.high:+.4f}"
            point["error_x"] = {
                **_reach([(row.low, row.value, row.high)]),
                "color": colour,
                "thickness": 2.5,
                "width": 0,
            }
        made["data"].append({**point, "hovertemplate": f"%{{fullData.name}}: %{{x:+.4f}}{ends}<extra></extra>"})
    zero = {"zeroline": True, "zerolinecolor": "@ink", "zerolinewidth": 1, "zerolinelayer": "below traces"}
    made["layout"]["shapes"] = [{**straight("x", 0.0), "line": {"color": "@ink", "width": 1}, "layer": "below"}]
    made["layout"]["height"] = 110 + 52 * max(1, len(panel.rows))
    made["layout"]["xaxis"].update(nticks=6, **zero)


def _reach(ends: Sequence[Any]) -> Chart:
    over, under = [high - value for _, value, high in ends], [value - low for low, value, _ in ends]
    return {"type": "data", "symmetric": False, "array": over, "arrayminus": under}


def straight(axis: str, at: float) -> Chart:
    """A dotted line across the chart at one value of an axis; the caption names it."""
    across, line = "x" if axis == "y" else "y", {"color": "@soft", "width": 1, "dash": "dot"}
    ends = {f"{axis}0": at, f"{axis}1": at, f"{across}0": 0, f"{across}1": 1}
    return {"type": "line", f"{across}ref": "paper", **ends, "line": line}


def logarithmic(values: Sequence[float | None], limit: float = inf) -> Chart:
    """A logarithmic axis for these values up to `limit`; its ticks are plain numbers, 1, 2, 5 within few decades."""
    drawn = [value for value in values if value and 0 < value <= limit]
    if not drawn:
        return {"type": "log"}
    low, high = log10(min(drawn)), log10(max(drawn))
    room = 0.05 * (high - low) or 0.1
    steps = (1, 2, 3, 5) if high - low < 1.1 else (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(floor(low - room), ceil(high + room) + 1) for step in steps]
    every = max(1, len(ticks) // 12)
    shown = {"tickvals": ticks[::every], "ticktext": [f"{tick:g}" for tick in ticks[::every]]}
    return {"type": "log", "range": [low - room, high + room], **shown}
