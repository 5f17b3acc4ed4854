"""What the parametrizations of a weight have in common that run on the kernels where those take it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.errors import ShapeError
from normkit.core.rule import Rule
from normkit.core.support import per_shape, show
from normkit.weights import kernels
from normkit.weights.multi_tensor import Share
from normkit.weights.spare import Spare


class Parametrization(nn.Module):
    """One weight, and for some one gain per set, to the weight as it is used.

    A subclass has ``definition``, in differentiable PyTorch, and ``plan``, what a kernel is told; its forward hands the raw
    tensors to ``made``.
    """

    # Whether each set is a row of axis 0, which may lie in memory as channels last has it.
    by_rows: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[tuple[object, ...], kernels.Plan | None] = {}
        self._spare = Spare()

    def __getstate__(self) -> dict[str, Any]:
        # Plans are bytes of a C structure, which another version of the kernels may lay out in another way.
        return {**vars(self), "_plans": {}}

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        """The weight as it is used, by PyTorch's operators."""
        raise NotImplementedError

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        """What a kernel is told of such a weight; None for what no kernel does."""
        raise NotImplementedError

    def options(self) -> tuple[object, ...]:
        """What the plan depends on besides the weight's shape and dtype."""
        return ()

    def made(self, weight: Tensor, *gain: Tensor) -> Tensor:
        """The weight as it is used, on the kernels where they take it."""
        plan = self._plan_here(weight, *gain)
        if plan is None:
            if not torch.compiler.is_compiling():  # which has no tensors with the negative bit
                weight, gain = weight.resolve_neg(), tuple(g.resolve_neg() for g in gain)
            return self.definition(weight, *gain)
        return kernels.normalize(weight, gain[0] if gain else None, plan, self.definition, self._spare)

    def share(self, *raw: Tensor) -> Share | None:
        """What the raw tensors, the weight last, bring to one call for many weights; None where the kernels don't run."""
        *gain, weight = raw
        plan = self._plan_here(weight, *gain)
        return None if plan is None else Share(plan, self.definition, weight, gain[0] if gain else None)

    def _plan_here(self, weight: Tensor, *gain: Tensor) -> kernels.Plan | None:
        if not kernels.takes(weight, *gain, rows=self.by_rows):
            return None
        key = (weight.shape, weight.dtype, *self.options())
        if key not in self._plans:
            self._plans[key] = self.plan(weight)
        plan = self._plans[key]
        if plan is not None and gain and gain[0].numel() != plan.sets:
            return None  # the definition says so
        return plan


def laid_out(gain: Tensor, rule: Rule, weight: Tensor, who: str) -> Tensor:
    """The gains of a rule on a weight, one per set, in the shape in which they multiply it.

    Raises:
        ShapeError: there are more or fewer.
    """
    assert rule.compensation is not None
    shape = per_shape(rule.compensation.per, rule.support.split(weight.shape))
    if gain.numel() != math.prod(shape):
        raise ShapeError(
            f"{who}: got {gain.numel()} lengths ({show(gain.shape)}) for a weight of {show(weight.shape)}; wanted "
            f"{math.prod(shape)}, of shape {show(shape)}"
        )
    return gain.reshape(shape)


def release(model: nn.Module) -> None:
    """Gives up the memory that parametrizations of a model keep from one training step to the next."""
    for part in model.modules():
        if isinstance(part, Parametrization):
            part._spare.empty()
