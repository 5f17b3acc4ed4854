"""Local response normalization: torch's form, the published limits, and what is refused."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.local_response_norm import LocalResponseNorm, local_response_norm
from normkit.core.errors import OptionError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 20])
@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 7, 3, 4), (2, 7, 2, 3, 2)])
def test_by_itself_it_is_torchs(size: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 10
    assert_close(LocalResponseNorm(size)(x), nn.LocalResponseNorm(size)(x), rtol=1e-9, atol=0)
    arguments = (size, 0.5, 0.6, 1.5)
    assert_close(LocalResponseNorm(*arguments)(x), nn.LocalResponseNorm(*arguments)(x), rtol=1e-9, atol=0)


def test_an_even_window_has_the_published_limits() -> None:
    x = torch.ones(1, 7, 1, dtype=torch.float64)
    # Channels i - 2 to i + 2: five terms inside, three at the borders.
    wanted = 1 / (2 + torch.tensor([3.0, 4, 5, 5, 5, 4, 3], dtype=torch.float64))
    assert_close(local_response_norm(x, 4, alpha=1.0, beta=1.0, torch_compat=False)[0, :, 0], wanted)
    assert not torch.allclose(wanted, nn.LocalResponseNorm(4, 4.0, 1.0, 2.0)(x)[0, :, 0])


def test_defaults_are_torchs_or_the_papers() -> None:
    norm, published, torchs = LocalResponseNorm(), LocalResponseNorm(torch_compat=False), nn.LocalResponseNorm(5)
    assert (norm.size, norm.alpha, norm.beta, norm.k) == (5, torchs.alpha, torchs.beta, torchs.k)
    assert (published.size, published.alpha, published.beta, published.k) == (5, 1e-4, 0.75, 2.0)
    assert isinstance(norm, nn.LocalResponseNorm)
    assert "torch_compat=False" in repr(published)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("torch_compat", [False, True])
def test_half_types_lose_only_the_last_rounding(dtype: torch.dtype, torch_compat: bool) -> None:
    x = (torch.randn(2, 16, 8) * 200).to(dtype)  # squares overflow float16
    found = local_response_norm(x, 5, 1e-2, torch_compat=torch_compat)
    exact = local_response_norm(x.double(), 5, 1e-2, torch_compat=torch_compat)
    assert found.dtype == dtype
    assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("k", [-1.0, float("nan")])
def test_what_has_no_real_root_is_refused(k: float) -> None:
    with pytest.raises(OptionError, match="wanted a number from 0"):
        LocalResponseNorm(5, k=k)
