"""What may not change a result: autocast, the number of rows, threads, memory, the back end; and sums that may not drift."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from laws import ACTIVATIONS, INPUTS, RULES, WEIGHTS, call, channels_first, layer, name, runs, sample_input, sub_batch
from normkit.core.card import Card
from test_drop_in import CASES

# These hold matrix products that are layers of the network, not statistics: autocast is meant for them.
_WHY = {
    **{
        f"layer_norm_{cell}": "its projections of input and state are the cell's linear layers"
        for cell in ("rnn", "lstm", "gru")
    },
    **dict.fromkeys(
        ("film", "adaptive_layer_norm", "adaptive_layer_norm_zero"),
        "scale and shift are the output of a linear layer on the condition",
    ),
    "spatially_adaptive_norm": "gain and shift are the output of convolutions on the map",
    "query_key_norm": "its output is that of attention, whose products autocast is meant for; the norms before it stay",
    "preconditioned_attention": "its products are attention's, which autocast is meant for",
    "fix_norm": "its output is that of a linear layer, the logits",
}

# Some roundings of sums and of the products with them, relative to the largest; a bfloat16 rounding is 2^-9 = 2e-3.
_NEAR = {"rtol": 1e-5, "atol": 1e-5}


exact = pytest.mark.parametrize("card", [card for card in ACTIVATIONS if card.name not in _WHY], ids=name)


@pytest.mark.parametrize("training", [True, False])
@exact
def test_autocast_leaves_an_activation_as_it_is(card: Card, training: bool) -> None:
    made, x = layer(card, 8, torch.float32).train(training), sample_input(card, 8, torch.float32)
    fresh = copy.deepcopy(made)
    wanted = call(card, fresh, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(card, made, x)
    assert found.dtype == torch.float32
    assert_close(found, wanted, **_NEAR)
    assert_close(made.state_dict(), fresh.state_dict(), **_NEAR)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("card", WEIGHTS, ids=name)
def test_autocast_leaves_a_weight_as_it_is(card: Card, training: bool) -> None:
    made = card.make(nn.Linear(16, 8)).train(training)
    fresh = copy.deepcopy(made)

    def weight(of: nn.Linear) -> Tensor:
        return of.weight

    with torch.autocast("cpu", torch.bfloat16):
        found = weight(made)
    assert_close(found, weight(fresh), **_NEAR)


@pytest.mark.parametrize("card", INPUTS, ids=name)
def test_autocast_leaves_an_input_as_it_is(card: Card) -> None:
    x = torch.randn(32, 4) @ torch.randn(4, 4)
    wanted = card.make(4).fit(x)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(card.make(4).fit(x)(x), wanted, **_NEAR)


HALVES = [torch.bfloat16, torch.float16]


def batches(card: Card, samples: int) -> Iterator[Tensor]:
    """Tokens, or images in both memory formats."""
    if channels_first(card):
        x = torch.randn(samples, 8, 6, 4) + 1
        yield x
        yield x.to(memory_format=torch.channels_last)
    else:
        yield torch.randn(samples, 1, 1024) + 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("card", [card for card in RULES if sub_batch(card) == 1], ids=name)
def test_a_row_is_the_same_among_any_number_of_rows(card: Card, dtype: torch.dtype, training: bool) -> None:
    if training and card.batch_dependent:
        return  # what is held is its evaluation
    for x in batches(card, 300):
        x = x.to(dtype)
        made = layer(card, x.shape[1] if channels_first(card) else x.shape[-1], torch.float32).train(training)
        direction = torch.randn_like(x)

        def run(rows: int, made: Any = made, x: Tensor = x, direction: Tensor = direction) -> list[Tensor]:
            part = x[:rows].detach().requires_grad_()
            y = made(part)
            return [y.detach(), *torch.autograd.grad(y, part, direction[:rows])]

        wanted = run(len(x))
        with torch.no_grad():
            assert_close(made(x), wanted[0], rtol=0, atol=0, msg="with and without gradients")
            for rows in (1, 2, 7, 100):
                assert_close(made(x[:rows]), wanted[0][:rows], rtol=0, atol=0)
        for rows in (1, 2, 7, 100):
            assert_close(run(rows), [each[:rows] for each in wanted], rtol=0, atol=0)
        try:
            torch.set_num_threads(2)
            assert_close(run(len(x)), wanted, rtol=0, atol=0, msg="on two threads")
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(8192, 8), (8193, 8), (1024, 64)], ids=str)
@pytest.mark.parametrize("card", [card for card in RULES if list(layer(card).parameters())], ids=name)
def test_gradients_of_parameters_keep_float32_sums(card: Card, size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, features = size
    x = torch.randn(rows, 1, features).to(dtype)
    if channels_first(card):
        x = x[: rows // 64 * 64].view(64, -1, features).transpose(1, 2).contiguous()
    direction = torch.rand(x.shape).to(dtype)
    made = layer(card, features, torch.float32)

    def found(made: Any, x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((made(x) * direction.to(x.dtype)).sum(), list(made.parameters())))

    exact = copy.deepcopy(made).double()
    exact.backend = "reference"
    wanted = found(exact, x.double())
    for backend, _ in runs(card, made, x):
        made.backend = backend
        for one, like in zip(found(made, x), wanted, strict=True):
            # Float32's roundings in thousands of summands, 2e-3 of one half-precision rounding.
            near = {"rtol": 1e-4, "atol": 1e-4 * like.abs().max().item()}
            assert_close(one.double(), like, **near, msg=lambda text, b=backend: f"{b}: {text}")


def memory(x: Tensor) -> list[bool]:
    """What may be viewed: as contiguous, or as channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return [x.is_contiguous(), last]


