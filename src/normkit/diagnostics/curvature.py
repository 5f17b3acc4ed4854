"""Curvature of a loss by the parameters: the Hessian and the Gauss-Newton matrix, their extremes and their density, smoothness.

The loss is a mean over all examples of all batches, ``loss(output, target)`` being the mean over a batch; so a training set in
chunks gives what it gives whole. The Hessian H is by the parameters that are trained, in the order of ``model.parameters()``:
the raw ones, or with ``by="effective"`` the weights that parametrizations make. The generalized Gauss-Newton matrix, "ggn", is
J' H_out J, J the derivative of outputs and H_out the Hessian of the loss by them: H without the curvature of the model.

Everything runs on a copy of the model in the mode that it is in, with dropout drawn by one seed and running statistics put back
before every pass: nothing of the model changes. A product with a vector takes a forward pass and two backward passes (for the
Gauss-Newton matrix four) over every batch, and the memory of one batch's graph.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from normkit.core.errors import check_options
from normkit.diagnostics.second_derivative import Batches, Curvature, Loss, Options
from normkit.diagnostics.spectrum import dominant, quadrature
from normkit.surgery.bake import bake
from normkit.surgery.select import Where, select, weight_names
from normkit.weights.weight_conditioning import Mode, weight_conditioning

Reading = Literal["constant", "differentiated", "plain"]

_ROWS = 256  # rows of a dense Hessian at a time: more are faster, and each holds a batch's activations


@dataclass(frozen=True)
class Extremes:
    """The largest and the smallest eigenvalue of a symmetric matrix, negative where the loss curves downwards."""

    largest: float
    smallest: float
    # Largest |eigenvalue| over the smallest; infinity if the matrix is singular. NaN where only the ends of the
    # spectrum are known and 0 lies between them.
    condition: float
    error: float  # so near to each of the two is an eigenvalue
    products: int = 0  # products of the matrix with a vector that were made; 0 where the whole matrix was

    @property
    def stable_rate(self) -> float:
        """The largest learning rate at which gradient descent on the quadratic is stable, 2 / largest."""
        return 2 / self.largest if self.largest > 0 else math.inf


def hessian_extremes(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    dense: int = 1000,
    tolerance: float = 1e-6,
    limit: int = 1000,
    **options: Unpack[Options],
) -> Extremes:
    """Find the extreme eigenvalues of a loss's Hessian, its condition number and the largest stable learning rate.

    Up to ``dense`` parameters the whole matrix is made, in float64. Beyond, Lanczos finds both ends by products with vectors; it
    usually takes 40 to 200, and keeps about 24 vectors of the size of the parameters. In float32 it is good to about 1e-5.

    Args:
        model: any module that can be differentiated twice.
        loss: ``loss(output, target)``, a mean over the batch.
        batches: pairs of an input and a target, to be walked again for every product: a list, or a loader that does not shuffle.
            An input is a tensor, a tuple of arguments or a dict of them.
        dense: number of parameters up to which the whole matrix is made. Default: 1000.
        tolerance: error at which Lanczos stops, relative to the largest |eigenvalue|. Default: 1e-6.
        limit: products after which Lanczos gives up. Default: 1000.
        **options: see ``Options``.

    Returns ``.largest``, ``.smallest``, ``.condition``, ``.stable_rate``, and how good they are.

    Raises:
        OptionError: nothing is trained; no batches; batches that can be walked only once; reentrant checkpointing; derivatives
            that are not finite; no convergence.
        BackendError: scipy is missing, which finds eigenvalues by products.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    >>> found = hessian_extremes(model, nn.functional.mse_loss, [(x, torch.zeros(2, 1))])
    >>> round(found.largest, 6), round(found.smallest, 6), round(found.condition, 6), round(found.stable_rate, 6)
    (25.0, 1.0, 25.0, 0.08)
    """
    who = "hessian_extremes"
    known = Curvature(who, model, loss, batches, limit, **options)
    if known.size <= dense:
        return extremes_of(hessian(model, loss, batches, **options))
    start = known.random(torch.Generator().manual_seed(0))
    one = dominant(known.times, start, tolerance=tolerance, limit=limit, who=who)
    # Shifted by one end, the other is the largest; its error is measured by the size of the whole, and 0 is found too.
    left = limit - one.products
    how = {"tolerance": tolerance, "limit": left, "who": who, "scale": abs(one.value)}
    other = dominant(lambda v: known.times(v) - one.value * v, start, **how)
    smallest, largest = sorted((one.value, one.value + other.value))
    least, error = min(abs(smallest), abs(largest)), max(one.error, other.error)
    condition = math.nan if smallest * largest < 0 else abs(one.value) / least if least else math.inf
    condition = math.inf if least <= error else condition
    return Extremes(largest, smallest, condition, error, one.products + other.products)


def extremes_of(matrix: Tensor) -> Extremes:
    """Take the extremes of a symmetric matrix from all of its eigenvalues."""
    values = torch.linalg.eigvalsh(matrix.double())
    largest, least = values.abs().max().item(), values.abs().min().item()
    error = len(values) * torch.finfo(values.dtype).eps * largest  # of a symmetric solver
    condition = math.inf if least <= error else largest / least
    return Extremes(values[-1].item(), values[0].item(), condition, error)


def hessian(model: nn.Module, loss: Loss, batches: Batches, **options: Unpack[Options]) -> Tensor:
    """Compute a loss's whole Hessian or Gauss-Newton matrix in float64, made symmetric against rounding.

    The matrix has the square of the number of parameters in elements; arguments and errors are those of ``hessian_extremes``.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> hessian(model, nn.functional.mse_loss, [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))])
    tensor([[2., 4.],
            [4., 8.]], dtype=torch.float64)
    """
    known = Curvature("hessian", model, loss, batches, 0, **{"dtype": torch.float64, **options})
    known.total = -(-known.size // _ROWS)
    rows = torch.eye(known.size, dtype=known.like.dtype, device=known.like.device)
    whole = torch.cat([known.times(part) for part in rows.split(_ROWS)])
    return 0.5 * (whole + whole.T)


@dataclass(frozen=True)
class Density:
    """The spectrum of a matrix as a quadrature: shares of the eigenvalues, which sum to 1, at nodes in ascending order."""

    nodes: Tensor
    weights: Tensor

    def at(self, points: Tensor, width: float) -> Tensor:
        """The density at points, each node widened to a Gaussian of a standard deviation."""
        apart = (points.double().unsqueeze(-1) - self.nodes) / width
        return (apart.square().mul(-0.5).exp() * self.weights).sum(-1) / (width * math.sqrt(2 * math.pi))


def spectral_density(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    *,
    steps: int = 60,
    probes: int = 4,
    seed: int = 0,
    **options: Unpack[Options],
) -> Density:
    """Estimate how the eigenvalues of a loss's Hessian are spread, by stochastic Lanczos quadrature.

    It takes ``steps`` products for each probe and keeps ``steps`` vectors of the size of the parameters. The mean of f over the
    eigenvalues, for f a polynomial of degree below 2 steps, is estimated with a standard deviation of about
    sqrt(2 / (probes n)) times the root mean square of f, n the number of parameters.

    ``probes`` random vectors, drawn by ``seed``, take ``steps`` each; other arguments and errors are those of
    ``hessian_extremes``.

    Reference: Ubaru, Chen, Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature" (2017),
    https://doi.org/10.1137/16M1104974; Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via
    Hessian Eigenvalue Density" (2019), https://arxiv.org/abs/1901.10159.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> found = spectral_density(model, nn.functional.mse_loss, [(x, torch.zeros(2, 1))], probes=1)
    >>> found.nodes.round(decimals=4), round(found.weights.sum().item(), 6)
    (tensor([1., 9.], dtype=torch.float64), 1.0)
    """
    known = Curvature("spectral_density", model, loss, batches, steps * probes, **options)
    generator = torch.Generator().manual_seed(seed)
    found = [quadrature(known.times, known.random(generator), steps) for _ in range(probes)]
    nodes, weights = (torch.cat(each).cpu() for each in zip(*found, strict=True))
    order = nodes.argsort()
    return Density(nodes[order], weights[order] / probes)


@dataclass(frozen=True)
class Smoothness:
    """Lowest and highest loss along the gradient, the start included, and how the gradient changes."""

    low: float
    high: float
    predictive: float  # largest distance of the gradient from the first one
    beta: float  # largest such distance over the length of the way, an effective Lipschitz constant of the gradient


def smoothness(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    rate: float,
    *,
    along: Sequence[float] = (0.5, 1.0, 2.0, 3.0, 4.0),
    **options: Unpack[Options],
) -> Smoothness:
    """Measure how smooth a loss is along its gradient, at steps of several times a learning rate.

    The steps are ``rate`` times the multiples in ``along``; other arguments and errors are those of ``hessian_extremes``.

    Reference: Santurkar, Tsipras, Ilyas, Madry (2018), https://arxiv.org/abs/1805.11604, section 3.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> found = smoothness(model, nn.functional.mse_loss, [(torch.ones(1, 1), torch.zeros(1, 1))], 0.1, along=(1.0,))
    >>> {name: round(value, 4) for name, value in vars(found).items()}
    {'low': 0.64, 'high': 1.0, 'predictive': 0.4, 'beta': 2.0}
    """
    known = Curvature("smoothness", model, loss, batches, len(along) + 1, **options)
    here, first = known.gradient()
    start = nn.utils.parameters_to_vector(known.parameters).detach()
    losses, changes, ratios = [here], [], []
    for part in along:
        nn.utils.vector_to_parameters(start - part * rate * first, known.parameters)
        value, second = known.gradient()
        losses.append(value)
        changes.append((first - second).norm().item())
        ratios.append(changes[-1] / max(part * rate * first.norm().item(), 1e-30))
    return Smoothness(min(losses), max(losses), max(changes), max(ratios))


class HessianCondition(NamedTuple):
    """The Hessian's extremes without conditioned weights and with them."""

    before: Extremes
    after: Extremes


