"""Condition numbers of matrices, of a model's weights, and of convolutions as linear operators.

Row equilibration E makes chi(A) = max row norm / sigma_min least among all left diagonal scalings DA of a matrix of m rows and
full rank; so kappa(EA) <= sqrt(m) min_D kappa(DA), and with two rows E is the best D. That kappa(EA) <= kappa(A) always, or that
conditioned weights make the loss's Hessian no worse, has been published and is false; docs/theory.md has proofs and
counterexamples. E usually lowers kappa where row norms differ much: measure it.

Reference: van der Sluis, "Condition Numbers and Equilibration of Matrices" (1969), https://doi.org/10.1007/BF02165096;
Saratchandran, Wang, Lucey, "Weight Conditioning for Smooth Optimization of Neural Networks" (2024),
https://arxiv.org/abs/2409.03424; Sedghi, Gupta, Long, "The Singular Values of Convolutional Layers" (2019),
https://arxiv.org/abs/1805.10408.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from normkit.core.errors import ShapeError
from normkit.core.support import show
from normkit.diagnostics.spectrum import Spectrum, ratio, spectrum, wide
from normkit.diagnostics.subject import Where, chosen, refuse_lazy
from normkit.surgery.watch import try_on
from normkit.weights.layout import hooked_weight, weight_layout, weight_of
from normkit.weights.weight_conditioning import Mode, equilibrate

# As attention's packed projections are named where query, key and value lie one after the other.
_PACKED = ("in_proj_weight", "qkv", "c_attn", "in_proj", "Wqkv")


def condition_number(matrix: Tensor) -> float:
    """Compute the ratio of a matrix's largest singular value to its min(m, n)-th, in float64.

    Args:
        matrix: a tensor of two axes.

    Returns a number from 1; infinity if the smallest is below 1e-12 of the largest; NaN if an element is not finite.

    Raises:
        ShapeError: another number of axes, or no elements.

    >>> round(condition_number(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])), 6)
    1.5
    """
    return _spectrum(matrix, "condition_number").condition


def chi(matrix: Tensor) -> float:
    """Compute the largest row norm over the smallest singular value: between kappa / sqrt(m) and kappa; E minimizes it.

    >>> round(chi(torch.tensor([[3.0, 4.0], [4.0, 3.0]])), 6)
    5.0
    """
    found = _spectrum(matrix, "chi")
    longest = torch.linalg.vector_norm(wide(matrix), dim=1).max().item()
    return found.condition if math.isinf(found.condition) else longest / found.smallest


def weight_conditions(model: nn.Module, where: Where | None = None) -> dict[str, tuple[float, float]]:
    """Compute the condition numbers of every layer's weight: of the raw parameter, and of the effective weight.

    Weights of more than two axes are unfolded to output units x the rest. The raw weight is ``original``, or the direction v of
    weight normalization; without a parametrization both numbers are equal. Under the hook-based utilities of ``torch.nn.utils``
    the weight is that of the last pass. Nothing is changed, not even the buffers of spectral normalization.

    Args:
        model: any module.
        where: which layers to include, by name and module. Default: all.

    Returns a dictionary from layer name to (raw, effective). A name other than ``weight`` follows the layer's.

    Raises:
        OptionError: a lazy layer has no size yet.

    >>> from normkit.weights.weight_conditioning import weight_conditioning
    >>> layer = weight_conditioning(nn.Linear(2, 2))
    >>> layer.weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> {name: f"{raw:.2f} -> {used:.2f}" for name, (raw, used) in weight_conditions(nn.Sequential(layer)).items()}
    {'0': '3.00 -> 1.00'}
    """
    found = {}
    for label, layer, key, raw, used in weights_of(model, where, "weight_conditions"):
        layout = weight_layout(layer, key)
        before = condition_number(layout.matrix(raw))
        found[label] = (before, before if used is raw else condition_number(layout.matrix(used)))
    return found


def weights_of(model: nn.Module, where: Where | None, who: str) -> Iterator[tuple[str, nn.Module, str, Tensor, Tensor]]:
    """Label, layer, name, raw and effective value of each weight of two axes or more, as ``weight_conditions`` names them."""
    refuse_lazy(model, who)
    for layer, name in chosen(model, where or (lambda *_: True)).items():
        if isinstance(layer, parametrize.ParametrizationList):
            continue
        for key in _weight_names(layer):
            raw, used = raw_and_used(layer, key)
            if raw.dim() > 1 and 0 not in raw.shape and raw.is_floating_point():
                yield name if key == "weight" else f"{name}.{key}" if name else key, layer, key, raw, used


def operator_spectrum(kernel: Tensor, size: Sequence[int], groups: int = 1, stride: Sequence[int] = ()) -> Tensor:
    """Compute all singular values of a convolution with circular padding, as a linear operator on inputs of a size.

    The Fourier transform makes the operator one small matrix for each frequency; their singular values together are the
    operator's. A stride s adds the s frequencies that it cannot tell apart: their matrices stand side by side, times
    1 / sqrt(s). Zero padding is not considered.

    Args:
        kernel: (out, in/groups, *taps), any number of spatial axes.
        size: size of the input along each spatial axis, not below the taps, and a multiple of the stride.
        groups: groups of the convolution. Default: 1.
        stride: along each spatial axis. Default: 1.

    Returns in descending order, float64: as many as the smaller of the operator's two sizes, in each group.

    Raises:
        ShapeError: the size does not fit the kernel or the stride.

    Reference: Sedghi, Gupta, Long (2019), https://arxiv.org/abs/1805.10408.

    >>> operator_spectrum(torch.tensor([[[1.0, 1.0]]]), (4,)).round(decimals=4)
    tensor([2.0000, 1.4142, 1.4142, 0.0000], dtype=torch.float64)
    """
    taps = kernel.shape[2:]
    if kernel.dim() < 3 or len(size) != len(taps) or any(n < k for n, k in zip(size, taps, strict=False)):
        raise ShapeError(
            f"operator_spectrum: a kernel of shape {show(kernel.shape)} on inputs of size {show(size)}; wanted one size per "
            "axis of taps, not below the taps"
        )
    if kernel.shape[0] % groups:
        raise ShapeError(f"operator_spectrum: {kernel.shape[0]} output channels do not split into groups={groups}")
    steps = tuple(stride) or (1,) * len(taps)
    if len(steps) != len(taps) or any(n % s for n, s in zip(size, steps, strict=True)):
        raise ShapeError(
            f"operator_spectrum: stride {show(steps)} on inputs of size {show(size)}; wanted a divisor per size"
        )
    axes = tuple(range(2, kernel.dim()))
    response = torch.fft.fftn(wide(kernel), s=tuple(size), dim=axes)
    for axis, step in zip(axes, steps, strict=True):
        alike = response.unflatten(axis, (step, -1)).movedim(axis, 1)
        response = alike.flatten(1, 2) / math.sqrt(step)
    matrices = response.flatten(2).unflatten(0, (groups, -1)).permute(3, 0, 1, 2)
    return torch.linalg.svdvals(matrices).flatten().sort(descending=True).values


def operator_norm(layer: nn.Module | Tensor, size: Sequence[int] = (), *, groups: int = 1) -> float:
    """Compute the exact norm of a layer as a linear operator: its largest singular value, hence its Lipschitz constant.

    A convolution is taken with circular padding, on inputs of the size. With W the 2-D unfolding whose norm ``spectral_norm``
    fixes to 1, norm <= sqrt(number of taps) sigma(W), and without strides sigma(W) <= norm.

    Args:
        layer: Linear, Conv or ConvTranspose, parametrized or not; or a kernel, (out, in/groups, *taps) or a matrix.
        size: size of the input along each spatial axis, at least the extent of the taps; of a ConvTranspose that of the output.
            Default: (), for a matrix.
        groups: groups of a convolution whose kernel is given; a layer has its own. Default: 1.

    Returns a number; NaN if an element is not finite.

    Raises:
        ShapeError: the size does not fit the taps or the strides.

    Reference: Sedghi, Gupta, Long (2019), https://arxiv.org/abs/1805.10408.

    >>> round(operator_norm(torch.tensor([[[1.0, 1.0]]]), (4,)), 4)  # sqrt(2) times that of the unfolding
    2.0
    """
    kernel = weight_of(layer, "weight", "operator_norm") if isinstance(layer, nn.Module) else layer
    if not kernel.isfinite().all():
        return math.nan
    if kernel.dim() == 2 and not size:
        return _spectrum(kernel, "operator_norm").largest
    if isinstance(layer, _ConvNd):
        return layer_spectrum(layer, kernel, size)[0].item()
    return operator_spectrum(kernel, size, groups)[0].item()


def layer_spectrum(layer: _ConvNd, kernel: Tensor, size: Sequence[int]) -> Tensor:
    """The operator's spectrum of a convolution layer with some kernel, its groups, strides and dilation included."""
    # Transposing keeps singular values: a transposed convolution has those of the convolution with its kernel.
    for axis, step in enumerate(layer.dilation, 2):
        spread = kernel.new_zeros([(n - 1) * step + 1 if d == axis else n for d, n in enumerate(kernel.shape)])
        places = torch.arange(0, spread.shape[axis], step, device=kernel.device)
        kernel = spread.index_copy(axis, places, kernel.detach())
    return operator_spectrum(kernel, size, layer.groups, layer.stride)


