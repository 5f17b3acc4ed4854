"""The interactive charts of the page, as plotly reads them.

A colour is given by its name on the page ("@series-0", "@ink", with an opacity after a slash), because the page alone
knows whether its ground is light or dark.
"""

from html import escape
from math import ceil, floor, inf, log10
from typing import Any

from normkit.lab.report.comparison import Comparison, at, finite
from normkit.lab.report.curves import curve, sweep
from normkit.lab.report.palette import Style, styles
from normkit.lab.report.wording import RESOLVED, number, score_name

Chart = dict[str, Any]


def charts(comparison: Comparison) -> dict[str, Chart]:
    """Every chart of the page by the id of its place."""
    result, score = comparison.result, marked(score_name(comparison.result))
    goal = finite(at(result, "target.score"))
    target = [straight("y", goal)] if goal is not None else []
    conditions = {f"condition-{place}": condition(comparison, place) for place in ("first", "last", "mean")}
    span = logarithmic([trace for place in conditions.values() for trace in place["data"]], RESOLVED)
    for place in conditions.values():
        place["layout"]["yaxis"].update(span)
    return {
        "differences": differences(comparison),
        "validation": chart(
            along(comparison, "val_score"), "epoch", f"validation {score}", shapes=target, views=halves(comparison)
        ),
        "time": chart(
            against_time(comparison), "training time, s", f"validation {score}", shapes=target, hovermode="closest"
        ),
        "loss": chart(along(comparison, "train_loss"), "epoch", "training loss", log=True),
        "rates": rates(comparison),
        **conditions,
        "milliseconds": bars(comparison, "ms_per_step", "ms a step"),
        "megabytes": bars(comparison, "mb_per_step", "MB a step"),
    }


def chart(data: list[Chart], x: str, y: str, *, log: bool = False, **more: Any) -> Chart:
    """A chart of curves with a legend above it."""
    layout = {
        "xaxis": {"title": {"text": x}, "gridcolor": "@rule", "zeroline": False},
        "yaxis": {"title": {"text": y, "standoff": 10}, "gridcolor": "@rule", "zeroline": False, "automargin": True},
        "hovermode": "x unified",
        "showlegend": True,
        "height": 380,
    }
    if x == "epoch" and max((max(trace["x"], default=0) for trace in data), default=0) <= 10:
        layout["xaxis"]["dtick"] = 1
    if log:
        layout["yaxis"].update(logarithmic(data))
    views = more.pop("views", [])
    return {"data": data, "layout": {**layout, **more}, "views": views}


def looks(comparison: Comparison) -> list[tuple[str, Style, str]]:
    """Name, style and colour of each recipe; plotly reads names as markup, so they are escaped."""
    chosen = styles(comparison.names, comparison.result["baseline"])
    return [
        (marked(name), style, f"@series-{index}")
        for index, (name, style) in enumerate(zip(comparison.names, chosen, strict=True))
    ]


def marked(text: str) -> str:
    """Text as plotly's markup, which knows no entity for quotes."""
    return escape(text, quote=False)


def along(comparison: Comparison, field: str) -> list[Chart]:
    """A band from the lowest to the highest seed and a line through the mean, for each recipe; diverged runs apart."""
    data = []
    for runs, (name, style, colour) in zip(comparison.runs, looks(comparison), strict=True):
        line = curve(runs, field)
        if line.epochs:
            band = {
                "x": line.epochs + line.epochs[::-1],
                "y": line.high + line.low[::-1],
                "fill": "toself",
                "fillcolor": f"{colour}/0.18",
                "line": {"width": 0},
                "mode": "lines",
            }
            data.append({**band, "name": name, "legendgroup": name, "showlegend": False, "hoverinfo": "skip"})
            data.append(
                {
                    **stroke(name, style, colour),
                    "x": line.epochs,
                    "y": line.mean,
                    "customdata": [list(pair) for pair in zip(line.low, line.high, strict=True)],
                    "hovertemplate": "%{y:.4~g}  (seeds %{customdata[0]:.4~g} to %{customdata[1]:.4~g})",
                }
            )
        for place, (seed, epochs, values) in enumerate(line.lost):
            rest = max(0, len(epochs) - 1)
            data.append(
                {
                    "name": f"{name}, diverged",
                    "legendgroup": f"{name}, diverged",
                    "showlegend": place == 0,
                    "x": epochs,
                    "y": values,
                    "mode": "lines+markers",
                    "line": {"color": colour, "width": 1, "dash": "dot"},
                    "marker": {"color": colour, "symbol": ["circle"] * rest + ["x"], "size": [0] * rest + [9]},
                    "hovertemplate": f"%{{y:.4~g}} (seed {seed})",
                }
            )
    return data


def stroke(name: str, style: Style, colour: str) -> Chart:
    """A named line."""
    return {
        "name": name,
        "legendgroup": name,
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2, "dash": style.dash},
        "marker": {"color": colour, "symbol": style.symbol, "size": 5},
    }