def hessian_condition(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    mode: Reading = "constant",
    *,
    method: Mode = "row",
    where: Where = "all",
) -> HessianCondition:
    """Compare the Hessian of a loss with that of the loss of conditioned weights, in one of three readings.

    That conditioning makes its condition number no larger has been published (Theorem 5.2 of the reference); it does not hold
    in general in any of these, with L the loss, W the weights and E(W) their preconditioner:

    ==================  ========================  ==================================================================
    ``constant``        L(E W), E constant        D H(EW) D, D the factors of E
    ``differentiated``  L(E(W) W), E(W) followed  at a stationary point singular: along each row the loss is constant
    ``plain``           L at the weights E W      H at another place
    ==================  ========================  ==================================================================

    The model is small, as the whole matrix is made, and its layers carry no parametrization; loss and batches are those of
    ``hessian_extremes``, ``method`` is the mode of ``weight_conditioning``, and ``where`` that of ``surgery.select``.

    Raises:
        OptionError: another reading, or a layer that can't be conditioned.

    Reference: Saratchandran, Wang, Lucey (2024), https://arxiv.org/abs/2409.03424.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 2)
    >>> before, after = hessian_condition(model, nn.functional.mse_loss, [batch])
    >>> round(before.condition, 6), round(after.condition, 6)  # (4 / 1) ** 2 times as large
    (4.0, 64.0)
    """
    check_options("hessian_condition", mode=(mode, Reading))
    twin = copy.deepcopy(model).double()
    for layer in select(twin, where).values():
        for name in weight_names(layer):
            weight_conditioning(layer, method, name, gradient="detach" if mode == "constant" else "full", path="weight")
    if mode == "plain":
        bake(twin)
    return HessianCondition(*(extremes_of(hessian(each, loss, batches)) for each in (model, twin)))
