"""Gradient descent on a quadratic: equations (2) to (13) of the paper on weight conditioning, with predicted and measured rates.

On f(x) = x'Ax/2 - b'x with A symmetric and positive definite, descent x <- x - rate (Ax - b) multiplies the error along
eigenvector i by 1 - rate s_i at each step (7). It converges where rate < 2/s_1 (10), the best fixed rate is 2 / (s_1 + s_n),
and the error then falls by (kappa - 1) / (kappa + 1) per step, kappa = s_1 / s_n (12).

Preconditioned, x <- x - rate P(Ax - b) has the same with the eigenvalues of PA, which are real and positive for P symmetric and
positive definite, and those of P^(1/2) A P^(1/2). They are not its singular values: for PA that is not symmetric, kappa as a
ratio of singular values predicts nothing here. Nor is descent on (13) as printed, x'PAx/2 - b'Px, this iteration: its gradient
is (PA + A'P')x/2 - P'b, which is 0 elsewhere than at the solution of Ax = b.

Ours: A is a matrix near the identity with its rows and columns scaled, drawn by a seed, six by six, in double precision.
"""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from normkit.diagnostics.conditioning import condition_number
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments.classification import PAPER
from normkit.lab.report.canvas import FULL, panels
from normkit.lab.report.drawing import COLOURS, GREY, name_ends

SIZE, FOLLOWED, ENOUGH, STEPS = 6, 40, 1e-10, {"tiny": 200, "small": 30_000}


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """A symmetric positive definite matrix of badly scaled rows and columns, and b."""
    made = torch.Generator().manual_seed(seed)
    noise = 0.05 * torch.randn(SIZE, SIZE, generator=made, dtype=torch.float64)
    scales = torch.logspace(0, 2.2, SIZE, dtype=torch.float64)[torch.randperm(SIZE, generator=made)].diag()
    near = torch.eye(SIZE, dtype=torch.float64) + 0.5 * (noise + noise.T)
    return scales @ near @ scales, torch.randn(SIZE, generator=made, dtype=torch.float64)


def preconditioners(a: Tensor, seed: int) -> dict[str, Tensor]:
    """Matrices P, each symmetric and positive definite."""
    made = torch.Generator().manual_seed(seed + 1)
    c = 0.3 * torch.randn(SIZE, SIZE, generator=made, dtype=torch.float64)
    root = a.diag().rsqrt().diag()
    return {
        "none": torch.eye(SIZE, dtype=torch.float64),
        "E, unit rows": a.norm(dim=1).reciprocal().diag(),
        "Jacobi": a.diag().reciprocal().diag(),
        # Near Jacobi and not diagonal: nothing in the theory asks for a diagonal.
        "general": root @ (torch.eye(SIZE, dtype=torch.float64) + c @ c.T / SIZE) @ root,
        "inverse": torch.linalg.inv(a),
    }


def eigenvalues(a: Tensor, p: Tensor) -> Tensor:
    """The eigenvalues of PA in ascending order, as those of C'AC, P = CC'."""
    c = torch.linalg.cholesky(p)
    return torch.linalg.eigvalsh(c.T @ a @ c)


def descend(
    a: Tensor, b: Tensor, p: Tensor, rate: float, steps: int, start: Tensor | None = None, enough: float = ENOUGH
) -> Tensor:
    """The errors x_t - A^(-1)b of descent, (steps + 1, n) or fewer where they fall to a part of the first; from 0 by default.

    >>> eye = torch.eye(2).double()
    >>> descend(torch.tensor([1.0, 25.0]).double().diag(), 0 * eye[0], eye, 0.02, 2, 2 * eye[1])[:, 1].tolist()
    [2.0, 1.0, 0.5]
    """
    x, solution = torch.zeros_like(b) if start is None else start, torch.linalg.solve(a, b)
    found = [x - solution]
    while len(found) <= steps and found[-1].norm() > enough * found[0].norm():
        x = x - rate * (p @ (a @ x - b))
        found.append(x - solution)
    return torch.stack(found)


def contraction(a: Tensor, b: Tensor, p: Tensor, rate: float, steps: int) -> float:
    """The factor of the error per step at the end of a descent, in the norm of P^(-1)."""
    errors = descend(a, b, p, rate, steps)[-4:]
    lengths = torch.linalg.solve_triangular(torch.linalg.cholesky(p), errors.T, upper=False).norm(dim=0)
    return (lengths[-1] / lengths[0]).item() ** (1 / (len(errors) - 1))


def largest_stable(a: Tensor, steps: int = 2000) -> float:
    """The largest rate at which the gradient does not grow in that many steps, by bisection.

    >>> round(largest_stable(torch.tensor([[25.0, 0.0], [0.0, 1.0]], dtype=torch.float64)), 6)
    0.08
    """
    low, high, start = 0.0, 8 / a.trace().item(), torch.linalg.eigh(a).eigenvectors.sum(1)
    for _ in range(40):
        rate = 0.5 * (low + high)
        w = torch.linalg.matrix_power(torch.eye(len(a), dtype=a.dtype) - rate * a, steps) @ start
        low, high = (rate, high) if (a @ w).norm() <= (a @ start).norm() else (low, rate)
    return low