def laid_out(x: Tensor) -> Iterator[Tensor]:
    yield x
    if x.dim() > 2:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
        yield x.transpose(1, 2).contiguous().transpose(1, 2)
        yield x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", [case for case, (_, _, shape) in CASES.items() if len(shape) > 1])
def test_the_output_can_be_viewed_where_torchs_can(case: str, training: bool) -> None:
    make, theirs_make, shape = CASES[case]
    ours, theirs = make().train(training), theirs_make().train(training)
    for samples in (shape[0], 128 * shape[0]):
        for x in laid_out(torch.randn(samples, *shape[1:])):
            for grad in (True, False):
                leaf = x.detach().requires_grad_(grad)
                found, wanted = ours(leaf), theirs(leaf)
                where = f"{tuple(x.shape)} in steps of {x.stride()}, gradients {grad}"
                if not any(memory(x)) or memory(found) != memory(x):  # contiguous and channels-last memory are kept
                    for mine, other in zip(memory(found), memory(wanted), strict=True):
                        assert mine or not other, where
                if grad and any(memory(x)):
                    (dx,) = torch.autograd.grad(found, leaf, torch.empty_like(found).normal_())
                    for mine, other in zip(memory(dx), memory(x), strict=True):
                        assert mine or not other, f"gradient of {where}"


@pytest.mark.parametrize("deviation", [1.0, 150.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("card", [card for card in RULES if layer(card).running() is not None], ids=name)
def test_back_ends_agree_on_what_they_remember(card: Card, dtype: torch.dtype, deviation: float) -> None:
    x = (sample_input(card) * deviation).to(dtype)
    made = card.make(4).to(dtype)
    exact = card.make(4).double()
    exact.backend = "reference"
    exact(x.double())
    blended = exact.state_dict()
    for backend, _ in runs(card, copy.deepcopy(made), x):
        other = copy.deepcopy(made)
        other.backend = backend
        other(x)
        for key, value in other.state_dict().items():
            # Statistics keep float32 or wider, whatever the module is cast to; blended in it, in another order of sums.
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            told = {"msg": lambda text, where=f"{backend} {key}": f"{where}: {text}"}
            assert_close(value.double(), blended[key].double(), rtol=16 * eps, atol=1e-6 * deviation, **told)
