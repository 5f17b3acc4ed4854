"""Lanczos: extreme eigenvalues of a symmetric operator that is known by its products, and quadrature of its spectrum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.core.errors import BackendError, OptionError

Product = Callable[[Tensor], Tensor]

# Vectors that ARPACK keeps: with fewer it restarts more often, with more it takes more memory.
VECTORS = 20


class Dominant(NamedTuple):
    """The eigenvalue of largest magnitude; an eigenvalue is within ``error`` of it, after some products with the matrix."""

    value: float
    error: float
    products: int


def dominant(
    product: Product, start: Tensor, *, tolerance: float, limit: int, who: str, scale: float = 0.0
) -> Dominant:
    """Find a symmetric operator's eigenvalue of largest magnitude by ARPACK, implicitly restarted Lanczos.

    It stops at a relative error, or gives up after a limit of products. The error is the residual norm |A v - value v|, v the
    unit vector found: so near to the value is an eigenvalue. What is rounding of numbers of a scale counts as the zero matrix,
    from which ARPACK cannot start. Memory: about 24 vectors, on the CPU.

    >>> scale = torch.arange(1.0, 101.0, dtype=torch.float64)
    >>> found = dominant(lambda x: scale * x, torch.ones_like(scale), tolerance=1e-9, limit=1000, who="example")
    >>> round(found.value, 6), found.error < 1e-4
    (100.0, True)
    """
    # curvlinops offers operators for the same solver, but its dependencies bring a torchvision that breaks a CPU build of torch.
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ModuleNotFoundError:
        raise BackendError(f"{who}: scipy finds the eigenvalues, and is not installed; pip install scipy") from None
    first, length = product(start), start.norm().item()
    if len(start) == 1:
        return Dominant((first @ start / (start @ start)).item(), 0.0, 1)
    size, made, rest = len(start), 1, first.norm().item() / length
    if rest <= 10 * torch.finfo(start.dtype).eps * scale:
        return Dominant(0.0, rest, made)

    def multiply(x: Any) -> Any:
        nonlocal made
        made += 1
        return product(torch.from_numpy(x.reshape(-1)).to(start)).cpu().numpy()

    vectors, begin = min(size, VECTORS), start.cpu().numpy()
    operator: Any = LinearOperator((size, size), matvec=multiply, dtype=begin.dtype)  # pyright: ignore[reportCallIssue]
    options: dict[str, Any] = {"tol": tolerance, "ncv": vectors, "maxiter": max(1, limit // vectors)}
    try:
        values, found = eigsh(operator, k=1, which="LM", v0=begin, **options)
    except ArpackNoConvergence:
        raise OptionError(
            f"{who}: {made} products did not bring an eigenvalue to a relative error of {tolerance:g}; give a larger limit= or "
            "tolerance="
        ) from None
    value, unit = float(values[0]), torch.from_numpy(found[:, 0]).to(start)
    return Dominant(value, (product(unit) - value * unit).norm().item(), made + 1)


def quadrature(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Take steps of Lanczos from a vector: Gauss quadrature of the operator's spectrum, weighted by the vector.

    With nodes x_k in ascending order and weights w_k, the sum of w_k f(x_k) is v' f(A) v for every polynomial f of degree below
    2 steps, v the start scaled to norm 1. Every vector is kept and made orthogonal to all, as rounding would else bring back
    eigenvalues that have been found.

    >>> nodes, weights = quadrature(lambda x: torch.tensor([1.0, 3.0]) * x, torch.tensor([1.0, 1.0]), 5)
    >>> nodes.float(), weights.float()
    (tensor([1.0000, 3.0000]), tensor([0.5000, 0.5000]))
    """
    basis, diagonal, beside = [start / start.norm()], list[Tensor](), list[Tensor]()
    for _ in range(min(steps, len(start))):
        following = product(basis[-1])
        diagonal.append(following @ basis[-1])
        for _ in range(2):  # the second pass removes what the first one's rounding leaves
            for vector in basis:
                following = following - (following @ vector) * vector
        length = following.norm()
        # Below this the vector is rounding error, and the space is complete.
        if length <= torch.finfo(start.dtype).eps * len(start) * max(map(abs, diagonal)):
            break
        beside.append(length)
        basis.append(following / length)
    inner = torch.stack(beside[: len(diagonal) - 1]).double() if len(diagonal) > 1 else start.new_zeros(0).double()
    middle = torch.stack(diagonal).double()
    nodes, vectors = torch.linalg.eigh(torch.diag(middle) + torch.diag(inner, 1) + torch.diag(inner, -1))
    return nodes, vectors[0].square()
