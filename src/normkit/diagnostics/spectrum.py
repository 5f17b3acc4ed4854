"""Singular values of a matrix, and Lanczos: extreme eigenvalues of a symmetric operator, and quadrature of its spectrum."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.core.errors import BackendError, OptionError

Product = Callable[[Tensor], Tensor]

# Vectors that ARPACK keeps: with fewer it restarts more often, with more it takes more memory.
VECTORS = 20
# Up to this smaller side all singular values are computed; those of larger matrices take minutes.
EXACT = 1024
# A singular value this far below the largest is rounding error, and the matrix is singular.
_RANK = 1e-12
_CHUNK = 4096  # rows of a tall matrix that are in float64 at a time


class Dominant(NamedTuple):
    """The eigenvalue of largest magnitude; an eigenvalue is within ``error`` of it, after some products with the matrix."""

    value: float
    error: float
    products: int


def dominant(
    product: Product, start: Tensor, *, tolerance: float, limit: int, who: str, scale: float = 0.0
) -> Dominant:
    """Find a symmetric operator's eigenvalue of largest magnitude by ARPACK, implicitly restarted Lanczos.

    It stops at a relative error, or gives up after a limit of products. The error is the residual norm |A v - value v|, v the
    unit vector found: so near to the value is an eigenvalue. What is rounding of numbers of a scale counts as the zero matrix,
    from which ARPACK cannot start. Memory: about 24 vectors, on the CPU.

    >>> scale = torch.arange(1.0, 101.0, dtype=torch.float64)
    >>> found = dominant(lambda x: scale * x, torch.ones_like(scale), tolerance=1e-9, limit=1000, who="example")
    >>> round(found.value, 6), found.error < 1e-4
    (100.0, True)
    """
    # curvlinops offers operators for the same solver, but its dependencies bring a torchvision that breaks a CPU build of torch.
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ModuleNotFoundError:
        raise BackendError(f"{who}: scipy finds the eigenvalues, and is not installed; pip install scipy") from None
    first, length = product(start), start.norm().item()
    if len(start) == 1:
        return Dominant((first @ start / (start @ start)).item(), 0.0, 1)
    size, made, rest = len(start), 1, first.norm().item() / length
    if rest <= 10 * torch.finfo(start.dtype).eps * scale:
        return Dominant(0.0, rest, made)

    def multiply(x: Any) -> Any:
        nonlocal made
        made += 1
        return product(torch.from_numpy(x.reshape(-1)).to(start)).cpu().numpy()

    vectors, begin = min(size, VECTORS), start.cpu().numpy()
    operator: Any = LinearOperator((size, size), matvec=multiply, dtype=begin.dtype)  # pyright: ignore[reportCallIssue]
    options: dict[str, Any] = {"tol": tolerance, "ncv": vectors, "maxiter": max(1, limit // vectors)}
    try:
        values, found = eigsh(operator, k=1, which="LM", v0=begin, **options)
    except ArpackNoConvergence:
        raise OptionError(
            f"{who}: {made} products did not bring an eigenvalue to a relative error of {tolerance:g}; give a larger limit= or "
            "tolerance="
        ) from None
    value, unit = float(values[0]), torch.from_numpy(found[:, 0]).to(start)
    return Dominant(value, (product(unit) - value * unit).norm().item(), made + 1)


def quadrature(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Take steps of Lanczos from a vector: Gauss quadrature of the operator's spectrum, weighted by the vector.

    With nodes x_k in ascending order and weights w_k, the sum of w_k f(x_k) is v' f(A) v for every polynomial f of degree below
    2 steps, v the start scaled to norm 1. Every vector is kept and made orthogonal to all, as rounding would else bring back
    eigenvalues that have been found.

    >>> nodes, weights = quadrature(lambda x: torch.tensor([1.0, 3.0]) * x, torch.tensor([1.0, 1.0]), 5)
    >>> nodes.float(), weights.float()
    (tensor([1.0000, 3.0000]), tensor([0.5000, 0.5000]))
    """
    basis, diagonal, beside = [start / start.norm()], list[Tensor](), list[Tensor]()
    for _ in range(min(steps, len(start))):
        following = product(basis[-1])
        diagonal.append(following @ basis[-1])
        for _ in range(2):  # the second pass removes what the first one's rounding leaves
            for vector in basis:
                following = following - (following @ vector) * vector
        length = following.norm()
        # Below this the vector is rounding error, and the space is complete.
        if length <= torch.finfo(start.dtype).eps * len(start) * max(map(abs, diagonal)):
            break
        beside.append(length)
        basis.append(following / length)
    inner = torch.stack(beside[: len(diagonal) - 1]).double() if len(diagonal) > 1 else start.new_zeros(0).double()
    middle = torch.stack(diagonal).double()
    nodes, vectors = torch.linalg.eigh(torch.diag(middle) + torch.diag(inner, 1) + torch.diag(inner, -1))
    return nodes, vectors[0].square()


