"""Row equilibration of network weights: Proposition 1 of the paper on weight conditioning, at standard initializations.

The proposition says kappa(EW) <= kappa(W) for every weight W, kappa the ratio of the largest to the smallest singular value. It
follows from a theorem that fails (``normkit theory van-der-sluis``); what holds is kappa(EW) <= sqrt(m) kappa(W) for m rows of
full rank. How often E helps depends on how much the norms of W's rows differ.

Ours: weights of linear layers as torch starts them, rows multiplied by exp(s z) with z standard normal, for spreads s from 0 to
2.
"""

import itertools
import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from normkit.diagnostics.spectrum import condition_of
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.classification import PAPER
from normkit.lab.experiments.runs import drawings, drawn
from normkit.lab.report.drawing import COLOURS, FAINT, FULL, band, panels

SHAPES = {"10×64, a classifier": (10, 64), "64×64": (64, 64), "64×27, a first convolution": (64, 27)}
SPREADS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
DRAWS = {"tiny": 8, "small": 200}


def weights(shape: tuple[int, int], spread: float, count: int, seed: int) -> Tensor:
    """Weights as torch starts those of linear layers, with rows of unequal scale."""
    made = torch.Generator().manual_seed(seed)
    uniform = (2 * torch.rand(count, *shape, generator=made, dtype=torch.float64) - 1) / math.sqrt(shape[1])
    return uniform * (spread * torch.randn(count, shape[0], 1, generator=made, dtype=torch.float64)).exp()


def run(bench: Bench) -> dict[str, Any]:
    rows = []
    for (name, shape), spread in itertools.product(SHAPES.items(), SPREADS):
        drawn = weights(shape, spread, DRAWS[bench.scale], bench.seeds[0])
        before = condition_of(torch.linalg.svdvals(drawn))
        ratio = condition_of(torch.linalg.svdvals(torch.nn.functional.normalize(drawn, dim=2))) / before
        found = ratio.quantile(torch.tensor([0.05, 0.5, 0.95, 1], dtype=torch.float64)).tolist()
        row = dict(zip(("low", "middle", "high", "worst"), found, strict=True))
        row |= {"before": before.median().item(), "better": (ratio < 1).double().mean().item()}
        rows.append({"shape": name, "spread": spread, **row})
    return {"rows": rows, "drawn": DRAWS[bench.scale]}


def tables(result: dict[str, Any]) -> list[Table]:
    forms = {"spread": "g", "before": ".3g", "middle": ".3g", "worst": ".3g", "better": ".0%"}
    lines = [[row["shape"], *(format(row[key], form) for key, form in forms.items())] for row in result["rows"]]
    columns = ("weight", "spread of rows", "κ(W)", "κ(EW)/κ(W)", "at worst", "better")
    return [Table("Row equilibration of weights", columns, lines, [f"Medians of {result['drawn']} draws."])]


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for name in SHAPES:
        rows = {row["spread"]: row for row in result["rows"] if row["shape"] == name}
        even, wide = rows[0.0], rows[2.0]
        said.append(
            f"{name}: as torch starts it, E lowers κ in {100 * even['better']:.0f} % of draws and changes it by a factor of "
            f"{even['middle']:.3f} (median); with rows of spread 2, in {100 * wide['better']:.0f} %, by {wide['middle']:.2g}."
        )
    return said


@drawn(
    "rows",
    "What row equilibration does to the condition number of a weight, as the ratio of after to before, against the "
    "spread of its row norms (standard deviation of their logarithms); medians, in bands from the 5th to the 95th "
    "percentile of draws. Above 1 it makes the condition number worse. Look at the left end, which is a standard "
    "initialization.",
)
def _draw(result: dict[str, Any]) -> Figure:
    figure, axes = panels(len(SHAPES), FULL, 2.3, sharey=True)
    for axis, hue, name in zip(axes, COLOURS, SHAPES, strict=False):
        rows = [row for row in result["rows"] if row["shape"] == name]
        lines = ([row[key] for row in rows] for key in ("middle", "low", "high"))
        band(axis, range(len(SPREADS)), *lines, color=hue, marker="o", markersize=3)
        axis.axhline(1, color=FAINT, linewidth=0.8)
        axis.set_xticks(range(len(SPREADS)), [f"{spread:g}" for spread in SPREADS])
        axis.set(yscale="log", xlabel="spread of row norms")
        axis.set_title(name, loc="left")
    axes[0].set_ylabel("κ(EW) / κ(W)")
    return figure


EXPERIMENT = Experiment(
    "proposition-1", "theory", "Row equilibration of network weights",
    "Row equilibration never raises the condition number of a network's weight.",
    PAPER, run, tables, drawings(_draw), remarks, ("tiny", "small"),
)  # fmt: skip
