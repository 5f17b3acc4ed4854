"""Divisive normalization: the members of the unified formula, the models of Lyu and Simoncelli and of Heeger."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from normkit.activations.divisive_norm import (
    DivisiveNorm,
    Field,
    HeegerNorm,
    LyuSimoncelliNorm,
    divisive_norm,
    heeger_norm,
    lyu_simoncelli_norm,
)
from normkit.core.errors import ShapeError


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + 1


def test_layer_instance_and_batch_normalization_are_members() -> None:
    x, eps = _image(), 1e-5
    whole, position = Field(), Field(None, 1)
    assert_close(divisive_norm(x, whole, whole, eps**0.5), F.layer_norm(x, x.shape[1:], eps=eps))
    instance, batch = Field(1, None), Field(1, None, samples=True)
    assert_close(divisive_norm(x, instance, instance, eps**0.5), F.instance_norm(x, eps=eps))
    assert_close(divisive_norm(x, batch, batch, eps**0.5), F.batch_norm(x, None, None, training=True, eps=eps))
    over_channels = F.layer_norm(x.movedim(1, -1), (4,), eps=eps).movedim(-1, 1)
    assert_close(divisive_norm(x, position, position, eps**0.5), over_channels)


def test_what_the_penalty_is_on() -> None:
    x, norm = _image(), DivisiveNorm(4, Field(1, 3), Field(1, 3)).double()
    assert_close(norm.centered(x), x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def test_lyu_simoncelli_on_images_is_a_convolution_of_the_energy() -> None:
    x, norm = _image(), LyuSimoncelliNorm(4, 3).double()
    torch.nn.init.normal_(norm.weight)
    profile = norm.weight.detach() ** 2
    kernel = (profile[:, :, None] * profile[:, None, :]).unsqueeze(1)
    energy = F.conv2d(x**2, kernel, padding=1, groups=4)
    assert_close(norm(x), x / (energy + 1 + 1e-6).sqrt())


def test_lyu_simoncelli_on_vectors_is_elementwise() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    weight, bias = torch.ones(4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert_close(lyu_simoncelli_norm(x, weight, bias), x / (1 + x**2).sqrt())


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0])
def test_heegers_response_saturates_at_the_gain(exponent: float) -> None:
    weight = torch.eye(2, dtype=torch.float64)
    x = torch.tensor([[1e-4, 3.0], [1e6, 1e6]], dtype=torch.float64)
    found = heeger_norm(x, weight, exponent, sigma=3.0, gain=5.0)
    assert_close(found[0, 1].item(), 2.5)  # sigma is the activity of half the response
    assert_close(found[1], torch.full((2,), 5.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_refusals() -> None:
    for norm in (DivisiveNorm(4), LyuSimoncelliNorm(4), HeegerNorm(4)):
        with pytest.raises(ShapeError, match="got 3 channels"):
            norm(torch.ones(2, 3, 5))
