"""What normalizations of one sample, over windows, channels and fields, and mixtures with those of a batch, equal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import normkit as nk
from foreign_norms import random_
from normkit import GDN, BatchNorm, DivisiveNorm, ExemplarNorm, GlobalResponseNorm, PositionalNorm, SwitchableNorm
from normkit.activations.divisive_norm import Field, LyuSimoncelliNorm, lyu_simoncelli_norm
from normkit.activations.group_norm import local_context_norm
from normkit.activations.layer_norm import moment_shortcut
from normkit.activations.local_response_norm import LocalResponseNorm, local_contrast_norm, local_response_norm
from normkit.functional import instance_norm, layer_norm, positional_moments, positional_norm, switchable_norm


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + torch.arange(3.0).view(3, 1, 1, 1)


def test_starts_as_the_mean_of_the_three() -> None:
    x, norm = _image(), ExemplarNorm(4).double()
    batch = BatchNorm(4).double()
    three = (instance_norm(x), layer_norm(x, 4, over="c *"), batch(x))
    assert_close(norm(x), sum(three) / 3)
    assert_close((norm.running_mean, norm.running_var), (batch.running_mean, batch.running_var))
    assert_close(norm.eval()(x), (three[0] + three[1] + batch.eval()(x)) / 3)


def test_the_authors_moments_come_from_unbiased_instance_variances() -> None:
    x, logits = _image(), torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    flat = x.view(3, 4, -1)
    mean_in, var_in = flat.mean(-1, keepdim=True), flat.var(-1, keepdim=True)
    moment = var_in + mean_in**2
    mean_ln, mean_bn = mean_in.mean(1, keepdim=True), mean_in.mean(0, keepdim=True)
    var_ln, var_bn = moment.mean(1, keepdim=True) - mean_ln**2, moment.mean(0, keepdim=True) - mean_bn**2
    a, b, c = logits.softmax(0)
    mean, var = a * mean_in + b * mean_ln + c * mean_bn, a * var_in + b * var_ln + c * var_bn
    wanted = ((flat - mean) / (var + 1e-5).sqrt()).view_as(x)
    assert_close(switchable_norm(x, logits, logits, correction=1), wanted)


def test_padding_that_differs_between_samples_is_weighed_by_elements() -> None:
    x, logits = torch.randn(2, 4, 6, dtype=torch.float64), torch.tensor([-1000.0, -1000.0, 1000.0]).double()
    mask = torch.ones(2, 1, 6, dtype=torch.bool)
    mask[1, :, 2:] = False
    real = torch.cat([x[0], x[1, :, :2]], -1)
    wanted = (x[0] - real.mean(1, keepdim=True)) / (real.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert_close(switchable_norm(x, logits, logits, mask=mask)[0], wanted)


def test_a_sample_with_a_single_real_position_does_not_spoil_the_others() -> None:
    norm, x = SwitchableNorm(4, correction=1).double(), _image().flatten(2).requires_grad_()
    mask = torch.ones(3, 1, 30, dtype=torch.bool)
    mask[0, :, 1:] = False
    y = norm(x, mask)
    assert y.isfinite().all()
    assert norm.running_var.isfinite().all()
    gradients = torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_learned_eps_counts_by_its_absolute_value() -> None:
    x, learned = torch.randn(2, 3, 4, 5, dtype=torch.float64), nk.FilterResponseNorm(3, 1e-4, learned_eps=True).double()
    nn.init.constant_(learned.eps_weight, -1e-4)
    assert_close(learned(x), nk.FilterResponseNorm(3, 1e-4).double()(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("correction", [0, 1])
def test_the_shortcut_restores_the_moments(correction: int) -> None:
    x, norm = _image(), PositionalNorm(correction=correction)
    moments = norm.moments(x)
    assert moments.mean.shape == moments.deviation.shape == (3, 1, 5, 6)
    assert_close(moment_shortcut(norm(x), moments), x, rtol=1e-9, atol=1e-9)
    later = moment_shortcut(norm(torch.randn_like(x)), moments)
    assert_close(later.mean(1, keepdim=True), moments.mean)
    # But for eps = 1e-5 beside variances that are seldom below 0.1.
    assert_close(later.std(1, keepdim=True, correction=correction), moments.deviation, rtol=1e-2, atol=0)


def test_gradients_flow_through_the_moments() -> None:
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)

    def output(x: torch.Tensor) -> torch.Tensor:
        return moment_shortcut(positional_norm(x).square(), positional_moments(x))

    assert torch.autograd.gradcheck(output, x)
    assert torch.autograd.gradgradcheck(output, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_types_are_float32(dtype: torch.dtype) -> None:
    x = _image().to(dtype)
    moments = positional_moments(x)
    assert moments.mean.dtype == moments.deviation.dtype == torch.float32
    assert moment_shortcut(positional_norm(x), moments).dtype == dtype


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


def test_a_flat_image_has_no_energy() -> None:
    x = torch.randn(2, 6, 1, 1, dtype=torch.float64).expand(2, 6, 4, 5)
    assert_close(local_contrast_norm(x, 3, 3, alpha=0.7), x / 2**0.75)
    assert_close(local_contrast_norm(x[:, :1], form="jarrett"), torch.zeros(2, 1, 4, 5, dtype=torch.float64))


def test_jarretts_eps_is_a_floor_of_the_divisor() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    one, two = (nk.LocalContrastNorm(form="jarrett", eps=eps)(x) for eps in (1e9, 2e9))
    assert_close(one, 2 * two)


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


def _random(**options: object) -> GlobalResponseNorm:
    norm = GlobalResponseNorm(6, **options).double()
    random_(norm)
    return norm


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
