"""Filter response normalization: the root mean square over positions, the threshold, the learned eps."""

import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.filter_response_norm import FilterResponseNorm, filter_response_norm


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
