"""Power iteration for the leading singular vectors of a matrix, and the loop for square matrices that finds something else."""

import torch
from torch import Tensor

from normkit.core.errors import OptionError, ShapeError
from normkit.core.moments import accumulation_dtype
from normkit.core.precision import full_precision
from normkit.core.support import show


@torch.no_grad()
def power_iteration(
    matrix: Tensor, u: Tensor | None = None, v: Tensor | None = None, iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Improve the leading singular vectors of a matrix: u <- W v / |W v|, v <- W^T u / |W^T u|; sigma is then u^T W v.

    Each iteration shrinks the error of sigma by (sigma_2 / sigma_1)^4, of the vectors by (sigma_2 / sigma_1)^2. sigma approaches
    from below. Keep the vectors for the next call: after a small change of the weight, one iteration is enough.

    Args:
        matrix: (out, in).
        u: (out,) from the previous call. Default: None, which is as good as random.
        v: (in,) from the previous call. Default: None, random.
        iterations: number of iterations, from 0. Default: 1.
        eps: a product no longer than this leaves its vector unchanged. Default: 1e-12.

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
            f"power_iteration_square: got x of shape {show(x.shape)}, wanted a vector of {matrix.shape[0]} elements"
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