def against_time(comparison: Comparison) -> list[Chart]:
    """The mean validation score against the mean time spent in training up to that epoch."""
    data = []
    for runs, (name, style, colour) in zip(comparison.runs, looks(comparison), strict=True):
        line = curve(runs, "val_score")
        whole = [run for run in runs if run.status == "ok"]
        count = min([len(run.seconds) for run in whole] + [len(line.epochs)])
        passed = [sum(sum(run.seconds[: last + 1]) for run in whole) / len(whole) for last in range(count)]
        if count:
            hover = "%{y:.4~g} after %{x:.3~g} s (epoch %{customdata})"
            drawn = {"x": passed, "y": line.mean[:count], "customdata": line.epochs[:count], "hovertemplate": hover}
            data.append({**stroke(name, style, colour), **drawn})
    return data


def halves(comparison: Comparison) -> list[Chart]:
    """Two views of the validation score: all epochs, and the second half enlarged, where curves lie close."""
    lines = [curve(runs, "val_score") for runs in comparison.runs]
    last = max((epoch for line in lines for epoch in line.epochs), default=0)
    late = [
        end
        for line in lines
        for epoch, low, high in zip(line.epochs, line.low, line.high, strict=True)
        if epoch >= last / 2
        for end in (low, high)
    ]
    if last < 6 or not late:
        return []
    room = 0.06 * (max(late) - min(late)) or 0.01
    near = {"xaxis.range": [last / 2, last * 1.01], "yaxis.range": [min(late) - room, max(late) + room]}
    return [
        {"label": "all epochs", "layout": {"xaxis.autorange": True, "yaxis.autorange": True}},
        {"label": "second half", "layout": near},
    ]


def straight(axis: str, at: float) -> Chart:
    """A dotted line across the chart at one value of an axis; the caption names it."""
    across, line = "x" if axis == "y" else "y", {"color": "@soft", "width": 1, "dash": "dot"}
    ends = {f"{axis}0": at, f"{axis}1": at, f"{across}0": 0, f"{across}1": 1}
    return {"type": "line", f"{across}ref": "paper", **ends, "line": line}


