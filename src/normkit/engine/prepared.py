"""A rule prepared for inputs of one shape, layout and dtype, as the C++ kernels read it: the loop nest and the plan."""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit.core.memory import RunningStatistics
from normkit.core.moments import Moments, accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.support import Split
from normkit.engine.abi import TYPES, Form, entry, readable
from normkit.engine.guard import Check
from normkit.engine.layout import memory_format
from normkit.engine.library import why_not
from normkit.engine.plan import Nest, is_dense, plan

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4, "leaky_relu": 5}
_SCALES = {("mean", "std"): 1, ("mean", None): 0, (None, "rms"): 1, (None, "norm"): 2}
_GUARDS = {"inside": 0, "outside": 1, "floor": 2}
# The codes above are those of native/plan.h, and change with it and with the library's ABI number.
# Between these sizes the output is written past the cache. Below, a reader still finds it there; with a reader behind, 12 MB take
# 15 % less time past the cache. From 32 MB on malloc maps new pages, which the system has zeroed in the cache. In half types,
# whose vectors are no whole lines, 12 MB lose a quarter.
_STREAM_BYTES = range((10 << 20) + 1, 1 << 25)
_WEIGHT, _BIAS, _OUTPUT = 1, 2, 4  # bits of NkPlan.parts: which parameters a call passes; y is kept for backward, not x


class NkPlan(ctypes.Structure):
    """The structure of that name in native/plan.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "far", "kept", "mid", "inner")),
        *((name, ctypes.c_int64) for name in ("outer_div", "outer_mod", "outer_step")),
        *((name, ctypes.c_int64) for name in ("per_far", "per_kept", "per_mid", "per_inner", "parameters")),
        *((name, ctypes.c_double) for name in ("eps", "offset")),
        *((name, ctypes.c_int32) for name in ("type", "parameter_type", "centred", "scale", "guard", "correction")),
        *((name, ctypes.c_int32) for name in ("activation", "given", "stream", "parts")),
    )


def absence() -> str | None:
    """Reason the kernels are unavailable, or None."""
    reason = why_not()
    return None if reason is None else f"the native kernels do not run: {reason}"


@dataclass(slots=True, eq=False)
class Prepared:
    """A rule on inputs of one shape, layout and dtype, ready for the kernels."""

    rule: Rule
    split: Split
    nest: Nest
    struct: NkPlan
    address: int
    wide: torch.dtype
    statistic_bytes: int
    centred: bool
    scaled: bool
    output: bool  # keeps its output for the backward pass, not its input
    activation: str | None
    source: torch.memory_format | None  # to copy the input to, where the kernels can't read it in place
    format: torch.memory_format | None  # to copy the output to, where it differs from the input's
    form: Form  # of what the kernels read
    parameter: Form | None  # of the weight and the bias
    forward: Any
    backward: Any
    given: Any
    remember: Any
    arrays: int | None = None  # the type of running statistics that are laid out as the kernel's, one array each
    # Whether a gradient and the saved tensors are like those that the kernel last took; kept by the backward pass.
    arrives: Check | None = None

    def statistic(self, values: Tensor, row: int) -> Tensor:
        """One row of what the kernels measured, with reduced axes of size 1."""
        nest = self.nest
        return values.as_strided(self.split.statistics_shape, nest.statistic_strides, row * nest.statistics)

    def moments(self, values: Tensor) -> Moments:
        """The moments in what the kernels measured, as the split's axes."""
        return Moments(self.statistic(values, 1), self.statistic(values, 2), self.split.count)


