"""What normalizations over windows, channels and fields equal, and where they start."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from normkit.activations.divisive_norm import (
    DivisiveNorm,
    Field,
    LyuSimoncelliNorm,
    divisive_norm,
    heeger_norm,
    lyu_simoncelli_norm,
)
from normkit.activations.gdn import GDN
from normkit.activations.global_response_norm import GlobalResponseNorm
from normkit.activations.group_norm import LocalContextNorm, group_norm, local_context_norm
from normkit.activations.local_response_norm import (
    LocalContrastNorm,
    LocalResponseNorm,
    local_contrast_norm,
    local_response_norm,
)

# Local context normalization


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 7), (2, 6, 5, 4), (2, 6, 3, 4, 2)])
def test_a_window_over_everything_is_group_norm(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    norm = LocalContextNorm(6, 3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert_close(norm(x), group_norm(x, 2, norm.weight, norm.bias), rtol=1e-9, atol=1e-9)


def test_each_axis_may_have_a_window_of_its_own() -> None:
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    found = local_context_norm(x, 2, (3, 5))[0, :, 2, 3]
    inside = x[0, :, 1:4, 1:6]
    assert_close(found, (x[0, :, 2, 3] - inside.mean()) / (inside.var(correction=0) + 1e-5).sqrt())


def test_accurate_beside_a_step_of_light() -> None:
    x = torch.randn(1, 2, 8, 32)
    x[..., 16:] += 1e4
    found, exact = (local_context_norm(z, 2, 5) for z in (x, x.double()))
    # Means of 1e4 are known to half a unit in the last place, 1e4 * 2^-24 deviations.
    assert_close(found.double(), exact, rtol=0, atol=1e-2)


# Local contrast normalization


def test_a_flat_image_has_no_energy() -> None:
    x = torch.randn(2, 6, 1, 1, dtype=torch.float64).expand(2, 6, 4, 5)
    assert_close(local_contrast_norm(x, 3, 3, alpha=0.7), x / 2**0.75)
    assert_close(local_contrast_norm(x[:, :1], form="jarrett"), torch.zeros(2, 1, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 3, 12, 13), (1, 2, 5, 6, 7)])
def test_jarretts_form_is_invariant_to_light(shape: tuple[int, ...]) -> None:
    x, norm = torch.randn(shape, dtype=torch.float64), LocalContrastNorm(form="jarrett")
    assert_close(norm(3 * x + 7), norm(x))


def test_jarretts_eps_is_a_floor_of_the_divisor() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    one, two = (LocalContrastNorm(form="jarrett", eps=eps)(x) for eps in (1e9, 2e9))
    assert_close(one, 2 * two)


# Local response normalization


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


# Divisive normalization


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


# Generalized divisive normalization


def test_starts_at_beta_one_and_a_tenth_of_the_identity() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    # Beside the diagonal stands 2^-36 in place of 0.
    assert_close(GDN(3).double()(x), x / (1 + 0.1 * x**2).sqrt(), rtol=1e-7, atol=0)
    assert_close(GDN(3, inverse=True).double()(x), x * (1 + 0.1 * x**2).sqrt(), rtol=1e-7, atol=0)


def test_every_weight_can_leave_its_start() -> None:
    norm = GDN(3)
    norm(torch.randn(4, 3, 5)).square().sum().backward()
    assert (norm.gamma.grad != 0).all()
    assert (norm.beta.grad != 0).all()


def test_stays_real_whatever_the_parameters() -> None:
    norm = GDN(3)
    nn.init.zeros_(norm.beta)
    nn.init.constant_(norm.gamma, -1e-12)
    assert norm(torch.randn(4, 3, 5) * 1e3).isfinite().all()
    assert norm(torch.zeros(4, 3, 5)).isfinite().all()


# Global response normalization


def _random(**options: object) -> GlobalResponseNorm:
    norm = GlobalResponseNorm(6, **options).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("layout", ["n * c", "n c *"])
def test_starts_as_the_identity(layout: str) -> None:
    x = torch.randn(2, 6, 5, 6)
    assert torch.equal(GlobalResponseNorm(6, layout=layout)(x), x)


@pytest.mark.parametrize("keys", [("weight", "bias"), ("gamma", "beta")])
@pytest.mark.parametrize("shape", [(6,), (1, 1, 1, 6), (1, 6, 1, 1)])
def test_foreign_checkpoints_load(keys: tuple[str, str], shape: tuple[int, ...]) -> None:
    wanted = _random().state_dict()
    block = nn.Sequential(GlobalResponseNorm(6)).double()
    foreign = {f"0.{key}": value.view(shape) for key, value in zip(keys, wanted.values(), strict=True)}
    kept = dict(foreign)
    block.load_state_dict(foreign)
    assert_close(block[0].state_dict(), wanted)
    assert foreign == kept  # the caller's dictionary is as it was
    with pytest.raises(RuntimeError, match="size mismatch"):
        block.load_state_dict({"0.weight": torch.ones(1, 1, 1, 5), "0.bias": torch.ones(6)})


def test_an_image_of_zeros_is_left_alone() -> None:
    x = torch.zeros(1, 3, 3, 6, dtype=torch.float64, requires_grad=True)
    norm = _random()
    assert_close(norm(x), norm.bias.expand_as(x))
    assert torch.autograd.grad(norm(x).sum(), x)[0].isfinite().all()
