"""Weights on the C++ kernels of this package: the plan of a kernel, the weights it takes, and its derivatives.

A *plan* is all that a kernel needs to know of a weight except its values: the bytes of ``NkWeightPlan`` in native/weights.h,
and the number of elements of each tensor of a call. Every pointer passed to the library comes from ``_address``, which checks it
against the plan. One call takes any number of weights. Backward measures the weight again instead of keeping statistics; a
backward pass that is itself differentiated goes through the definition in PyTorch.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normkit.core.errors import BackendError, ShapeError
from normkit.core.moments import accumulation_dtype
from normkit.core.statistic import Statistic
from normkit.core.support import Split, show
from normkit.engine.abi import TYPES, checked, entry, gradients, like, plain
from normkit.engine.library import library
from normkit.weights.spare import Spare

Method = Literal["normalize", "sequential", "simultaneous", "ruiz", "spectral"]
Sets = Literal["near", "apart"]

_METHODS = {"normalize": 0, "sequential": 1, "simultaneous": 2, "ruiz": 3, "spectral": 4}
_SCALES = {("mean", "std"): (1, 1), (None, "norm"): (0, 2)}
_GUARDS = {"inside": 0, "outside": 1, "floor": 2}
_NORM = Statistic(None, "norm", 1e-12, "floor")
_POINTERS = (
    "weight",
    "gain",
    "gradient",
    "result",
    "gain's gradient",
    "left vector",
    "right vector",
    "room",
)  # of NkWeightCall


class Plan(NamedTuple):
    """What a kernel needs to know of a weight, and the element counts of a call's tensors, in the order of ``NkWeightCall``."""

    without_gain: bytes
    with_gain: bytes
    dtype: torch.dtype
    counts: tuple[int, ...]

    def raw(self, gain: Tensor | None) -> bytes:
        """The plan in bytes, which say whether there is a gain: a null pointer could also be a gain without memory."""
        return self.without_gain if gain is None else self.with_gain

    @property
    def sets(self) -> int:
        """Number of gains."""
        return self.counts[1]


def plan_for(
    nest: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    method: Method = "normalize",
    sets: Sets = "near",
    statistic: Statistic = _NORM,
    factor: float = 1.0,
    constant: bool = False,
    iterations: int = 0,
) -> Plan | None:
    """Make the plan of a weight whose axes merge, in the order of memory, to groups, far, kept, inner; None without a kernel.

    A near set belongs to one (group, far), an apart set to one (group, kept); ``"sequential"`` takes ``sets`` first.
    """
    form = _SCALES.get((statistic.center, statistic.scale))
    if dtype not in TYPES or form is None or 0 in nest:
        return None
    eps = statistic.epsilon(accumulation_dtype(dtype))
    codes = (
        TYPES[dtype],
        _METHODS[method],
        int(sets == "apart"),
        *form,
        _GUARDS[statistic.guard],
        statistic.correction,
    )
    raw, gained = (struct.pack("4q2d10i", *nest, eps, factor, *codes, constant, iterations, gain) for gain in (0, 1))
    groups, far, kept, inner = nest
    size, count = math.prod(nest), groups * (far if sets == "near" else kept)
    return Plan(raw, gained, dtype, (size, count, size, size, count, far, kept * inner, 1 + far + kept * inner))


def plan_over(
    split: Split, dtype: torch.dtype, statistic: Statistic, factor: float = 1.0, constant: bool = False
) -> Plan | None:
    """Make the plan for normalizing a contiguous weight over a support; None for what no kernel does."""
    if split.count <= statistic.correction:
        return None
    axes = [d for d, size in enumerate(split.shape) if size != 1]
    runs = [
        (reduced, math.prod(split.shape[d] for d in dims))
        for reduced, dims in groupby(axes, key=lambda d: d in split.dims)
    ]
    # Kept and reduced axes alternate, a kept one first; a missing one at either end has size 1.
    if not runs or not runs[-1][0]:
        runs.append((True, 1))
    if runs[0][0]:
        runs.insert(0, (False, 1))
    sizes = [size for _, size in runs]
    if len(sizes) > 4:
        return None
    nest = (1, sizes[0], sizes[1], 1) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2], sizes[3])
    sets: Sets = "near" if len(sizes) == 2 else "apart"
    return plan_for(nest, dtype, sets=sets, statistic=statistic, factor=factor, constant=constant)


def takes(weight: Tensor, *others: Tensor, rows: bool = False) -> bool:
    """Whether the kernels take these tensors now: plain ones on a CPU, while nothing must see PyTorch's operators.

    With ``rows`` it is enough that axis 0 is outermost in memory, as in channels-last weights.
    """
    if not plain(weight, *others) or library() is None:
        return False
    if not (weight.is_contiguous() or (rows and _channels_last(weight))):
        return False
    for other in others:
        if other.dtype is not weight.dtype or not other.is_contiguous():
            return False
    return True


