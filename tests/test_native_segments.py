"""Kernels for sets that lie together in memory, called bare: any plan against the definition in float64."""

import math
import random

import pytest
import torch
from torch.testing import assert_close

import native_calls
from native_calls import ACTIVATIONS, Call, batch, check, definition, groups, places, random_call, rows, shape_of
from normkit.engine.abi import TYPES
from normkit.engine.library import library, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")


@pytest.mark.parametrize("seed", range(12))
def test_any_plan_is_the_definition(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        outer, far, kept, mid = map(chance.choice, ((1, 2, 3, 6), (1, 1, 2, 5), (1, 1, 2, 3), (1, 1, 2, 3)))
        inner = chance.choice([1, 2, 3, 7, 8, 17, 33, 64, 200, 513])
        check(random_call(chance, (outer, far, kept, mid, inner)), chance)


def test_short_pieces_with_a_gain_each() -> None:
    torch.manual_seed(0)
    for seed in range(30):
        chance = random.Random(seed)
        plan = batch(*map(chance.choice, ([2, 70, 3000], [1, 3, 8], [2, 4, 9])), activation=seed % 5)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_results_do_not_depend_on_threads(dtype: torch.dtype, stream: int, activation: int) -> None:
    fields = {"stream": stream, "activation": activation}
    plans = [rows(n, d, dtype, **fields) for n, d in ((700, 96), (5, 50001), (9, 300000))]
    for plan in (*plans, batch(5, 3, 9001, dtype, **fields), groups(2, 2, 64, 2049, dtype, **fields)):
        torch.manual_seed(0)
        x, dy = (torch.randn(shape_of(plan)).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(plan.parameters).to(dtype) for _ in range(2))
        found = []
        for _ in native_calls.in_threads(1, 2, 3):
            call = Call(plan, x, weight, bias)
            found.append([call.forward(), call.center, call.inverse, *call.backward(dy).values()])
        for other in found[1:]:
            assert_close(other, found[0], rtol=0, atol=0)


def test_past_the_cache_nothing_else_comes_out() -> None:
    torch.manual_seed(0)
    for dtype in TYPES:
        for plan in (rows(40, 512, dtype), rows(40, 515, dtype), batch(3, 7, 613, dtype), groups(2, 2, 6, 701, dtype)):
            x, dy = (torch.randn(math.prod(shape_of(plan)) + 3).to(dtype) for _ in range(2))
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
            assert_close((spoilt[1:], spoilt[:, :, 1:]), (wanted[1:], wanted[:, :, 1:]), rtol=0, atol=0)


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
            low = 0.01 if function is torch.nn.functional.leaky_relu else 0.0
            assert_close(dx.flatten()[2:4], torch.tensor([1.0, low]), rtol=0, atol=0)


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
