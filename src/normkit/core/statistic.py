"""The centre that is subtracted and the scale that is divided by: mean and deviation, root mean square, norm, range."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normkit.core.errors import OptionError, check_options
from normkit.core.moments import Moments, accumulation_dtype, moments
from normkit.core.support import Split

Center = Literal["mean", "min"]
Scale = Literal["std", "rms", "norm", "range", "max"]
Guard = Literal["inside", "outside", "floor"]

_SCALE_FORMULA = {"std": "sqrt(Var[x])", "rms": "sqrt(E[x^2])", "norm": "|x|", "max": "max|x|"}
_SCALE_FORMULA |= {"range": "(max[x] - min[x])"}
_INSIDE_FORMULA = {"std": "sqrt(Var[x] + eps)", "rms": "sqrt(E[x^2] + eps)", "norm": "sqrt(|x|^2 + eps)"}


@dataclass(frozen=True)
class Statistic:
    """A centre and a scale: x becomes (x - centre) / scale.

    Args:
        center: ``"mean"``, ``"min"`` or None for no centring.
        scale: ``"std"``, ``"rms"``, ``"norm"`` (Euclidean), ``"range"``, ``"max"`` (of absolute values) or None for no scaling.
        eps: keeps the scale above zero. None takes the machine epsilon of the accumulation dtype.
        guard: where eps enters: ``"inside"`` the root, ``"outside"`` it (added), or as a ``"floor"`` on the scale.
        correction: 1 divides the variance by count - 1, 0 by count.

    Raises:
        OptionError: an unknown name, a negative eps, or eps inside a scale that has no root.

    >>> Statistic("mean", "std", 1e-5).formula()
    '(x - E[x]) / sqrt(Var[x] + eps)'
    """

    center: Center | None = "mean"
    scale: Scale | None = "std"
    eps: float | None = 1e-5
    guard: Guard = "inside"
    correction: int = 0

    def __post_init__(self) -> None:
        scales, guards = (*_SCALE_FORMULA, None), ("inside", "outside", "floor")
        check_options("Statistic", center=(self.center, ("mean", "min", None)), scale=(self.scale, scales))
        check_options("Statistic", guard=(self.guard, guards), correction=(self.correction, (0, 1)))
        if self.eps is not None and not self.eps >= 0:
            raise OptionError(f"Statistic: eps={self.eps}; wanted a number from 0, or None")
        if self.guard == "inside" and self.scale is not None and self.scale not in _INSIDE_FORMULA:
            raise OptionError(f'Statistic: scale={self.scale!r} has no root for eps; use guard="floor" or "outside"')

    def epsilon(self, dtype: torch.dtype) -> float:
        """Eps as a number, for statistics of this dtype."""
        return torch.finfo(dtype).eps if self.eps is None else self.eps

    def guarded(self, raw: Tensor, power: int = 1) -> Tensor:
        """Return the scale with eps applied, given the bare scale (``power=1``) or its square (``power=2``)."""
        eps = self.epsilon(raw.dtype)
        if self.guard == "inside":
            return (raw + eps).sqrt() if power == 2 else (raw.square() + eps).sqrt()
        root = raw.sqrt() if power == 2 else raw
        return root + eps if self.guard == "outside" else root.clamp_min(eps)

    def measure(
        self, x: Tensor, split: Split, mask: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Moments | None]:
        """Measure centre, guarded scale and moments of a split tensor, with reduced axes of size 1; None for what is not in use.

        Args:
            x: the tensor, viewed as ``split.shape``.
            split: split of the support set.
            mask: boolean, broadcasts over x; elements where it is False are left out.

        Returns tensors in the accumulation dtype, differentiable any number of times.
        """
        x = x.to(accumulation_dtype(x.dtype))
        dims = split.dims
        found = moments(x, dims, mask) if self.center == "mean" or self.scale == "std" else None
        # Masked elements must not win a minimum or maximum, so they become infinities there.
        least = x if mask is None else torch.where(mask, x, math.inf)
        if self.center == "mean":
            assert found is not None
            center = found.mean
        else:
            center = _least(least, dims) if self.center == "min" else None
        if self.scale is None:
            return center, None, found
        # Inside a root eps keeps its derivative finite at zero, so squares do; elsewhere ``length``, whose derivative is 0 there.
        if self.scale == "std":
            assert found is not None
            if self.guard == "inside":
                return center, self.guarded(found.unbiased() if self.correction else found.var, power=2), found
            rest = x - found.mean if mask is None else torch.where(mask, x - found.mean, 0.0)
            count = found.n - self.correction
            if isinstance(count, Tensor) and not self.correction:
                count = count.clamp_min(1)  # a set that a mask empties has the deviation 0, not 0 / 0
            deviation = length(rest, dims) / count**0.5
            return center, self.guarded(deviation), found
        kept = x if mask is None else torch.where(mask, x, 0.0)
        if self.scale == "rms":
            count = split.count if mask is None else mask.expand(x.shape).sum(dims, keepdim=True).clamp_min(1)
            if self.guard == "inside":
                return center, self.guarded(_total(kept.square(), dims) / count, power=2), found
            return center, self.guarded(length(kept, dims) / count**0.5), found
        if self.scale == "norm":
            if self.guard == "inside":
                return center, self.guarded(_total(kept.square(), dims), power=2), found
            return center, self.guarded(length(kept, dims)), found
        if self.scale == "max":
            return center, self.guarded(_most(kept.abs(), dims)), found
        most = x if mask is None else torch.where(mask, x, -math.inf)
        return center, self.guarded(_most(most, dims) - _least(least, dims)), found

    def formula(self) -> str:
        """The normalized value, as the literature writes it.

        >>> Statistic(None, "rms", guard="floor").formula()
        'x / max(sqrt(E[x^2]), eps)'
        """
        top = {"mean": "(x - E[x])", "min": "(x - min[x])", None: "x"}[self.center]
        if self.scale is None:
            return top.strip("()")
        if self.guard == "inside":
            return f"{top} / {_INSIDE_FORMULA[self.scale]}"
        bare = _SCALE_FORMULA[self.scale]
        if self.guard == "floor":
            return f"{top} / max({bare.strip('()') if bare.startswith('(') else bare}, eps)"
        return f"{top} / ({bare} + eps)"


# torch reduces all axes where none are named; here no axes mean that each element is a set of its own.


def _total(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x


def _most(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.amax(dims, keepdim=True) if dims else x


def _least(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.amin(dims, keepdim=True) if dims else x


def length(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over some axes, kept with size 1; of no axes, the absolute value."""
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True) if dims else x.abs()
