"""Run a rule on the C++ kernels of this package, on a CPU.

A call is one allocation for the output, one for the statistics, and one call into the library. The double backward goes through
the closed form in PyTorch, which is differentiable to any order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from normkit.core.errors import BackendError
from normkit.core.moments import Moments
from normkit.core.rule import Rule
from normkit.core.support import Split
from normkit.engine import closed_form
from normkit.engine.abi import checked, entry, gradients, like, pointer
from normkit.engine.call import Call, Output, summed
from normkit.engine.eager import watched
from normkit.engine.guard import calm, guard
from normkit.engine.prepared import Prepared
from normkit.engine.reference import activate
from normkit.engine.remembered import of_arrays, placed, remember, updates
from normkit.engine.undo import check_undone


def perform(ready: Prepared, call: Call) -> Output:
    """Run a call by the input's own statistics, with what was prepared for it."""
    x, residual = _dense(call.x, ready), call.residual
    if residual is not None:  # the kernel walks both with the strides of x
        residual = like(residual, x)
    measured = call.measured or call.running is not None
    y, total, values = normalize(ready, x, call.weight, call.bias, residual, measured)
    if not measured:
        return Output(y, total)
    memory, running = call.rule.memory, call.running
    # One more call into the library, where the update by operators would take a dozen.
    if ready.arrays is not None and running is not None and memory is not None and updates(memory):
        remember(ready, memory, values, running)
        return Output(y, total, remembered=True)
    return Output(y, total, ready.moments(values))


def measure(ready: Prepared, x: Tensor) -> Moments:
    """The moments alone, without gradients, by what was prepared for a centred rule without parameters."""
    x = _dense(x, ready)
    values = x.new_empty(3 * ready.nest.statistics, dtype=ready.wide)
    start, step = values.data_ptr(), ready.statistic_bytes
    checked(entry("nk_measure")(ready.address, x.data_ptr(), start + step, start, start + 2 * step))
    return ready.moments(values)


def by_rows(ready: Prepared, x: Tensor) -> bool:
    """Whether the sets are the rows of the last axis in memory, and have the same parameters."""
    nest = ready.nest
    rows = nest.kind == "row" and nest.kept.size == 1 and nest.outer_place[2] == 0
    return rows and x.is_contiguous() and x.shape[-1] == ready.split.count


