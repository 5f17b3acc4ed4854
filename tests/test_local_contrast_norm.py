"""Local contrast normalization: a window of one, invariance to light, flat images, accuracy."""

import pytest
import torch
from torch.testing import assert_close

from normkit.activations.local_contrast_norm import LocalContrastNorm, local_contrast_norm
from normkit.core.errors import OptionError


def test_a_window_of_one_position_leaves_the_constant_alone() -> None:
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    assert_close(local_contrast_norm(x, 3, 1, alpha=0.7), x / 2**0.75)


def test_a_flat_image_has_no_energy() -> None:
    x = torch.randn(2, 6, 1, 1, dtype=torch.float64).expand(2, 6, 4, 5)
    assert_close(local_contrast_norm(x, 3, 3, alpha=0.7), x / 2**0.75)
    assert_close(local_contrast_norm(x[:, :1], form="jarrett"), torch.zeros(2, 1, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 3, 12, 13), (1, 2, 5, 6, 7)])
def test_jarretts_form_is_invariant_to_light(shape: tuple[int, ...]) -> None:
    x, norm = torch.randn(shape, dtype=torch.float64), LocalContrastNorm(form="jarrett")
    assert_close(norm(3 * x + 7), norm(x))


def test_jarretts_weights_are_gaussian_over_channels_and_positions() -> None:
    x = torch.zeros(1, 2, 31, 31, dtype=torch.float64)
    x[0, 0, 15, 15] = 1.0
    norm = LocalContrastNorm(form="jarrett", eps=1e9)  # the divisor is then eps, and v is seen by itself
    taken = (x - 1e9 * norm(x))[0]
    at = torch.arange(-4.0, 5.0, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (at / 1.5) ** 2)
    kernel = kernel / kernel.sum()
    for channel in taken:
        # Sums of numbers of 1e9 times 1e-16.
        assert_close(channel[11:20, 11:20], kernel[:, None] * kernel / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "article"}, "wanted 'response' or 'jarrett'"),
        ({"form": "jarrett", "window": 4}, "an odd one, e.g. 5"),
        ({"window": 0}, "from 1"),
        ({"size": 0}, "from 1"),
        ({"k": -1.0}, "from 0"),
        ({"form": "jarrett", "sigma": 0.0}, "above 0"),
    ],
)
def test_options_are_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LocalContrastNorm(**options)