def prepare(
    rule: Rule,
    x: Tensor,
    split: Split,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None = None,
    running: RunningStatistics | None = None,
    given: bool = False,
    output: bool = False,
) -> Prepared | str:
    """Prepare the kernels for such arguments, or return the reason they can't run them.

    ``given`` says that running statistics replace the input's own, ``output`` that the backward pass is given y, not x.
    """
    forward = entry("nk_forward")
    if forward is None:
        return absence() or ""
    if reason := _unfit(x, weight, bias):
        return reason
    statistic = rule.statistic
    scale = _SCALES.get((statistic.center, statistic.scale))
    if scale is None:
        return f"the kernels do not know {statistic.formula()}"
    # A kernel reads a first element without asking, and divides by count - correction.
    if x.numel() == 0 or not split.dims or (not given and split.count <= statistic.correction):
        return "there is nothing to reduce"
    found = _nest(rule, x, split)
    if isinstance(found, str):
        return found
    nest, source, format = found
    parameter = weight if weight is not None else bias
    wide = accumulation_dtype(x.dtype)
    # Without a weight there is no gain, and so nothing to offset.
    offset = rule.compensation.offset if rule.compensation is not None and weight is not None else 0.0
    struct = NkPlan(
        *(nest.outer, nest.far.size, nest.kept.size, nest.mid.size, nest.inner.size),
        *nest.outer_place,
        *(nest.far.step, nest.kept.step, nest.mid.step, nest.inner.step, nest.parameters),
        *(statistic.epsilon(wide), offset),
        *(TYPES[x.dtype], TYPES[wide if parameter is None else parameter.dtype]),
        *(statistic.center is not None, scale, _GUARDS[statistic.guard], statistic.correction),
        *(ACTIVATIONS[activation], given, x.itemsize > 2 and x.numel() * x.itemsize in _STREAM_BYTES),
        _WEIGHT * (weight is not None) + _BIAS * (bias is not None) + _OUTPUT * output,
    )
    return Prepared(
        rule=rule,
        split=split,
        nest=nest,
        struct=struct,
        address=ctypes.addressof(struct),  # looked up once; ``struct`` keeps the memory alive
        wide=wide,
        statistic_bytes=nest.statistics * wide.itemsize,
        centred=statistic.center is not None,
        scaled=statistic.scale is not None,
        output=output,
        activation=activation,
        source=source,
        format=format,
        form=Form(x.shape, x.stride() if source is None else _stand_in(x, source).stride(), x.dtype),
        parameter=None if parameter is None else Form(parameter.shape, _packed_strides(parameter), parameter.dtype),
        forward=forward,
        backward=entry("nk_backward"),
        given=entry("nk_given"),
        remember=entry("nk_remember"),
        arrays=None if running is None else _arrays(nest, running, statistic.scale is not None),
    )


def _arrays(nest: Nest, running: RunningStatistics, scaled: bool) -> int | None:
    """The type of running statistics that the library may read and write as arrays, one value per set; None for others."""
    mean, var = running.mean, running.var if scaled else running.mean
    channels = 1 in (nest.outer, nest.kept.size)  # the channels of a single sample are the outer loop
    if not channels or mean.numel() != nest.statistics or var.numel() != mean.numel() or var.dtype != mean.dtype:
        return None
    # The library sees pointers and one type, no strides.
    fit = readable(mean) and readable(var) and mean.is_contiguous() and var.is_contiguous()
    return TYPES[mean.dtype] if fit else None


def _nest(
    rule: Rule, x: Tensor, split: Split
) -> tuple[Nest, torch.memory_format | None, torch.memory_format | None] | str:
    """The loop nest, and the memory formats to copy the input and the output to; None where the kernels read them in place."""
    format = memory_format(rule.support, x)
    if is_dense(x.shape, x.stride()):
        found = plan(split, x.view(split.shape).stride(), rule.compensation)
        if not isinstance(found, str):
            return found, None, None if x.is_contiguous(memory_format=format) else format
    copy = _stand_in(x, format)  # planning needs only its strides; the copy itself is made at each call
    found = plan(split, copy.view(split.shape).stride(), rule.compensation)
    return found if isinstance(found, str) else (found, format, None)


def _stand_in(x: Tensor, format: torch.memory_format) -> Tensor:
    """A meta tensor of the input's shape in a memory format."""
    return torch.empty(x.shape, device="meta", memory_format=format)


def _packed_strides(parameter: Tensor) -> tuple[int, ...]:
    return parameter.stride() if parameter.is_contiguous() else _stand_in(parameter, torch.contiguous_format).stride()


def _unfit(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    for t in (x, weight, bias):
        if t is not None and not readable(t):
            return f"the kernels do not take a {type(t).__name__} of {t.dtype} on {t.device.type}"
    # NkPlan has one type for both, and the kernels widen parameters to the statistics' type but never narrow them.
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return "weight and bias have two dtypes"
    if TYPES[accumulation_dtype(x.dtype)] == 0 and any(
        p is not None and p.dtype == torch.float64 for p in (weight, bias)
    ):
        return "the parameters are wider than the statistics"
    return None
