"""What every activation method is held to where it has the option: masks, layouts, memory of statistics, and accuracy."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from laws import ACTIVATIONS, call, channels_first, layer, name, roundings, sample_input
from normkit.core.card import Card
from normkit.core.errors import ShapeError
from variants import EVERY


def takes(card: Card, option: str) -> bool:
    return option in inspect.signature(card.module.__init__).parameters


def masked(card: Card) -> bool:
    """The mask of attention is on its logits; a convolution looks from the map's kept part at the rest."""
    return "mask" in inspect.signature(card.module.forward).parameters and card.name not in (
        "query_key_norm",
        "preconditioned_attention",
        "spatially_adaptive_norm",
    )


def statistics(made: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in made.named_buffers() if value.is_floating_point()}


def trained(card: Card, dtype: torch.dtype = torch.float64) -> Any:
    """The layer after a batch."""
    made = layer(card, dtype=dtype)
    call(card, made, sample_input(card, dtype=dtype) + 1)
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("card", [card for card in EVERY if masked(card)], ids=name)
def test_a_mask_equals_leaving_the_padding_out(card: Card, training: bool) -> None:
    made, x = trained(card).train(training), sample_input(card)
    fresh, extra, axis = copy.deepcopy(made), card.extra(x) if card.extra else (), -1 if channels_first(card) else 1
    mask = (torch.arange(5) < 3).view((1, 1, 5) if channels_first(card) else (1, 5, 1))
    padded = torch.where(mask, x, torch.nan).requires_grad_()
    found = made(padded, *extra, mask=mask)
    wanted = fresh(x.narrow(axis, 0, 3).contiguous(), *extra)
    assert_close(found.narrow(axis, 0, 3), wanted, rtol=1e-9, atol=1e-9)
    assert (found.narrow(axis, 3, 2) == 0).all()
    assert_close(made.state_dict(), fresh.state_dict(), rtol=1e-9, atol=1e-9)
    slopes = torch.autograd.grad(found.square().sum(), [padded, *made.parameters()], allow_unused=True)
    assert all(slope is None or slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("card", [card for card in EVERY if takes(card, "layout")], ids=name)
def test_channels_last_layout_is_a_transposition(card: Card) -> None:
    first = trained(card)
    first.layout = "n c *"
    last, x = copy.deepcopy(first), torch.randn(8, 4, 5, 3, dtype=torch.float64)
    last.layout = "n * c"
    extra = card.extra(x) if card.extra else ()
    for training in (True, False):
        found = last.train(training)(x.movedim(1, -1).contiguous(), *extra)
        assert_close(found.movedim(-1, 1), first.train(training)(x, *extra), rtol=1e-9, atol=1e-9)
        assert found.is_contiguous()
        assert "layout" in repr(last) or "layout" in repr(first)
    assert_close(last.state_dict(), first.state_dict())


# A nearly singular matrix, as tokens of a large mean make, has singular vectors that are known to few digits.
@pytest.mark.parametrize("card", [card for card in EVERY if card.name != "conditioned_tokens"], ids=name)
def test_a_large_mean_costs_no_accuracy(card: Card) -> None:
    made = card.make(4)
    x = sample_input(card, dtype=torch.float32) + 1e4
    exact = call(card, copy.deepcopy(made).double(), x.double())
    # A mean of 1e4 is known to half a unit in its last place, 1e4 * 2^-24 deviations.
    assert_close(call(card, made, x).double(), exact, rtol=1e-4 * roundings(card) / 8, atol=1e-2)


@pytest.mark.parametrize("card", [card for card in EVERY if card.running_state], ids=name)
def test_a_broken_channel_leaves_what_is_remembered_of_it(card: Card) -> None:
    made, x = trained(card), sample_input(card)
    before = statistics(made)
    x[0, (1 if channels_first(card) else slice(None)), ...] = torch.nan if channels_first(card) else x[0]
    x[..., 1] = x[..., 1] if channels_first(card) else torch.nan
    call(card, made, x)
    for key, value in statistics(made).items():
        assert value.isfinite().all(), key
        assert (value != before[key]).any(), key


@pytest.mark.parametrize("card", [card for card in EVERY if hasattr(layer(card), "reset_parameters")], ids=name)
def test_reset_layers_are_new_ones(card: Card) -> None:
    made, fresh = trained(card, torch.float32), card.make(4)
    for each in (made, fresh):
        torch.manual_seed(1)
        for module in reversed([*each.modules()]):  # a layer sets its parts last
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert_close(made.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("card", [card for card in EVERY if takes(card, "track_running_stats")], ids=name)
def test_tracking_turned_off_later_remembers_nothing(card: Card) -> None:
    made = trained(card)
    made.track_running_stats = False
    before = copy.deepcopy(made.state_dict())
    call(card, made, sample_input(card))
    assert_close(made.state_dict(), before, rtol=0, atol=0)


ESTIMATES = ("batch_channel_norm_estimate", "est_batch_norm")  # of deviations from the old mean


@pytest.mark.parametrize("card", [c for c in EVERY if takes(c, "momentum") and c.name not in ESTIMATES], ids=name)
def test_a_momentum_of_one_set_later_keeps_the_last_batch_alone(card: Card) -> None:
    made, fresh, x = trained(card), layer(card), sample_input(card)
    for each in (made, fresh):
        each.momentum = 1.0
        call(card, each, x)
    assert_close(statistics(made), statistics(fresh))


@pytest.mark.parametrize("card", EVERY, ids=name)
def test_another_number_of_channels_is_refused(card: Card) -> None:
    made, x = layer(card), sample_input(card, 8)
    if not [p for p in made.parameters() if p.numel() > 1]:
        return  # it takes any
    with pytest.raises(ShapeError, match=r"8.*4|4.*8"):
        call(card, made, x)


def _sizes(t: Tensor) -> list[list[int]]:
    """Shapes that a parameter must not have: with one more along an axis, with one alone, and with an axis of its own."""
    places = [(axis, size) for axis in range(t.dim()) for size in (1, t.shape[axis] + 1)]
    changed = [[size if d == axis else n for d, n in enumerate(t.shape)] for axis, size in places]
    return [shape for shape in [[2], *changed] if shape != list(t.shape)]


@pytest.mark.parametrize("card", EVERY, ids=name)
@pytest.mark.parametrize("mode", [True, False])
def test_a_parameter_of_another_size_is_refused(card: Card, mode: bool) -> None:
    x = sample_input(card)
    made = layer(card).train(mode)
    call(card, made, x)  # what is decided for sizes that fit holds for no others
    for owner in [module for module in made.modules() if type(module).__module__.startswith("normkit.")]:
        for held in (owner._parameters, owner._buffers):
            for key, right in list(held.items()):
                if right is None or not right.is_floating_point():
                    continue
                for shape in _sizes(right):
                    held[key] = right.new_ones(shape) if held is owner._buffers else nn.Parameter(right.new_ones(shape))
                    with pytest.raises(ShapeError, match="wanted"):
                        call(card, made, x)
                held[key] = right
    call(card, made, x)


# Of the tensors besides the input that functions take for 4 channels or features: by name, and of a function where it differs.
_SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("weight", "bias", "running_mean", "running_var", "running_std", "tau", "alpha", "beta"), (4,)),
    **dict.fromkeys(("mean_weight", "var_weight"), (3,)),
    **dict.fromkeys(("group_weight", "group_bias"), (2,)),
    **{"gain": (), "shift": (), "query_weight": (), "scale_norm weight": ()},
    **{"dynamic_tanh alpha": (), "dynamic_erf alpha": ()},
    **{"gamma": (4, 4), "embeddings": (6, 4), "fix_norm bias": (6,)},
    **{"heeger_norm weight": (4, 4), "lyu_simoncelli_norm weight": (4, 1)},
}
_OPTIONS = {"training": True, "num_groups": 2, "normalized_shape": 4, "channels_per_group": 2, "fraction": 0.5}