def differences(comparison: Comparison) -> Chart:
    """Paired differences from the baseline: mean, interval and each seed."""
    result, data = comparison.result, []
    pairs = zip(result["recipes"], looks(comparison), strict=True)
    rows = [(recipe, look) for recipe, look in pairs if recipe["recipe"] != result["baseline"]]
    for place, (recipe, (name, style, colour)) in enumerate(rows):
        mean, low, high = (finite(at(recipe, f"paired.{key}")) for key in ("mean", "low", "high"))
        each = [value for value in map(finite, at(recipe, "paired.differences") or []) if value is not None]
        dots = {"color": colour, "size": 6, "opacity": 0.55}
        data.append(
            {
                "x": each,
                "y": [place + 0.26] * len(each),
                "mode": "markers",
                "marker": dots,
                "name": name,
                "hovertemplate": "%{fullData.name}, one seed: %{x:+.4f}<extra></extra>",
            }
        )
        if mean is None:
            continue
        ends = f"<br>interval {low:+.4f} to {high:+.4f}" if low is not None and high is not None else ""
        point = {
            "x": [mean],
            "y": [place],
            "mode": "markers",
            "marker": {"color": colour, "symbol": style.symbol, "size": 11},
            "name": name,
            "hovertemplate": f"%{{fullData.name}}: %{{x:+.4f}}{ends}<extra></extra>",
        }
        if low is not None and high is not None:
            reach = {"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low]}
            point["error_x"] = {**reach, "color": colour, "thickness": 2.5, "width": 0}
        data.append(point)
    made = chart(data, f"test {marked(score_name(result))} minus {marked(result['baseline'])}'s, same seed", "")
    made["layout"].update(hovermode="closest", showlegend=False, height=110 + 52 * max(1, len(rows)))
    made["layout"]["shapes"] = [{**straight("x", 0.0), "line": {"color": "@ink", "width": 1}, "layer": "below"}]
    made["layout"]["xaxis"].update(
        zeroline=True, zerolinecolor="@ink", zerolinewidth=1, zerolinelayer="below traces", nticks=6
    )
    made["layout"]["yaxis"].update(
        tickvals=list(range(len(rows))),
        ticktext=[name for _, (name, *_) in rows],
        range=[len(rows) - 0.4, -0.6],
        showgrid=False,
        fixedrange=True,
        ticklabelstandoff=6,
    )
    return made


def rates(comparison: Comparison) -> Chart:
    """The validation score after the last epoch at each rate tried; the chosen rate's mark is filled."""
    data, tried = [], set()
    for recipe, (name, style, colour) in zip(comparison.result["recipes"], looks(comparison), strict=True):
        points = sweep(recipe["sweep"])
        tried.update(rate for rate, _ in points)
        chosen = [rate == recipe.get("rate") for rate, _ in points]
        data.append(
            {
                **stroke(name, style, colour),
                "x": [rate for rate, _ in points],
                "y": [score for _, score in points],
                "marker": {
                    "color": [colour if kept else "@ground" for kept in chosen],
                    "symbol": style.symbol,
                    "size": [11 if kept else 8 for kept in chosen],
                    "line": {"color": colour, "width": 2},
                },
                "text": ["chosen" if kept else "" for kept in chosen],
                "hovertemplate": "%{y:.4~g} %{text}",
            }
        )
    made = chart(data, "learning rate", f"validation {marked(score_name(comparison.result))}, last epoch")
    ticks = {"tickvals": sorted(tried), "ticktext": [f"{rate:g}" for rate in sorted(tried)]}
    made["layout"]["xaxis"].update(type="log", unifiedhovertitle={"text": "rate %{x:g}"}, **ticks)
    return made


def condition(comparison: Comparison, place: str) -> Chart:
    """Condition numbers along training of one layer or of the mean over layers."""
    data, beyond = [], []
    for recipe, (name, style, colour) in zip(comparison.result["recipes"], looks(comparison), strict=True):
        record = at(recipe, f"condition.{place}") or {}
        raw, effective = ([finite(value) for value in record.get(key) or []] for key in ("raw", "effective"))
        beyond += [name] if any(value and value > RESOLVED for value in effective) else []
        epochs = list(range(1, max(len(raw), len(effective)) + 1))
        if raw != effective:
            fine = {"mode": "lines", "line": {"color": colour, "width": 1.5, "dash": "dot"}}
            data.append({"x": epochs, "y": raw, "name": f"{name}, raw", "hovertemplate": "%{y:.3~g}", **fine})
        drawn = {**stroke(name, style, colour), "hovertemplate": "%{y:.3~g}"}
        data.append({"x": epochs, "y": effective, **drawn, "marker": {"color": colour, "size": 4}})
    made = chart(data, "epoch", "condition number")
    made["layout"].update(showlegend=False, height=300)
    if beyond:
        corner = {"xref": "paper", "yref": "paper", "x": 0.02, "y": 0.99, "xanchor": "left", "yanchor": "top"}
        note = {"text": f"beyond {RESOLVED:.0e}: {', '.join(beyond)}", "font": {"color": "@soft", "size": 11}}
        made["layout"]["annotations"] = [{**note, **corner, "showarrow": False}]
    return made


def logarithmic(data: list[Chart], limit: float = inf) -> Chart:
    """A logarithmic axis for these traces up to `limit`; its ticks are plain numbers, 1, 2, 5 within few decades."""
    values = [value for trace in data for value in trace["y"] if value and 0 < value <= limit]
    if not values:
        return {"type": "log"}
    low, high = log10(min(values)), log10(max(values))
    room = 0.05 * (high - low) or 0.1
    steps = (1, 2, 3, 5) if high - low < 1.1 else (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(floor(low - room), ceil(high + room) + 1) for step in steps]
    every = max(1, len(ticks) // 12)
    shown = {"tickvals": ticks[::every], "ticktext": [f"{tick:g}" for tick in ticks[::every]]}
    return {"type": "log", "range": [low - room, high + room], **shown}


def bars(comparison: Comparison, key: str, title: str) -> Chart:
    """One bar a recipe from zero, with the quartiles of the time."""
    recipes, found = comparison.result["recipes"], looks(comparison)
    values = [finite(at(recipe, f"cost.{key}")) for recipe in recipes]
    bar: Chart = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": list(range(len(recipes))),
        "marker": {"color": [colour for *_, colour in found]},
        "customdata": [name for name, *_ in found],
        "text": [number(value, "ms" if key == "ms_per_step" else "mb") for value in values],
        "textposition": "inside",
        "insidetextanchor": "start",
        "textangle": 0,
        "insidetextfont": {"color": "@ground"},
        "hovertemplate": f"%{{customdata}}: %{{x:.4~g}} {title}<extra></extra>",
    }
    quartiles = [at(recipe, "cost.ms_quartiles") for recipe in recipes]
    if key == "ms_per_step" and all(quartiles) and None not in values:
        over = [high - value for value, (_, high) in zip(values, quartiles, strict=True)]
        under = [value - low for value, (low, _) in zip(values, quartiles, strict=True)]
        reach = {"type": "data", "symmetric": False, "array": over, "arrayminus": under}
        bar["error_x"] = {**reach, "color": "@ink", "thickness": 1.5, "width": 0}
    made = chart([bar], title, "")
    made["layout"].update(hovermode="closest", showlegend=False, height=90 + 34 * len(recipes), bargap=0.35)
    made["layout"]["xaxis"].update(rangemode="tozero", nticks=6)
    made["layout"]["yaxis"].update(
        tickvals=list(range(len(recipes))),
        ticktext=[name for name, *_ in found],
        range=[len(recipes) - 0.5, -0.5],
        showgrid=False,
        fixedrange=True,
        ticklabelstandoff=6,
    )
    return made
