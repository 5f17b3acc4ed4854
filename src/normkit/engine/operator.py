"""The native kernels as operators that torch.compile does not trace into: ``torch.ops.normkit.normalize`` and its backward.

A compiled graph calls them like torch's own kernels, with the strides of the trace. The rule is passed as text, so that a graph
cached on disk runs in another process too.
"""

from typing import Any

import torch
from torch import Tensor

from normkit.core.compensation import Affine
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.engine import native
from normkit.engine.call import Call, Output, summed
from normkit.engine.layout import memory_format
from normkit.engine.prepared import Prepared, absence, prepare

_LIBRARY = torch.library.Library("normkit", "DEF")
_LIBRARY.define(
    "normalize(Tensor x, Tensor? weight, Tensor? bias, str rule, str activation) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.define(
    "normalize_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor values, str rule, str activation) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)

_RULES: dict[str, Rule] = {}  # one rule per text, so that what was prepared for it is found again at the next call


def write(rule: Rule) -> str:
    """Write a rule, without its memory, as text."""
    support, statistic, compensation = rule.support, rule.statistic, rule.compensation
    sizes = ",".join(f"{name}={size}" for name, size in support.sizes)
    after = "-|0.0" if compensation is None else f"{compensation.per}|{compensation.offset}"
    return (
        f"{support.axes}|{support.over}|{sizes}|{statistic.center}|{statistic.scale}|{statistic.eps}|{statistic.guard}|"
        f"{statistic.correction}|{after}"
    )


def read(text: str) -> Rule:
    """Read the rule that was written; the same text gives the same rule."""
    if text not in _RULES:
        axes, over, sizes, center, scale, eps, guard, correction, per, offset = text.split("|")
        given = {name: int(size) for name, size in (pair.split("=") for pair in sizes.split(",") if pair)}
        names: dict[str, Any] = {"None": None}
        statistic = Statistic(
            names.get(center, center),
            names.get(scale, scale),
            None if eps == "None" else float(eps),
            guard,  # pyright: ignore[reportArgumentType]
            int(correction),  # pyright: ignore[reportArgumentType]
        )
        _RULES[text] = Rule(
            Support(axes, over=over, **given), statistic, None if per == "-" else Affine(per, float(offset))
        )
    return _RULES[text]


def _prepared(x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: str, activation: str) -> Prepared | str:
    known = read(rule)
    key = (
        "operator",
        x.shape,
        x.stride(),
        x.dtype,
        *(None if p is None else (p.shape, p.dtype, p.device) for p in (weight, bias)),
        activation,
    )
    return known.keep(key, lambda: prepare(known, x, known.support.split(x.shape), weight, bias, activation or None))


@torch.library.impl(_LIBRARY, "normalize", "CPU")
def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: str, activation: str
) -> tuple[Tensor, Tensor]:
    ready = _prepared(x, weight, bias, rule, activation)
    if isinstance(
        ready, str
    ):  # a cached graph may run where there is no library, or with parameters that no kernel takes
        known = read(rule)
        y = native.define(known, known.support.split(x.shape), x, weight, bias, activation or None)
        return _empty(known, x).copy_(y), x.new_empty(_measured(rule, x), dtype=accumulation_dtype(x.dtype))
    return native.normalize_for_backward(ready, x, weight, bias)


@torch.library.impl(_LIBRARY, "normalize_backward", "CPU")
def _normalize_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, rule: str, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    ready = _prepared(x, weight, bias, rule, activation)
    if isinstance(ready, str):
        known = read(rule)
        inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        with torch.enable_grad():
            split = known.support.split(x.shape)
            y = native.define(known, split, *inputs, activation or None)  # pyright: ignore
            asked = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy))
        found = [None if t is None else next(asked) for t in inputs]
        dx = torch.empty_like(x).copy_(found[0])  # pyright: ignore[reportArgumentType]
        dweight, dbias = found[1], found[2]
    else:
        dx, dweight, dbias = native.differentiate(ready, dy, x, weight, bias, values)
        assert dx is not None
        dx = dx if ready.source is None else torch.empty_like(x).copy_(dx)
    return dx, _or_empty(dweight, x), _or_empty(dbias, x)


# The real output and the fake one alike: a compiled graph reads the output with the strides that the fake one had.
def _empty(rule: Rule, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(rule.support, x))


# An operator can't return None: a tensor without elements stands for it.
def _or_empty(gradient: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if gradient is None else gradient


def _measured(rule: str, x: Tensor) -> Any:
    """The number of statistics that the kernel measures."""
    known = read(rule)
    sets: Any = 1
    for size in known.support.split(x.shape).statistics_shape:
        sets = sets * size
    return (1 + (known.statistic.center is not None)) * sets


@torch.library.register_fake("normkit::normalize", lib=_LIBRARY)
def _normalize_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: str, activation: str
) -> tuple[Tensor, Tensor]:
    return _empty(read(rule), x), x.new_empty(_measured(rule, x), dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("normkit::normalize_backward", lib=_LIBRARY)
def _normalize_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, rule: str, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = (
        x.new_empty(0) if p is None else torch.empty_like(p, memory_format=torch.contiguous_format)
        for p in (weight, bias)
    )
    return torch.empty_like(x), *gradients  # pyright: ignore[reportReturnType]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.rule, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, values = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.normkit.normalize_backward(dy, x, weight, bias, values, ctx.rule, ctx.activation)
    return dx, None if weight is None else dweight, None if bias is None else dbias, None, None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, bias, _, ctx.rule, ctx.activation = inputs
    ctx.save_for_backward(dy, x, weight, bias)


def _differentiate_backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
    """The second derivative, through the definition."""
    rule, inputs = read(ctx.rule), [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
    dy, x, weight, bias = inputs
    assert x is not None
    with torch.enable_grad():
        y = native.define(rule, rule.support.split(x.shape), x, weight, bias, ctx.activation or None)
        asked = [t for t in (x, weight, bias) if t is not None]
        first = torch.autograd.grad(y, asked, dy, create_graph=True)
    along = [d for d, t in zip(directions, (x, weight, bias), strict=True) if t is not None]
    pairs = [(f, d) for f, d in zip(first, along, strict=True) if d is not None]
    there = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad([f for f, _ in pairs], there, [d for _, d in pairs], allow_unused=True))
    return *(None if t is None else next(found) for t in inputs), None, None, None


torch.library.register_autograd("normkit::normalize", _differentiate, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd(
    "normkit::normalize_backward", _differentiate_backward, setup_context=_keep_backward, lib=_LIBRARY
)


def available() -> bool:
    """Whether the kernels run here; a constant to a compiler."""
    return absence() is None


# All that torch.compiler.assume_constant_result does; calling it would import the compiler, a second at every start.
available._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def refusal(call: Call) -> str | None:
    """Reason a compiled graph should trace the definition rather than call the operator, or None."""
    x = call.x
    if x.device.type != "cpu" or not available():
        return "the native kernels do not run here"
    if any(p is not None and p.dtype not in (x.dtype, accumulation_dtype(x.dtype)) for p in (call.weight, call.bias)):
        return "the native kernels do not know it"
    return None


def perform(call: Call) -> Output:
    """Run a call by the operator; only where ``refusal`` returned None."""
    x, total = summed(call)
    return Output(
        torch.ops.normkit.normalize(x, call.weight, call.bias, write(call.rule), call.activation or "")[0], total
    )
