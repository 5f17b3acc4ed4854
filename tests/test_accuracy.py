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


@pytest.mark.parametrize("scale", [1e-23, 1e-30, 1e22])
@pytest.mark.parametrize("shape", [(6, 40), (3, 9000), (4, 8, 6, 6), (300, 700)])
def test_squares_beyond_float32_do_not_spoil_a_set(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * scale
    for layer in (nk.LayerNorm(shape[-1], eps=0.0), nk.RMSNorm(shape[-1], eps=0.0), nk.BatchNorm(shape[1], eps=0.0)):
        exact = copy.deepcopy(layer).double()
        layer.backend = "native"
        assert_close(layer(x).double(), exact(x.double()), rtol=1e-5, atol=1e-6)  # float32
