"""Curvature of a loss by the parameters: the Hessian and the Gauss-Newton matrix, their extremes and their density, smoothness.

The loss is a mean over all examples of all batches, ``loss(output, target)`` being the mean over a batch; so a training set in
chunks gives what it gives whole. The Hessian H is by the parameters that are trained, in the order of ``model.parameters()``:
the raw ones, or with ``by="effective"`` the weights that parametrizations make. ``matrix="ggn"`` is the generalized Gauss-Newton
matrix J' H_out J, J the derivative of outputs and H_out the Hessian of the loss by them: H without the curvature of the model.

Everything runs on a copy of the model in the mode that it is in, with dropout drawn by one seed and running statistics put back
before every pass: nothing of the model changes. A product with a vector takes a forward pass and two backward passes (for the
Gauss-Newton matrix four) over every batch, and the memory of one batch's graph.

Reference:
    Pearlmutter, "Fast Exact Multiplication by the Hessian" (1994), https://doi.org/10.1162/neco.1994.6.1.147; Schraudolph, "Fast
    Curvature Matrix-Vector Products for Second-Order Gradient Descent" (2002), https://doi.org/10.1162/08997660260028683.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normkit.core.errors import OptionError, closest
from normkit.diagnostics.lanczos import dominant, quadrature
from normkit.surgery.bake import bake
from normkit.surgery.select import Where, select, weight_names
from normkit.surgery.watch import forked, run_on
from normkit.weights.weight_conditioning import Mode, weight_conditioning

Loss = Callable[[Any, Any], Tensor]
By = Literal["raw", "effective"]
Matrix = Literal["hessian", "ggn"]
Reading = Literal["constant", "differentiated", "plain"]
Progress = Callable[[int, int], object]

# Rows of a dense Hessian at a time: more are faster, and each holds a batch's activations.
_ROWS = 256


@dataclass(frozen=True)
class Extremes:
    """The ends of a symmetric matrix's spectrum.

    Attributes:
        largest: largest eigenvalue.
        smallest: smallest eigenvalue, negative where the loss curves downwards.
        condition: largest |eigenvalue| over the smallest; infinity if the matrix is singular. NaN where only the ends of
            the spectrum are known and 0 lies between them.
        error: so near to each of the two is an eigenvalue.
        products: products of the matrix with a vector that were made; 0 where the whole matrix was.
    """

    largest: float
    smallest: float
    condition: float
    error: float
    products: int = 0

    @property
    def stable_rate(self) -> float:
        """The largest learning rate at which gradient descent on the quadratic is stable, 2 / largest."""
        return 2 / self.largest if self.largest > 0 else math.inf


def hessian_extremes(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Any, Any]],
    *,
    matrix: Matrix = "hessian",
    by: By = "raw",
    dense: int = 1000,
    dtype: torch.dtype | None = None,
    tolerance: float = 1e-6,
    limit: int = 1000,
    progress: Progress | None = None,
) -> Extremes:
    """Find the extreme eigenvalues of a loss's Hessian, its condition number and the largest stable learning rate.

    Up to ``dense`` parameters the whole matrix is made, in float64. Beyond, Lanczos finds both ends by products with vectors;
    it usually takes 40 to 200, and keeps about 24 vectors of the size of the parameters.

    Args:
        model: any module that can be differentiated twice.
        loss: ``loss(output, target)``, a mean over the batch.
        batches: pairs of an input and a target, to be walked again for every product: a list, or a loader that does not shuffle.
            An input is a tensor, a tuple of arguments or a dict of them.
        matrix: ``"hessian"`` or ``"ggn"``. Default: "hessian".
        by: ``"raw"`` or ``"effective"`` parameters. Default: "raw".
        dense: number of parameters up to which the whole matrix is made. Default: 1000.
        dtype: of Lanczos. Default: the parameters'; in float32 eigenvalues are good to about 1e-5 of the largest.
        tolerance: error at which Lanczos stops, relative to the largest |eigenvalue|. Default: 1e-6.
        limit: products after which Lanczos gives up. Default: 1000.
        progress: called as ``progress(done, limit)`` with the number of products, or of rows of the whole matrix.

    Returns:
        ``.largest``, ``.smallest``, ``.condition``, ``.stable_rate``, and how good they are.

    Raises:
        OptionError: nothing is trained; no batches; batches that can be walked only once; no convergence.
        BackendError: scipy is missing, which finds eigenvalues by products.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    >>> found = hessian_extremes(model, nn.functional.mse_loss, [(x, torch.zeros(2, 1))])
    >>> round(found.largest, 6), round(found.smallest, 6), round(found.condition, 6), round(found.stable_rate, 6)
    (25.0, 1.0, 25.0, 0.08)
    """
    count = sum(p.numel() for p in _twin(model, by, None).parameters() if p.requires_grad)
    if count <= dense:
        return extremes_of(hessian(model, loss, batches, matrix=matrix, by=by, progress=progress))
    known, who = _Curvature(model, loss, batches, matrix, by, dtype, "hessian_extremes"), "hessian_extremes"
    start = known.random(torch.Generator().manual_seed(0))
    product = _told(known.times, progress, limit)
    one = dominant(product, start, tolerance=tolerance, limit=limit, who=who)
    # Shifted by one end, the other is the largest; its error is measured by the size of the whole, and 0 is found too.
    other = dominant(
        lambda v: product(v) - one.value * v, start, tolerance=tolerance, limit=limit - one.products, who=who
    )
    smallest, largest = sorted((one.value, one.value + other.value))
    return _between(smallest, largest, max(one.error, other.error), one.products + other.products)


def extremes_of(matrix: Tensor) -> Extremes:
    """Take the extremes of a symmetric matrix from all of its eigenvalues.

    >>> extremes_of(torch.diag(torch.tensor([-4.0, 2.0, 1.0]))).condition
    4.0
    """
    values = torch.linalg.eigvalsh(matrix.double())
    sizes = values.abs()
    # The eigenvalues of a symmetric solver are good to this share of the largest.
    rounding = len(values) * torch.finfo(values.dtype).eps
    largest, least = sizes.max().item(), sizes.min().item()
    condition = math.inf if least <= rounding * largest else largest / least
    return Extremes(values[-1].item(), values[0].item(), condition, rounding * largest)


def hessian(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Any, Any]],
    *,
    matrix: Matrix = "hessian",
    by: By = "raw",
    progress: Progress | None = None,
) -> Tensor:
    """Compute a loss's whole Hessian or Gauss-Newton matrix in float64, made symmetric against rounding.

    Args:
        model: with few parameters: the matrix has the square of their number of elements.
        loss: see ``hessian_extremes``, as are the others.
        batches: pairs of an input and a target.
        matrix: ``"hessian"`` or ``"ggn"``. Default: "hessian".
        by: ``"raw"`` or ``"effective"``. Default: "raw".
        progress: called as ``progress(done, rows)``.

    Raises:
        OptionError: nothing is trained, or there are no batches.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> hessian(model, nn.functional.mse_loss, [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))])
    tensor([[2., 4.],
            [4., 8.]], dtype=torch.float64)
    """
    known = _Curvature(model, loss, batches, matrix, by, torch.float64, "hessian")
    whole = torch.zeros(known.size, known.size, dtype=torch.float64, device=known.parameters[0].device)
    for place in range(0, known.size, _ROWS):
        rows = torch.eye(min(_ROWS, known.size - place), known.size, dtype=torch.float64, device=whole.device)
        whole[place : place + _ROWS] = known.times(rows.roll(place, 1))
        if progress is not None:
            progress(min(place + _ROWS, known.size), known.size)
    return 0.5 * (whole + whole.T)


@dataclass(frozen=True)
class Density:
    """The spectrum of a matrix as a quadrature: weights at nodes, averaged over random vectors.

    Attributes:
        nodes: places, float64; those at the ends are near to extreme eigenvalues.
        weights: share of the eigenvalues near each node; they sum to 1.
    """

    nodes: Tensor
    weights: Tensor

    def at(self, points: Tensor, width: float) -> Tensor:
        """The density at points, each node widened to a Gaussian of a standard deviation."""
        apart = (points.double().unsqueeze(-1) - self.nodes) / width
        return (apart.square().mul(-0.5).exp() * self.weights).sum(-1) / (width * math.sqrt(2 * math.pi))


def spectral_density(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Any, Any]],
    *,
    matrix: Matrix = "hessian",
    by: By = "raw",
    steps: int = 60,
    probes: int = 4,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Density:
    """Estimate how the eigenvalues of a loss's Hessian are spread, by stochastic Lanczos quadrature.

    It takes ``steps`` products for each probe and keeps ``steps`` vectors of the size of the parameters. The mean of f over the
    eigenvalues, for f a polynomial of degree below 2 steps, is estimated without bias, with a standard deviation of about
    sqrt(2 / (probes n)) times the root mean square of f, n the number of parameters.

    Args:
        model: see ``hessian_extremes``, as are the others.
        loss: ``loss(output, target)``, a mean over the batch.
        batches: pairs of an input and a target.
        matrix: ``"hessian"`` or ``"ggn"``. Default: "hessian".
        by: ``"raw"`` or ``"effective"``. Default: "raw".
        steps: of Lanczos. Default: 60.
        probes: random vectors. Default: 4.
        seed: of the vectors. Default: 0.
        dtype: Default: the parameters'.
        progress: called as ``progress(done, steps * probes)``.

    Raises:
        OptionError: nothing is trained, or there are no batches.

    Reference:
        Ubaru, Chen, Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature" (2017),
        https://doi.org/10.1137/16M1104974; Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density" (2019), https://arxiv.org/abs/1901.10159.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> found = spectral_density(model, nn.functional.mse_loss, [(x, torch.zeros(2, 1))], probes=1)
    >>> found.nodes.round(decimals=4), round(found.weights.sum().item(), 6)
    (tensor([1., 9.], dtype=torch.float64), 1.0)
    """
    known = _Curvature(model, loss, batches, matrix, by, dtype, "spectral_density")
    product = _told(known.times, progress, steps * probes)
    generator = torch.Generator().manual_seed(seed)
    found = [quadrature(product, known.random(generator), steps) for _ in range(probes)]
    nodes, weights = (torch.cat(each).cpu() for each in zip(*found, strict=True))
    order = nodes.argsort()
    return Density(nodes[order], weights[order] / probes)


@dataclass(frozen=True)
class Smoothness:
    """How a loss and its gradient change along the gradient.

    Attributes:
        low: lowest loss on the way, its start included.
        high: highest loss.
        predictive: largest distance of the gradient from the first one.
        beta: largest such distance over the length of the way, an effective Lipschitz constant of the gradient.
    """

    low: float
    high: float
    predictive: float
    beta: float


def smoothness(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Any, Any]],
    rate: float,
    *,
    along: Sequence[float] = (0.5, 1.0, 2.0, 3.0, 4.0),
    by: By = "raw",
) -> Smoothness:
    """Measure how smooth a loss is along its gradient, at steps of several times a learning rate.

    Args:
        model: see ``hessian_extremes``, as are loss, batches and ``by``.
        loss: ``loss(output, target)``, a mean over the batch.
        batches: pairs of an input and a target.
        rate: learning rate.
        along: multiples of the rate. Default: 0.5, 1, 2, 3 and 4.
        by: ``"raw"`` or ``"effective"``. Default: "raw".

    Raises:
        OptionError: nothing is trained, or there are no batches.

    Reference:
        Santurkar, Tsipras, Ilyas, Madry, "How Does Batch Normalization Help Optimization?" (2018),
        https://arxiv.org/abs/1805.11604, section 3.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> found = smoothness(model, nn.functional.mse_loss, [(torch.ones(1, 1), torch.zeros(1, 1))], 0.1, along=(1.0,))
    >>> {name: round(value, 4) for name, value in vars(found).items()}
    {'low': 0.64, 'high': 1.0, 'predictive': 0.4, 'beta': 2.0}
    """
    known = _Curvature(model, loss, batches, "hessian", by, None, "smoothness")
    here, first = known.gradient()
    start = [parameter.detach().clone() for parameter in known.parameters]
    parts = first.split([parameter.numel() for parameter in start])
    losses, changes, ratios = [here], [], []
    for part in along:
        with torch.no_grad():
            for parameter, at, way in zip(known.parameters, start, parts, strict=True):
                parameter.copy_(at - part * rate * way.view_as(at))
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
    batches: Iterable[tuple[Any, Any]],
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

    Args:
        model: small: the whole matrix is made. Its layers should carry no parametrization.
        loss: see ``hessian_extremes``, as are batches.
        batches: pairs of an input and a target.
        mode: the reading. Default: "constant".
        method: what is equilibrated, as in ``weight_conditioning``. Default: "row".
        where: which layers, as in ``surgery.select``. Default: "all".

    Returns:
        ``.before`` and ``.after``, each with ``.condition``.

    Raises:
        OptionError: another reading, or a layer that can't be conditioned.

    Reference:
        Saratchandran, Wang, Lucey, "Weight Conditioning for Smooth Optimization of Neural Networks" (2024),
        https://arxiv.org/abs/2409.03424.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 2)
    >>> before, after = hessian_condition(model, nn.functional.mse_loss, [batch])
    >>> round(before.condition, 6), round(after.condition, 6)  # (4 / 1) ** 2 times as large
    (4.0, 64.0)
    """
    known = ("constant", "differentiated", "plain")
    if mode not in known:
        raise OptionError(f"hessian_condition: mode={mode!r}; wanted one of {', '.join(known)}{closest(mode, known)}")
    twin = copy.deepcopy(model).double()
    for layer in select(twin, where).values():
        for name in weight_names(layer):
            weight_conditioning(layer, method, name, gradient="detach" if mode == "constant" else "full", path="weight")
    if mode == "plain":
        bake(twin)
    before, after = (extremes_of(hessian(each, loss, batches)) for each in (model, twin))
    return HessianCondition(before, after)


