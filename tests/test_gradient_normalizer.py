import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.gradients.gradient_normalizer import GradientNormalizer, normalize_gradients


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(6, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(20, 3),
        nn.LayerNorm(3),
    ).double()


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
    by_group = central["1.weight"].view(
        2, 3, 2, 3
    )  # (groups, in, out, taps): an output unit is fed by its group's inputs
    assert_close(by_group.sum((1, 3)), zero.expand(2, 2), rtol=0, atol=1e-12)
    assert_close(central["3.weight"].sum(1), zero.expand(3), rtol=0, atol=1e-12)
    for name in ("0.bias", "3.bias", "4.weight"):
        assert_close(central[name], plain[name], rtol=0, atol=0)
    assert_close(central["3.weight"], plain["3.weight"] - plain["3.weight"].mean(1, keepdim=True))


def test_centralised_first_then_of_unit_length() -> None:
    model = network()
    with GradientNormalizer(model, "tensor", centralize=True):
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
