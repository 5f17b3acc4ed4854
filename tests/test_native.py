"""Rules on the native kernels: any layout, any number of threads, the numerics contract, operators for compilers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.catalogue.methods import method
from normkit.core.compensation import Affine
from normkit.core.moments import moments
from normkit.core.support import Split, Support, per_shape
from normkit.engine import operator
from normkit.engine.dispatch import measure
from normkit.engine.layout import memory_format
from normkit.engine.library import library, why_not
from normkit.engine.plan import Nest, plan
from normkit.lab.bench.speed import further_inputs, methods, pair

needs_kernels = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")

SUPPORTS: list[tuple[Support, tuple[str | None, ...], int]] = [
    (Support("n c *", over="n *"), ("c", None), 4),
    (Support("n c *", over="c"), ("c", "", None), 4),
    (Support("n c *", over="c *"), ("c", "", None), 4),
    (Support("n c *", over="*"), ("c", "n c", None), 4),
    (Support("n (g c) *", over="c *", g=2), ("(g c)", None), 4),
    (Support("(b n) c *", over="n *", b=2), ("c", None), 4),
    (Support("n * d", over="d"), ("d", "n d", "", None), 3),
    (Support("o i *", over="o *"), (None,), 4),
]


@st.composite
def problems(draw: Any) -> tuple[nk.Rule, Tensor, tuple[int, ...]]:
    support, pers, rank = draw(st.sampled_from(SUPPORTS))
    per = draw(st.sampled_from(pers))
    sizes = [draw(st.integers(1, 9)) for _ in range(rank)]
    sizes[0] *= 2
    if rank == 4:
        sizes[1] *= 2
    center, scale = draw(st.sampled_from([("mean", "std"), (None, "rms"), (None, "norm"), ("mean", None)]))
    guard = draw(st.sampled_from(["inside", "outside", "floor"]))
    rule = nk.Rule(support, nk.Statistic(center, scale, 1e-3, guard), None if per is None else Affine(per, 0.5))
    order = draw(st.permutations(range(rank)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn([sizes[d] for d in order], generator=generator, dtype=torch.float64)
    return rule, x.permute([order.index(d) for d in range(rank)]), tuple(order)


@needs_kernels
@settings(max_examples=120, deadline=None)
@given(problems())
def test_any_rule_in_any_layout_is_the_reference(problem: tuple[nk.Rule, Tensor, tuple[int, ...]]) -> None:
    rule, x, _ = problem
    split = rule.support.split(x.shape)
    weight = bias = None
    if rule.compensation is not None:
        shape = per_shape(rule.compensation.per, split)
        weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = [t for t in (x.requires_grad_(), weight, bias) if t is not None]
    try:
        y = nk.functional.run(rule, x, weight, bias, backend="native")
    except nk.errors.BackendError as error:
        reason = str(error)
        event("refused")
        if any(known in reason for known in ("memory", "one element", "nothing to reduce", "alternate")):
            return
        raise
    event("run")
    wanted = nk.functional.run(rule, x, weight, bias, backend="reference")
    assert y.is_contiguous(memory_format=memory_format(rule.support, x))
    assert_close(y, wanted, rtol=1e-9, atol=1e-9)  # float64
    direction = torch.randn_like(wanted)
    found, expected = (torch.autograd.grad(out, inputs, direction, allow_unused=True) for out in (y, wanted))
    for one, other in zip(found, expected, strict=True):
        # A gradient through 1 / scale grows as the scale comes near the eps of 1e-3.
        assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_plans_of_the_methods() -> None:
    def nest(support: Support, shape: tuple[int, ...], per: str, last: bool = False) -> Nest:
        x = torch.empty(shape)
        x = x.to(memory_format=torch.channels_last) if last else x
        split = support.split(shape)
        found = plan(split, x.view(split.shape).stride(), Affine(per))
        assert isinstance(found, Nest), found
        return found

    image = (2, 8, 5, 5)
    batch, groups = Support("n c *", over="n *"), Support("n (g c) *", over="c *", g=4)
    channels, each = Support("n c *", over="c"), Support("n c *", over="*")
    assert [nest(batch, image, "c", last).kind for last in (False, True)] == ["block", "column"]
    assert [nest(groups, image, "(g c)", last).kind for last in (False, True)] == ["row", "block"]
    assert [nest(channels, image, "c", last).kind for last in (False, True)] == ["column", "row"]
    assert [nest(each, image, "n c", last).kind for last in (False, True)] == ["row", "column"]
    assert isinstance(plan(Split((2, 3, 4, 5), tuple("abcd"), (1, 3)), (60, 20, 5, 1), None), Nest)
    assert "alternate" in str(plan(Split((2,) * 6, tuple("abcdef"), (0, 2, 4)), (32, 16, 8, 4, 2, 1), None))


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_the_kernels_start_no_threads_of_their_own() -> None:
    x, before = torch.randn(6, 64, 20, 20, requires_grad=True), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.ones(1 << 20).add_(1)  # torch starts its threads
        tasks = len(os.listdir("/proc/self/task"))
        for norm in (nk.BatchNorm(64), nk.GroupNorm(8, 64), nk.LayerNorm(64, over="c"), nk.InstanceNorm(64)):
            norm.backend = "native"
            norm(x).square().sum().backward()
            assert len(os.listdir("/proc/self/task")) <= tasks
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("per", ["(g c)", None])
def test_the_operator_keeps_torch_s_rules(per: str | None) -> None:
    rule = nk.Rule(Support("n (g c) *", over="c *", g=2), nk.Statistic(), None if per is None else Affine(per))
    x = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (None if per is None else torch.randn(4, requires_grad=True) for _ in range(2))
    assert operator.read(operator.write(rule)) == rule
    torch.library.opcheck(torch.ops.normkit.normalize, (x, weight, bias, operator.write(rule), "silu"))


@needs_kernels
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dtype", "deviation"), [(torch.float16, 200), (torch.float16, 1000), (torch.bfloat16, 1000)])
def test_running_statistics_keep_what_fits(dtype: torch.dtype, deviation: float, kept: torch.dtype) -> None:
    # A layer keeps float32, whatever it is cast to; a function takes what it is given.
    running = nk.functional.RunningStatistics(torch.zeros(2, dtype=kept), torch.ones(2, dtype=kept))
    x = (torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, deviation])).to(dtype)
    nk.functional.run(nk.BatchNorm(2).rule, x, running=running, backend="native")
    exact = 0.9 + 0.1 * x.double().var(0)
    fits = exact < torch.finfo(kept).max
    # Blended in float32 and rounded once to the dtype that is kept; a channel whose result does not fit is left alone.
    wanted = torch.where(fits, exact, 1.0)
    assert_close(running.var.double(), wanted, rtol=4 * torch.finfo(kept).eps, atol=0)
    assert fits.tolist() == [True, kept != torch.float16 or deviation < 1000]


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_statistics_alone_are_those_of_the_reference(problem: tuple[nk.Rule, Tensor, tuple[int, ...]]) -> None:
    rule, x, _ = problem
    rule = nk.Rule(rule.support, nk.Statistic())
    split = rule.support.split(x.shape)
    for found, wanted in zip(measure(rule, x), moments(x.reshape(split.shape), split.dims), strict=True):
        assert_close(torch.as_tensor(found), torch.as_tensor(wanted))


def kept(layer: nn.Module, x: Tensor, others: tuple[Any, ...]) -> tuple[int, int]:
    """Bytes that a layer keeps for backward beyond its parameters: tensors, and statistics of our kernels."""
    tensors: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        tensors[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        nodes = [layer(x.clone(memory_format=torch.preserve_format).requires_grad_(), *others).grad_fn]
    statistics = 0
    for node in nodes:  # grows on the way
        values = getattr(node, "values", None)
        statistics += values.untyped_storage().nbytes() if isinstance(values, Tensor) else 0
        nodes += [each for each, _ in getattr(node, "next_functions", ()) if each is not None and each not in nodes]
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    return sum(size for at, size in tensors.items() if at not in own), statistics


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", methods())
def test_no_more_is_kept_for_backward_than_by_torch(name: str, dtype: torch.dtype) -> None:
    if name == "local_response_norm":
        dtype = torch.float32  # torch has no other
    images = name.endswith("over channels") or method(name).layout == "n c *"
    x = torch.randn((4, 64, 6, 6) if images else (2, 8, 64)).to(dtype)
    for memory in (torch.contiguous_format, torch.channels_last)[: 1 + images]:
        x = x.to(memory_format=memory)
        ours, (torchs, _) = (kept(layer.to(dtype), x, further_inputs(name, x)) for layer in pair(name, 64))
        tensors, statistics = ours
        assert tensors <= torchs
        # Float32 in every dtype: torch rounds those of some layers to the half type, and differentiates by them.
        assert statistics <= 4 * x.numel() / 8