def _spectrum(matrix: Tensor, who: str) -> Spectrum:
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ShapeError(
            f"{who}: got a tensor of shape {show(matrix.shape)}, wanted a matrix that is not empty; unfold it first, "
            "e.g. weight.flatten(1)"
        )
    return spectrum(matrix, exact=math.inf)


def _weight_names(layer: nn.Module) -> list[str]:
    """The layer's own tensors that multiply its input; a norm's gain does not."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return []
    own = {}
    for key, _ in layer.named_parameters(recurse=False):  # from which a hook may compute a weight of another name
        stem = key.rpartition("_")[0]
        own[stem if key.endswith(("_orig", "_g", "_v")) and hooked_weight(layer, stem) else key] = key
    parts = layer._modules.get("parametrizations")
    derived = list(parts._modules) if isinstance(parts, nn.ModuleDict) else []
    return [key for key in (*own, *derived) if key == "weight" or "_weight" in key or key.startswith("weight_")]


@torch.no_grad()
def raw_and_used(layer: nn.Module, key: str) -> tuple[Tensor, Tensor]:
    """A weight as it is stored and as the layer uses it; power iteration stands still meanwhile."""
    if not parametrize.is_parametrized(layer, key):
        used = getattr(layer, key)
        hooked = hooked_weight(layer, key)
        return (used if hooked is None else hooked[1]), used
    parts = layer.get_submodule(f"parametrizations.{key}")
    raw = getattr(parts, "original" if parts.is_tensor else "original1")
    modes = {part: part.training for part in parts.modules()}
    try:
        return raw, parts.eval()()
    finally:
        for part, training in modes.items():
            part.training = training


MODES: tuple[Mode, ...] = ("row", "col", "rowcol")


@dataclass(frozen=True)
class WeightCondition:
    """The conditioning of one weight."""

    # Of the layer, with that of the weight if it is another than ``weight``, and the part of a packed projection.
    name: str
    kind: str  # the layer's class, or ``query``, ``key`` or ``value`` of a packed projection
    shape: tuple[int, int]  # of the matrix: output units x the rest
    spectrum: Spectrum  # of the weight that the layer computes with, unfolded
    stable_rank: float  # squared Frobenius norm over squared largest singular value, from 1 to the rank
    rows: float  # largest row norm over the smallest
    columns: float  # largest column norm over the smallest
    raw: float  # condition number of the raw parameter; that of the weight if it has no parametrization
    after: dict[str, float]  # condition numbers of the weight equilibrated in each mode
    # Largest and smallest singular value of a convolution with circular padding as an operator on the example's size;
    # None without an example, for other layers, and where the size does not fit.
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

    Returns a row per weight, in the order of the modules.

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
            full, kind = (
                (f"{label}[{part}]", part)
                if part
                else (label, parametrize.type_before_parametrizations(layer).__name__)
            )
            stable = ratio(lengths[0].square().sum().item(), now.largest**2)
            by_row, by_column = (ratio(length.max().item(), length.min().item()) for length in lengths)
            then = {mode: values[place] for mode, values in after.items()}
            raw_one = now.condition if used is raw else spectrum(before).condition
            shape = matrix.shape[0], matrix.shape[1]
            rows.append(WeightCondition(full, kind, shape, now, stable, by_row, by_column, raw_one, then, operator))
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
