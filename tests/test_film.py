"""FiLM: broadcasting, layouts, what it starts as, and what it refuses."""

import torch
from torch.testing import assert_close

from normkit.activations.film import FiLM


def test_the_linear_layer_gives_scale_then_shift() -> None:
    layer, x, condition = FiLM(4, 6), torch.randn(3, 4, 5), torch.randn(3, 6)
    scale, shift = layer.linear(condition)[:, :4, None], layer.linear(condition)[:, 4:, None]
    assert_close(layer(x, condition), (1 + scale) * x + shift)
    assert torch.equal(FiLM(4, 6, zero=True)(x, condition), x)
