"""How well every weight of a model is conditioned, and what equilibration of its rows, its columns or both would change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from normkit.diagnostics.conditioning import layer_spectrum, weights_of
from normkit.diagnostics.spectrum import Spectrum, ratio, spectrum
from normkit.diagnostics.subject import Where
from normkit.surgery.watch import try_on
from normkit.weights.layout import weight_layout
from normkit.weights.weight_conditioning import Mode, equilibrate

MODES: tuple[Mode, ...] = ("row", "col", "rowcol")
# As attention's packed projections are named where query, key and value lie one after the other.
_PACKED = ("in_proj_weight", "qkv", "c_attn", "in_proj", "Wqkv")


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
    where: Where | None = None,
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
        OptionError: an unknown mode, or a lazy layer without a size yet.
        BackendError: scipy is missing, and the smaller side of a matrix is above 1024.
        SurgeryError: the model does not run on the example.

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> (row,) = conditions(nn.Sequential(layer))
    >>> row.name, row.condition, row.rows, {mode: round(value, 4) for mode, value in row.after.items()}
    ('0', 3.0, 3.0, {'row': 1.0, 'col': 1.0, 'rowcol': 1.0})
    """
    found, sizes, rows = list(weights_of(model, where, "conditions")), {}, []
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
                    stable_rank=ratio(lengths[0].square().sum().item(), now.largest**2),
                    rows=ratio(lengths[0].max().item(), lengths[0].min().item()),
                    columns=ratio(lengths[1].max().item(), lengths[1].min().item()),
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
