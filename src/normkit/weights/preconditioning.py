"""Preconditioning of a weight by matrices of one's own, and of attention's by a multiple of the identity that is added."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.moments import accumulation_dtype
from normkit.core.support import show
from normkit.weights import kernels
from normkit.weights.attachment import ModuleT, attach
from normkit.weights.layout import WeightLayout, weight_layout, weight_of
from normkit.weights.parametrization import Parametrization, inverse_norm

Preconditioner = Tensor | Callable[[Tensor], Tensor]
Gradient = Literal["full", "detach"]


def inverse_root_rows(matrix: Tensor) -> Tensor:
    """The diagonal 1 / sqrt(norm(a_i)) over rows, of one matrix or several.

    >>> inverse_root_rows(torch.tensor([[0.0, 4.0], [16.0, 0.0]]))
    tensor([0.5000, 0.2500])
    """
    return inverse_norm(matrix, (matrix.dim() - 1,), 1e-12).squeeze(-1).sqrt()


def inverse_root_diagonal(matrix: Tensor) -> Tensor:
    """The diagonal 1 / sqrt(abs(a_ii)) of a square matrix; from both sides it is the symmetric Jacobi preconditioner.

    Raises:
        OptionError: the matrix is not square.

    >>> inverse_root_diagonal(torch.tensor([[4.0, 1.0], [1.0, 16.0]]))
    tensor([0.5000, 0.2500])
    """
    if matrix.shape[-1] != matrix.shape[-2]:
        raise OptionError(f"inverse_root_diagonal: got a matrix of {show(matrix.shape[-2:])}; wanted a square one")
    return matrix.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-12).rsqrt()


class Precondition(Parametrization):
    """The parametrization W = P1 A P2, where A is the raw weight's matrix and P1 and P2 are given.

    A preconditioner is a tensor, or a function of A that gives one. A vector is a diagonal, a matrix is taken whole. Tensors are
    constants: they are buffers, go with the module to other devices and dtypes and are in its state_dict. Both functions see the
    raw A. Where the weight has groups, A is (groups, rows, columns), each group has its own P, and a tensor serves all.

    A module whose preconditioner is a function can be pickled if that function can: one of a module, not a lambda.

    Args:
        left: P1, of (rows,) or (rows, rows) of one group. Default: None, the identity.
        right: P2, of (columns,) or (columns, columns). Default: None, the identity.
        layout: layout of the weight. Default: axis 0 indexes output units.
        gradient: of functions: ``"full"`` differentiates through them, ``"detach"`` takes what they give as a constant.
            Default: "full".

    Shape: Any of two axes or more; the output has the same shape; products are taken in at least float32.

    Raises:
        OptionError: neither side is given, or an unknown ``gradient``.
        ShapeError: in use, a preconditioner that does not fit the weight.

    Reference: Saratchandran, Wang, Lucey, "Weight Conditioning for Smooth Optimization of Neural Networks" (2024),
    https://arxiv.org/abs/2409.03424: its definition of preconditioning, without its choice of the matrix.

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> Precondition(torch.tensor([2.0, 1.0]), swap)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[4., 2.],
            [4., 3.]])
    """

    left: Preconditioner | None
    right: Preconditioner | None

    def __init__(
        self,
        left: Preconditioner | None = None,
        right: Preconditioner | None = None,
        layout: WeightLayout | None = None,
        *,
        gradient: Gradient = "full",
    ) -> None:
        super().__init__()
        if left is None and right is None:
            raise OptionError("Precondition: neither left= nor right= is given; wanted a tensor or function for one")
        check_options("Precondition", gradient=(gradient, Gradient))
        self.layout, self.gradient = layout or WeightLayout(), gradient
        for side, given in (("left", left), ("right", right)):
            if isinstance(given, Tensor):
                self.register_buffer(side, given.detach().clone())
            elif given is None or callable(given):
                setattr(self, side, given)
            else:
                raise OptionError(f"Precondition: {side} is a {type(given).__name__}; wanted a tensor or a function")

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        """The preconditioned weight by torch's operators."""
        matrix = self.layout.matrix(weight.to(accumulation_dtype(weight.dtype)))
        if self.layout.groups > 1:
            matrix = matrix.unflatten(0, (self.layout.groups, -1))
        y = matrix
        for side in ("left", "right"):
            found = self._at(matrix, side)
            if found is None:
                continue
            if found.dim() == matrix.dim():
                y = found @ y if side == "left" else y @ found
            else:
                y = y * found.unsqueeze(-1 if side == "left" else -2)
        return self.layout.weight(y.reshape(-1, y.shape[-1]), weight.shape).to(weight.dtype)

    def _at(self, matrix: Tensor, side: str) -> Tensor | None:
        """A preconditioner for this matrix, checked."""
        given = getattr(self, side)
        if given is None:
            return None
        if isinstance(given, Tensor):
            found = given.to(matrix.dtype).expand(*matrix.shape[:-2], *given.shape)
        else:
            found = given(matrix.detach() if self.gradient == "detach" else matrix)
        size = matrix.shape[-2 if side == "left" else -1]
        diagonal = torch.Size((*matrix.shape[:-2], size))
        if found.shape not in (diagonal, torch.Size((*diagonal, size))):
            one = isinstance(given, Tensor)  # for all groups
            got, wanted = (given.shape, (size,)) if one else (found.shape, diagonal)
            groups = "; one tensor serves all groups, a function gives each its own" if one and matrix.dim() > 2 else ""
            raise ShapeError(
                f"Precondition: {side} of a matrix of {show(matrix.shape)} is of {show(got)}; wanted {show(wanted)}, a diagonal, "
                f"or {show((*wanted, size))}{groups}"
            )
        return found

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        """No kernel: the matrices are anyone's."""
        return None

    def extra_repr(self) -> str:
        sides = []
        for side in ("left", "right"):
            given = getattr(self, side)
            if given is not None:
                told = show(given.shape) if isinstance(given, Tensor) else getattr(given, "__name__", repr(given))
                sides.append(f"{side}={told}")
        return f"{', '.join(sides)}, gradient={self.gradient!r}"


