"""FiLM: broadcasting, layouts, what it starts as, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.film import FiLM, film
from normkit.core.errors import OptionError, ShapeError


@pytest.mark.parametrize("spatial", [(), (5,), (4, 5), (2, 3, 4)], ids=str)
def test_broadcasts_over_positions_in_both_layouts(spatial: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, *spatial, dtype=torch.float64)
    scale, shift = torch.randn(2, 3, 4, dtype=torch.float64)
    wide = (3, 4, *(1,) * len(spatial))
    wanted = (1 + scale.view(wide)) * x + shift.view(wide)
    assert_close(film(x, scale, shift), wanted, rtol=1e-12, atol=1e-12)
    assert_close(film(x.movedim(1, -1), scale, shift, layout="n * c"), wanted.movedim(1, -1), rtol=1e-12, atol=1e-12)


def test_the_linear_layer_gives_scale_then_shift() -> None:
    layer, x, condition = FiLM(4, 6), torch.randn(3, 4, 5), torch.randn(3, 6)
    scale, shift = layer.linear(condition)[:, :4, None], layer.linear(condition)[:, 4:, None]
    assert_close(layer(x, condition), (1 + scale) * x + shift)
    assert torch.equal(FiLM(4, 6, zero=True)(x, condition), x)


def test_after_a_batch_norm_it_is_its_compensation() -> None:
    x, condition = torch.randn(8, 4, 5, dtype=torch.float64), torch.ones(8, 1, dtype=torch.float64)
    layer = FiLM(4, 1).double()
    scale, shift = layer.linear(condition[:1])[0].chunk(2)
    bare, full = BatchNorm(4, affine=False).double(), BatchNorm(4).double()
    with torch.no_grad():
        full.weight.copy_(1 + scale)
        full.bias.copy_(shift)
    assert_close(layer(bare(x), condition), full(x), rtol=1e-12, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="channels=4"):
        FiLM(4, 6)(torch.randn(2, 5, 3), torch.randn(2, 6))
    with pytest.raises(ShapeError, match="wanted 2x6"):
        FiLM(4, 6)(torch.randn(2, 4, 3), torch.randn(2, 5))
    with pytest.raises(OptionError, match="layout='c n'"):
        FiLM(4, 6, layout="c n")
    with pytest.raises(ShapeError, match="does not broadcast"):
        film(torch.randn(2, 4, 3), torch.randn(2, 3), torch.randn(2, 3))
