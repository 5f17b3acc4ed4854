"""The base of weight parametrizations on the kernels, and many weights in one call, with one node of autograd for all."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import parametrize

from normkit.core.errors import ShapeError
from normkit.core.module import ShownModule
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.statistic import length
from normkit.core.support import per_shape, show
from normkit.engine.abi import like, plain
from normkit.engine.eager import traced
from normkit.weights import kernels
from normkit.weights.attachment import hooked, originals
from normkit.weights.spare import Spare


class Share(NamedTuple):
    """One weight's part of a call; ``definition`` computes the same, of weight and gain or of weight, left and right vector.

    The vectors are updated in place.
    """

    plan: kernels.Plan
    definition: Callable[..., Tensor]
    weight: Tensor
    gain: Tensor | None = None
    vectors: tuple[Tensor, Tensor] | None = None


class Parametrization(ShownModule):
    """Map a raw weight (and, for some methods, one gain per set) to the effective weight.

    A subclass defines ``definition``, in differentiable PyTorch, and ``plan``, for a kernel. Its raw tensors are the weight, or
    the gain and the weight.
    """

    # Whether each set is a row of axis 0, so that channels-last weights need no copy.
    by_rows: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[tuple[object, ...], kernels.Plan | None] = {}
        self._spare = Spare()

    def __getstate__(self) -> dict[str, Any]:
        # Plans are bytes of a C structure, which another version of the kernels may lay out differently.
        return {**vars(self), "_plans": {}}

    def forward(self, *raw: Tensor) -> Tensor:
        """The effective weight, of the raw weight's shape and dtype."""
        *gain, weight = raw
        return self.made(weight, *gain)

    def right_inverse(self, weight: Tensor) -> Any:
        """The raw tensors that assigning a weight stores: by default that weight itself."""
        return weight

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        """Compute the effective weight by PyTorch's operators."""
        raise NotImplementedError

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        """Make the plan of a kernel for such a weight; None for what no kernel does."""
        raise NotImplementedError

    def options(self) -> tuple[object, ...]:
        """The options that the plan depends on, besides the weight's shape and dtype."""
        return ()

    def made(self, weight: Tensor, *gain: Tensor) -> Tensor:
        """Compute the effective weight, on the kernels where they take the raw one."""
        plan = self._plan_here(weight, *gain)
        if plan is None:
            if not torch.compiler.is_compiling():  # a compiler has no tensors with the negative bit
                weight, gain = weight.resolve_neg(), tuple(g.resolve_neg() for g in gain)
            return self.definition(weight, *gain)
        return kernels.normalize(weight, gain[0] if gain else None, plan, self.definition, self._spare)

    def share(self, *raw: Tensor) -> Share | None:
        """The raw tensors' part, with the weight last, of one call for many weights; None where the kernels don't run."""
        *gain, weight = raw
        plan = self._plan_here(weight, *gain)
        return None if plan is None else Share(plan, self.definition, weight, gain[0] if gain else None)

    def _plan_here(self, weight: Tensor, *gain: Tensor) -> kernels.Plan | None:
        if not kernels.takes(weight, *gain, rows=self.by_rows):
            return None
        # Not the strides: takes() accepted them, and the kernels walk rows the same way in both layouts.
        key = (weight.shape, weight.dtype, *self.options())
        if key not in self._plans:
            self._plans[key] = self.plan(weight)
        plan = self._plans[key]
        if plan is not None and gain and gain[0].numel() != plan.sets:
            return None  # the definition raises the error
        return plan


def laid_out(gain: Tensor, rule: Rule, weight: Tensor, who: str) -> Tensor:
    """Bring the gains of a rule on a weight, one per set, to the shape in which they multiply it."""
    assert rule.compensation is not None
    shape = per_shape(rule.compensation.per, rule.support.split(weight.shape))
    if gain.numel() != math.prod(shape):
        raise ShapeError(
            f"{who}: got {gain.numel()} lengths ({show(gain.shape)}) for a weight of {show(weight.shape)}; wanted "
            f"{math.prod(shape)}, of shape {show(shape)}"
        )
    return gain.reshape(shape)


def release(model: nn.Module) -> None:
    """Free the memory that the parametrizations of a model keep from one training step to the next."""
    for part in model.modules():
        if isinstance(part, Parametrization):
            part._spare.empty()


