"""Gradients of unit length or clipped by units, and networks without activation norms that need it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit import NormalizerFreeBlock
from normkit.activations.normalizer_free import predicted_betas
from normkit.core.errors import OptionError
from normkit.functional import adaptive_gradient_clipping, normalize_gradients, scaled_activation
from normkit.gradients import AdaptiveClipping, GradientNormalizer
from normkit.weights import nonlinearity_gain, scaled_weight_standardization, weight_conditioning, weight_norm
from normkit.weights.weight_standardization import RELU_GAIN


def network() -> nn.Sequential:
    grouped = nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(6, 4, 3, groups=2)
    return nn.Sequential(*grouped, nn.Flatten(), nn.Linear(20, 3), nn.LayerNorm(3)).double()


def backward(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    (model(torch.randn(2, 4, 5, dtype=torch.float64)) * torch.randn(2, 3)).sum().mul(scale).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)


@pytest.mark.parametrize("scale", [1e-140, 1.0, 1e140])
@pytest.mark.parametrize("mode", ["tensor", "layer", "global"])
def test_lengths_are_one_and_directions_stay(mode: Any, scale: float) -> None:
    model = network()
    plain = backward(model)
    hook = GradientNormalizer(model, mode)
    unit = backward(model, scale)
    groups = {
        "tensor": [[name] for name in plain],
        "layer": [[name for name in plain if name.startswith(f"{k}.")] for k in (0, 1, 3, 4)],
        "global": [list(plain)],
    }[mode]
    for group in groups:
        after, before = flat([unit[name] for name in group]), flat([plain[name] for name in group])
        assert_close(after.norm(), torch.tensor(1.0).double(), rtol=1e-12, atol=0)
        assert_close(cosine(after, before), torch.tensor(1.0).double(), rtol=1e-9, atol=0)
    hook.remove()
    hook.remove()
    assert_close(backward(model), plain, rtol=0, atol=0)


def test_centralised_gradients_sum_to_zero_over_what_feeds_a_unit() -> None:
    model = network()
    plain = backward(model)
    with GradientNormalizer(model, None, centralize=True):
        central = backward(model)
    zero = torch.zeros((), dtype=torch.float64)
    assert_close(central["0.weight"].sum((1, 2)), zero.expand(6), rtol=0, atol=1e-12)
    # (groups, in, out, taps): an output unit is fed by its group's inputs.
    by_group = central["1.weight"].view(2, 3, 2, 3)
    assert_close(by_group.sum((1, 3)), zero.expand(2, 2), rtol=0, atol=1e-12)
    assert_close(central["3.weight"].sum(1), zero.expand(3), rtol=0, atol=1e-12)
    for name in ("0.bias", "3.bias", "4.weight"):
        assert_close(central[name], plain[name], rtol=0, atol=0)
    assert_close(central["3.weight"], plain["3.weight"] - plain["3.weight"].mean(1, keepdim=True))
    with GradientNormalizer(model, "tensor", centralize=True):  # and then of unit length
        found = backward(model)["3.weight"]
    assert_close(found.norm(), torch.tensor(1.0).double())
    assert_close(found.sum(1), torch.zeros(3).double(), rtol=0, atol=1e-12)


def test_a_centralised_step_keeps_the_mean_of_each_row() -> None:
    model = nn.Linear(5, 3, dtype=torch.float64)
    before = model.weight.mean(1).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with GradientNormalizer(optimizer, None, centralize=True):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
    assert_close(model.weight.mean(1), before, rtol=0, atol=1e-12)


def test_zero_and_broken_gradients_stay() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    with GradientNormalizer([a, b, c], "tensor"):
        ((a * 0).sum() + (b * torch.tensor([torch.inf, 1.0])).sum()).backward()
    assert_close(a.grad, torch.zeros(2))
    assert_close(b.grad, torch.tensor([torch.inf, 1.0]))
    assert c.grad is None


@pytest.mark.parametrize("size", [1e-40, 1e38])
def test_lengths_beyond_single_precision_are_one_too(size: float) -> None:
    w = nn.Parameter(torch.ones(400))
    w.grad = torch.full((400,), size)
    normalize_gradients([w])
    # The smallest numbers of float32 have some 17 bits at 1e-40.
    assert_close(w.grad, torch.full((400,), 0.05), rtol=1e-4, atol=0)


def test_half_precision_and_frozen_parameters() -> None:
    model = nn.Linear(8, 8).bfloat16()
    model.bias.requires_grad_(False)
    with GradientNormalizer(model):
        (model(torch.randn(2, 8).bfloat16()) * 1e30).sum().backward()
    assert model.weight.grad.dtype == torch.bfloat16
    assert_close(model.weight.grad.double().norm(), torch.tensor(1.0).double(), rtol=1e-2, atol=0)


def test_an_optimizer_sees_what_passes_add_up_to() -> None:
    model = network()
    first = backward(model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    hook = GradientNormalizer(optimizer, "global")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)
    (model(torch.ones(2, 4, 5, dtype=torch.float64)) ** 2).sum().backward()
    second = {name: p.grad.sub(first[name]) for name, p in model.named_parameters()}
    optimizer.step()
    stepped = flat([before[name] - p.detach() for name, p in model.named_parameters()])
    assert_close(stepped.norm(), torch.tensor(1.0).double())
    assert_close(cosine(stepped, flat([first[n] + second[n] for n in first])), torch.tensor(1.0).double())
    hook.remove()
    backward(model)
    length = flat([p.grad for p in model.parameters()]).norm()
    assert abs(length - 1) > 0.1


def test_a_backward_pass_that_fails_does_not_disarm_it() -> None:
    w = nn.Parameter(torch.ones(2))
    v = nn.Parameter(torch.ones(2))
    hook = GradientNormalizer([w, v])

    def fail(_: Tensor) -> None:
        raise ValueError("stop")

    handle = v.register_hook(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"):
            ((w * 3).sum() + v.sum()).backward()
    handle.remove()
    w.grad = v.grad = None
    ((w * 3).sum() + v.sum()).backward()
    assert_close(flat([w.grad, v.grad]).norm(), torch.tensor(1.0))
    hook.remove()


def test_a_shared_parameter_counts_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    with GradientNormalizer(tied, "layer"):
        tied(torch.randn(3, 4)).sum().backward()
    assert_close(tied[0].weight.grad.norm(), torch.tensor(1.0))


def test_the_function_is_the_hook() -> None:
    one = network()
    two = copy.deepcopy(one)
    with GradientNormalizer(one, "layer", centralize=True):
        wanted = backward(one)
    backward(two)
    normalize_gradients(two, "layer", centralize=True)
    assert_close({name: p.grad for name, p in two.named_parameters()}, wanted, rtol=0, atol=0)


LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed, groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


def test_gains_of_nonlinearities() -> None:
    assert math.sqrt(2 / (1 - 1 / math.pi)) == RELU_GAIN
    assert nonlinearity_gain(torch.relu) == pytest.approx(RELU_GAIN, abs=1e-8)
    assert nonlinearity_gain(lambda z: z) == pytest.approx(1, abs=1e-9)
    z = torch.randn(2_000_000, dtype=torch.float64)
    for activation in (torch.tanh, nn.functional.gelu, nn.functional.silu):
        # The deviation of two million samples is known to about 1e-3.
        assert (activation(z) * nonlinearity_gain(activation)).std().item() == pytest.approx(1, abs=3e-3)
    with pytest.raises(OptionError, match="constant"):
        nonlinearity_gain(torch.zeros_like)


def test_the_signal_has_the_predicted_variance() -> None:
    width, transitions = 512, [True, False, False, False, True, False, False]
    betas = predicted_betas(transitions)

    def layer() -> nn.Module:
        return scaled_weight_standardization(nn.Linear(width, width, bias=False), gamma=1.0)

    def branch() -> nn.Module:
        return nn.Sequential(scaled_activation(nn.ReLU(), RELU_GAIN), layer())

    x, found = torch.randn(256, width), []
    for beta, transition in zip(betas, transitions, strict=True):
        found.append(x.std().item())
        x = NormalizerFreeBlock(branch(), beta, shortcut=layer() if transition else None)(x).detach()
    # Shortcut and branch of a random network of width 512 are correlated by about 512 ** -0.5.
    assert found == pytest.approx(betas, rel=0.05)


def test_block_and_betas() -> None:
    block = NormalizerFreeBlock(nn.Tanh(), beta=2.0, alpha=0.5, shortcut=nn.ReLU())
    x = torch.randn(4)
    assert_close(block(x), torch.relu(x / 2) + 0.5 * torch.tanh(x / 2))
    assert [beta**2 for beta in predicted_betas([True, False, True], 0.5)] == pytest.approx([1.0, 1.25, 1.5])
    assert "NormalizerFreeBlock(\n  beta=2, alpha=0.5\n" in repr(block)
    assert "(1): _Scale(1.5)" in repr(scaled_activation(nn.ReLU(), 1.5))
    with pytest.raises(OptionError, match="beta=0"):
        NormalizerFreeBlock(nn.Tanh(), beta=0)


def _gradients(model: nn.Module, size: float = 100.0) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * size
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_units_are_clipped_to_a_share_of_their_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Linear(3, 2)).double()
    before = _gradients(model)
    nn.init.zeros_(model[0].weight[0])
    clipped = adaptive_gradient_clipping(model, 0.01)
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        if name.startswith("3"):
            assert_close(parameter.grad, old, rtol=0, atol=0)
            continue
        weights, units, olds = parameter.detach(), parameter.grad, old
        if parameter.dim() == 1:
            weights, units, olds = weights[None], units[None], olds[None]
        elif name.startswith("2"):
            weights, units, olds = (value.transpose(0, 1) for value in (weights, units, olds))
        for weight, unit, was in zip(weights, units, olds, strict=True):
            assert_close(unit, was * (0.01 * max(weight.norm().item(), 1e-3) / was.norm()))
    assert clipped == 4 + 1 + 1 + 1 + 2 + 1


def test_small_gradients_stay_and_broken_ones_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = _gradients(model, 1e-7)
    assert AdaptiveClipping(model)() == 0
    assert_close([parameter.grad for parameter in model.parameters()], before, rtol=0, atol=0)
    model[0].weight.grad[1, 0] = torch.inf
    model[0].weight.grad[2] = 1e30
    AdaptiveClipping(model, skip=lambda name, module: False)()
    assert model[0].weight.grad[1, 0] == torch.inf
    assert_close(model[0].weight.grad[2].norm(), 0.01 * model[0].weight[2].norm())
    with pytest.raises(OptionError, match="clip=0"):
        AdaptiveClipping(model, 0)


WEIGHTS = {
    "plain": lambda layer: layer,
    "weight norm": weight_norm,
    "weight norm, torch's": nn.utils.parametrizations.weight_norm,
    "scaled standardization": scaled_weight_standardization,
    "row": weight_conditioning,
}


@pytest.mark.parametrize("put", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", LAYERS)
def test_raw_weights_are_clipped_and_centralized_by_their_layers_units(name: str, put) -> None:
    model = nn.Sequential(put(LAYERS[name]().double()), put(nn.Linear(3, 2).double()))
    layer = model[0]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 100
    weight = layer.get_submodule("parametrizations.weight") if put is not WEIGHTS["plain"] else layer
    raw = max(weight.parameters(recurse=False), key=lambda parameter: parameter.numel())
    before = {parameter: parameter.grad.clone() for parameter in model.parameters()}
    centralized = GradientNormalizer(model, None, centralize=True)
    assert len(centralized.groups) == len(before)
    centralized.apply()
    assert_close(by_units(layer, raw.grad).mean(1), torch.zeros(layer.bias.numel()).double(), rtol=0, atol=1e-12)
    for parameter in before.keys() - {raw, *(p for p in model[1].parameters() if p.numel() == 6)}:
        assert_close(parameter.grad, before[parameter], rtol=0, atol=0)  # a length less its mean would be nothing
    adaptive_gradient_clipping(model, clip=0.5)
    assert_close(by_units(layer, raw.grad).norm(dim=1), 0.5 * by_units(layer, raw.detach()).norm(dim=1))
    for parameter in layer.parameters():
        assert parameter.grad.norm() <= 0.5 * parameter.norm().clamp_min(1e-3) * (1 + 1e-12)
    for parameter in model[1].parameters():  # the head
        assert parameter.grad.norm() > 10


def by_units(layer: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def test_a_layers_gradients_have_one_length_parametrized_or_not() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(5, 4)), weight_conditioning(nn.Linear(4, 2)))
    assert [len(group) for group in GradientNormalizer(model, "layer").groups] == [3, 2]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(3, 5)).sum().backward()
    GradientNormalizer(optimizer, None, centralize=True).apply()  # which does not know what is a length
    assert model[0].get_parameter("parametrizations.weight.original0").grad.abs().max() > 0