def precondition(
    layer: ModuleT,
    left: Preconditioner | None = None,
    right: Preconditioner | None = None,
    name: str = "weight",
    *,
    gradient: Gradient = "full",
) -> ModuleT:
    """Precondition a layer's weight by matrices of one's own at every use, in place; the raw weight stays the trained parameter.

    ``name`` is the weight's; ``left``, ``right`` and ``gradient`` are those of Precondition.

    Raises:
        OptionError: no such weight, one with fewer than two axes, or neither side given.
        ShapeError: a preconditioner that does not fit the weight.

    >>> layer = precondition(nn.Linear(2, 2), left=inverse_root_diagonal, right=inverse_root_diagonal)
    >>> layer.weight = torch.tensor([[4.0, 2.0], [2.0, 16.0]])
    >>> layer.weight.detach()
    tensor([[1.0000, 0.2500],
            [0.2500, 1.0000]])
    """
    weight = weight_of(layer, name, "precondition")
    if weight.dim() < 2:
        raise OptionError(
            f"precondition: the {name} of {type(layer).__name__} ({show(weight.shape)}) is no matrix; wanted two axes or more"
        )
    part = Precondition(left, right, weight_layout(layer, name), gradient=gradient).to(weight.device)
    part(weight.detach())  # what does not fit is told now
    return attach(layer, name, part)


def preconditioned(
    weight: Tensor,
    left: Preconditioner | None = None,
    right: Preconditioner | None = None,
    *,
    layout: WeightLayout | None = None,
    gradient: Gradient = "full",
) -> Tensor:
    """A preconditioned weight as a function; see Precondition.

    >>> preconditioned(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2.0, 1.0]))
    tensor([[2., 4.],
            [3., 4.]])
    """
    return Precondition(left, right, layout, gradient=gradient)(weight)


CARD = Card(
    name="preconditioning",
    title="Preconditioning by matrices of one's own",
    kind="weight",
    normalized_over="what the given matrices say; in recipes each row by the root of its norm",
    formula="W = P1 A P2",
    paper=paper("saratchandran2024weight"),
    use_cases="research on preconditioners of weights: fixed matrices, or functions of the weight, such as symmetric Jacobi",
    strengths="any matrix, from the left, the right or both; no new parameters; free once folded",
    weaknesses="a full matrix costs a product with the weight at each use; nothing is promised of the condition number",
    module=Precondition,
    functional=preconditioned,
    make=lambda layer: precondition(layer, inverse_root_rows),
)


