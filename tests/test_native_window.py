"""Responses and sliding sums on the native kernels: equal to their definitions, to any order of derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from native_calls import in_threads
from normkit import GlobalResponseNorm, LocalResponseNorm
from normkit.engine import abi, native_global_response, native_window
from normkit.engine.library import why_not
from normkit.engine.window import sliding_sum
from normkit.functional import global_response_norm, local_response_norm

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no native kernels: {why_not()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# A few positions and many, odd sizes, one channel, channels beyond a vector's lanes.
SHAPES = [(2, 7, 3, 5), (1, 40, 9, 31), (3, 1, 4, 4), (2, 33, 1, 1), (2, 5), (1, 19, 700), (2, 6, 2, 3, 4)]
MANY = (1, 300, 8, 9)


def _random(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False, scale: float = 1.0) -> Tensor:
    x = (torch.randn(shape) * scale).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many calls the kernels answered."""
    calls = {"native": 0}

    def checked(status: int) -> None:
        calls["native"] += 1
        abi.checked(status)

    for module in (native_window, native_global_response):
        monkeypatch.setattr(module, "checked", checked)
    return calls


def _compare(function: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    """Output and gradients against the definition's in float64, to which only PyTorch's operators belong."""
    own = [None if t is None else t.detach().requires_grad_() for t in inputs]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    y, wanted = function(*own), _defined(function, *exact)
    x = inputs[0]
    assert x is not None
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    dy = torch.randn_like(y)
    asked = [[t for t in side if t is not None] for side in (own, exact)]
    found = torch.autograd.grad(y, asked[0], dy)
    expected = torch.autograd.grad(wanted, asked[1], dy.double())
    # One rounding to a half type; in the wider types that of sums of some hundred terms.
    loose = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}[x.dtype]
    for got, want in zip((y, *found), (wanted, *expected), strict=True):
        assert_close(got.double(), want, rtol=loose, atol=loose * max(1.0, want.abs().max().item()))


def _defined(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """The function where the kernels do not run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (native_window, native_global_response):
            patch.setattr(module, "plain", lambda *tensors: False)
        return function(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_local_response_is_the_definition(dtype: torch.dtype, last: bool, count: dict[str, int]) -> None:
    for shape in SHAPES:
        for size in (1, 2, 5, 40):
            x = _random(shape, dtype, last, scale=3.0)
            _compare(lambda x, size=size: local_response_norm(x, size, 0.5), x)
    assert count["native"] == 2 * len(SHAPES) * 4


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [3, 24, 25, 26, 100, 299, 1000])
def test_windows_of_many_channels(size: int, last: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        for torch_compat in (False, True):
            options = {"alpha": 0.3, "torch_compat": torch_compat}
            _compare(lambda x, o=options: local_response_norm(x, size, **o), _random(MANY, dtype, last))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.6, 0.75, 1.0, 2.0, -0.5])
def test_powers(beta: float) -> None:
    for dtype in (torch.float32, torch.float64):
        _compare(lambda x: local_response_norm(x, 3, 0.3, beta, 0.1), _random((2, 9, 70), dtype))


def test_small_windows_keep_their_digits_behind_large_elements() -> None:
    for shape in ((1, 60, 1), (1, 60, 100)):
        x = _random(shape, torch.float32)
        x[:, 20:23] *= 1e8
        for size in (3, 31):
            found = local_response_norm(x, size, float(size), k=1.0)
            wanted = _defined(lambda x, s=size: local_response_norm(x, s, float(s), k=1.0), x.double())
            assert_close(found.double(), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [5, 31])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_spoils_its_windows_alone(value: float, size: int, last: bool) -> None:
    x = _random((2, 50, 80), torch.float32, last)
    x[0, 20, 7] = value
    found = local_response_norm(x, size)
    wanted = _defined(lambda x: local_response_norm(x, size), x)
    assert_close(found, wanted, equal_nan=True)
    assert found.isfinite().sum() >= x.numel() - size


def test_an_offset_of_zero_is_the_definitions() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    for beta in (0.5, 0.6, 0.75, 1.0):
        found = local_response_norm(x, 3, 1.0, beta, 0.0)
        assert_close(found, _defined(lambda x, b=beta: local_response_norm(x, 3, 1.0, b, 0.0), x), equal_nan=True)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_sliding_sums_are_the_definition(dim: int, last: bool, count: dict[str, int]) -> None:
    for dtype in (torch.float32, torch.float64):
        x = _random((9, 31, 11, 70), dtype, last)
        for before, after in ((1, 0), (4, 4), (0, 30), (100, 100)):
            _compare(lambda x, b=before, a=after: sliding_sum(x, dim, b, a), x)
    assert count["native"] == 2 * 2 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layout", ["n c *", "n * c"])
@pytest.mark.parametrize("over", ["*", "n *"])
def test_global_response_is_the_definition(dtype: torch.dtype, last: bool, layout: str, over: str, count: Any) -> None:
    shapes = [*SHAPES, MANY, (5, 3, 5000), (1, 1100, 3, 7)]
    for shape in shapes:
        x = _random(shape, dtype, last)
        x = x if layout == "n c *" else x.movedim(1, -1)
        # Parameters of the statistics' dtype, as in a mixed-precision network.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = torch.randn(2, shape[1], dtype=wide)
        _compare(lambda x, w, b: global_response_norm(x, w, b, layout=layout, over=over), x, weight, bias)
    assert count["native"] == 2 * len(shapes)


def test_global_response_without_parameters() -> None:
    for dtype in DTYPES:
        x = _random((2, 9, 4, 5), dtype)
        weight, bias = torch.randn(2, 9).to(dtype)
        for parameters in ((None, None), (weight, None), (None, bias), (weight, bias)):
            _compare(lambda x, w, b: global_response_norm(x, w, b, layout="n c *"), x, *parameters)


def test_a_channel_of_zeros_has_the_norms_subgradient() -> None:
    x = torch.randn(2, 4, 6)
    x[:, 1] = 0
    _compare(lambda x, w: global_response_norm(x, w, layout="n c *"), x, torch.randn(4))
    _compare(lambda x, w: global_response_norm(x, w, layout="n c *"), torch.zeros(2, 4, 6), torch.randn(4))


def test_only_what_is_asked_for_has_a_gradient() -> None:
    x, weight = torch.randn(2, 4, 6), torch.randn(4, requires_grad=True)
    bias = torch.randn(4)
    y = global_response_norm(x, weight, bias, layout="n c *")
    y.sum().backward()
    assert weight.grad is not None
    assert bias.grad is None
    assert x.grad is None


def _functions() -> list[Callable[[Tensor], Tensor]]:
    return [lambda x: local_response_norm(x, 3, 0.3), lambda x: global_response_norm(x, layout="n c *")]


@pytest.mark.parametrize("which", [0, 1])
def test_results_do_not_depend_on_the_threads(which: int) -> None:
    function = _functions()[which]
    for shape in ((1, 70, 900), (5, 64, 40), (2, 3, 20000)):
        for last in (False, True):
            x = _random(shape, torch.float32, last).requires_grad_()
            found = []
            for _ in in_threads(1, 2, 3):
                y = function(x)
                found.append((y, *torch.autograd.grad(y, x, x.detach())))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_layers_run_on_the_kernels(count: dict[str, int]) -> None:
    x = torch.randn(2, 4, 5, 6)
    LocalResponseNorm(3)(x)
    GlobalResponseNorm(4, layout="n c *")(x)
    assert count["native"] == 2
    GlobalResponseNorm(4, layout="n c *")(x, mask=x[:, :1] > 0)
    assert count["native"] == 2
