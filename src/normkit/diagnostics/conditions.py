"""How well every weight of a model is conditioned, and what equilibration of its rows, its columns or both would change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from normkit.diagnostics.conditioning import layer_spectrum, weights_of
from normkit.diagnostics.lanczos import dominant
from normkit.surgery.watch import try_on
from normkit.weights.layout import weight_layout
from normkit.weights.weight_conditioning import Mode, equilibrate

MODES: tuple[Mode, ...] = ("row", "col", "rowcol")
# Up to this smaller side all singular values are computed; that of larger ones takes minutes.
_EXACT = 1024
_CHUNK = 4096  # rows of a tall matrix that are in float64 at a time
# A singular value this far below the largest is rounding error, and the matrix is singular.
_RANK = 1e-12
# As attention's packed projections are named where query, key and value lie one after the other.
_PACKED = ("in_proj_weight", "qkv", "c_attn", "in_proj", "Wqkv")


class Spectrum(NamedTuple):
    """The singular values of a matrix: all of them, or None where only the ends were found, each to a relative error."""

    values: Tensor | None
    largest: float
    smallest: float
    error: float

    @property
    def condition(self) -> float:
        """The largest over the smallest; infinity if the matrix is singular, NaN if an element is not finite."""
        singular = self.smallest <= _RANK * self.largest
        return math.inf if singular else self.largest / self.smallest


def spectrum(matrix: Tensor, *, exact: int = _EXACT) -> Spectrum:
    """Compute the singular values of a matrix in float64, or their ends by Lanczos if its smaller side is large.

    A tall matrix is reduced to its triangular factor R, block by block, so that it is never in float64 as a whole. Where the
    smaller side is above ``exact``, Lanczos finds the largest eigenvalue of R'R and that of its inverse, by solving with R.

    Args:
        matrix: of two axes, not empty.
        exact: smaller side up to which all singular values are computed. Default: 1024.

    Returns:
        All values in descending order if they were computed; the largest and the smallest; a bound of their relative error: that
        of rounding, times κ, and by Lanczos half the relative residual, as so near to each that was found is an eigenvalue.

    Raises:
        BackendError: scipy is missing, and the matrix is large.

    >>> found = spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    >>> found.largest, found.smallest, round(found.condition, 4)
    (4.0, 3.0, 1.3333)
    """
    tall = matrix.detach()
    tall = tall if tall.device.type in ("cpu", "cuda") else tall.cpu()  # other devices may lack float64
    tall = tall.T if tall.shape[0] < tall.shape[1] else tall
    rows, side = tall.shape
    if not tall.isfinite().all():
        return Spectrum(None, math.nan, math.nan, math.nan)
    rounding = side * torch.finfo(torch.float64).eps
    if side <= exact:
        values = torch.linalg.svdvals(_triangle(tall) if rows > 2 * side else tall.double())
        return _ends(values, values[0].item(), values[-1].item(), rounding)
    r = _triangle(tall)
    start = torch.randn(side, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(r.device)
    options: dict[str, Any] = {"tolerance": 1e-9, "limit": 5000, "who": "spectrum"}
    one = dominant(lambda x: r.T @ (r @ x), start, **options)
    largest = math.sqrt(one.value)
    if r.diagonal().abs().min() <= _RANK * largest:
        return _ends(None, largest, 0.0, rounding)

    def inverse(x: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(r.T, x.unsqueeze(1), upper=False)
        return torch.linalg.solve_triangular(r, y, upper=True).squeeze(1)

    other = dominant(inverse, start, **options)
    residual = max(found.error / found.value / 2 for found in (one, other))
    return _ends(None, largest, 1 / math.sqrt(other.value), rounding, residual)


def _ends(values: Tensor | None, largest: float, smallest: float, rounding: float, residual: float = 0.0) -> Spectrum:
    """With the error: that of rounding is a part of the largest, and so of the smallest times the condition number."""
    return Spectrum(values, largest, smallest, max(residual, rounding * _ratio(largest, smallest)))


def _triangle(tall: Tensor) -> Tensor:
    r = tall.new_zeros(0, tall.shape[1], dtype=torch.float64)
    for block in tall.split(_CHUNK):
        r = torch.linalg.qr(torch.cat([r, block.double()]), mode="r").R
    return r


@dataclass(frozen=True)
class WeightCondition:
    """The conditioning of one weight.

    Attributes:
        name: of the layer, with that of the weight if it is another than ``weight``, and the part of a packed projection.
        kind: the layer's class, or ``query``, ``key`` or ``value`` of a packed projection.
        shape: of the matrix: output units x the rest.
        spectrum: of the weight that the layer computes with, unfolded.
        stable_rank: squared Frobenius norm over squared largest singular value, from 1 to the rank.
        rows: largest row norm over the smallest.
        columns: largest column norm over the smallest.
        raw: condition number of the raw parameter; that of the weight if it has no parametrization.
        after: condition numbers of the weight equilibrated in each mode.
        operator: largest and smallest singular value of a convolution with circular padding as an operator on the example's
            size; None without an example, for other layers, and where the size does not fit.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    spectrum: Spectrum
    stable_rank: float
    rows: float
    columns: float
    raw: float
    after: dict[str, float]
    operator: tuple[float, float] | None = None

    @property
    def condition(self) -> float:
        """Largest singular value over the smallest."""
        return self.spectrum.condition

    def json(self) -> dict[str, Any]:
        """All of it as JSON writes it; null for infinity, which it does not have."""
        values, largest, smallest, error = self.spectrum
        ends = {"condition": self.condition, "largest": largest, "smallest": smallest, "error": error}
        found = {**vars(self), **ends, "spectrum": None if values is None else values.tolist()}
        after = {mode: _known(value) for mode, value in self.after.items()}
        return {key: _known(value) for key, value in found.items()} | {"after": after}


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def conditions(
    model: nn.Module,
    where: Callable[[str, nn.Module], bool] | None = None,
    *,
    modes: Sequence[Mode] = MODES,
    example: Any = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> list[WeightCondition]:
    """Report how every weight of a model is conditioned, now and under each kind of conditioning.

    Weights are those of ``weight_conditions``: of Linear, convolutions, embeddings, attention and recurrent layers, unfolded to
    output units x the rest. A packed projection of attention is split into query, key and value. Nothing is changed.

    It takes an SVD per weight and mode, in float64; memory beyond the model is about four times that of its largest weight.

    Args:
        model: any module.
        where: which layers to include, by name and module. Default: all.
        modes: of conditioning to try, as in ``weight_conditioning``. Default: row, col and rowcol.
        example: an input, on which the model is run once to see the sizes of images at its convolutions, whose operators are
            then computed too. Default: None.
        progress: called as ``progress(done, total, name)`` before each weight.

    Returns:
        A row per weight, in the order of the modules.

    Raises:
        OptionError: an unknown mode.
        BackendError: scipy is missing, and the smaller side of a matrix is above 1024.
        SurgeryError: the model does not run on the example.

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> (row,) = conditions(nn.Sequential(layer))
    >>> row.name, row.condition, row.rows, {mode: round(value, 4) for mode, value in row.after.items()}
    ('0', 3.0, 3.0, {'row': 1.0, 'col': 1.0, 'rowcol': 1.0})
    """
    found, sizes, rows = list(weights_of(model, where)), {}, []
    if example is not None:
        layers = [layer for _, layer, *_ in found if isinstance(layer, _ConvNd)]
        sizes = {key: tuple(shape[2:]) for key, shape in try_on(model, example, layers).shapes.items()}
    for done, (label, layer, key, raw, used) in enumerate(found):
        if progress is not None:
            progress(done, len(found), label)
        layout = weight_layout(layer, key)
        whole = layout.matrix(used)
        name = key if isinstance(layer, nn.MultiheadAttention) else label.rpartition(".")[2]
        packed = name in _PACKED and whole.shape[0] == 3 * whole.shape[1]
        parts = ("query", "key", "value") if packed else ("",)
        # A layer is conditioned as a whole, and then split.
        after: dict[Mode, list[float]] = {}
        for mode in modes:
            scaled = layout.matrix(equilibrate(used.detach().double(), mode, layout=layout))
            after[mode] = [spectrum(m).condition for m in scaled.chunk(len(parts))]
        operator = _operator(layer, used, sizes.get(id(layer)))
        for place, part in enumerate(parts):
            matrix, before = (m.chunk(len(parts))[place] for m in (whole, layout.matrix(raw)))
            now = spectrum(matrix)
            lengths = [torch.linalg.vector_norm(matrix, dim=d, dtype=torch.float64) for d in (1, 0)]
            rows.append(
                WeightCondition(
                    name=f"{label}[{part}]" if part else label,
                    kind=part or parametrize.type_before_parametrizations(layer).__name__,
                    shape=(matrix.shape[0], matrix.shape[1]),
                    spectrum=now,
                    stable_rank=_ratio(lengths[0].square().sum().item(), now.largest**2),
                    rows=_ratio(lengths[0].max().item(), lengths[0].min().item()),
                    columns=_ratio(lengths[1].max().item(), lengths[1].min().item()),
                    raw=now.condition if used is raw else spectrum(before).condition,
                    after={mode: values[place] for mode, values in after.items()},
                    operator=operator,
                )
            )
    return rows


def _operator(layer: nn.Module, used: Tensor, size: tuple[int, ...] | None) -> tuple[float, float] | None:
    if not isinstance(layer, _ConvNd) or size is None:
        return None
    if layer.transposed:
        size = tuple(n * s for n, s in zip(size, layer.stride, strict=True))
    extents = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    if any(n % s or n < k for n, s, k in zip(size, layer.stride, extents, strict=True)):
        return None
    values = layer_spectrum(layer, used, size)
    return values[0].item(), values[-1].item()


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf if above else math.nan
