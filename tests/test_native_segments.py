"""Kernels for sets that lie together in memory, called bare: any plan against the definition in float64."""

import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from normkit.engine.abi import TYPES
from normkit.engine.library import library, why_not
from normkit.engine.prepared import NkPlan

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda y: y,
    torch.relu,
    F.silu,
    F.gelu,
    lambda y: F.gelu(y, approximate="tanh"),
]
# Relative to the largest element of what is compared: a few roundings of the type that it is kept in.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def make_plan(dtype: torch.dtype = torch.float32, parameter_dtype: torch.dtype | None = None, **fields: Any) -> NkPlan:
    plan = NkPlan()
    for name in ("outer", "far", "kept", "mid", "inner", "outer_div", "outer_mod", "parameters", "centred", "scale"):
        setattr(plan, name, 1)
    plan.eps = 1e-5
    plan.type, plan.parameter_type = TYPES[dtype], TYPES[parameter_dtype or dtype]
    for name, value in fields.items():
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


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
            statistics = self.plan.outer * self.plan.kept
            self.inverse = torch.empty(statistics, dtype=self.wide)
            self.variance = torch.empty(statistics, dtype=self.wide)
            self.center = torch.empty(statistics, dtype=self.wide) if self.plan.centred else None
        self.y = torch.empty_like(self.x) if self.y is None else self.y
        self.total = None if self.residual is None else torch.empty_like(self.x)
        tensors = (
            self.x,
            self.residual,
            self.weight,
            self.bias,
            self.y,
            self.total,
            self.center,
            self.inverse,
            self.variance,
        )
        self.called("nk_forward", *tensors)
        return self.y

    def backward(
        self, dy: Tensor, dsum: Tensor | None = None, wanted: str = "x weight bias"
    ) -> dict[str, Tensor | None]:
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
        function = getattr(kernels, name)
        arguments = (ctypes.c_void_p(address(tensor)) for tensor in tensors)
        return function(ctypes.c_void_p(ctypes.addressof(self.plan)), *arguments)


def places(plan: NkPlan) -> Tensor:
    """Where the parameters of each element are."""
    o, *axes = (torch.arange(n).view([-1 if d == e else 1 for e in range(5)]) for d, n in enumerate(shape_of(plan)))
    steps = (plan.per_far, plan.per_kept, plan.per_mid, plan.per_inner)
    place = o // plan.outer_div % plan.outer_mod * plan.outer_step
    for axis, step in zip(axes, steps, strict=True):
        place = place + axis * step
    return place


