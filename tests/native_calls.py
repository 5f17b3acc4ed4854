"""Plans of the native kernels with their tensors, called bare, and their definition in float64."""

import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from normkit.engine.abi import TYPES
from normkit.engine.library import library
from normkit.engine.prepared import NkPlan

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: list[Callable] = [lambda y: y, torch.relu, F.silu, F.gelu, _gelu_tanh, F.leaky_relu]
AXES = ("outer", "far", "kept", "mid", "inner")
# Relative to the largest element of what is compared: a few roundings of the type that it is kept in.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def in_threads(*counts: int) -> Iterator[int]:
    """Each number of torch's threads in turn, and then what it was."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def make_plan(dtype: torch.dtype = torch.float32, parameter_dtype: torch.dtype | None = None, **fields: Any) -> NkPlan:
    plan = NkPlan()
    ones = dict.fromkeys((*AXES, "outer_div", "outer_mod", "parameters", "centred", "scale"), 1)
    types = {"type": TYPES[dtype], "parameter_type": TYPES[parameter_dtype or dtype]}
    for name, value in {**ones, "eps": 1e-5, **types, **fields}.items():
        setattr(plan, name, value)
    return plan


def rows(n: int, d: int, dtype: torch.dtype = torch.float32, **fields: Any) -> NkPlan:
    """LayerNorm and RMSNorm."""
    return make_plan(dtype, outer=n, inner=d, per_inner=1, parameters=d, **fields)


def batch(n: int, c: int, s: int, dtype: torch.dtype = torch.float32, **fields: Any) -> NkPlan:
    """BatchNorm with channels first."""
    return make_plan(dtype, far=n, kept=c, inner=s, per_kept=1, parameters=c, **fields)


def groups(n: int, g: int, c: int, s: int, dtype: torch.dtype = torch.float32, **fields: Any) -> NkPlan:
    """GroupNorm with channels first."""
    place = {"outer_mod": g, "outer_step": c // g, "per_mid": 1, "parameters": c}
    return make_plan(dtype, outer=n * g, mid=c // g, inner=s, **place, **fields)


def shape_of(plan: NkPlan) -> tuple[int, ...]:
    return plan.outer, plan.far, plan.kept, plan.mid, plan.inner


@dataclass
class Call:
    """One plan with its tensors; run() fills what the kernels write."""

    plan: NkPlan
    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    center: Tensor | None = None
    inverse: Tensor | None = None
    variance: Tensor | None = None
    y: Tensor | None = None
    total: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def forward(self) -> Tensor:
        if self.inverse is None:
            inverse, variance, center = torch.empty(3, self.plan.outer * self.plan.kept, dtype=self.wide)
            self.inverse, self.variance, self.center = inverse, variance, center if self.plan.centred else None
        self.y = torch.empty_like(self.x) if self.y is None else self.y
        self.total = None if self.residual is None else torch.empty_like(self.x)
        given = (self.x, self.residual, self.weight, self.bias)
        tensors = (*given, self.y, self.total, self.center, self.inverse, self.variance)
        self.called("nk_forward", *tensors)
        return self.y

    def backward(self, dy: Tensor, dsum: Tensor | None = None, wanted: str = "x weight bias") -> dict[str, Any]:
        x = self.x if self.total is None else self.total
        of = {"x": x, "weight": self.weight, "bias": self.bias}
        found = {n: torch.full_like(t, 7) if t is not None and n in wanted.split() else None for n, t in of.items()}
        given = (dy, dsum, x, self.weight, self.bias, self.center, self.inverse)
        self.called("nk_backward", *given, *found.values())
        self.gradients = found
        return found

    def called(self, name: str, *tensors: Tensor | None) -> None:
        self.plan.parts = (self.weight is not None) + 2 * (self.bias is not None)
        assert self.status(name, *tensors) == 0

    def status(self, name: str, *tensors: Tensor | None) -> int:
        kernels = library()
        assert kernels is not None
        arguments = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
        return getattr(kernels, name)(ctypes.c_void_p(ctypes.addressof(self.plan)), *arguments)


def places(plan: NkPlan) -> Tensor:
    """Where the parameters of each element are."""
    o, *axes = (torch.arange(n).view([-1 if d == e else 1 for e in range(5)]) for d, n in enumerate(shape_of(plan)))
    steps = (plan.per_far, plan.per_kept, plan.per_mid, plan.per_inner)
    first = o // plan.outer_div % plan.outer_mod * plan.outer_step
    return first + sum(axis * step for axis, step in zip(axes, steps, strict=True))


def definition(call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Output, centre, 1 / scale and variance, from the plan's formulas in float64."""
    plan, dims = call.plan, (1, 3, 4)
    statistics = (plan.outer, 1, plan.kept, 1, 1)
    zero, n = torch.zeros(statistics, dtype=torch.float64), plan.far * plan.mid * plan.inner
    center = x.mean(dims, keepdim=True) if plan.centred else zero
    if plan.given:
        center = zero if call.center is None else call.center.double().view(statistics)
    square = (x - center).square().sum(dims, keepdim=True)
    found = square / (n - plan.correction) if plan.scale == 1 else square
    root = found.sqrt()
    guarded = [(found + plan.eps).sqrt(), root + plan.eps, root.clamp_min(plan.eps)][plan.guard]
    inverse = 1 / guarded if plan.scale else zero + 1
    if plan.given:
        assert call.inverse is not None
        inverse = call.inverse.double().view(statistics)
    y, at = (x - center) * inverse, places(plan)
    y = y if weight is None else y * (plan.offset + weight)[at]
    y = y if bias is None else y + bias[at]
    return ACTIVATIONS[plan.activation](y), center, inverse, square / n


