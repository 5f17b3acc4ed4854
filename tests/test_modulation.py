"""Scales, shifts and conditions of every shape that broadcasts, in every layer that takes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import normkit as nk
from normkit.activations.adaptive_layer_norm import modulate
from normkit.activations.film import film

LAST = st.sampled_from([(3, 5, 4), (3, 2, 5, 4), (3, 4), (1, 5, 4), (4, 4, 4)])


def broadcast(part: Tensor, rank: int, channel: int) -> Tensor:
    """What the shapes mean: one axis is the channels, two are samples and channels."""
    sizes = [1] * rank
    for d, size in zip({1: [channel], 2: [0, channel]}.get(part.dim(), range(rank)), part.shape, strict=True):
        sizes[d] = size
    return part.view(sizes)


def part(data: st.DataObject, shape: tuple[int, ...], channel: int) -> Tensor:
    forms = [
        (shape[channel],),
        (shape[0], shape[channel]),
        (1, shape[channel]),
        tuple(data.draw(st.sampled_from([1, size])) for size in shape),
    ]
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
        gradients = [
            torch.autograd.grad((each * direction).sum(), (shift, scale), retain_graph=True)
            for each in (found(), wanted)
        ]
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
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
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
    assert_close(norm(x, torch.tensor(1)), wanted)
    assert_close(norm(x, torch.tensor([1])), wanted)
    half = nk.functional.adaptive_instance_norm(x, x.flip(0), 0.5)
    for strength in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((2,), 0.5), torch.full((2, 1, 1), 0.5)):
        assert_close(nk.functional.adaptive_instance_norm(x, x.flip(0), strength), half)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (5,), (2, 5, 1, 4)])
def test_what_does_not_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    x, wrong = torch.randn(2, 5, 4), torch.randn(shape)
    for function in (modulate, nk.functional.adaptive_layer_norm, lambda *a: film(*a, layout="n * c")):
        with pytest.raises(nk.errors.ShapeError, match="does not broadcast over an input of 2x5x4"):
            function(x, wrong, wrong)