def definition(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    plan_sizes = dict(zip(("outer", "far", "kept", "mid", "inner"), sizes, strict=True))
    fields: dict[str, Any] = {**plan_sizes}
    parameters = 1
    for axis in ("inner", "mid", "kept", "far"):  # those that parameters vary along, in the order of memory
        if chance.random() < 0.5:
            fields[f"per_{axis}"] = parameters
            parameters *= plan_sizes[axis]
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
    near(
        found["x"],
        expected["x"] + (0 if dsum is None else dsum.double()),
        dtype,
        1,
        gain * float(inverse.detach().max()),
    )
    # A gradient of parameters is a sum of so many terms, whose errors come together as those of a random walk do.
    walk = float(dy.double().abs().max()) * (call.x.numel() / min(plan.parameters, call.x.numel())) ** 0.5
    for name in ("weight", "bias"):
        if name in expected:
            parameter = inputs[name]
            assert parameter is not None
            near(found[name], expected[name], parameter.dtype if dtype != torch.float64 else wide, 1, walk)


@pytest.mark.parametrize("seed", range(12))
def test_any_plan_is_the_definition(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        outer, far, kept, mid = (
            chance.choice(sizes) for sizes in ((1, 2, 3, 6), (1, 1, 2, 5), (1, 1, 2, 3), (1, 1, 2, 3))
        )
        check(
            random_call(chance, (outer, far, kept, mid, chance.choice([1, 2, 3, 7, 8, 17, 33, 64, 200, 513]))), chance
        )


def test_short_pieces_with_a_gain_each() -> None:
    torch.manual_seed(0)
    for seed in range(30):
        chance = random.Random(seed)
        plan = batch(
            chance.choice([2, 70, 3000]), chance.choice([1, 3, 8]), chance.choice([2, 4, 9]), activation=seed % 5
        )
        weight, bias = torch.randn(plan.parameters), torch.randn(plan.parameters)
        check(Call(plan, torch.randn(shape_of(plan)), weight, bias), chance)


LARGE = [
    (1, 1, 1, 1, 70001),  # few large sets: in chunks
    (2, 1, 1, 3, 30011),
    (1, 3, 2, 1, 12345),
    (3, 2, 1, 5, 7001),
    (1, 70, 3, 1, 613),
    (2, 1, 1, 9000, 4),
    (40, 1, 1, 1, 3000),  # small sets in batches
    (600, 1, 1, 1, 129),
    (9, 1, 1, 1, 70001),  # gradients of parameters down the sets
    (20, 1, 1, 1, 140000),
]


@pytest.mark.parametrize("sizes", LARGE)
def test_any_large_plan_is_the_definition(sizes: tuple[int, ...]) -> None:
    chance = random.Random(sum(sizes))
    torch.manual_seed(0)
    for _ in range(3):
        check(random_call(chance, sizes), chance)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_results_do_not_depend_on_threads(
    dtype: torch.dtype, stream: int, activation: int, threads: Callable[[int], None]
) -> None:
    fields = {"stream": stream, "activation": activation}
    plans = [
        rows(700, 96, dtype, **fields),
        rows(5, 50001, dtype, **fields),
        rows(9, 300000, dtype, **fields),
        batch(5, 3, 9001, dtype, **fields),
        groups(2, 2, 64, 2049, dtype, **fields),
    ]
    for plan in plans:
        torch.manual_seed(0)
        x, dy = (torch.randn(shape_of(plan)).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(plan.parameters).to(dtype) for _ in range(2))
        found = []
        for count in (1, 2, 3):
            threads(count)
            call = Call(plan, x, weight, bias)
            found.append([call.forward(), call.center, call.inverse, *call.backward(dy).values()])
        for other in found[1:]:
            assert_close(other, found[0], rtol=0, atol=0)


def test_past_the_cache_nothing_else_comes_out() -> None:
    torch.manual_seed(0)
    for dtype in TYPES:
        for plan in (rows(40, 512, dtype), rows(40, 515, dtype), batch(3, 7, 613, dtype), groups(2, 2, 6, 701, dtype)):
            x, dy = (
                torch.randn(plan.outer * plan.far * plan.kept * plan.mid * plan.inner + 3).to(dtype) for _ in range(2)
            )
            weight, bias = (torch.randn(plan.parameters).to(dtype) for _ in range(2))
            for start in range(4):  # of lines and of vectors
                part, of = (t[start:][: x.numel() - 3].view(shape_of(plan)) for t in (x, dy))
                found = []
                for stream in (0, 1):
                    plan.stream = stream
                    call = Call(plan, part, weight, bias)
                    found.append((call.forward(), call.backward(of)["x"]))
                assert_close(found[1], found[0])


def test_output_may_be_the_input() -> None:
    torch.manual_seed(0)
    for plan in (rows(9, 77), batch(3, 5, 49), groups(2, 2, 6, 21), rows(3, 9001), rows(9, 77, activation=3)):
        x, weight, bias = torch.randn(shape_of(plan)), torch.randn(plan.parameters), torch.randn(plan.parameters)
        wanted = Call(plan, x, weight, bias).forward()
        here = x.clone()
        assert_close(Call(plan, here, weight, bias, y=here).forward(), wanted, rtol=0, atol=0)


def test_outliers_at_the_start_cost_no_accuracy() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 5000) * 1e-3
    x[:, 0] = 1.0
    x[::2, 4096] = -1.0
    call = Call(rows(20, 5000, eps=0.0), x.view(20, 1, 1, 1, 5000))
    exact = definition(call, call.x.double(), None, None)
    call.forward()
    assert_close(call.variance.double().view_as(exact[3]), exact[3], rtol=2e-6, atol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_set(dtype: torch.dtype, bad: float) -> None:
    torch.manual_seed(0)
    for plan in (rows(6, 70, dtype), rows(3, 9000, dtype), batch(3, 4, 50, dtype), groups(2, 2, 6, 33, dtype)):
        x, dy = (torch.randn(shape_of(plan)).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(plan.parameters).to(dtype) for _ in range(2))
        clean = Call(plan, x.clone(), weight, bias)
        clean.forward()
        clean.backward(dy)
        x[0, 0, 0, 0, 1] = bad
        call = Call(plan, x, weight, bias)
        y, dx = call.forward(), call.backward(dy)["x"]
        assert dx is not None
        for spoilt, wanted in ((y, clean.y), (dx, clean.gradients["x"])):
            assert wanted is not None
            assert spoilt[0, :, 0].isnan().all()
            assert_close(spoilt[1:], wanted[1:], rtol=0, atol=0)
            assert_close(spoilt[:, :, 1:], wanted[:, :, 1:], rtol=0, atol=0)


def test_every_nan_of_a_parameter_comes_through() -> None:
    for bits in (0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001):
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        for plan in (rows(2, 64, torch.bfloat16), groups(1, 1, 2, 32, torch.bfloat16)):
            plan.parameter_type = TYPES[torch.float32]
            x = torch.randn(shape_of(plan)).bfloat16()
            for which in ("weight", "bias"):
                parameters = {"weight": torch.ones(plan.parameters), "bias": torch.zeros(plan.parameters)}
                parameters[which][0] = nan[0]
                spoilt = Call(plan, x, **parameters).forward().isnan()
                assert torch.equal(spoilt, (places(plan) == 0).expand_as(spoilt))


@pytest.mark.parametrize("activation", [2, 3, 4])
def test_activations_keep_their_tails(activation: int) -> None:
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.randn(999) * 1e-3]).view(1, 1, 1, 1, -1)
    plan = rows(1, z.numel(), given=1, activation=activation)
    call = Call(plan, z, inverse=torch.ones(1))
    exact = z.detach().double().requires_grad_()
    wanted = definition(call, exact, None, None)[0]
    assert_close(call.forward().double(), wanted, rtol=2e-6 if activation < 4 else 2e-5, atol=1e-15)
    slope = torch.autograd.grad(wanted.sum(), exact)[0]
    assert_close(call.backward(torch.ones_like(z))["x"].double(), slope, rtol=0, atol=4e-7)  # type: ignore[union-attr]


