"""Spectral normalization: the weight's largest singular value is 1; and power iteration, which finds it."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ShapeError
from normkit.core.memory import recomputed
from normkit.core.moments import accumulation_dtype, full_precision
from normkit.core.statistic import Statistic
from normkit.core.support import show
from normkit.weights import kernels
from normkit.weights.attachment import ModuleT, attach
from normkit.weights.layout import weight_of
from normkit.weights.parametrization import Parametrization, Share, normalize


@torch.no_grad()
def power_iteration(
    matrix: Tensor, u: Tensor | None = None, v: Tensor | None = None, iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Improve the leading singular vectors of a matrix: u <- W v / |W v|, v <- W^T u / |W^T u|; sigma is then u^T W v.

    Each iteration shrinks the error of sigma by (sigma_2 / sigma_1)^4, of the vectors by (sigma_2 / sigma_1)^2. sigma approaches
    from below. Keep the vectors for the next call: after a small change of the weight, one iteration is enough.

    The matrix is (out, in); ``u`` (out,) and ``v`` (in,) are those of the previous call, random if None. A product no longer than
    ``eps`` leaves its vector unchanged.

    Returns u and v, of length 1, in the accumulation dtype.

    Raises:
        ShapeError: the tensor is not a matrix.

    Reference: Miyato, Kataoka, Koyama, Yoshida (2018), https://arxiv.org/abs/1802.05957, algorithm 1.

    >>> W = torch.tensor([[1.0, 5.0], [0.0, 0.5]])
    >>> u, v = power_iteration(W, v=torch.tensor([1.0, 0.0]), iterations=10)
    >>> (u @ W @ v).round(decimals=4)
    tensor(5.1225)
    """
    if matrix.dim() != 2:
        raise ShapeError(f"power_iteration: got a tensor of shape {show(matrix.shape)}, wanted a matrix")
    wide = matrix.detach().to(accumulation_dtype(matrix.dtype))
    left, right = (
        _unit(wide.new_empty(size).normal_(), eps) if kept is None else kept.to(wide.dtype)
        for kept, size in zip((u, v), wide.shape, strict=True)
    )
    with full_precision(wide):
        for _ in range(iterations):
            left = _unit(wide @ right, eps, left)
            right = _unit(wide.T @ left, eps, right)
    return left, right


@torch.no_grad()
def power_iteration_square(
    matrix: Tensor, tol: float = 1e-6, x: Tensor | None = None, limit: int = 10_000
) -> tuple[Tensor, Tensor]:
    """Run x <- W x / |W x| until x moves by less than ``tol``, up to sign: |W x| is the spectral radius, not the norm.

    Introductions to spectral normalization print this loop and take |W x| for the largest singular value. It is the largest
    absolute eigenvalue, which equals the spectral norm only for normal matrices, such as symmetric ones, and is smaller
    otherwise. Do not normalize by it; use ``power_iteration`` or ``spectral_norm``. It needs a square matrix with a dominant
    real eigenvalue, else OptionError after ``limit`` iterations (von Mises and Pollaczek-Geiringer, 1929,
    https://doi.org/10.1002/zamm.19290090206).

    >>> W = torch.tensor([[1.0, 5.0], [0.0, 0.5]])
    >>> radius, x = power_iteration_square(W, x=torch.tensor([1.0, 1.0]))
    >>> radius.round(decimals=4), torch.linalg.matrix_norm(W, 2).round(decimals=4)
    (tensor(1.), tensor(5.1225))
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(
            f"power_iteration_square: got a tensor of shape {show(matrix.shape)}, wanted a square matrix; for others use "
            "power_iteration"
        )
    if x is not None and x.shape != matrix.shape[:1]:
        raise ShapeError(
            f"power_iteration_square: got x of {show(x.shape)}, wanted a vector of {matrix.shape[0]} elements"
        )
    wide = matrix.detach().to(accumulation_dtype(matrix.dtype))
    now = _unit(wide.new_empty(len(wide)).normal_() if x is None else x.to(wide.dtype), 0.0)
    with full_precision(wide):
        for _ in range(limit):
            product = wide @ now
            size = torch.linalg.vector_norm(product)
            if not size:
                return size, now
            before, now = now, product / size
            if min((now - before).norm(), (now + before).norm()) < tol:
                return torch.linalg.vector_norm(wide @ now), now
    raise OptionError(
        f"power_iteration_square: x still moves by more than tol={tol:g} after limit={limit} iterations; the matrix may have no "
        "dominant real eigenvalue, or tol is below the rounding of its dtype"
    )


def _unit(product: Tensor, eps: float, before: Tensor | None = None) -> Tensor:
    """The product's direction, or the previous one if it has none: no iteration recovers from a zero vector."""
    norm = torch.linalg.vector_norm(product)
    direction = product / norm.clamp_min(eps)
    return direction if before is None else torch.where(norm > eps, direction, before)