def _arguments(card: Card) -> dict[str, Any]:
    """Arguments besides the input with which the card's function runs on its sample input."""
    function = card.functional.__name__
    names = {key: str(of.annotation) for key, of in inspect.signature(card.functional).parameters.items()}
    tensors = [key for key, kind in names.items() if "Tensor" in kind]
    shapes = {key: _SHAPES.get(f"{function} {key}", _SHAPES.get(key)) for key in tensors}
    parameters = {key: torch.ones(shape, dtype=torch.float64) for key, shape in shapes.items() if shape is not None}
    options = {**_OPTIONS, "layout": card.layout if card.layout == "n c *" or card.name.startswith("dyn") else "n * c"}
    return parameters | {key: value for key, value in options.items() if key in names}


# A conditioned function's scale broadcasts over its input by design; a mixture takes moments, and cells hold their weights.
@pytest.mark.parametrize(
    "card",
    [card for card in ACTIVATIONS if not (card.extra or card.name.startswith(("exemplar_norm", "layer_norm_")))],
    ids=name,
)
def test_a_function_refuses_a_parameter_of_another_size(card: Card) -> None:
    x = sample_input(card)
    given = _arguments(card)
    card.functional(x, **given)
    for key, right in given.items():
        for shape in _sizes(right) if isinstance(right, Tensor) else ():
            with pytest.raises(ShapeError, match="wanted"):
                card.functional(x, **{**given, key: right.new_ones(shape)})
