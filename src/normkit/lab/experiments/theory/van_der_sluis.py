"""Row equilibration against all diagonal scalings: Theorem 5.1 of the paper on weight conditioning.

The paper states, after van der Sluis, that E, which gives A unit rows, has the least condition number kappa(DA) among all
diagonal D. True are: E minimizes chi(A) = max row norm / smallest singular value; hence kappa(EA) <= sqrt(m) min_D kappa(DA)
for m rows; and E is the best D where m = 2. The best D itself is found by optimisation: L-BFGS on the logarithms of its
entries, of log kappa(DA), from E and from D = 1.

Ours: matrices with entries drawn from the whole numbers -3 to 3, those of full rank; the optimisation is run on the first few
of each size.
"""

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from normkit.diagnostics.conditioning import chi, condition_number
from normkit.diagnostics.spectrum import condition_of
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments.classification import PAPER
from normkit.lab.report.bands import marked
from normkit.lab.report.canvas import FAINT, FULL, panels
from normkit.lab.report.drawing import COLOURS
from normkit.weights.weight_conditioning import equilibrate

COUNTEREXAMPLE = ((1.0, 2.0, 3.0), (0.0, 0.0, 2.0), (2.0, 1.0, 3.0))
ROWS = (2, 3, 4, 6)
SIZES = {"tiny": (50, 2), "small": (20_000, 60)}  # matrices drawn of each size, and optimised


def best_scaling(a: Tensor, steps: int = 200) -> tuple[float, Tensor]:
    """The least condition number of DA over positive diagonal D that is found, and D's diagonal.

    It is never above that of A or of its row equilibration, from which it starts.
    """
    found = []
    for start in (a.norm(dim=1).log().neg(), torch.zeros(len(a), dtype=a.dtype)):
        logs = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logs], max_iter=steps, tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def closure(logs: Tensor = logs, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            values = torch.linalg.svdvals(logs.exp()[:, None] * a)
            loss = values[0].log() - values[-1].log()
            loss.backward()
            return loss

        optimizer.step(closure)
        for point in (start, logs.detach()):
            d = point.exp()
            found.append((condition_number(d[:, None] * a), d))
    return min(found, key=lambda pair: pair[0])


def draws(rows: int, count: int, seed: int) -> Tensor:
    """Square matrices with entries from -3 to 3."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (count, rows, rows), generator=made).double()


def conditions(batch: Tensor) -> Tensor:
    """Condition numbers, infinite for a singular matrix."""
    return condition_of(torch.linalg.svdvals(batch))


def run(bench: Bench) -> dict[str, Any]:
    """Searches every size."""
    count, optimised = SIZES[bench.scale]
    a = torch.tensor(COUNTEREXAMPLE, dtype=torch.float64)
    least, d = best_scaling(a)
    forms = {"A": a, "EA": equilibrate(a), "DA": d[:, None] * a}
    example = {name: [condition_number(matrix), chi(matrix)] for name, matrix in forms.items()}
    rows = []
    for m in ROWS:
        drawn = draws(m, count, bench.seeds[0])
        before = conditions(drawn)
        drawn, before = drawn[before < math.inf], before[before < math.inf]
        after = conditions(torch.nn.functional.normalize(drawn, dim=2))
        ratios = (after / before).sort().values
        few = [(k.item(), best_scaling(one)[0]) for k, one in zip(after[:optimised], drawn[:optimised], strict=True)]
        # Rounding alone may change a condition number where E changes nothing.
        row = {"rows": m, "full rank": len(drawn), "worse": int((ratios > 1 + 1e-9).sum()), "worst": ratios[-1].item()}
        quantiles = ratios[torch.linspace(0, len(ratios) - 1, 101).long()].tolist()
        rows.append({**row, "quantiles": quantiles, "over best": sorted(e / best for e, best in few)})
    return {"example": example, "best": (d / d[0]).tolist(), "least": least, "drawn": count, "sizes": rows}


def tables(result: dict[str, Any]) -> list[Table]:
    """The counterexample, and the search."""
    names = {"A": "A", "EA": "EA, unit rows", "DA": "DA, the best D that is found"}
    example = [[names[name], *(f"{value:.3f}" for value in pair)] for name, pair in result["example"].items()]
    lines = []
    for row in result["sizes"]:
        ratios = (f"{value:.3f}" for value in (row["worst"], row["over best"][-1], row["rows"] ** 0.5))
        lines.append([row["rows"], row["full rank"], row["worse"], *ratios])
    columns = ("rows m", "of full rank", "E makes κ worse", "worst κ(EA)/κ(A)", "worst κ(EA)/κ(best DA)", "bound √m")
    few = len(result["sizes"][0]["over best"])
    notes = [f"{result['drawn']} matrices of each size; the best D by L-BFGS, of {few} of each."]
    said = ["A has the rows (1, 2, 3), (0, 0, 2), (2, 1, 3); χ is the largest row norm by the smallest singular value."]
    return [Table("A counterexample", ("matrix", "κ", "χ"), example, said), Table("A search", columns, lines, notes)]


def remarks(result: dict[str, Any]) -> list[str]:
    """What fails and what holds."""
    before, after = result["example"]["A"], result["example"]["EA"]
    worse = ", ".join(f"{row['worse']} of {row['full rank']} ({row['rows']} rows)" for row in result["sizes"])
    return [
        f"The theorem as printed fails: unit rows take κ from {before[0]:.3f} to {after[0]:.3f} (and χ from {before[1]:.3f} to "
        f"{after[1]:.3f}); the best D that is found has κ {result['least']:.3f}.",
        f"Of matrices with small whole entries, row equilibration makes κ worse in {worse}.",
        "Within √m of the best is as far as E is guaranteed to be; the bound is not reached here.",
    ]


def figures(result: dict[str, Any]) -> list[Drawing]:
    """One figure."""
    caption = (
        "Left: what row equilibration E does to the condition number of random matrices, as quantiles of the ratio of "
        "after to before, for m rows; right of the point where a line crosses 1, E has made it worse, which the printed "
        "theorem excludes. Right: how far E is from the best diagonal scaling that is found, a dot for each matrix, below "
        "the bound, the root of m (bars)."
    )
    return [Drawing("search", lambda: draw(result), caption)]


def draw(result: dict[str, Any]) -> Figure:
    """Quantiles of the change, and the distance from the best."""
    figure, (left, right) = panels(2, FULL, 2.6)
    for row, hue in zip(result["sizes"], COLOURS, strict=False):
        left.plot(range(101), row["quantiles"], color=hue, label=f"m = {row['rows']}")
        right.plot([row["rows"]] * len(row["over best"]), row["over best"], "o", color=hue, alpha=0.4, markersize=3)
        right.plot([row["rows"]], [row["rows"] ** 0.5], "_", color="black", markersize=22)
    left.axhline(1, color=FAINT, linewidth=0.8)
    left.set(xlabel="percent of matrices")
    left.legend(loc="lower right")
    left.set_title("κ(EA) / κ(A)", loc="left")
    marked(right, ROWS, base=2)
    right.set(xlabel="rows m", xlim=(1.6, 7.5))
    right.set_title("κ(EA) / κ(DA), D the best that is found", loc="left")
    return figure


EXPERIMENT = Experiment(
    "van-der-sluis", "theory", "Row equilibration against all diagonal scalings",
    "Among all diagonal preconditioners, the one that gives a matrix unit rows minimizes its condition number.",
    PAPER, run, tables, figures, remarks, ("tiny", "small"),
)  # fmt: skip