def test_activations_at_the_ends() -> None:
    z = torch.tensor([float("nan"), float("inf"), 3e38, -3e38, 0.0, -0.0, 1e-40, -200.0, 88.0, -88.0])
    for activation, function in enumerate(ACTIVATIONS):
        call = Call(rows(1, 10, given=1, activation=activation), z.view(1, 1, 1, 1, -1), inverse=torch.ones(1))
        # In float64, as torch's own GELU gives NaN at infinity on some processors.
        assert_close(call.forward().flatten(), function(z.double()).float(), equal_nan=True, rtol=1e-6, atol=1e-30)
        if activation > 1:
            dx = call.backward(torch.ones_like(call.x))["x"]
            assert dx is not None
            assert_close(dx.flatten()[2:4], torch.tensor([1.0, 0.0]), rtol=0, atol=0)


def test_a_null_pointer_is_not_taken_for_an_absent_one() -> None:
    freed = torch.ones(8)
    freed.untyped_storage().resize_(0)
    x, weight = torch.randn(4, 1, 1, 1, 8), torch.ones(8)
    for plan in (rows(4, 8), batch(4, 8, 1)):
        call = Call(plan, x.view(shape_of(plan)))
        y, inverse, center = (torch.full((32,), 7.0) for _ in range(3))
        for parts, tensors in (
            (1, (x, None, freed, None, y, None, center, inverse, None)),
            (2, (x, None, None, None, y, None, center, inverse, None)),
            (0, (x, None, weight, None, y, None, center, inverse, None)),
            (0, (freed, None, None, None, y, None, center, inverse, None)),
            (0, (x, None, None, None, None, None, center, inverse, None)),
            (0, (x, x, None, None, y, None, center, inverse, None)),
        ):
            plan.parts = parts
            assert call.status("nk_forward", *tensors) == 3
            assert (torch.cat((y, inverse, center)) == 7).all()
        plan.parts = 1
        dx, dweight = torch.full((32,), 7.0), torch.full((8,), 7.0)
        assert call.status("nk_backward", y, None, x, freed, None, center, inverse, dx, dweight, None) == 3
        plan.parts = 0
        assert call.status("nk_backward", freed, None, x, None, None, center, inverse, dx, dweight, None) == 3
        assert (torch.cat((dx, dweight)) == 7).all()
        plan.type = 9
        assert call.status("nk_forward", x, None, None, None, y, None, center, inverse, None) == 2


def test_statistics_need_not_be_kept() -> None:
    torch.manual_seed(0)
    for plan in (rows(40, 300), rows(3, 40000), batch(6, 5, 700), batch(40, 32, 1), batch(40, 1, 1)):
        call = Call(plan, torch.randn(shape_of(plan)))
        wanted, y = call.forward().clone(), torch.empty(shape_of(plan))
        assert call.status("nk_forward", call.x, None, None, None, y, None, None, None, None) == 0
        assert_close(y, wanted, rtol=0, atol=0)
