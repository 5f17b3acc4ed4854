"""Weight conditioning: a diagonal preconditioner, computed from the weight, that equalizes its rows or columns."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import BackendError, OptionError, check_options
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support, show
from normkit.engine import closed_form
from normkit.weights import kernels
from normkit.weights.attachment import ModuleT, attach
from normkit.weights.layout import View, WeightLayout, weight_layout, weight_of
from normkit.weights.output_scaling import Path, RowScaling, refusal, scaled_forward
from normkit.weights.parametrization import inverse_norm

Mode = Literal["row", "col", "rowcol", "jacobi"]
Order = Literal["sequential", "simultaneous", "ruiz"]
Gradient = Literal["full", "detach"]


def weight_conditioning_rule(support: Support | None = None, eps: float = 1e-12) -> Rule:
    """Equilibration over one support, by default of rows, as data."""
    return Rule(support or Support("o *", over="*"), Statistic(None, "norm", eps, "floor"))


class Equilibrate(RowScaling):
    """The parametrization that multiplies a weight by a diagonal preconditioner, which equalizes its rows or columns.

    For a weight A with rows a_i and columns a^j, a left preconditioner PA scales rows (output units), a right one AP scales
    columns (input units), and P1 A P2 scales both:

    ==========  ========================  ==========================  ====================================
    mode        matrices                  gives                       scaling A by s scales the result by
    ==========  ========================  ==========================  ====================================
    row         E_r A, 1 / norm(a_i)      unit rows                   1; so for each row separately
    col         A E_c, 1 / norm(a^j)      unit columns                1; so for each column separately
    rowcol      E_r A E_c                 see ``order``               1; simultaneous: 1 / s
    jacobi      P A, 1 / A_ii             unit diagonal (square A)    1; so for each row separately
    ==========  ========================  ==========================  ====================================

    ``order`` of rowcol: ``"sequential"`` takes the columns of the row-scaled matrix and ends with unit columns;
    ``"simultaneous"`` takes both factors from A and ends with neither; ``"ruiz"`` divides by the roots of both norms
    repeatedly, and converges to equal rows and equal columns.

    Row mode is weight normalization with lengths frozen at 1. The gradient of the raw row is
    (dw - <dw, w> w) / norm(a_i): orthogonal to it, so that under plain gradient descent norms only grow and the effective rate
    falls as 1 / norm^2; weight decay changes nothing but that rate. Before BatchNorm, row mode changes only the training, up to
    the norm's eps. Here ``eps`` is a floor of the norm, so that invariance to scale is exact; a zero row stays zero, and its
    gradient is that of its conditioned weight divided by ``eps``.

    Assigning ``layer.weight = W`` stores W as the raw weight: ``layer.weight`` then returns W conditioned, which is W itself
    only if its rows (columns) already have norm ``gain``. The norms of W change the effective rate, not the function.

    Args:
        mode: ``"row"``, ``"col"``, ``"rowcol"`` or ``"jacobi"``. Default: "row".
        layout: layout of the weight. Default: axis 0 indexes output units.
        order: order of rowcol. Default: "sequential".
        iterations: iterations of ruiz. Default: 10.
        eps: floor of a norm, above 0. Default: 1e-12.
        gradient: ``"full"`` differentiates through the norms, ``"detach"`` treats the preconditioner as a constant.
            Default: "full".
        gain: factor of the result; sqrt(2) keeps the signal's power through ReLU. Default: 1.
        view: what a column of a convolution is, see ``WeightLayout.columns``. Default: "operator".
        path: see ``weight_conditioning``. Default: "auto".

    Shape: Any of two axes or more; the output has the same shape; norms are taken in at least float32.

    Raises:
        OptionError: an argument outside its range.

    Reference: Saratchandran, Wang, Lucey, "Weight Conditioning for Smooth Optimization of Neural Networks" (2024),
    https://arxiv.org/abs/2409.03424; Ruiz, "A Scaling Algorithm to Equilibrate Both Rows and Columns Norms in Matrices"
    (2001), https://cerfacs.fr/wp-content/uploads/2017/06/14_DanielRuiz.pdf.

    >>> Equilibrate()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    order: Order
    view: View

    def __init__(
        self,
        mode: Mode = "row",
        layout: WeightLayout | None = None,
        *,
        order: Order = "sequential",
        iterations: int = 10,
        eps: float = 1e-12,
        gradient: Gradient = "full",
        gain: float = 1.0,
        view: View = "operator",
        path: Path = "auto",
    ) -> None:
        super().__init__()
        check_options("Equilibrate", mode=(mode, Mode), order=(order, Order), gradient=(gradient, Gradient))
        check_options("Equilibrate", view=(view, View), path=(path, Path))
        if not eps > 0:
            raise OptionError(f"Equilibrate: eps={eps}; wanted a number above 0, the floor of a norm")
        if iterations < 1:
            raise OptionError(f"Equilibrate: iterations={iterations}; wanted a whole number from 1")
        self.layout = layout or WeightLayout()
        self.mode, self.order, self.iterations, self.eps = mode, order, iterations, eps
        self.gradient, self.gain, self.view, self.path = gradient, gain, view, path
        self.rows, self.columns = self.layout.rows, self.layout.columns(view)
        self._statistic = Statistic(None, "norm", eps, "floor")
        self.by_rows = mode == "row" and self.layout.output_axis == 0

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        x = weight.to(accumulation_dtype(weight.dtype))
        if self.mode == "jacobi":
            n, axis = x.shape[self.layout.output_axis], self.layout.output_axis
            y = x * self._diagonal_factors(x).view([n if d == axis else 1 for d in range(x.dim())])
        elif self.mode != "rowcol":
            y = self._unit(x, self.rows if self.mode == "row" else self.columns)
        elif self.order == "sequential":
            y = self._unit(self._unit(x, self.rows), self.columns)
        elif self.order == "simultaneous":
            left, right = self._inverse(x, self.rows), self._inverse(x, self.columns)
            y = self._times(self._times(x, self.rows, left), self.columns, right)
        else:
            y = x
            for _ in range(self.iterations):
                left, right = self._inverse(y, self.rows).sqrt(), self._inverse(y, self.columns).sqrt()
                y = self._times(self._times(y, self.rows, left), self.columns, right)
        return (y if self.gain == 1.0 else y * self.gain).to(weight.dtype)

    def row_factors(self, weight: Tensor) -> Tensor | None:
        """The diagonal of the left preconditioner, times the gain; None if columns are scaled too."""
        if self.mode not in ("row", "jacobi") or self.layout.output_axis != 0:
            return None
        x = weight.to(accumulation_dtype(weight.dtype))
        factors = self._diagonal_factors(x) if self.mode == "jacobi" else self._inverse(x, self.rows).flatten()
        return factors if self.gain == 1.0 else factors * self.gain

    def options(self) -> tuple[object, ...]:
        return self.mode, self.order, self.iterations, self.eps, self.gradient, self.gain

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        """Make the plan of a kernel for such a weight; no kernel does jacobi."""
        constant = self.gradient == "detach"
        if self.mode in ("row", "col"):
            support = self.rows if self.mode == "row" else self.columns
            return kernels.plan_over(support.split(weight.shape), weight.dtype, self._statistic, self.gain, constant)
        if self.mode == "jacobi":
            return None
        shape = self.layout.nest(weight.shape, self.view)
        if shape is None:
            return None
        sets = "near" if self.layout.output_axis == 0 else "apart"
        how = {"statistic": self._statistic, "factor": self.gain, "constant": constant, "iterations": self.iterations}
        return kernels.plan_for(shape, weight.dtype, method=self.order, sets=sets, **how)

    def check(self, weight: Tensor, trained: bool = False) -> None:
        """Refuse a weight that can't be conditioned.

        Raises:
            OptionError: fewer than two axes; jacobi of a matrix that is not square or has a zero on its diagonal; with
                ``trained``, a weight whose full gradient would always be zero.
        """
        shape = show(weight.shape)
        if weight.dim() < 2:
            raise OptionError(f"Equilibrate: a weight of shape {shape}; wanted two axes or more, for rows and columns")
        if self.mode == "jacobi":
            matrix = weight.flatten(1)
            if matrix.shape[0] != matrix.shape[1] or self.layout.groups > 1:
                raise OptionError(
                    f"Equilibrate: jacobi of a weight of shape {shape}; wanted a square matrix in one group; mode='row' takes any"
                )
            if not torch.compiler.is_compiling() and bool((matrix.diagonal() == 0).any()):
                at = (matrix.diagonal() == 0).nonzero()[0].item()
                raise OptionError(f"Equilibrate: jacobi divides by the diagonal, whose element {at} is zero; use 'row'")
        last = self.rows if self.mode == "row" else self.columns
        if (
            trained
            and self.mode in ("row", "col", "rowcol")
            and self.gradient == "full"
            and last.split(weight.shape).count == 1
        ):
            what, cure = ("row", "col") if self.mode == "row" else ("column", "row")
            raise OptionError(
                f"Equilibrate: a weight of shape {shape} has one element in each {what}; mode={self.mode!r} would freeze it "
                f"at +-gain; leave this layer out, or use mode={cure!r}"
            )

    def extra_repr(self) -> str:
        order = f", order={self.order!r}" + (f", iterations={self.iterations}" if self.order == "ruiz" else "")
        return (
            f"mode={self.mode!r}{order if self.mode == 'rowcol' else ''}, gradient={self.gradient!r}, gain={self.gain:g}, "
            f"eps={self.eps:g}, path={self.path!r}"
        )

    def _unit(self, x: Tensor, support: Support) -> Tensor:
        if self.gradient == "full" and not (
            torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0
        ):
            split = support.split(x.shape)
            return closed_form.normalize(x.reshape(split.shape), split, self._statistic)[0].reshape(x.shape)
        return self._times(x, support, self._inverse(x, support))

    def _inverse(self, x: Tensor, support: Support) -> Tensor:
        split = support.split(x.shape)
        x = x.reshape(split.shape)
        if self.gradient == "detach":
            x = x.detach()
        return inverse_norm(x, split.dims, self.eps)

    def _times(self, x: Tensor, support: Support, factors: Tensor) -> Tensor:
        return (x.reshape(support.split(x.shape).shape) * factors).reshape(x.shape)

    def _diagonal_factors(self, x: Tensor) -> Tensor:
        diagonal = x.flatten(1).diagonal()
        floor = torch.copysign(torch.full_like(diagonal, self.eps), diagonal)
        factors = torch.where(diagonal.abs() > self.eps, diagonal, floor).reciprocal()
        return factors.detach() if self.gradient == "detach" else factors