class _Curvature:
    """A loss on a copy of a model: its value, gradient, and products of its second derivative with vectors."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Iterable[tuple[Any, Any]],
        matrix: Matrix,
        by: By,
        dtype: torch.dtype | None,
        who: str,
    ) -> None:
        if matrix not in ("hessian", "ggn") or by not in ("raw", "effective"):
            raise OptionError(
                f"{who}: matrix={matrix!r}, by={by!r}; wanted 'hessian' or 'ggn', and 'raw' or 'effective'"
            )
        if isinstance(batches, Iterator):
            raise OptionError(f"{who}: the batches can be walked only once; give a list of them, or a loader")
        self.model, self.loss, self.batches, self.who = _twin(model, by, dtype), loss, batches, who
        self.second = self._hessian if matrix == "hessian" else self._gauss_newton
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise OptionError(f"{who}: no parameter of the model is trained, so that the loss has no curvature")
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self._kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    def random(self, generator: torch.Generator) -> Tensor:
        """A vector of independent normal elements."""
        like = self.parameters[0]
        return torch.randn(self.size, generator=generator, dtype=like.dtype).to(like.device)

    def gradient(self) -> tuple[float, Tensor]:
        """The loss and its gradient."""
        total, whole = 0.0, torch.zeros((), device=self.parameters[0].device)
        for share, _, loss in self._passes():
            total += share * loss.item()
            whole = whole + share * self._flat(self._grad(loss, self.parameters))
        return total, whole

    def times(self, vectors: Tensor) -> Tensor:
        """The matrix times a vector, or times each of the rows given."""
        whole = torch.zeros_like(vectors)
        for share, output, loss in self._passes():
            whole += share * self.second(output, loss, vectors)
        return whole

    def _hessian(self, output: Tensor, loss: Tensor, vectors: Tensor) -> Tensor:
        gradient = self._flat(self._grad(loss, self.parameters, create_graph=True))
        return self._flat(self._grad(gradient, self.parameters, vectors), len(vectors) if vectors.dim() > 1 else 0)

    def _gauss_newton(self, output: Tensor, loss: Tensor, vectors: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise OptionError(f"{self.who}: the model gives a {type(output).__name__}; matrix='ggn' wants a tensor")
        (outer,) = self._grad(loss, [output], create_graph=True)
        # J v as the derivative of u' J v by u: it takes no forward mode, which not every operator has.
        u = torch.zeros_like(output, requires_grad=True)
        (forward,) = self._grad(self._flat(self._grad(output, self.parameters, u, create_graph=True)), [u], vectors)
        (curved,) = self._grad(outer, [output], forward, batched=vectors.dim() > 1)
        batched = vectors.dim() > 1
        return self._flat(self._grad(output, self.parameters, curved, batched=batched), len(vectors) if batched else 0)

    def _grad(
        self,
        of: Tensor,
        by: Sequence[Tensor],
        vectors: Tensor | None = None,
        create_graph: bool = False,
        batched: bool | None = None,
    ) -> list[Tensor]:
        """Gradients, zero where there is no way; ``batched`` by default where ``of`` is a vector and rows are given."""
        batched = vectors is not None and vectors.dim() > of.dim() if batched is None else batched
        shape = vectors.shape[:1] if vectors is not None and batched else ()
        found: Sequence[Tensor | None] = [None] * len(by)
        if of.requires_grad:
            found = torch.autograd.grad(
                of,
                by,
                vectors,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=batched,
            )
        return [
            each.new_zeros((*shape, *each.shape)) if part is None else part
            for part, each in zip(found, by, strict=True)
        ]

    def _flat(self, parts: Iterable[Tensor], rows: int = 0) -> Tensor:
        return torch.cat([part.reshape(rows, -1) if rows else part.flatten() for part in parts], dim=-1)

    def _passes(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """Share of each batch in the mean, the output and the loss."""
        sizes = self._sizes()
        like = self.parameters[0]
        for size, (given, target) in zip(sizes, self.batches, strict=True):
            with torch.no_grad():  # before a pass, as the graph of the last one holds what it read
                for buffer, value in self._kept:
                    buffer.copy_(value)
            # Fused attention has no second derivative.
            with forked() as seed, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                seed()
                output = run_on(self.model, _placed(given, like))
                loss = self.loss(output, _placed(target, like))
            yield size / sum(sizes), output, loss

    def _sizes(self) -> list[int]:
        if not hasattr(self, "_counted"):
            self._counted = [len(target) if getattr(target, "ndim", 0) else 1 for _, target in self.batches]
        if not sum(self._counted):
            raise OptionError(f"{self.who}: there are no batches, or no examples in them")
        return self._counted


def _twin(model: nn.Module, by: By, dtype: torch.dtype | None) -> nn.Module:
    twin = copy.deepcopy(model)
    if by == "effective":
        bake(twin)
    return twin if dtype is None else twin.to(dtype)


def _placed(value: Any, like: Tensor) -> Any:
    """Tensors on the device of the parameters, floating ones in their dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _placed(part, like) for key, part in value.items()}
    return type(value)(_placed(part, like) for part in value) if isinstance(value, list | tuple) else value


def _told(product: Callable[[Tensor], Tensor], progress: Progress | None, total: int) -> Callable[[Tensor], Tensor]:
    done = 0

    def multiply(vector: Tensor) -> Tensor:
        nonlocal done
        found, done = product(vector), done + 1
        if progress is not None:
            progress(done, total)
        return found

    return multiply


def _between(smallest: float, largest: float, error: float, products: int) -> Extremes:
    least, most = sorted((abs(smallest), abs(largest)))
    condition = math.inf if least <= error else most / least if smallest * largest > 0 else math.nan
    return Extremes(largest, smallest, condition, error, products)
