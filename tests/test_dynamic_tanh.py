"""Dynamic tanh: both layouts, the authors' keys, what is refused."""

import torch
from torch.testing import assert_close

from normkit.activations.dynamic_tanh import DynamicTanh


def test_starts_as_the_bare_function() -> None:
    x = torch.randn(2, 5, 4) * 3
    assert_close(DynamicTanh(4)(x), torch.tanh(0.5 * x))
    assert_close(DynamicTanh(4, elementwise_affine=False)(x), torch.tanh(0.5 * x))


def test_the_authors_keys() -> None:
    shapes = {key: tuple(value.shape) for key, value in DynamicTanh(4).state_dict().items()}
    assert shapes == {"alpha": (1,), "weight": (4,), "bias": (4,)}
    assert set(DynamicTanh(4, bias=False).state_dict()) == {"alpha", "weight"}
    assert set(DynamicTanh(4, elementwise_affine=False).state_dict()) == {"alpha"}
