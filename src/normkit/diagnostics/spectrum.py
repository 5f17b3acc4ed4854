"""The singular values of a matrix in float64: all of them, or the ends of a large one by Lanczos."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.diagnostics.lanczos import dominant

# Up to this smaller side all singular values are computed; those of larger matrices take minutes.
EXACT = 1024
# A singular value this far below the largest is rounding error, and the matrix is singular.
_RANK = 1e-12
_CHUNK = 4096  # rows of a tall matrix that are in float64 at a time


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
