"""Filter response normalization: the root mean square over positions, the threshold, the learned eps."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.filter_response_norm import FilterResponseNorm, filter_response_norm
from normkit.activations.rms_norm import rms_norm
from normkit.core.errors import OptionError, ShapeError


def test_is_the_root_mean_square_over_positions() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert_close(filter_response_norm(x), rms_norm(x, (4, 5), eps=1e-6), rtol=1e-9, atol=0)


def test_the_threshold_starts_as_a_rectifier_and_is_learned() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    norm = FilterResponseNorm(3).double()
    assert_close(norm(x), filter_response_norm(x).relu())
    with torch.no_grad():
        norm.tau.copy_(torch.tensor([-0.5, 0.0, 0.5]))
    assert_close(norm(x).amin((0, 2, 3)), norm.tau.detach())
    tau = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, tau: filter_response_norm(x, tau=tau), (x[:1].requires_grad_(), tau))


def test_timms_keys() -> None:
    state = FilterResponseNorm(3).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {"weight": (3,), "bias": (3,), "tau": (3,)}


def test_a_learned_eps_starts_as_the_fixed_one() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    learned = FilterResponseNorm(3, 1e-4, learned_eps=True).double()
    nn.init.constant_(learned.eps_weight, -1e-4)  # the absolute value counts
    assert_close(learned(x), FilterResponseNorm(3, 1e-4).double()(x), rtol=1e-9, atol=0)
    mask = torch.rand(2, 1, 4, 5) > 0.3
    assert_close(learned(x, mask=mask), FilterResponseNorm(3, 1e-4).double()(x, mask=mask), rtol=1e-9, atol=1e-12)


def test_a_learned_eps_lets_a_single_position_through() -> None:
    norm = FilterResponseNorm(1, 1.0, tlu=False, learned_eps=True).double()
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    assert_close(norm(x), x / (x.square() + 1).sqrt())

    def output(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return filter_response_norm(x, eps=eps)

    inputs = (x, norm.eps_weight)
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


@pytest.mark.parametrize("learned", [False, True])
def test_padding_stays_zero_behind_the_threshold(learned: bool) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    norm = FilterResponseNorm(3, learned_eps=learned).double()
    nn.init.constant_(norm.tau, 0.5)
    mask = torch.tensor([True] * 4 + [False] * 2).view(1, 1, 6)
    found = norm(torch.where(mask, x, torch.nan), mask=mask)
    assert_close(found[..., :4], norm(x[..., :4]), rtol=1e-9, atol=1e-12)
    assert (found[..., 4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_half_types(dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    x = torch.randn(2, 3, 40, dtype=torch.float64) * 300  # squares overflow float16
    norm = FilterResponseNorm(3, learned_eps=True).double()
    found = copy.deepcopy(norm).to(parameters or dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert_close(found.double(), norm(x), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="got 4 channels"):
        FilterResponseNorm(3)(torch.ones(2, 4, 5))
    with pytest.raises(OptionError, match="int64"):
        FilterResponseNorm(3, learned_eps=True)(torch.ones(2, 3, 5, dtype=torch.int64))
