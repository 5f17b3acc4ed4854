"""Normalizing with a backward pass in closed form, in eager PyTorch.

Autograd through the definition keeps five intermediates of the input's size and walks them all again; the closed form
keeps the normalized tensor and one scale per statistic. With y = (x - c) / s, i = 1 / s and n - correction elements in the
variance, the gradient is

    dx = i * (dy - mean(dy) - k * y * (sum(dy * y) + i * di))

without the mean where nothing is centred; di is the gradient that reaches i itself, and k comes from how s depends on x:
1 / n for the deviation and the root mean square with eps inside the root, 1 for a norm, divided by 1 - eps * i where eps is
added to the root, and 0 where the floor holds. Both y and i are outputs, so the formula is its own derivative to any order.
"""

from typing import Any

import torch
from torch import Tensor

from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.statistic import Statistic, length
from normkit.core.support import Split
from normkit.engine.call import Call, Output, finish, summed
from normkit.engine.reference import activate


def has_closed_form(statistic: Statistic) -> bool:
    """Whether the statistic's gradient is the formula of this file."""
    return (statistic.center, statistic.scale) in {("mean", "std"), ("mean", None), (None, "rms"), (None, "norm")}


def refusal(call: Call, split: Split) -> str | None:
    """Reason this call can't run on the closed form, or None."""
    statistic = call.rule.statistic
    if not has_closed_form(statistic):
        return f"no closed backward is known for {statistic.formula()}"
    if call.mask is not None:
        return "the closed form takes no mask"
    if not call.own:
        return "given statistics need no closed form"
    if 0 in (call.x.numel(), len(split.dims)) or split.count <= statistic.correction:
        return "there is nothing to reduce"
    return None


def perform(call: Call, split: Split) -> Output:
    """Run a call by this form; only where ``refusal`` returned None."""
    x, total = summed(call)
    y, _, moments = normalize(x.reshape(split.shape), split, call.rule.statistic)
    if call.weight is not None or call.bias is not None:
        assert call.rule.compensation is not None
        y = call.rule.compensation.apply(y, split, call.weight, call.bias)
    elif y.dtype == x.dtype:
        y = y.clone()  # the backward pass needs y, and a caller may write into its output
    return Output(finish(activate(y, call.activation), call), total, moments)


class _ClosedForm(torch.autograd.Function):
    """(normalized, 1 / scale, mean, variance) of a tensor; the last two have no gradient and are for running averages."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, dims: tuple[int, ...], count: int, statistic: Statistic
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x = x.to(accumulation_dtype(x.dtype))
        if statistic.center is None:
            divisor = count if statistic.scale == "rms" else 1
            squared = statistic.guard == "inside"
            size = length(x, dims)
            inverse = statistic.guarded(
                size.square() / divisor if squared else size / divisor**0.5, power=1 + squared
            ).reciprocal_()
            return x * inverse, inverse, None, None
        mean = x.mean(dims, keepdim=True)
        rest = x - mean
        # As in core.moments: the mean is corrected by the mean of the residuals.
        shift = rest.mean(dims, keepdim=True)
        rest -= shift
        square = length(rest, dims).square()
        found = square / (count - statistic.correction)
        inverse = statistic.guarded(found, power=2).reciprocal_()
        return rest.mul_(inverse), inverse, mean + shift, square / count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, ctx.dims, ctx.count, ctx.statistic = inputs
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)  # a gradient of 1 / scale is rare, and zeros in its place would cost a pass
        ctx.mark_non_differentiable(*(moment for moment in output[2:] if moment is not None))
        ctx.save_for_backward(*output[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        y, inverse = ctx.saved_tensors
        dy, di, statistic, dims = gradients[0], gradients[1], ctx.statistic, ctx.dims
        along = (dy * y).sum(dims, keepdim=True) if dy is not None else torch.zeros_like(inverse)
        if di is not None:
            along = along + inverse * di
        along = along * _strength(statistic, inverse, ctx.count)
        if dy is None:
            return (-y * along * inverse).to(ctx.dtype), None, None, None
        if torch.is_grad_enabled():  # this pass is itself differentiated, and must not write in place
            centred = dy if statistic.center is None else dy - dy.mean(dims, keepdim=True)
            return ((centred - y * along) * inverse).to(ctx.dtype), None, None, None
        dx = torch.addcmul(dy, y, along, value=-1)
        if statistic.center is not None:
            dx -= dy.mean(dims, keepdim=True)
        return dx.mul_(inverse).to(ctx.dtype), None, None, None


def _strength(statistic: Statistic, inverse: Tensor, count: int) -> Tensor | float:
    """How the scale depends on the input: the k of this file's formula."""
    k = 1.0 if statistic.scale == "norm" else 1.0 / (count - statistic.correction)
    eps = statistic.epsilon(inverse.dtype)
    if statistic.guard == "floor":
        # Against the very reciprocal that the floor gives: in floating point (1 / eps) * eps may be less than 1.
        return k * (inverse < torch.full_like(inverse, eps).reciprocal()).to(inverse.dtype)
    if statistic.guard == "outside":
        rest = 1 - eps * inverse
        # Where the scale is eps alone the normalized tensor is zero, and so is what this multiplies.
        return torch.where(rest > 0, k / torch.where(rest > 0, rest, 1.0), 0.0)
    return k


def normalize(x: Tensor, split: Split, statistic: Statistic) -> tuple[Tensor, Tensor, Moments | None]:
    """Normalize a split tensor with the closed backward; returns y and 1 / scale in the accumulation dtype, and any moments."""
    if statistic.scale is None:
        return _centred(x, split)
    y, inverse, mean, var = _ClosedForm.apply(x, split.dims, split.count, statistic)
    return y, inverse, None if mean is None else Moments(mean, var, split.count)


def _centred(x: Tensor, split: Split) -> tuple[Tensor, Tensor, Moments]:
    """Centring alone is linear: about a constant near the mean, autograd itself gives dx = dy - mean(dy) and keeps nothing."""
    x = x.to(accumulation_dtype(x.dtype))
    near = x.detach().mean(split.dims, keepdim=True)
    rest = x - near
    shift = rest.mean(split.dims, keepdim=True)
    y = rest - shift
    var = length(y.detach(), split.dims).square() / split.count
    return y, torch.ones_like(near), Moments(near + shift.detach(), var, split.count)
