"""What the benchmark found, as a table, as Markdown and as a figure."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from normkit.lab.bench.speed import KERNELS, OPERATORS, OWN, PEERS, TRAVERSALS, geometric_mean, group, reached
from normkit.lab.experiment import Drawing
from normkit.lab.record import write_bytes
from normkit.lab.report.drawing import FAINT, FULL, GRID, INK, save
from normkit.lab.say import counted

LEGEND = "A peer's time over normkit's, mean and worst: above 1, normkit is faster; copy: of its bandwidth"
NOTE = f"+ {OWN}; * {OPERATORS}"
MARKS = {KERNELS: "", OWN: "+", OPERATORS: "*"}
GROUPS = ("method", "direction", "cells", "eager", "worst", "compile", "worst", "copy")


def groups(result: dict[str, Any]) -> list[list[str]]:
    """A line for each method and direction: the geometric mean and the worst ratio to each peer, and the median roofline."""
    lines = []
    ordered = sorted(result["rows"], key=lambda row: [*MARKS].index(group(row)))
    for method, over in dict.fromkeys((row["method"], group(row)) for row in ordered):
        for direction in TRAVERSALS:
            own = [row for row in ordered if (row["method"], group(row), row["direction"]) == (method, over, direction)]
            if not own:
                continue
            line = [method + MARKS[over], "fwd" if direction == "forward" else "fwd+bwd", str(len(own))]
            for peer in PEERS:
                ratios = [row["ratio"][peer] for row in own if peer in row["ratio"]]
                line += [f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}"] if ratios else ["", ""]
            lines.append([*line, f"{median(row['roofline']['ours'] for row in own):.2f}"])
    return lines


def show(result: dict[str, Any], console: Console) -> None:
    """Prints one table, which a terminal of 80 columns holds, and a line per direction and peer with the worst cell."""
    table = Table(title=LEGEND, title_justify="left", title_style="", box=None, pad_edge=False, header_style="bold")
    for column in GROUPS:
        table.add_column(column, justify="left" if column in GROUPS[:2] else "right", overflow="fold")
    last = ""
    for method, *rest in groups(result):
        table.add_row("" if method == last else method, *rest)
        last = method
    console.print(table, highlight=False)
    console.print(NOTE, markup=False, highlight=False)
    for line in conclusions(result):
        console.print(line, markup=False, highlight=False)


def conclusions(result: dict[str, Any]) -> list[str]:
    """The worst cell and the mean of each direction and peer, and what changed since an earlier record."""
    lines = []
    for row in result["summary"]:
        between = row.get("worst_interval")
        worst = f"{row['worst']:.2f}" + (f" ({between[0]:.2f} to {between[1]:.2f})" if between else "")
        cells = counted(row["cells"], "cell")
        lines.append(
            f"{row['over']}, {row['direction']} against {row['peer']}: {cells}, mean {row['geometric_mean']:.2f}, "
            f"{row['below']} below 0.95, worst {worst}: {row['worst_case']}"
        )
    for dtype, direction, goal, middle, cells, of in reached(result["rows"]):
        lines.append(f"{dtype} {direction}, 4 to 64 MB: median {middle:.2f} of a copy, {cells} of {of} reach {goal}")
    if "against" in result:
        earlier = result["against"]
        lines.append(
            f"against {earlier['file']} of {earlier['date']}: {counted(earlier['both'], 'ratio')} in both, "
            f"{len(earlier['worse'])} slower beyond noise, {len(earlier['better'])} faster"
        )
        lines += [f"slower  {said}" for said in earlier["worse"]]
    return lines


def brief(result: dict[str, Any]) -> str:
    """How it was measured, the conclusions and the table of methods, as Markdown."""
    ways: dict[str, dict[str, list[str]]] = {}
    for method, way, count, eager, slowest, compiled, worst, copied in groups(result):
        if method.endswith(MARKS[OPERATORS]):  # nothing of it is measured here
            continue
        both = [f"{mean} ({least})" if mean else "" for mean, least in ((eager, slowest), (compiled, worst))]
        ways.setdefault(method, {})[way] = [count, *both, copied]
    head = [
        "method",
        *(f"{way}{name}" for way in ("fwd", "fwd+bwd") for name in (" cells", " eager", " compile", " copy")),
    ]
    rows = [
        [method, *(cell for way in ("fwd", "fwd+bwd") for cell in own.get(way, [""] * 4))]
        for method, own in ways.items()
    ]
    lines = [_how(result), "", f"{LEGEND}; + {OWN}.", "", *(f"* {line}" for line in conclusions(result)), ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in (head, ["---", *["--:"] * 8], *rows))]) + "\n"


def _how(result: dict[str, Any]) -> str:
    return (
        f"`{result['command']}`, {result['date']}, {result['machine']}, torch {result['torch']}, "
        f"{counted(result['threads'], 'thread')}, native kernels: {result['native']}."
    )


def replace_section(path: Path, title: str, text: str) -> None:
    """Replaces the section of this title in a Markdown file, or appends it."""
    parts = path.read_text().split("\n## ") if path.exists() else ["# Measured speed\n"]
    at = next((i for i, part in enumerate(parts) if part.startswith(f"{title}\n")), len(parts))
    parts[at : at + 1] = [f"{title}\n\n{text}\n"]
    write_bytes(path, "\n## ".join(part.rstrip("\n") + "\n" for part in parts).encode())


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws every cell's ratio to eager, a line for each method, forward next to forward and backward."""
    return save([Drawing("speed", partial(_figure, result), "")], folder)


def _figure(result: dict[str, Any]) -> Figure:
    rows: Sequence[dict[str, Any]] = result["rows"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure = Figure(figsize=(FULL, 0.9 + 0.24 * len(names)), layout="constrained")
    for axis, direction in zip(
        figure.subplots(1, len(directions), sharey=True, squeeze=False)[0], directions, strict=True
    ):
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.axvspan(0.95, 1.05, color=GRID, linewidth=0)
        for row in rows:
            if row["direction"] == direction and "eager" in row["ratio"]:
                half = row["dtype"] != "float32"
                axis.plot(
                    row["ratio"]["eager"],
                    names.index(row["method"]) + (0.12 if half else -0.12),
                    "s" if row["layout"] == "channels last" else "o",
                    markersize=3.4,
                    color="#d55e00" if half else "#0072b2",
                    markerfacecolor="none"
                    if row["shape"][-1] * row["shape"][0] < 2**15 and len(row["shape"]) == 2
                    else None,
                    alpha=0.85,
                )
        axis.set_xscale("log")
        axis.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        axis.minorticks_off()
        axis.set_title(direction, loc="left")
        axis.set_xlabel("time of torch eager / time of normkit")
        axis.grid(axis="x")
        axis.grid(axis="y", visible=False)
    axis = figure.axes[0]
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    said = "blue float32, orange bfloat16; squares channels last; hollow small; right of 1 normkit is faster"
    figure.suptitle(said, fontsize=6.5, color=FAINT)
    return figure