def near(found: Tensor | None, wanted: Tensor, dtype: torch.dtype, factor: float = 1.0, scale: float = 0.0) -> None:
    if found is None:
        return
    wanted = wanted.detach().double()
    room = TOLERANCE[dtype] * factor * (float(wanted.abs().max()) + scale + 1e-3)
    assert_close(found.double().view(wanted.shape), wanted, rtol=0, atol=room)


def random_call(chance: random.Random, sizes: tuple[int, ...]) -> Call:
    if sizes[1] > 1 and sizes[3] * sizes[4] < 1024:  # short pieces apart are other kernels'
        sizes = (*sizes[:4], sizes[4] + 1024)
    fields: dict[str, Any] = dict(zip(AXES, sizes, strict=True))
    parameters = 1
    for axis in AXES[:0:-1]:  # those that parameters vary along, in the order of memory
        if chance.random() < 0.5:
            fields[f"per_{axis}"] = parameters
            parameters *= fields[axis]
    if chance.random() < 0.5:
        div = chance.choice([d for d in (1, 2, 3) if d <= sizes[0]])
        mod = chance.choice([1, 2, 3, -(-sizes[0] // div)])
        fields |= {"outer_div": div, "outer_mod": mod, "outer_step": parameters}
        parameters *= mod
    dtype = chance.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    parameter_dtype = chance.choice([dtype, torch.float64 if dtype == torch.float64 else torch.float32])
    count = sizes[1] * sizes[3] * sizes[4]
    fields |= {
        "parameters": parameters,
        "eps": chance.choice([1e-5, 1e-3, 0.5]),
        "offset": chance.choice([0.0, 1.0]),
        "centred": chance.choice([0, 1, 1]),
        "scale": chance.choice([0, 1, 1, 2]),
        "guard": chance.choice([0, 0, 1, 2]) if count > 1 else 0,
        "correction": chance.choice([0, 0, 1]) if count > 1 else 0,
        "activation": chance.choice([0, 0, 1, 2, 3, 4]),
        "given": int(chance.random() < 0.2),
        "stream": chance.choice([0, 1]),
    }
    plan = make_plan(dtype, parameter_dtype, **fields)

    def maybe(p: float, t: Tensor) -> Tensor | None:
        return t if chance.random() < p else None

    call = Call(plan, (torch.randn(sizes) + chance.choice([0, 3])).to(dtype))
    call.weight = maybe(0.7, torch.randn(parameters).to(parameter_dtype))
    call.bias = maybe(0.6, torch.randn(parameters).to(parameter_dtype))
    call.residual = maybe(0.3 * (not plan.given), torch.randn(sizes).to(dtype))
    if plan.given:
        statistics = plan.outer * plan.kept
        call.center = maybe(0.7, torch.randn(statistics, dtype=call.wide))
        call.inverse = torch.rand(statistics, dtype=call.wide) + 0.5
    return call


def check(call: Call, chance: random.Random) -> None:
    plan, dtype, wide = call.plan, call.x.dtype, call.wide
    call.forward()
    if call.total is not None:
        assert call.residual is not None
        assert torch.equal(call.total, call.x + call.residual)
    inputs = {"x": call.x if call.total is None else call.total, "weight": call.weight, "bias": call.bias}
    exact = {n: None if t is None else t.detach().double().requires_grad_() for n, t in inputs.items()}
    x = exact["x"]
    assert x is not None
    y, center, inverse, variance = definition(call, x, exact["weight"], exact["bias"])
    near(call.y, y, dtype)
    if not plan.given:
        near(call.inverse, inverse, wide)
        if plan.centred:
            near(call.center, center, wide, scale=float(x.detach().abs().max()))
            near(call.variance, variance, wide)

    dy = torch.randn(call.x.shape).to(dtype)
    if plan.activation == 1:  # at the edge of ReLU a rounding decides: no gradient comes from there
        edge = Call(make_plan(), call.x, center=call.center, inverse=call.inverse)
        edge.plan = NkPlan.from_buffer_copy(plan)
        edge.plan.activation = 0
        before = definition(edge, x, exact["weight"], exact["bias"])[0]
        dy = torch.where(before.abs() < 1e-3, 0, dy.double()).to(dtype)
    dsum = torch.randn(call.x.shape).to(dtype) if chance.random() < 0.4 else None
    wanted = " ".join(name for name in inputs if chance.random() < 0.85)
    found = call.backward(dy, dsum, wanted)
    kept = {n: t for n, t in exact.items() if t is not None}
    expected = dict(zip(kept, torch.autograd.grad(y, list(kept.values()), dy.double()), strict=True))
    # dx is the difference of terms of this size.
    gain = 1 if call.weight is None else float((plan.offset + call.weight.double()).abs().max())
    wanted_dx = expected["x"] + (0 if dsum is None else dsum.double())
    near(found["x"], wanted_dx, dtype, 1, gain * float(inverse.detach().max()))
    # A gradient of parameters is a sum of so many terms, whose errors come together as those of a random walk do.
    walk = float(dy.double().abs().max()) * (call.x.numel() / min(plan.parameters, call.x.numel())) ** 0.5
    for name in ("weight", "bias"):
        if name in expected:
            parameter = inputs[name]
            assert parameter is not None
            near(found[name], expected[name], parameter.dtype if dtype != torch.float64 else wide, 1, walk)