def run(bench: Bench) -> dict[str, Any]:
    """Descends in every form."""
    a, b = problem(bench.seeds[0])
    values, vectors = torch.linalg.eigh(a)
    rate = 1.9 / values[-1].item()
    y = descend(a, b, torch.eye(SIZE, dtype=a.dtype), rate, FOLLOWED) @ vectors
    measured, factors = (y[2] / y[0]).abs().sqrt() * (y[1] / y[0]).sign(), 1 - rate * values
    rows = []
    for name, p in preconditioners(a, bench.seeds[0]).items():
        low, *_, high = eigenvalues(a, p).tolist()
        best, predicted = 2 / (high + low), (high - low) / (high + low)
        row = {"name": name, "singular": condition_number(p @ a), "ratio": high / low, "predicted": predicted}
        row |= {"measured": contraction(a, b, p, best, STEPS[bench.scale]), "printed": _printed(a, b, p)}
        rows.append({**row, "errors": descend(a, b, p, best, FOLLOWED).norm(dim=1).tolist()})
    return {
        "directions": [values.tolist(), factors.tolist(), measured.tolist()],
        "apart": (measured - factors).abs().max().item(),
        "off": max(abs(row["measured"] - row["predicted"]) for row in rows),
        "errors": (y / y[0]).abs().T.tolist(),
        "bound": 2 / values[-1].item(),
        "stable": largest_stable(a),
        "forms": rows,
    }


def _printed(a: Tensor, b: Tensor, p: Tensor) -> float:
    # How far the stationary point of (13) as printed is from the solution, relative to it.
    symmetric, solution = 0.5 * (p @ a + a.T @ p.T), torch.linalg.solve(a, b)
    return ((torch.linalg.solve(symmetric, p.T @ b) - solution).norm() / solution.norm()).item()


def tables(result: dict[str, Any]) -> list[Table]:
    """Directions, and forms."""
    lines = [[k, *(f"{v:.6g}" for v in row)] for k, row in enumerate(zip(*result["directions"], strict=True), 1)]
    keys = ("singular", "ratio", "predicted", "measured", "printed")
    forms = [[form["name"], *(f"{form[key]:.6g}" for key in keys)] for form in result["forms"]]
    columns = ("P", "κ of PA by singular values", "by eigenvalues", "factor predicted", "measured", "(13) off by")
    note = "Off by: distance of the stationary point of (13) as printed from the solution of Ax = b, in parts of the solution."
    return [
        Table("One step along each eigenvector, at rate 1.9 / σ₁", ("i", "σᵢ", "1 - ησᵢ", "measured"), lines),
        Table("Preconditioned descent at its best rate", columns, forms, [note]),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    """How far predictions and measurements agree."""
    wrong = [form["name"] for form in result["forms"] if form["printed"] > 1e-6]
    return [
        f"Factors per step along the eigenvectors are 1 - ησᵢ within {result['apart']:.1g}.",
        f"The largest stable rate is {result['stable']:.6g}, and 2/σ₁ is {result['bound']:.6g}.",
        f"Factors per step at the best rate are those of the eigenvalues of PA within {result['off']:.1g}.",
        f"Equation (13) as printed has another solution than Ax = b for P: {', '.join(wrong)}.",
    ]


def figures(result: dict[str, Any]) -> list[Drawing]:
    """One figure."""
    caption = (
        "Left: the error along each eigenvector of A under plain descent at rate 1.9 / s_1, in parts of the first (dots), "
        "and what equation (7) predicts (lines); the flattest line is the smallest eigenvalue. Right: the whole error "
        "under preconditioned descent, each form at its best rate; the inverse of A is done after one step. The order at "
        "the right is that of the eigenvalue ratios of PA, not of its singular values."
    )
    return [Drawing("descent", lambda: draw(result), caption)]


def draw(result: dict[str, Any]) -> Figure:
    """Errors along directions, and of every form."""
    figure, (left, right) = panels(2, FULL, 2.6)
    ends = []
    for k, (factor, errors) in enumerate(zip(result["directions"][1], result["errors"], strict=True)):
        hue = COLOURS[k % len(COLOURS)]
        steps = range(len(errors))
        left.plot(steps, [abs(factor) ** t for t in steps], color=hue, linewidth=0.9)
        left.plot(steps[::4], errors[::4], "o", color=hue, markersize=2.6)
    for form, hue in zip(result["forms"], (GREY, *COLOURS), strict=False):
        errors = [max(error / form["errors"][0], 1e-12) for error in form["errors"]]
        right.plot(errors, color=hue)
        ends.append((errors[-1], form["name"], hue))
    for axis, title, low in ((left, "error along each eigenvector", 1e-4), (right, "error, by preconditioner", 1e-12)):
        axis.set(yscale="log", ylim=(low, 2), xlabel="step")
        axis.set_title(title, loc="left")
    name_ends(right, ends)
    return figure


EXPERIMENT = Experiment(
    "quadratic", "theory", "Gradient descent on a quadratic, with and without preconditioning",
    "The rate of gradient descent is set by the condition number, and a preconditioner that lowers it makes descent faster.",
    PAPER, run, tables, figures, remarks, ("tiny", "small"),
)  # fmt: skip
