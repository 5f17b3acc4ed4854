"""Scales, shifts and statistics that come from a condition: what they start as, and over what they broadcast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from foreign_norms import random_
from normkit import AdaLayerNorm, AdaLayerNormOutput, AdaLayerNormZeroBlock, AdaptiveInstanceNorm, BatchNorm
from normkit.activations.conditional_norm import ConditionalNorm, SpatiallyAdaptiveNorm, conditional_norm_rule
from normkit.core.memory import RunningStatistics
from normkit.engine.dispatch import explain, run
from normkit.functional import adaptive_instance_norm, conditional_norm, film, modulate


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 9, dtype=torch.float64) * 3 + 5, torch.randn(2, 3, 4, 7, dtype=torch.float64) * 2 - 1


def test_strength_goes_from_the_content_to_the_style() -> None:
    x, style = _pair()
    full = adaptive_instance_norm(x, style)
    assert torch.equal(AdaptiveInstanceNorm(0.0)(x, style), x)
    assert_close(AdaptiveInstanceNorm(0.3)(x, style), 0.7 * x + 0.3 * full)
    each = adaptive_instance_norm(x, style, torch.tensor([0.0, 1.0]))
    assert_close(each, torch.stack([x[0], full[1]]))


def _block(features: int = 8, condition: int = 6) -> AdaLayerNormZeroBlock:
    mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU("tanh"), nn.Linear(4 * features, features))
    return AdaLayerNormZeroBlock(features, condition, attn=nn.Linear(features, features), mlp=mlp).double()


def _random(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)


def test_the_zero_block_starts_as_the_identity_and_its_gates_learn_first() -> None:
    block, x, condition = _block(), torch.randn(3, 5, 8).double(), torch.randn(3, 6).double()
    assert torch.equal(block(x, condition), x)
    block(x, condition).square().sum().backward()
    bias = block.adaLN_modulation[1].bias.grad.view(6, 8)
    assert (bias[[2, 5]] != 0).any(1).all()
    assert (bias[[0, 1, 3, 4]] == 0).all()


def test_the_output_layer_is_the_published_formula() -> None:
    final, x, condition = AdaLayerNormOutput(8, 6, 4), torch.randn(3, 5, 8), torch.randn(3, 6)
    _random(final)
    linear = final.adaLN_modulation[1]
    shift, scale = F.linear(F.silu(condition), linear.weight, linear.bias)[:, None].chunk(2, dim=2)
    assert_close(final(x, condition), final.linear(F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift))


def test_explains_which_back_end() -> None:
    text = str(AdaLayerNorm(8, 6).explain(torch.randn(2, 5, 8), torch.randn(2, 6)))
    assert "(1 + weight)" in text
    assert "2 samples" in text


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_the_kernels_take_weights_of_each_sample(format: torch.memory_format, training: bool) -> None:
    norm = BatchNorm(5, affine=False).train(training)
    rule = conditional_norm_rule("n *")
    x = torch.randn(3, 5, 4, 6).to(memory_format=format)
    weight, bias, running = torch.randn(3, 5), torch.randn(3, 5), RunningStatistics(torch.rand(5), torch.rand(5) + 0.5)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(running.mean)
    norm.running_var.copy_(running.var)
    assert explain(rule, x, weight, bias, running=running, training=training).backend == "native"
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = run(rule, *inputs, running=running, training=training)
    expected = norm(x) * weight[:, :, None, None] + bias[:, :, None, None]
    assert_close(y, expected)
    assert y.is_contiguous(memory_format=format)
    dy = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy))
    assert_close(running.mean, norm.running_mean)


def _image() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + 1


def _random_conditional(**options: object) -> ConditionalNorm:
    norm = ConditionalNorm(4, **options).double()
    random_(norm)
    return norm


def test_shares_mix_classes() -> None:
    x, norm = _image(), _random_conditional(classes=2)
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    found = norm(x, shares)
    assert_close(found[:2], norm(x, torch.tensor([0, 1, 0]))[:2])
    whole = [norm(x, torch.full((3,), k))[2] for k in range(2)]
    assert_close(found[2], 0.25 * whole[0] + 0.75 * whole[1])


def test_running_averages_are_batch_norms() -> None:
    norm, batch_norm = _random_conditional(features=2, over="n *", momentum=None), BatchNorm(4, momentum=None).double()
    condition = torch.randn(3, 2, dtype=torch.float64)
    x = _image()
    for _ in range(2):
        x = x + 1
        norm(x, condition)
        batch_norm(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(norm, key), getattr(batch_norm, key))
    gain, shift = (1 + condition @ norm.weight)[..., None, None], (condition @ norm.bias)[..., None, None]
    assert_close(norm.eval()(x, condition), gain * batch_norm.eval()(x) + shift)


def test_a_map_gives_each_position_its_weight_and_bias() -> None:
    x, norm = _image(), SpatiallyAdaptiveNorm(4, 2, hidden=3).double()
    small = torch.rand(3, 2, 2, 3, dtype=torch.float64)
    labels = F.interpolate(small, (5, 6), mode="nearest")
    hidden = F.conv2d(labels, norm.shared.weight, norm.shared.bias, padding=1).relu()
    gain = F.conv2d(hidden, norm.gain.weight, norm.gain.bias, padding=1)
    shift = F.conv2d(hidden, norm.shift.weight, norm.shift.bias, padding=1)
    wanted = F.batch_norm(x, None, None, training=True) * (1 + gain) + shift
    assert_close((norm(x, labels), norm(x, small)), (wanted, wanted))


def test_over_the_sample_a_map_layer_keeps_no_state() -> None:
    x, norm = _image(), SpatiallyAdaptiveNorm(4, 2, hidden=3, over="*").double()
    labels = torch.rand(3, 2, 5, 6, dtype=torch.float64)
    assert not dict(norm.named_buffers())
    assert_close(norm.eval()(x, labels), norm.train()(x, labels))
    assert_close(norm(x, labels)[:1], norm(x[:1], labels[:1]))


def test_the_function_takes_both() -> None:
    x, weight, bias = _image(), torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    maps = [p[..., None, None].expand(3, 4, 5, 6) for p in (weight, bias)]
    assert_close(conditional_norm(x, weight, bias), conditional_norm(x, *maps))
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    found = conditional_norm(x, weight, bias, mean, var, training=False, over="n *")
    assert_close(found, maps[0] * x / (1 + 1e-5) ** 0.5 + maps[1])


LAST = st.sampled_from([(3, 5, 4), (3, 2, 5, 4), (3, 4), (1, 5, 4), (4, 4, 4)])


def broadcast(part: Tensor, rank: int, channel: int) -> Tensor:
    """What the shapes mean: one axis is the channels, two are samples and channels."""
    sizes = [1] * rank
    for d, size in zip({1: [channel], 2: [0, channel]}.get(part.dim(), range(rank)), part.shape, strict=True):
        sizes[d] = size
    return part.view(sizes)


def part(data: st.DataObject, shape: tuple[int, ...], channel: int) -> Tensor:
    own = tuple(data.draw(st.sampled_from([1, size])) for size in shape)
    forms = [(shape[channel],), (shape[0], shape[channel]), (1, shape[channel]), own]
    return torch.randn(data.draw(st.sampled_from(forms)), dtype=torch.float64)


@given(data=st.data())
def test_scales_and_shifts_broadcast(data: st.DataObject) -> None:
    shape = data.draw(LAST)
    x, rank = torch.randn(shape, dtype=torch.float64), len(shape)
    shift, scale = (part(data, shape, rank - 1).requires_grad_() for _ in range(2))
    a, b = (broadcast(each, rank, rank - 1) for each in (shift, scale))
    y = F.layer_norm(x, shape[-1:], eps=1e-6)
    cases: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda: modulate(x, shift, scale), (1 + b) * x + a),
        (lambda: nk.functional.adaptive_layer_norm(x, shift, scale), (1 + b) * y + a),
        (lambda: film(x, scale, shift, layout="n * c"), (1 + b) * x + a),
    ]
    direction = torch.randn(shape, dtype=torch.float64)
    for found, wanted in cases:
        assert_close(found(), wanted)
        gradients = [torch.autograd.grad(y, (shift, scale), direction, retain_graph=True) for y in (found(), wanted)]
        assert_close(*gradients)


@given(data=st.data())
def test_weights_of_channels_first_inputs_broadcast(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(3, 4, 5), (3, 4, 2, 5), (4, 4, 4)]))
    x = torch.randn(shape, dtype=torch.float64)
    weight, bias = (part(data, shape, 1) for _ in range(2))
    w, b = (broadcast(each, len(shape), 1) for each in (weight, bias))
    assert_close(nk.functional.conditional_norm(x, weight, bias), w * F.instance_norm(x) + b)
    assert_close(film(x, weight, bias), (1 + w) * x + b)


@pytest.mark.parametrize(
    ("made", "size"),
    [
        (nk.AdaLayerNorm(4, 3, zero=False), 3),
        (nk.AdaLayerNormZeroBlock(4, 3, torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), 3),
        (nk.AdaLayerNormOutput(4, 3, 5), 3),
        (nk.FiLM(4, 3, layout="n * c"), 3),
        (nk.ConditionalNorm(5, features=3), 3),
        (nk.ConditionalNorm(5, classes=3), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_conditions_broadcast(made: Any, size: int) -> None:
    random_(made)
    x, one = torch.randn(2, 5, 4), torch.randn(1, size)
    each = torch.randn(2, size)
    assert_close(made(x, each.unsqueeze(1)), made(x, each))
    for form in (one, one[0], one.unsqueeze(1)):
        assert_close(made(x, form), made(x, one.expand(2, -1)))
    if type(made).__name__.startswith("AdaLayerNorm"):
        token = torch.randn(1, 5, size)
        assert_close(made(x, token), made(x, token.expand(2, -1, -1)))
    with pytest.raises(nk.errors.ShapeError, match="got a condition of"):
        made(x, torch.randn(2, 3, size))


def test_a_class_or_a_strength_for_all_samples() -> None:
    norm, x = nk.ConditionalNorm(4, classes=3), torch.randn(2, 4, 5)
    torch.nn.init.normal_(norm.weight)  # pyright: ignore[reportArgumentType]
    wanted = norm(x, torch.tensor([1, 1]))
    assert_close((norm(x, torch.tensor(1)), norm(x, torch.tensor([1]))), (wanted, wanted))
    half = nk.functional.adaptive_instance_norm(x, x.flip(0), 0.5)
    for strength in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((2,), 0.5), torch.full((2, 1, 1), 0.5)):
        assert_close(nk.functional.adaptive_instance_norm(x, x.flip(0), strength), half)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (5,), (2, 5, 1, 4)])
def test_what_does_not_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    x, wrong = torch.randn(2, 5, 4), torch.randn(shape)
    for function in (modulate, nk.functional.adaptive_layer_norm, lambda *a: film(*a, layout="n * c")):
        with pytest.raises(nk.errors.ShapeError, match="does not broadcast over an input of 2x5x4"):
            function(x, wrong, wrong)