def weight_conditioning(
    layer: ModuleT,
    mode: Mode = "row",
    name: str = "weight",
    *,
    order: Order = "sequential",
    iterations: int = 10,
    eps: float = 1e-12,
    gradient: Gradient = "full",
    gain: float | Literal["learned"] = 1.0,
    view: View = "operator",
    path: Path = "auto",
) -> ModuleT:
    """Condition a layer's weight at every use, in place: the raw weight stays the trained parameter, with its identity.

    The product EWx has two exact forms. ``path="weight"`` rebuilds the weight EW; ``path="output"`` scales the output, E(Wx),
    which a Linear or convolution in row or jacobi mode can do if this is the weight's only parametrization. ``"auto"``
    chooses the cheaper form at each call. ``layer.weight`` and the state_dict are the same in both.
    ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")`` bakes the conditioned weight in.

    ``name`` is the weight's; ``mode``, ``order``, ``iterations``, ``eps``, ``gradient``, ``gain``, ``view`` and ``path`` are
    those of Equilibrate. ``gain="learned"`` is one scalar per layer that starts at 1 and is trained, a parametrization of its own
    behind this one.

    Raises:
        OptionError: no such weight, an argument outside its range, a weight that does not fit the mode.
        BackendError: ``path="output"`` where the output can't be scaled.

    >>> layer = weight_conditioning(nn.Linear(2, 1, bias=False))
    >>> layer.weight = torch.tensor([[30.0, 40.0]])
    >>> layer.weight.detach(), layer(torch.tensor([[1.0, 1.0]])).detach()
    (tensor([[0.6000, 0.8000]]), tensor([[1.4000]]))
    """
    weight = weight_of(layer, name, "weight_conditioning")
    how = {"order": order, "iterations": iterations, "eps": eps, "gradient": gradient, "view": view, "path": path}
    part = Equilibrate(mode, weight_layout(layer, name), gain=1.0 if gain == "learned" else gain, **how)
    part.check(weight, trained=weight.requires_grad)
    reason = refusal(layer, name) if mode in ("row", "jacobi") else f"mode={mode!r} scales columns too"
    if path == "output" and reason is not None:
        raise BackendError(f'weight_conditioning: path="output" can\'t run: {reason}; use path="auto"')
    if gain != "learned":
        return attach(layer, name, part, forward=scaled_forward if reason is None else None, directed=True)
    if path == "output":
        raise BackendError('weight_conditioning: path="output" can\'t run with gain="learned", another parametrization')
    attach(layer, name, part, directed=True)
    return attach(layer, name, Temperature(device=weight.device, dtype=weight.dtype))