class SpectralNorm(Parametrization):
    """The parametrization w / sigma(w), sigma the largest singular value of the 2-D unfolding, by warm power iteration.

    u <- w v / norm, v <- w^T u / norm at each use in training, none in evaluation; sigma = u^T w v, without gradient through
    u and v. The gradient is (dw - <dw, w> u v^T) / sigma with w the normalized weight. An iteration shrinks the error by
    (sigma_2 / sigma_1)^2; only the largest singular value is fixed. A weight of one axis is divided by its norm. Of a convolution
    of stride 1 the operator's norm is at most sqrt(taps) sigma, not sigma.

    With ``exact``, sigma comes from a singular value decomposition at each use, in training and in evaluation, and is
    differentiated: slower, but never outdated. The buffers then stay unchanged; both kinds have the same state_dict.

    Args:
        weight: the initial tensor, which determines the size of the buffers ``_u`` and ``_v``.
        n_power_iterations: iterations at each use in training. Default: 1.
        dim: the axis that indexes output units. Default: 0.
        eps: floor of norms and of sigma. Default: 1e-12.
        exact: whether to use a singular value decomposition instead of iterations. Default: False.

    Shape: That of ``weight``; the output has the same shape.

    Raises:
        OptionError: no such axis, or no iteration.

    Reference: Miyato, Kataoka, Koyama, Yoshida (2018), https://arxiv.org/abs/1802.05957.

    >>> SpectralNorm(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).eval()(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).round(decimals=4)
    tensor([[1.0000, 0.0000],
            [0.0000, 0.3333]])
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12, *, exact: bool = False
    ) -> None:
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            axes = weight.dim()
            raise OptionError(f"SpectralNorm: dim={dim} of a weight of {axes} axes; wanted {-axes} to {axes - 1}")
        if n_power_iterations < 1:
            raise OptionError(f"SpectralNorm: n_power_iterations={n_power_iterations}; wanted a whole number from 1")
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim % weight.dim(), eps
        self.exact = exact
        if weight.dim() > 1:
            matrix = self._matrix(weight.detach())
            for name, size in zip(("_u", "_v"), matrix.shape, strict=True):
                start = matrix.new_empty(size).normal_()
                self.register_buffer(name, F.normalize(start, dim=0, eps=eps))
            self._iterate(matrix, 15)  # as many as torch, so that both start alike

    def forward(self, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if weight.dim() == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        share = self.share(weight)
        if share is not None:
            return normalize([share])[0]
        matrix = self._matrix(weight)
        if not self.exact and matrix.shape != (self._u.numel(), self._v.numel()):
            raise ShapeError(
                f"SpectralNorm: the weight's matrix is {show(matrix.shape)}, but its singular vectors are those of a "
                f"{self._u.numel()}x{self._v.numel()} matrix, its size when it was parametrized; resize the weight before that"
            )
        if self.exact:
            sigma = torch.linalg.matrix_norm(matrix.to(accumulation_dtype(weight.dtype)), 2)
            return (weight / sigma.clamp_min(self.eps)).to(weight.dtype)
        if self._iterations:
            self._iterate(matrix.detach(), self._iterations)
        # Copies, as the next use writes to the buffers while this one's graph still needs their values.
        wide = accumulation_dtype(weight.dtype)
        u, v = (buffer.to(wide, copy=True) for buffer in (self._u, self._v))
        return self.definition(weight, u, v)

    def share(self, *raw: Tensor) -> Share | None:
        """This weight's part of one call for many weights; None where the kernels don't run."""
        (weight,) = raw
        if self.exact or self.dim != 0 or weight.dim() == 1:
            return None
        plan = self._plan_here(weight, self._u, self._v)
        if plan is None or plan.counts[5:7] != (self._u.numel(), self._v.numel()):
            return None  # forward raises the error
        return Share(plan, self.definition, weight, vectors=(self._u, self._v))

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        rows, statistic = weight.shape[0], Statistic(None, "norm", self.eps, "floor")
        nest, how = (
            (1, rows, weight.numel() // max(rows, 1), 1),
            {"statistic": statistic, "iterations": self._iterations},
        )
        return kernels.plan_for(nest, weight.dtype, method="spectral", **how)

    def options(self) -> tuple[object, ...]:
        return self._iterations, self.eps

    @property
    def _iterations(self) -> int:
        # Activation checkpointing runs a pass again, and wants the weight that the first one had.
        return self.n_power_iterations if self.training and not recomputed() else 0

    def definition(self, weight: Tensor, *vectors: Tensor) -> Tensor:
        """The weight divided by the singular value of its left and right vector."""
        divided = divide_by_sigma(self._matrix(weight), *vectors, eps=self.eps)
        return divided.reshape(self._moved(weight).shape).movedim(0, self.dim)

    def extra_repr(self) -> str:
        text = f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps:g}"
        return text + ", exact=True" * self.exact

    def _moved(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0)

    def _matrix(self, weight: Tensor) -> Tensor:
        return self._moved(weight).flatten(1)

    def _iterate(self, matrix: Tensor, iterations: int) -> None:
        outside = nullcontext
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            # The vectors are not part of what torch.func transforms, and are updated as they would be without it.
            while torch._C._functorch.is_gradtrackingtensor(matrix):  # pyright: ignore[reportAttributeAccessIssue]
                matrix = torch._C._functorch.get_unwrapped(matrix)  # pyright: ignore[reportAttributeAccessIssue]
            outside = temporarily_clear_interpreter_stack
        with outside(), torch.no_grad():
            u, v = power_iteration(matrix, self._u, self._v, iterations, self.eps)
            self._u.copy_(u)
            self._v.copy_(v)


def spectral_norm(
    layer: ModuleT,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    exact: bool = False,
) -> ModuleT:
    """Apply spectral normalization to a layer, in place; the raw weight stays the trained parameter.

    ``torch.nn.utils.parametrizations.spectral_norm`` with the same arguments, buffers and state_dict keys, and no NaN from a
    zero weight; ``dim=None`` is 1 in transposed convolutions and 0 in others. ``exact`` and errors are those of SpectralNorm. Set
    the layer to evaluation before folding it; otherwise folding iterates once more.

    >>> layer = spectral_norm(nn.Linear(3, 2)).eval()
    >>> torch.linalg.matrix_norm(layer.weight, 2).item() > 0.9
    True
    """
    weight = weight_of(layer, name, "spectral_norm")
    if dim is None:
        dim = int(isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))
    part = SpectralNorm(weight, n_power_iterations, dim, eps, exact=exact)
    return attach(layer, name, part, directed=True)


def divide_by_sigma(matrix: Tensor, u: Tensor, v: Tensor, eps: float = 1e-12) -> Tensor:
    """Spectral normalization as a function of a matrix and its leading singular vectors: w / (u^T w v); see SpectralNorm.

    >>> divide_by_sigma(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    with full_precision(matrix):
        wide = matrix.to(u.dtype)
        sigma = u @ (wide @ v)
        # At the floor sigma is a constant.
        return (wide / torch.where(sigma.abs() > eps, sigma, eps)).to(matrix.dtype)


CARD = Card(
    name="spectral_norm",
    title="Spectral normalization",
    kind="weight",
    word="sn",
    normalized_over="the whole weight, by its largest singular value",
    formula="w = v / sigma(v)",
    paper=paper("miyato2018spectral"),
    use_cases="discriminators of GANs, critics, and whatever must be Lipschitz",
    strengths="bounds the layer's Lipschitz constant; cheap, with one warm iteration per step; free once folded",
    weaknesses="fixes only the largest singular value, which is not a convolution's operator norm; lags behind fast weights",
    module=SpectralNorm,
    functional=divide_by_sigma,
    make=spectral_norm,
    train_equals_eval=False,
    invariances=frozenset({"weight scale"}),
)