def _address(plan: Plan, which: int, tensor: Tensor | None) -> int | None:
    """The address of a call's tensor by its place in ``NkWeightCall``, refused without the plan's elements, dtype or density."""
    if tensor is None:
        return None
    address, dtype = tensor.data_ptr(), plan.dtype if which < 7 else accumulation_dtype(plan.dtype)
    dense = tensor.is_contiguous() or _channels_last(tensor)
    if address and dense and tensor.is_cpu and tensor.numel() == plan.counts[which] and tensor.dtype is dtype:
        return address
    what = f"the kernels on weights: the {_POINTERS[which]} ({show(tensor.shape)}, {tensor.dtype})"
    if tensor.numel() != plan.counts[which]:
        raise ShapeError(
            f"{what} does not have the {plan.counts[which]} elements that the weight needs; was one of them resized?"
        )
    raise BackendError(f"{what} has no memory, or is not dense there as {dtype}; was it freed, or swapped?")


def _channels_last(weight: Tensor) -> bool:
    kind = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    return kind is not None and weight.is_contiguous(memory_format=kind)


def normalize(
    weight: Tensor, gain: Tensor | None, plan: Plan, definition: Callable[..., Tensor], spare: Spare | None = None
) -> Tensor:
    """Normalize one weight, for which ``takes`` holds, on the kernels; ``spare`` keeps its memory from step to step."""
    if torch.is_grad_enabled() and (weight.requires_grad or (gain is not None and gain.requires_grad)):
        return _apply(weight, gain, plan, definition, spare)
    return _forward(weight, gain, plan, None)


def _forward(weight: Tensor, gain: Tensor | None, plan: Plan, spare: Spare | None) -> Tensor:
    result = torch.empty_like(weight) if spare is None else spare.take(weight)
    at = _address(plan, 0, weight), _address(plan, 1, gain), _address(plan, 3, result)
    checked(entry("nk_weight_forward")(plan.raw(gain), *at))
    return result


class _Normalize(torch.autograd.Function):
    # A forward with ctx, not setup_context: for a small weight the latter costs more than the kernel.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        weight, gain, ctx.plan, ctx.definition, spare = inputs
        ctx.save_for_backward(weight, gain)
        return _forward(weight, gain, ctx.plan, spare)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = arrived
        weight, gain = ctx.saved_tensors
        if torch.is_grad_enabled() or not plain(gradient):
            return *gradients_by(ctx.definition, (weight, gain), ctx.needs_input_grad, gradient), None, None, None
        # The weight may come back changed from hooks on saved tensors; _address then refuses it.
        gradient, result = like(gradient, weight), torch.empty_like(weight)
        dgain = None if gain is None else torch.empty_like(gain)
        plan = ctx.plan
        ends = _address(plan, 3, result), _address(plan, 4, dgain)
        at = _address(plan, 2, gradient), _address(plan, 0, weight), _address(plan, 1, gain), *ends
        checked(entry("nk_weight_backward")(plan.raw(gain), *at))
        return result, dgain, None, None, None


# The base's apply, in C++: all that Function.apply adds in Python is for torch.func, under which no kernel runs.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Normalize).apply  # pyright: ignore[reportAttributeAccessIssue]


def gradients_by(
    definition: Callable[..., Tensor], raw: tuple[Tensor, Tensor | None], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients of weight and gain by autograd through the definition, to be differentiated again."""
    if raw[1] is None:
        return [*gradients(definition, raw[:1], needed[:1], gradient), None]
    return gradients(definition, raw, needed[:2], gradient)


def run(plans: Sequence[Plan], calls: Sequence[Sequence[Tensor | None]], backward: bool) -> None:
    """Run many weights in one call into the library.

    Each has a plan and its tensors, or None: weight, gain, gradient, result, gradient of the gain, and for ``"spectral"`` the
    left and right vector and what is kept for backward. See native/weights.h.
    """
    pointers = (ctypes.c_void_p * (len(_POINTERS) * len(plans)))()
    for place, (plan, tensors) in enumerate(zip(plans, calls, strict=True)):
        for which, tensor in enumerate(tensors):
            pointers[len(_POINTERS) * place + which] = _address(plan, which, tensor)
    raw = (ctypes.c_char_p * len(plans))(*(plan.raw(tensors[1]) for plan, tensors in zip(plans, calls, strict=True)))
    checked(entry("nk_weights")(len(plans), raw, pointers, backward))