def equilibrate(
    weight: Tensor,
    mode: Mode = "row",
    *,
    layout: WeightLayout | None = None,
    order: Order = "sequential",
    iterations: int = 10,
    eps: float = 1e-12,
    gradient: Gradient = "full",
    gain: float = 1.0,
    view: View = "operator",
) -> Tensor:
    """Weight conditioning as a function; see Equilibrate.

    >>> equilibrate(torch.tensor([[3.0, 4.0], [4.0, 3.0]]), "rowcol", order="simultaneous") * 5
    tensor([[0.6000, 0.8000],
            [0.8000, 0.6000]])
    """
    how = {"order": order, "iterations": iterations, "eps": eps, "gradient": gradient}
    part = Equilibrate(mode, layout, gain=gain, view=view, **how)
    part.check(weight)
    return part(weight)


CARD = Card(
    name="weight_conditioning",
    title="Weight conditioning",
    kind="weight",
    word="e",
    normalized_over="each output unit's weights",
    formula="W = E A, E = diag(1 / max(|a_i|, eps))",
    paper=paper("saratchandran2024weight"),
    use_cases="first convolution and last layer of convolutional networks, all layers of NeRFs and transformers; with any norm",
    strengths="no new parameters; usually lowers the weight's condition number where rows differ much; free once folded",
    weaknesses="can raise the condition number, by at most sqrt(rows); before BatchNorm it only changes the rate; rows grow",
    module=Equilibrate,
    functional=equilibrate,
    make=weight_conditioning,
    rule=weight_conditioning_rule(),
    invariances=frozenset({"weight scale", "row scale"}),
)


class Temperature(nn.Module):
    """The parametrization that multiplies a weight by one learned scalar, which starts at 1.

    After ``Equilibrate`` it restores the length that unit rows remove from a last layer: how peaked its logits can be.

    >>> Temperature()(torch.ones(2)).detach()
    tensor([1., 1.])
    """

    def __init__(self, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled weight, of the weight's dtype."""
        return (weight * self.scale).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight that the scale maps to this one; this one itself if the scale is 0."""
        return weight / torch.where(self.scale == 0, 1.0, self.scale).to(weight.dtype)