def quantize(ready: Prepared, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output as int8 and the scale of each row, where ``by_rows`` holds."""
    weight, bias = _packed(weight), _packed(bias)
    q, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    pointers = x.data_ptr(), pointer(weight), pointer(bias), q.data_ptr(), scale.data_ptr()
    checked(entry("nk_quantize")(ready.address, *pointers))
    # A double beyond float32's range; all of q is 0 there.
    return q, scale if x.dtype != torch.float64 else scale.masked_fill_(scale.isinf(), torch.nan)


def quick(chosen: Any, call: Call) -> Callable[..., Tensor] | None:
    """Return the shortest path for calls like this one: a function of input, weight, bias and any given mean and variance.

    None where the moments are wanted, as for running statistics, tensors must be copied first, or operators follow the kernel.
    """
    (ready,) = chosen.args
    if chosen.func not in (perform, perform_by):
        return None
    # A parameter that is not contiguous needs a copy at each call, which the full path makes.
    packed = all(p is None or p.is_contiguous() for p in (call.weight, call.bias))
    if ready.source is not None or not packed or call.wants_moments:
        return None
    if not call.own:
        return functools.partial(_by_arrays, ready) if ready.arrays is not None else None

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if _recorded(x, weight, bias):
            return _normalize(x, weight, bias, ready)
        return _forward(ready, x, weight, bias, None, 0)[0]

    return run


def normalize(
    ready: Prepared,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    measured: bool = False,
) -> tuple[Tensor, Tensor | None, Any]:
    """Return the output, x + residual if there is one, and the measured rows: 1 / scale, mean and, if asked for, variance."""
    weight, bias = _packed(weight), _packed(bias)
    if _recorded(x, weight, bias, residual):
        kept: list[Tensor] = []
        if residual is None:
            y = _normalize(x, weight, bias, ready, kept) if measured else _normalize(x, weight, bias, ready)
            return y, None, kept[0] if measured else None
        y, total = _normalize(x, weight, bias, ready, kept if measured else None, residual)
        return y, total, kept[0] if measured else None
    return _forward(ready, x, weight, bias, residual, 3 if measured else 0)


def normalize_for_backward(
    ready: Prepared, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output, and the statistics that ``differentiate`` needs."""
    kept = 1 + ready.centred
    y, _, values = _forward(ready, _dense(x, ready), _packed(weight), _packed(bias), None, kept)
    assert values is not None
    return y, values


def perform_by(ready: Prepared, call: Call) -> Output:
    """Run a call by running statistics, one for each element of the memory's axes; ``ready`` was prepared for given ones."""
    x, total = summed(call)
    x, weight, bias, running = _dense(x, ready), _packed(call.weight), _packed(call.bias), call.running
    assert running is not None
    if ready.arrays is not None:
        return Output(_by_arrays(ready, x, weight, bias, running.mean, running.var), total)
    return Output(_by_values(ready, x, weight, bias, placed(ready, x, running)), total)


def _by_arrays(
    ready: Prepared, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor
) -> Tensor:
    return _by_values(ready, x, weight, bias, of_arrays(ready, x, mean, var))


def _by_values(ready: Prepared, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor) -> Tensor:
    if _recorded(x, weight, bias):
        return _normalize_by(x, weight, bias, values, ready)
    return _forward(ready, x, weight, bias, None, 1 + ready.centred, values)[0]


def _recorded(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None) -> bool:
    """Whether autograd wants a gradient of any of these."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _dense(x: Tensor, ready: Prepared) -> Tensor:
    """The input itself, or the copy that was planned."""
    return x if ready.source is None else x.contiguous(memory_format=ready.source)


def _packed(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def _forward(
    ready: Prepared,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, the sum with the residual, and ``rows`` of 1 / scale, mean, variance, written unless ``values`` are given."""
    # empty_like keeps the strides of x, with which the kernel writes.
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    inverse = center = variance = None
    if rows:
        if values is None:
            values = x.new_empty(rows * ready.nest.statistics, dtype=ready.wide)
        inverse = values.data_ptr()
        center = inverse + ready.statistic_bytes if rows > 1 else None
        variance = inverse + 2 * ready.statistic_bytes if rows > 2 else None
    status = ready.forward(
        ready.address,
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None if total is None else total.data_ptr(),
        center,
        inverse,
        variance,
    )
    if status:
        checked(status)
    return y if ready.format is None else y.contiguous(memory_format=ready.format), total, values


def _backward(
    ready: Prepared,
    dy: Tensor | None,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if dy is None:  # only the sum was used
        return dsum, None, None
    # The kernel normalizes x again from the kept statistics: nothing else of the input's size is kept for it.
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    start = values.data_ptr()
    status = ready.backward(
        ready.address,
        dy.data_ptr(),
        None if dsum is None else dsum.data_ptr(),
        x.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        start + ready.statistic_bytes if ready.centred else None,
        start,
        None if dx is None else dx.data_ptr(),
        None if dweight is None else dweight.data_ptr(),
        None if dbias is None else dbias.data_ptr(),
    )
    if status:
        checked(status)
    return dx, dweight, dbias


def define(
    rule: Rule, split: Split, x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Compute the same in PyTorch, differentiable to any order."""
    y = closed_form.normalize(x.reshape(split.shape), split, rule.statistic)[0]
    return _compensated(rule, split, x, y, weight, bias, activation)


def _compensated(
    rule: Rule, split: Split, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str | None
) -> Tensor:
    if rule.compensation is not None:
        y = rule.compensation.apply(y, split, weight, bias)
    return activate(y.reshape(x.shape), activation).to(x.dtype)


def _definition(ready: Prepared, values: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``define``, or by given statistics."""
    if not ready.struct.given:
        return define(ready.rule, ready.split, x, weight, bias, ready.activation)
    center = ready.statistic(values, 1) if ready.centred else 0.0
    y = (x.reshape(ready.split.shape).to(ready.wide) - center) * ready.statistic(values, 0)
    return _compensated(ready.rule, ready.split, x, y, weight, bias, ready.activation)


def differentiate(
    ready: Prepared, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, given what ``normalize_for_backward`` measured."""
    x = _dense(x, ready)
    return _backward(ready, like(dy, x), None, x, _packed(weight), _packed(bias), values, (True, True, True))


def _gradients(
    ready: Prepared,
    dy: Tensor | None,
    dsum: Tensor | None,
    inputs: tuple[Tensor, Tensor | None, Tensor | None],
    values: Tensor,
    wanted: tuple[bool, bool, bool],
) -> Sequence[Tensor | None]:
    """The gradients: by the kernel, or through the definition for a pass that is itself differentiated."""
    if not torch.is_grad_enabled() and _arrives_plainly(dy, dsum):
        x, weight, bias = _restored(ready, *inputs)
        dy, dsum = (None if g is None else like(g, x) for g in (dy, dsum))
        return _backward(ready, dy, dsum, x, weight, bias, values, wanted)
    if dy is None:
        return [dsum, None, None]
    if ready.output:
        raise BackendError(
            'save="output" has no second derivatives and no batched gradients, as its input is not kept; use save="input"'
        )
    dx, dweight, dbias = gradients(functools.partial(_definition, ready, values), inputs, wanted, dy)
    if dsum is not None:  # the sum is an output too, and its gradient adds to the one through the norm
        dx = dsum if dx is None else dx + dsum
    return [dx, dweight, dbias]


class _Normalize(torch.autograd.Function):
    # For small inputs autograd's overhead exceeds the kernel's time. Hence a forward with ctx, not setup_context; statistics on
    # ctx and in a list, not among the outputs; and no argument that a call does not need.
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        ready: Prepared,
        kept: list[Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        y, total, values = _forward(ready, x, weight, bias, residual, 1 + ready.centred if kept is None else 3)
        ctx.ready, ctx.values = ready, values
        ctx.set_materialize_grads(False)  # where only one of two outputs is used, no zeros for the other
        if ready.output:
            check_undone(ready.struct.offset, x.dtype, weight, bias)
        ctx.save_for_backward(y if ready.output else x if total is None else total, weight, bias)
        if kept is not None:
            assert values is not None
            kept.append(values)
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        ready, needs = ctx.ready, ctx.needs_input_grad
        try:
            x, weight, bias = ctx.saved_tensors
        except RuntimeError as error:
            if ready.output and "inplace" in str(error):
                error.add_note(
                    'A norm with save="output" keeps its output, which nothing may change; use save="input" for it.'
                )
            raise
        # Nearly every pass is the usual one: a single comparison, and no conversion.
        if len(arrived) == 1 and _is_usual(ready, arrived[0], x, weight, bias):
            found = _backward(ready, arrived[0], None, x, weight, bias, ctx.values, needs)
            return found + (None,) * (len(needs) - 3)
        dy, dsum = (*arrived, None)[:2]
        summed = len(needs) == 6 and needs[5]  # as many entries as forward got arguments; the residual is the sixth
        wanted = (needs[0] or summed, needs[1], needs[2])
        dx, dweight, dbias = _gradients(ready, dy, dsum, (x, weight, bias), ctx.values, wanted)
        return (dx if needs[0] else None, dweight, dbias, None, None, dx if summed else None)[: len(needs)]


class _NormalizeBy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, ready: Prepared
    ) -> Tensor:
        ctx.ready, ctx.values = ready, values
        ctx.save_for_backward(x, weight, bias)
        return _forward(ready, x, weight, bias, None, 1 + ready.centred, values)[0]

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        found = _gradients(ctx.ready, arrived[0], None, ctx.saved_tensors, ctx.values, ctx.needs_input_grad[:3])
        return *found, None, None  # given statistics are constants: nothing flows back to them


def _is_usual(ready: Prepared, dy: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a kernel may read a gradient and the saved tensors as they are; after the first time, one comparison."""
    if dy is None or torch.is_grad_enabled() or not calm():
        return False
    tensors = [t for t in (dy, x, weight, bias) if t is not None]
    if ready.arrives is not None and ready.arrives(*tensors):
        return True
    parameters = all(p is None or (ready.parameter is not None and ready.parameter.holds(p)) for p in (weight, bias))
    if watched() or not parameters or not ready.form.holds(x) or not ready.form.holds(dy):
        return False
    ready.arrives = guard(*tensors)  # kept only once all checks have passed, so that it implies them
    return True


def _restored(
    ready: Prepared, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the saved tensors in the form in which the kernel read them."""
    form = ready.parameter
    weight, bias = (p if p is None or form is None else form.restore(p) for p in (weight, bias))
    return ready.form.restore(x), weight, bias


def _arrives_plainly(*gradients: Tensor | None) -> bool:
    """Whether gradients can be copied to a form that a kernel reads: not a batch of them, as of ``is_grads_batched``."""
    return not watched() and all(
        g is None or (type(g) is Tensor and g.is_cpu and not is_legacy_batchedtensor(g)) for g in gradients
    )


# The base's apply, in C++: all that Function.apply adds in Python is for torch.func, under which no kernel runs.
_normalize: Callable[..., Any] = super(torch.autograd.Function, _Normalize).apply  # pyright: ignore[reportAttributeAccessIssue]
_normalize_by: Callable[..., Any] = super(torch.autograd.Function, _NormalizeBy).apply  # pyright: ignore[reportAttributeAccessIssue]
