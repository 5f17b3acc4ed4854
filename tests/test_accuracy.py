"""Rounding errors of the kernels against float64: no larger than torch's, whatever the mean, the layout and the dtype."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import normkit as nk
from normkit.engine.library import library, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")

accuracy = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "accuracy.py")))


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize("method", accuracy.METHODS, ids=lambda m: m.name)
def test_errors_are_at_most_torch_s(method: Any, dtype: torch.dtype) -> None:
    for layout in method.layouts():
        for kind in (*accuracy.RATIOS, accuracy.OUTLIER):
            cell = accuracy.cell(method, layout, dtype, kind, small=True)
            # One unit in the last place of the largest value: where either result is rounded is chance.
            assert cell.excess() <= 1, cell


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [64, 3000, 20000])
def test_gradients_of_parameters_are_summed_in_float32(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    for layer, shape in (
        (nk.LayerNorm(8), (rows, 8)),
        (nk.BatchNorm(8), (rows, 8)),
        (nk.GroupNorm(2, 8), (rows // 16, 8, 16)),
        (nk.LayerNorm(8, over="c"), (rows // 16, 8, 16)),
    ):
        layer = layer.to(dtype)
        layer.backend = "native"
        x, dy = torch.randn(shape).to(dtype), torch.rand(shape).to(dtype)
        layer(x).backward(dy)
        axes = [d for d in range(len(shape)) if d != (1 if len(shape) == 3 else len(shape) - 1)]
        assert layer.bias is not None
        assert layer.bias.grad is not None
        # Rounded once to the parameter's dtype; sums of float32 add a few roundings.
        tolerance = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
        assert_close(layer.bias.grad.double(), dy.double().sum(axes), rtol=tolerance, atol=0)


@pytest.mark.parametrize("scale", [1e-23, 1e-30, 1e22])
@pytest.mark.parametrize("shape", [(6, 40), (3, 9000), (4, 8, 6, 6), (300, 700)])
def test_squares_beyond_float32_do_not_spoil_a_set(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * scale
    for layer in (nk.LayerNorm(shape[-1], eps=0.0), nk.RMSNorm(shape[-1], eps=0.0), nk.BatchNorm(shape[1], eps=0.0)):
        exact = copy.deepcopy(layer).double()
        layer.backend = "native"
        assert_close(layer(x).double(), exact(x.double()), rtol=1e-5, atol=1e-6)  # float32