class SpectralConditioning(Parametrization):
    """The parametrization w = v + shift * I, where the shift is a constant and I has ones on its main diagonal.

    The weight is taken as its matrix, one row per output unit, and I has its shape, square or not. Where a weight stacks several
    matrices, as the query's, the key's and the value's in attention, each gets an I of its own, not one for each head: so we read
    the paper, whose formulas have one head. Trained is v, from its own initial values: put this on before training, as the
    function at the start is another one than without the shift. Folding adds the shift to the weight.

    Args:
        shift: the factor of I, called lambda. Default: 10.
        layout: layout of the weight. Default: axis 0 indexes output units.
        blocks: number of matrices stacked along output units. Default: 1.

    Shape: Any of two axes or more; the output has the same shape.

    Raises:
        OptionError: a shift that is not finite, or less than one block.

    Reference: Saratchandran, Lucey (2025), https://arxiv.org/abs/2603.07162.

    >>> SpectralConditioning(2.0)(torch.ones(2, 3))
    tensor([[3., 1., 1.],
            [1., 3., 1.]])
    """

    def __init__(self, shift: float = 10.0, layout: WeightLayout | None = None, blocks: int = 1) -> None:
        super().__init__()
        if not math.isfinite(shift):
            raise OptionError(f"SpectralConditioning: shift={shift}; wanted a finite number, the factor of I")
        if blocks < 1:
            raise OptionError(f"SpectralConditioning: blocks={blocks}; wanted a whole number from 1")
        self.shift, self.layout, self.blocks = shift, layout or WeightLayout(), blocks

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        rows, columns = self.layout.matrix(weight).shape
        eye = torch.eye(rows // self.blocks, columns, device=weight.device, dtype=weight.dtype) * self.shift
        return weight + self.layout.weight(eye.repeat(self.blocks, 1), weight.shape)

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        """No kernel: one addition is as fast."""
        return None

    def extra_repr(self) -> str:
        return f"shift={self.shift:g}" + (f", blocks={self.blocks}" if self.blocks > 1 else "")


def spectral_conditioning(
    layer: ModuleT, name: str = "weight", shift: float = 10.0, *, blocks: int | None = None
) -> ModuleT:
    """Add a fixed multiple of the identity to a layer's weight, in place; the raw weight stays the trained parameter.

    For the query, key and value layers of attention: ``in_proj_weight`` (or the separate ones) of
    ``torch.nn.MultiheadAttention``, and linear layers of other attention, apart or packed into one. ``name`` is the weight's;
    ``shift`` and ``blocks`` are those of SpectralConditioning. Without ``blocks`` there are 3 for an ``in_proj_weight``, and for
    a Linear (or GPT-2's Conv1D) with three times as many outputs as inputs, which packs queries, keys and values; else 1.

    Raises:
        OptionError: no such weight, one with fewer than two axes, a shift that is not finite, or rows that do not split.

    >>> layer = spectral_conditioning(nn.Linear(2, 2), shift=3.0)
    >>> layer.weight = torch.zeros(2, 2)
    >>> layer.weight.detach()
    tensor([[3., 0.],
            [0., 3.]])
    """
    weight = weight_of(layer, name, "spectral_conditioning")
    layout = weight_layout(layer, name)
    if weight.dim() < 2:
        raise OptionError(
            f"spectral_conditioning: the {name} of {type(layer).__name__} ({show(weight.shape)}) is no matrix; wanted two axes "
            "or more"
        )
    rows, columns = layout.matrix(weight).shape
    if blocks is None:
        packed = weight.dim() == 2 and rows == 3 * columns and layout.groups == 1
        blocks = 3 if packed else layout.groups
    if blocks < 1 or rows % blocks:
        raise OptionError(
            f"spectral_conditioning: the {rows} output units of the {name} of {type(layer).__name__} do not split into "
            f"blocks={blocks}; wanted a number that divides them"
        )
    return attach(layer, name, SpectralConditioning(shift, layout, blocks))


def add_identity(weight: Tensor, shift: float = 10.0, *, layout: WeightLayout | None = None, blocks: int = 1) -> Tensor:
    """Spectral conditioning as a function; see SpectralConditioning.

    >>> add_identity(torch.zeros(4, 2), 1.0, blocks=2)
    tensor([[1., 0.],
            [0., 1.],
            [1., 0.],
            [0., 1.]])
    """
    return SpectralConditioning(shift, layout, blocks)(weight)


CARD_SPECTRAL_CONDITIONING = Card(
    name="spectral_conditioning",
    title="Spectral conditioning of attention",
    kind="weight",
    word="sc",
    normalized_over="nothing: no statistic, a constant is added to the diagonal",
    formula="w = v + shift * I, shift = 10",
    paper=paper("saratchandran2025spectral"),
    use_cases="query, key and value layers of transformers, from the start of training",
    strengths="no parameters and no statistic; a large shift lowers the weights' condition number; free once folded",
    weaknesses="as we read it from summaries, without the authors' code; starts at another function; for attention alone",
    module=SpectralConditioning,
    functional=add_identity,
    make=spectral_conditioning,
)
