"""Rows of weights scaled by their norms: two controls of row equilibration, and its variants for ablations."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.surgery.select import select
from normkit.weights.weight_conditioning import weight_conditioning

Scale = Literal["", "unit", "kept"]
_TRUNK = "re:trunk"
EPS = 1e-12


def scale_rows(model: nn.Module, scale: Scale) -> None:
    """Changes the layers of a model's trunks, in place, before it is trained: two controls of E."""
    # "unit" divides rows by their norms once: the E form's first signals, no conditioning. "kept" is E with a gain, the root
    # mean square of the rows' norms: conditioning that leaves the first signals about as large as they were.
    for layer in select(model, _TRUNK).values() if scale else ():
        weight = layer.get_parameter("weight")
        if scale == "kept":
            lengths = weight.detach().norm(dim=1)
            weight_conditioning(layer, gain=float(lengths.square().mean().sqrt()))
        else:
            unit_rows(weight)


@torch.no_grad()
def unit_rows(weight: torch.Tensor) -> None:
    """Divides each row of a weight by its norm, in place."""
    weight /= weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))


class ByNorm(nn.Module):
    """Divides each row by its p-norm: w_i = v_i / max(|v_i|_p, eps); p is from 1, infinity for the greatest element."""

    def __init__(self, order: float) -> None:
        super().__init__()
        self.order = order

    def forward(self, weight: Tensor) -> Tensor:
        return weight / _norms(weight, self.order).clamp(min=EPS)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Kept(nn.Module):
    """Divides each row by the norm that it had when it was last looked at, every few training steps.

    The factors are constants: the gradient does not go through them. They are looked at when the weight is asked for with
    gradients, so that evaluation does not count.
    """

    factors: Tensor
    count: Tensor

    def __init__(self, every: int, weight: Tensor) -> None:
        super().__init__()
        self.every = every
        self.register_buffer("factors", self._measured(weight))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            if int(self.count) % self.every == 0:
                self.factors.copy_(self._measured(weight))
            self.count.add_(1)
        # A copy, as the buffer may be written before the backward pass.
        return weight * self.factors.clone()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def _measured(weight: Tensor) -> Tensor:
        return _norms(weight.detach(), 2.0).clamp(min=EPS).reciprocal()


def scale_by_norm(model: nn.Module, where: str = "first_last", *, norm: float | str = 2.0, every: int = 0) -> None:
    """Scales rows by their norm of order `norm`; or, where `every` is not 0, by 2-norms kept for `every` steps."""
    for layer in select(model, where).values():
        assert isinstance(layer.weight, Tensor)
        scaling = Kept(every, layer.weight) if every else ByNorm(float(norm))
        # "Unsafe" leaves out a trial run, which would count as a step.
        parametrize.register_parametrization(layer, "weight", scaling, unsafe=True)


def _norms(weight: Tensor, order: float) -> Tensor:
    axes = [1] * (weight.dim() - 1)
    return torch.linalg.vector_norm(weight.flatten(1), order, dim=1).view(-1, *axes)