def inverse_norm(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Compute 1 / max(norm, eps) over some axes, kept with size 1; at a zero row its second derivative is zero, not NaN."""
    if traced():
        return length(x, dims).clamp_min(eps).reciprocal()
    return _InverseNorm.apply(x, dims, eps)  # pyright: ignore[reportReturnType]


class _InverseNorm(torch.autograd.Function):
    # A forward with ctx, not setup_context: for a small weight the latter costs more than the norm.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, dims, ctx.eps = inputs
        inverse = length(x, dims).clamp_min_(ctx.eps).reciprocal_()
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        # Against the very reciprocal that the floor gives: in floating point (1 / eps) * eps may be less than 1.
        above = inverse < torch.full_like(inverse, ctx.eps).reciprocal()
        return x * torch.where(above, -gradients[0] * inverse**3, 0.0), None, None


def normalize(shares: Sequence[Share]) -> list[Tensor]:
    """Compute the weights of all shares, for which ``kernels.takes`` holds, in one call into the library."""
    if not shares:
        return []
    raw = [tensor for share in shares for tensor in (share.weight, share.gain)]
    return list(cast(tuple[Tensor, ...], _Together.apply(tuple(shares), *raw)))


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """A context in which a model's parametrized weights are computed once, in one call for those that the kernels know.

    It is ``torch.nn.utils.parametrize.cached`` with all weights computed at the start. Put the forward passes of a step inside,
    the backward pass inside or after it, the optimizer's step after it. Weights that are used several times per step are computed
    once, and spectral normalization iterates once. The gradients of all raw weights arrive together at the end of the backward
    pass: do not use the context where something waits for them one by one, such as DistributedDataParallel, where weights are
    not in memory until their layer runs, as with FSDP and offloading, or around checkpointed regions, which are recomputed after.
    """
    # torch's own cache, an internal dictionary: layers look up their weights there, and so need not know of this.
    with parametrize.cached():
        places: list[tuple[int, str]] = []
        shares: list[Share] = []
        for layer in model.modules():
            for name, part, raw in _single_parts(layer):
                share = part.share(*raw) if (id(layer), name) not in parametrize._cache else None
                if share is not None:
                    places.append((id(layer), name))
                    shares.append(share)
        parametrize._cache.update(zip(places, normalize(shares), strict=True))  # pyright: ignore
        yield


def _single_parts(layer: nn.Module) -> Iterator[tuple[str, Parametrization, list[Tensor]]]:
    """Yield the name, parametrization and raw tensors of each tensor with one parametrization and no hooks."""
    held = layer._modules.get("parametrizations") if parametrize.is_parametrized(layer) else None
    for name, found in held._modules.items() if held is not None else ():
        assert found is not None
        parts = list(found._modules.values())
        if len(parts) == 1 and isinstance(parts[0], Parametrization) and not hooked(found, parts[0]):
            yield name, parts[0], originals(found)


class _Together(torch.autograd.Function):
    """Weights computed by the kernels; inputs are the shares, then weight and gain of each."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        shares: tuple[Share, ...] = inputs[0]
        results = tuple(torch.empty_like(share.weight) for share in shares)
        kept = [_room(share) for share in shares]
        calls = [
            (share.weight, share.gain, None, result, None, *(share.vectors or (None, None)), room)
            for share, result, room in zip(shares, results, kept, strict=True)
        ]
        kernels.run([share.plan for share in shares], calls, backward=False)
        for share in shares:
            if share.vectors is not None:
                increment_version(share.vectors)  # the library wrote to them without autograd's knowledge
        ctx.plans = [share.plan for share in shares]
        ctx.definitions = [_definition(share, room) for share, room in zip(shares, kept, strict=True)]
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raw, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        found: list[Tensor | None] = [None] * len(raw)
        plans, calls = [], []
        for k, gradient in enumerate(gradients):
            weight, gain = raw[2 * k : 2 * k + 2]
            if gradient is None or not any(needed[2 * k : 2 * k + 2]):
                continue
            if torch.is_grad_enabled() or not plain(gradient):
                both = needed[2 * k : 2 * k + 2]
                found[2 * k : 2 * k + 2] = kernels.gradients_by(ctx.definitions[k], (weight, gain), both, gradient)
                continue
            result, dgain = torch.empty_like(weight), None if gain is None else torch.empty_like(gain)
            found[2 * k : 2 * k + 2] = result, dgain
            plans.append(ctx.plans[k])
            calls.append((weight, gain, like(gradient, weight), result, dgain, None, None, ctx.kept[k]))
        if plans:
            kernels.run(plans, calls, backward=True)
        return None, *found


def _room(share: Share) -> Tensor | None:
    """Where forward keeps what it measured, of a weight that has vectors."""
    if share.vectors is None:
        return None
    return share.weight.new_empty(1 + sum(len(v) for v in share.vectors), dtype=accumulation_dtype(share.weight.dtype))


def _definition(share: Share, room: Tensor | None) -> Callable[..., Tensor]:
    if share.vectors is None or room is None:
        return share.definition
    left, right = room[1:].split([len(v) for v in share.vectors])
    return functools.partial(_by_vectors, share.definition, left, right)


def _by_vectors(definition: Callable[..., Tensor], left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    return definition(weight, left, right)