class Spectrum(NamedTuple):
    """The singular values of a matrix: all of them, or None where only the ends were found, each to a relative error."""

    values: Tensor | None
    largest: float
    smallest: float
    error: float

    @property
    def condition(self) -> float:
        """The largest over the smallest; infinity if the matrix is singular, NaN if an element is not finite."""
        return condition_of(torch.tensor([self.largest, self.smallest], dtype=torch.float64)).item()


def condition_of(values: Tensor) -> Tensor:
    """The ratio of the first to the last along the last axis of descending singular values; infinity where that is rounding."""
    high, low = values[..., 0], values[..., -1]
    return torch.where(low <= _RANK * high, math.inf, high / low)


def spectrum(matrix: Tensor, *, exact: float = EXACT) -> Spectrum:
    """Compute the singular values of a matrix in float64, or their ends by Lanczos if its smaller side is large.

    A tall matrix is reduced to its triangular factor R, block by block, so that it is never in float64 as a whole. Where the
    smaller side is above ``exact``, Lanczos finds the largest eigenvalue of R'R and that of its inverse, by solving with R.

    The bound of the relative error is that of rounding, times κ, and by Lanczos half the relative residual, as so near to each
    that was found is an eigenvalue.

    >>> found = spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    >>> found.largest, found.smallest, round(found.condition, 4)
    (4.0, 3.0, 1.3333)
    """
    tall = matrix.detach().to(where_wide(matrix))
    tall = tall.T if tall.shape[0] < tall.shape[1] else tall
    rows, side = tall.shape
    if not tall.isfinite().all():
        return Spectrum(None, math.nan, math.nan, math.nan)
    rounding = side * torch.finfo(torch.float64).eps
    if side <= exact:
        values = torch.linalg.svdvals(_triangle(tall) if rows > 2 * side else wide(tall))
        return _ends(values, values[0].item(), values[-1].item(), rounding)
    r = _triangle(tall)
    start = torch.randn(side, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(r)
    options: dict[str, Any] = {"tolerance": 1e-9, "limit": 5000, "who": "spectrum"}
    one = dominant(lambda x: r.mH @ (r @ x), start, **options)
    largest = math.sqrt(one.value)
    if r.diagonal().abs().min() <= _RANK * largest:
        return _ends(None, largest, 0.0, rounding)

    def inverse(x: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(r.mH, x.unsqueeze(1), upper=False)
        return torch.linalg.solve_triangular(r, y, upper=True).squeeze(1)

    other = dominant(inverse, start, **options)
    residual = max(found.error / found.value / 2 for found in (one, other))
    return _ends(None, largest, 1 / math.sqrt(other.value), rounding, residual)


def wide(x: Tensor) -> Tensor:
    """In float64, or complex128."""
    return x.detach().to(where_wide(x), torch.complex128 if x.is_complex() else torch.float64)


def where_wide(x: Tensor) -> torch.device:
    """The tensor's device, or the CPU where that may lack float64."""
    return x.device if x.device.type in ("cpu", "cuda", "meta") else torch.device("cpu")


def ratio(above: float, below: float) -> float:
    """A quotient; infinity over 0, and NaN of 0 by 0."""
    return above / below if below else math.inf if above else math.nan


def _ends(values: Tensor | None, largest: float, smallest: float, rounding: float, residual: float = 0.0) -> Spectrum:
    """With the error: that of rounding is a part of the largest, and so of the smallest times the condition number."""
    return Spectrum(values, largest, smallest, max(residual, rounding * ratio(largest, smallest)))


def _triangle(tall: Tensor) -> Tensor:
    r = wide(tall[:0])
    for block in tall.split(_CHUNK):
        r = torch.linalg.qr(torch.cat([r, wide(block)]), mode="r").R
    return r
