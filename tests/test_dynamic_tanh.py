"""Dynamic tanh: both layouts, the authors' keys, what is refused."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.dynamic_tanh import DynamicTanh, dynamic_tanh
from normkit.core.errors import OptionError, ShapeError


def test_starts_as_the_bare_function() -> None:
    x = torch.randn(2, 5, 4) * 3
    assert_close(DynamicTanh(4)(x), torch.tanh(0.5 * x))
    assert_close(DynamicTanh(4, elementwise_affine=False)(x), torch.tanh(0.5 * x))


def test_channels_first_is_the_same_function() -> None:
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    last, first = DynamicTanh(4, 0.8).double(), DynamicTanh(4, 0.8, layout="n c *").double()
    nn.init.normal_(last.weight)
    nn.init.normal_(last.bias)
    first.load_state_dict(last.state_dict())
    assert_close(first(x), last(x.movedim(1, -1)).movedim(-1, 1))
    channels_last = x.to(memory_format=torch.channels_last)
    assert first(channels_last).is_contiguous(memory_format=torch.channels_last)


def test_the_authors_keys() -> None:
    shapes = {key: tuple(value.shape) for key, value in DynamicTanh(4).state_dict().items()}
    assert shapes == {"alpha": (1,), "weight": (4,), "bias": (4,)}
    assert set(DynamicTanh(4, bias=False).state_dict()) == {"alpha", "weight"}
    assert set(DynamicTanh(4, elementwise_affine=False).state_dict()) == {"alpha"}


def test_an_element_depends_on_no_other() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(dynamic_tanh, x).view(24, 24)
    assert_close(jacobian, torch.diag(jacobian.diagonal()), rtol=0, atol=0)
    assert (jacobian.diagonal() > 0).all()


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="wanted one that ends in 4"):
        DynamicTanh(4)(torch.ones(2, 3))
    with pytest.raises(ShapeError, match="with 4 channels"):
        DynamicTanh(4, layout="n c *")(torch.ones(2, 3, 4))
    with pytest.raises(OptionError, match="one number of channels"):
        DynamicTanh((4, 5), layout="n c *")
    with pytest.raises(OptionError, match="layout='n d'"):
        DynamicTanh(4, layout="n d")
