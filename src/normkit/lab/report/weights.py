"""How well a model's weights are conditioned, and how its signal goes through the depth, as a table and figures."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from normkit.diagnostics.activations import Signal
from normkit.diagnostics.conditioning import WeightCondition
from normkit.lab.experiment import Table
from normkit.lab.report.bands import key, rows_of
from normkit.lab.report.canvas import FULL, log, panels, plain
from normkit.lab.report.drawing import COLOURS, GREY, SHAPES
from normkit.lab.report.wording import number

MODES = {"row": "row", "col": "column", "rowcol": "row-column"}


def conditions_table(title: str, found: Sequence[WeightCondition]) -> Table:
    """A row per weight: its condition number before and after, and why."""
    tried = [mode for mode in MODES if found and mode in found[0].after]
    parametrized = any(row.raw != row.condition for row in found)
    operators = any(row.operator for row in found)
    columns = ["weight", "kind", "size", *(["κ raw"] if parametrized else []), "κ"]
    columns += [f"κ {MODES[mode]}" for mode in tried] + ["largest σ", "stable rank", "row norms", "column norms"]
    columns += ["operator's largest σ", "operator's κ"] if operators else []
    rows = []
    for row in found:
        kappas = [*([row.raw] if parametrized else []), row.condition, *(row.after[mode] for mode in tried)]
        cells = [number(kappa, "condition") if kappa != math.inf else "∞" for kappa in kappas]
        cells += [f"{value:.3g}" for value in (row.spectrum.largest, row.stable_rank, row.rows, row.columns)]
        if operators:
            most, least = row.operator or (None, None)
            cells += [None if most is None else f"{most:.3g}"]
            cells += [None if most is None or not least else number(most / least, "condition")]
        rows.append([row.name or "(model)", row.kind, "x".join(map(str, row.shape)), *cells])
    notes = [
        "κ is the largest singular value σ over the smallest: of the weight as it is, and equilibrated in each mode. Stable "
        "rank: squared Frobenius norm over σ². Norms: largest over smallest."
    ]
    worst = max((row.spectrum.error for row in found if row.spectrum.values is None), default=None)
    if worst is not None:
        notes.append(f"Of large weights σ is found by Lanczos, with a relative error of at most {worst:.1g}.")
    if operators:
        notes.append(
            "Operator: the convolution with circular padding on inputs of the example's size, by Fourier transform."
        )
    return Table(title, columns, rows, notes)


def conditions_figure(models: dict[str, Sequence[WeightCondition]]) -> Figure:
    """Condition numbers of each weight, as it is and equilibrated; a panel per model."""
    longest = max(map(len, models.values()))
    figure, axes = panels(len(models), FULL, 1.0 + 0.14 * longest)
    figure.set_layout_engine("constrained", w_pad=0.08)
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        draw_conditions(axis, found)
        axis.set_title(plain(name), loc="right")
        axis.set_xlabel("condition number κ")
    looks = zip(("as it is", *MODES.values()), (GREY, *COLOURS), SHAPES, strict=False)
    handles = [key(hue, linestyle="", marker=shape, markersize=4) for _, hue, shape in looks]
    figure.legend(handles, ("as it is", *MODES.values()), loc="outside upper left", ncols=4)
    return figure


def draw_conditions(axis: Axes, found: Sequence[WeightCondition]) -> None:
    """Four marks per weight on a row of its own."""
    for hue, shape, mode in zip((GREY, *COLOURS), SHAPES, ("", *MODES), strict=False):
        kappas = [row.after.get(mode, math.inf) if mode else row.condition for row in found]
        shown = [kappa if math.isfinite(kappa) else math.nan for kappa in kappas]
        axis.plot(shown, range(len(found)), shape, color=hue, markersize=3.4, alpha=0.85)
    rows_of(axis, [plain(row.name or "(model)") for row in found])
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    if high < 100 * low:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 3)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())


def depth_figure(models: dict[str, Sequence[Signal]]) -> Figure:
    """The standard deviation of activations and of gradients through the depth; a line per model."""
    figure, axes = panels(2, FULL, 2.4)
    for (name, found), hue, shape in zip(models.items(), COLOURS, SHAPES, strict=False):
        for axis, value in zip(axes, ("std", "gradient_std"), strict=True):
            heights = [float(getattr(row, value) or math.nan) for row in found]
            axis.plot(range(len(found)), heights, marker=shape, color=hue, markersize=3, label=plain(name))
    for axis, title in zip(axes, ("std of outputs", "std of their gradients"), strict=True):
        log(axis)
        axis.set_title(title, loc="left")
        axis.set_xlabel("module, in the order of the first call")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure
