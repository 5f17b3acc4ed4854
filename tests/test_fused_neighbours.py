"""What follows a norm in the same layer: dropout that stores no mask, and rows rounded to int8."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.engine.library import library, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("kind", [nk.LayerNorm, nk.RMSNorm])
def test_dropout_zeroes_its_share_and_keeps_the_mean(kind: type[nn.Module], dtype: torch.dtype) -> None:
    p, layer, x = 0.3, kind(77, dropout=0.3, dtype=dtype), torch.randn(301, 77, dtype=dtype)
    torch.manual_seed(1)
    y, other = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, layer(x))
    full = layer.eval()(x)
    dropped, again = (y == 0).double(), (other == 0).double()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped.mean() - p) < 5 * deviation
    pairs = [(dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1]), (dropped, again)]
    for one, two in pairs:  # neighbours and calls are independent
        assert abs((one * two).mean() - p * p) < 5 * deviation
    assert_close(y, torch.where(y == 0, 0, full / (1 - p)), rtol=4 * torch.finfo(dtype).eps, atol=0)  # rounded twice


def test_gradients_through_dropout() -> None:
    layer = nk.LayerNorm(16, dropout=0.5).double()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return layer(x)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        found += torch.autograd.grad(run(x).square().sum(), x)
    assert torch.equal(*found)
    assert found[0].count_nonzero() > 0
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert 0 < (compiled(x) == 0).sum() < x.numel()
    y, total = layer.after_sum(x, x)
    assert 0 < (y == 0).sum() < y.numel()
    assert torch.equal(total, 2 * x)


def test_a_layer_that_hands_dropout_on_drops() -> None:
    class Named(nk.RMSNorm):
        def __init__(self, features: int) -> None:
            super().__init__(features, dropout=0.5)

    layer, x = Named(64), torch.ones(64)
    assert all((y == 0).any() for y in (layer(x), layer.after_sum(x, x)[0]))


@DTYPES
@pytest.mark.parametrize("width", [7, 1024, 5000])
def test_rows_are_rounded_as_from_the_output(width: int, dtype: torch.dtype) -> None:
    for layer in (nk.LayerNorm(width, dtype=dtype), nk.RMSNorm(width, offset=1.0, dtype=dtype, activation="silu")):
        x = torch.randn(2, 9, width, dtype=dtype)
        x[1, 3], x[0, 2, 4] = 0, torch.nan
        q, scale = layer.quantized(x)
        layer.backend = "reference"
        wanted, by = layer.quantized(x)
        assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, x.shape, torch.float32, (2, 9, 1))
        # Two roundings of the output to its dtype may differ, and with them whole numbers next to a half.
        assert_close(scale, by, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=0, equal_nan=True)
        real = scale.isfinite().expand(x.shape)
        assert (q[real].int() - wanted[real].int()).abs().max() <= (2 if dtype == torch.bfloat16 else 1)
        assert q[1, 3].eq(0).all()
        assert scale[0, 2].isnan()


def test_rows_of_nothing_and_rows_beyond_float32() -> None:
    q, scale = nk.LayerNorm(4, over="c").quantized(torch.empty(2, 4, 0))
    assert (q.shape, scale.tolist()) == ((2, 4, 0), torch.zeros(2, 4, 1).tolist())
    layer = nk.RMSNorm(2, dtype=torch.float64)
    nn.init.constant_(layer.weight, 1e300)
    for layer.backend in ("auto", "reference"):
        q, scale = layer.quantized(torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
        assert_close(
            (q.double(), scale), (torch.zeros(2, 2).double(), torch.tensor([[torch.nan], [0.0]])), equal_nan=True
        )
