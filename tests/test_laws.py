"""Every activation method against the laws that all must keep, and against each claim on its card."""

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import laws
from laws import ACTIVATIONS, RULES, call, channels_first, layer, name, rule_of, runs, sample_input
from normkit import Layer, NormkitError, fold
from normkit.catalogue.diagram import members
from normkit.core.card import Card
from normkit.core.errors import OptionError, ShapeError
from normkit.engine import dispatch
from normkit.engine import layer as layers
from normkit.engine.call import Call, Output
from normkit.engine.choose import Choice
from normkit.functional import run
from oracles import ORACLES, normalized
from variants import EVERY, WITH_ORACLES, of

RULED = [*RULES, *(card for card in WITH_ORACLES if card.rule is not None and card.extra is None)]

each_rule = pytest.mark.parametrize("card", RULES, ids=name)
each_activation = pytest.mark.parametrize("card", ACTIVATIONS, ids=name)
each_form = pytest.mark.parametrize("card", EVERY, ids=name)


class Applying(list[Card]):
    """The cards to which a law applies, and the test that says so of another card."""

    def __init__(self, applies: Callable[[Card], bool], among: Sequence[Card] = ACTIVATIONS) -> None:
        super().__init__(card for card in among if applies(card))
        self.applies = applies


def each(applies: Callable[[Card], bool], among: Sequence[Card] = ACTIVATIONS) -> pytest.MarkDecorator:
    """Every activation to which a law applies."""
    return pytest.mark.parametrize("card", Applying(applies, among), ids=name)


@pytest.mark.parametrize("card", RULED, ids=name)
@given(data=st.data())
def test_equals_the_oracle_on_every_back_end(card: Card, data: st.DataObject) -> None:
    channels = 2 * data.draw(st.integers(1, 3))
    spatial = data.draw(st.lists(st.integers(1, 3), max_size=3))
    batch = data.draw(st.integers(2, 3)) * laws.sub_batch(card)
    shape = [batch, channels, *spatial] if channels_first(card) else [batch, *spatial, channels]
    x = torch.randn(shape, dtype=torch.float64) * data.draw(st.sampled_from([1e-3, 1.0, 1e3])) + 3
    if data.draw(st.booleans()):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels-last memory
    made = layer(card, channels)
    if rule_of(card).support.split(x.shape).count == 1:
        try:
            call(card, copy.deepcopy(made), x)
        except ShapeError as error:
            if "one value for each statistic" not in str(error):
                raise
            return
    wanted = normalized(made.rule, x, made.weight, made.bias)
    for backend, found in runs(card, made, x):
        # Both sides are float64; the input's mean is up to 3e3 times the smallest deviation.
        assert_close(found, wanted, rtol=1e-8, atol=1e-8, msg=lambda text, backend=backend: f"{backend}: {text}")


@each(lambda card: card.rule is None or card.extra is not None, [*ACTIVATIONS, *WITH_ORACLES])
def test_equals_an_oracle_written_otherwise(card: Card) -> None:
    made, x = layer(card), sample_input(card)
    wanted = ORACLES[of(card)](copy.deepcopy(made), x, *(card.extra(x) if card.extra else ()))
    assert_close(call(card, made, x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("card", "backend"), laws.on_back_ends(EVERY), ids=name)
def test_derivatives_are_right_to_second_order(card: Card, backend: Any) -> None:
    made, x = layer(card), sample_input(card)[:2].requires_grad_()
    made.backend = backend
    names = [key for key, _ in made.named_parameters()]

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        fresh = {
            key: value.clone() for key, value in made.named_buffers()
        }  # finite differences must not pile up updates
        extra = card.extra(x) if card.extra else ()
        y = torch.func.functional_call(made, (fresh, dict(zip(names, parameters, strict=True))), (x, *extra))
        return y[0] if isinstance(y, tuple) else y

    inputs = (x, *(p.detach().requires_grad_() for p in made.parameters()))
    if not card.exact_gradient:
        assert not torch.autograd.gradcheck(output, inputs, raise_exception=False)
        return
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)  # the seams hold derivatives to order four


@each_rule
def test_what_autograd_reaches_is_the_drawn_support(card: Card) -> None:
    x = sample_input(card, channels=4).requires_grad_()
    rule = rule_of(card)
    y = run(rule, x)
    element = (1, 2, 3) if channels_first(card) else (1, 3, 2)
    (g,) = torch.autograd.grad(y[element], x)
    assert torch.equal(g != 0, members(rule.support, x.shape, element))


@each_form
def test_keeps_dtype_and_is_near_float64(card: Card) -> None:
    x = sample_input(card, 8)
    made = layer(card, 8)
    exact = call(card, copy.deepcopy(made), x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for parameters in (torch.float32, dtype):
            fresh = copy.deepcopy(made).to(parameters)
            for backend, y in runs(card, fresh, x.to(dtype)):
                assert y.dtype == dtype, backend
                # The input, the parameters and the output are each rounded once; 8 such roundings cover their products.
                eps = laws.roundings(card) * torch.finfo(dtype).eps
                assert_close(y.double(), exact, rtol=eps, atol=eps * exact.abs().max().item())


@each_rule
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_accuracy_depends_on_no_layout_and_no_mean(card: Card, ratio: float, memory_format: Any) -> None:
    x = (torch.randn(4, 32, 12, 12) + ratio).to(memory_format=memory_format)
    x = x if channels_first(card) else x.movedim(1, -1)
    if not channels_first(card) and ratio and rule_of(card).statistic.center is None:
        x = x - ratio
    wanted = run(rule_of(card), x.double(), backend="reference")
    found = run(rule_of(card), x)
    # A mean is known to half a unit in its last place, ratio * 2^-24 deviations, and x * scale + shift, as torch's kernels
    # compute, rounds twice at that size, for each of which the largest of 18,000 elements is some four times the typical.
    assert (found.double() - wanted).abs().max() < 4e-6 + 16 * ratio * 2**-24


@each(channels_first)
def test_memory_format_is_kept(card: Card) -> None:
    made = layer(card)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    like = call(card, copy.deepcopy(made), x)
    for backend, y in runs(card, made, x.to(memory_format=torch.channels_last)):
        assert_close(y, like, rtol=1e-9, atol=1e-9)
        assert y.is_contiguous(memory_format=torch.channels_last), backend


@each_form
def test_odd_inputs(card: Card) -> None:
    made = layer(card)
    x = sample_input(card)
    constant = call(card, made, torch.full_like(x, 7.0))
    assert constant.isfinite().all()
    if card in RULES and rule_of(card).statistic.center == "mean" and made.bias is not None:  # else a constant stays
        bias = made.bias if not channels_first(card) else made.bias.view(-1, 1)
        assert_close(constant, bias.expand_as(x), rtol=0, atol=1e-6)
    for nothing in (x[:0], x.narrow(-1 if channels_first(card) else 1, 0, 0)):
        if len(nothing) and (card.name.startswith("layer_norm_") or card.name == "spatially_adaptive_norm"):
            continue  # no step to take, and no map of no size
        # A condition is made of means, which nothing has none of.
        extra = [part.nan_to_num() for part in (card.extra(nothing) if card.extra else ())]
        empty = made(nothing, *extra)
        empty = empty[0] if isinstance(empty, tuple) else empty
        assert empty.shape == nothing.shape
        leaves = [*made.parameters()]
        gradients = torch.autograd.grad(empty.sum(), leaves, allow_unused=True) if empty.requires_grad else ()
        assert all(gradient is None or (gradient == 0).all() for gradient in gradients)
    strided = torch.randn(6, *x.shape[1:-1], 2 * x.shape[-1], dtype=x.dtype)[::2, ..., ::2]
    assert not strided.is_contiguous()
    fresh = copy.deepcopy(made)
    assert_close(call(card, made, strided), call(card, fresh, strided.contiguous()), rtol=1e-9, atol=1e-9)
    for backend, _ in runs(card, made, x):
        z = x.clone().requires_grad_()
        made.backend = backend
        call(card, made, z).relu_().sum().backward()  # an in-place activation behind the norm
    with pytest.raises(OptionError, match="int64"):
        call(card, made, torch.ones(x.shape, dtype=torch.int64))


@each_form
def test_state_dict_copy_and_pickle_round_trip(card: Card) -> None:
    made, x = layer(card), sample_input(card)
    call(card, made, x)
    made.eval()
    fresh = card.make(4).double().eval()
    fresh.load_state_dict(made.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_close(call(card, other, x), call(card, made, x), rtol=0, atol=0)
        assert repr(other) == repr(made)


@each(lambda card: card.extra is None and isinstance(layer(card), Layer))
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("samples", [3, 4, 5])
def test_explain_tells_what_runs(card: Card, mode: bool, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(card).train(mode)
    x = torch.randn(samples, 4, 4, dtype=torch.float64)
    ran: list[Choice] = []

    def told(choice: Choice, call: Call, perform_by: Any = dispatch.perform_by) -> Output:
        ran.append(choice)
        return perform_by(choice, call)

    said = made.explain(x).backend
    for place in (dispatch, layers):
        monkeypatch.setattr(place, "perform_by", told)
    call(card, made, x)
    assert said == (ran[0].backend if ran else "reference")


@each(lambda card: isinstance(layer(card), Layer), EVERY)
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_neighbours_that_are_fused_change_nothing_or_are_refused(card: Card, mode: bool, dtype: torch.dtype) -> None:
    made, x = layer(card, dtype=dtype).train(mode), sample_input(card, dtype=dtype)
    other = copy.deepcopy(made)
    if type(made).forward is not Layer.forward:
        for refused in (lambda: made.after_sum(x, x), lambda: made.quantized(x)):
            with pytest.raises(OptionError, match=rf"{type(made).__name__}\.\w+: .* forward of its own"):
                refused()
        return
    y, total = made.after_sum(x, x.roll(1))
    assert_close((y, total), (other(x + x.roll(1)), x + x.roll(1)), rtol=1e-12, atol=1e-12)  # the same numbers
    assert_close(made.state_dict(), other.state_dict())
    q, scale = made.quantized(x)
    assert_close(made.state_dict(), other.state_dict(), rtol=0, atol=0)
    room = 0.5 + 127 * torch.finfo(dtype).eps  # of a step, and the output's rounding
    assert ((q * scale - other.eval()(x)).abs() <= room * scale + 1e-6).all()


@each_form
@pytest.mark.parametrize("nothing", ["no samples", "all masked"])
def test_nothing_leaves_running_statistics(card: Card, nothing: str) -> None:
    made, x = layer(card), sample_input(card)
    kept = {key: buffer for key, buffer in made.named_buffers() if buffer.is_floating_point()}
    for buffer in kept.values():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    before = {key: buffer.clone() for key, buffer in kept.items()}
    if not kept:
        assert not card.running_state
        return
    if nothing == "no samples":
        call(card, made, x[:0])
    elif "mask" in inspect.signature(made.forward).parameters:
        made(x, *(card.extra(x) if card.extra else ()), mask=torch.zeros(1, 1, 1, dtype=torch.bool))
    assert_close(dict(kept), before, rtol=0, atol=0)


@each_activation
def test_claim_train_equals_eval(card: Card) -> None:
    made, x = layer(card), sample_input(card)
    same = torch.allclose(call(card, made.train(), x), call(card, made.eval(), x), rtol=1e-9, atol=1e-9)
    assert same == card.train_equals_eval


@each_activation
def test_claim_batch_dependent(card: Card) -> None:
    made, x = layer(card), sample_input(card)
    alone, among = call(card, made, x[:1]), call(card, made, x)[:1]
    assert torch.allclose(alone, among, rtol=1e-9, atol=1e-9) == (not card.batch_dependent)
    if card.rule is not None:
        assert card.rule.batch_dependent == card.batch_dependent


@each_activation
def test_claim_running_state(card: Card) -> None:
    assert bool(dict(layer(card).named_buffers())) == card.running_state


@each_activation
def test_samples_may_come_in_any_order(card: Card) -> None:
    made, x = layer(card), sample_input(card)
    order = torch.arange(len(x)).roll(1)
    found, wanted = call(card, copy.deepcopy(made), x[order]), call(card, made, x)[order]
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9) == (not card.order_dependent)


class _Layer(nn.Module):
    """Norm(W x) on inputs of 3 samples, 5 positions and 6 features."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4, bias=False, dtype=torch.float64)
        self.norm = layer(card)
        for module in self.norm.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-12
        self.card, self.first = card, channels_first(card)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        y = call(self.card, self.norm, z.transpose(1, 2) if self.first else z)
        return y.transpose(1, 2) if self.first else y


_CHANGES = {
    "weight scale": lambda w, x: (3 * w, x),
    "weight shift": lambda w, x: (w + torch.arange(1.0, 7.0, dtype=w.dtype), x),
    "row scale": lambda w, x: (w * torch.tensor([[5.0], [1.0], [1.0], [1.0]], dtype=w.dtype), x),
    "data scale": lambda w, x: (w, 3 * x),
    "data shift": lambda w, x: (w, x + torch.arange(1.0, 7.0, dtype=x.dtype)),
    "sample scale": lambda w, x: (w, x * torch.tensor([5.0, 1.0, 1.0], dtype=x.dtype).view(3, 1, 1)),
}


@each_activation
@pytest.mark.parametrize("change", _CHANGES)
def test_claim_invariant(card: Card, change: str) -> None:
    model, x = _Layer(card), torch.randn(3, 5, 6, dtype=torch.float64)
    before = model(x)
    weight, moved = _CHANGES[change](model.linear.weight.detach(), x)
    model.linear.weight.data = weight
    # Exact but for eps = 1e-12 beside variances of order one.
    assert torch.allclose(model(moved), before, rtol=1e-6, atol=1e-6) == (change in card.invariances)


def _behind_a_convolution(card: Card) -> tuple[nn.Sequential, Tensor]:
    """In evaluation, with running statistics that are not those of the start."""
    first: nn.Module = nn.Conv1d(3, 4, 2) if channels_first(card) else nn.Linear(3, 4)
    model = nn.Sequential(first.double(), layer(card)).eval()
    for key, buffer in model[1].named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5 if key.endswith(("var", "std")) else torch.randn_like(buffer))
    return model, torch.randn(2, 3, 6, dtype=torch.float64) if channels_first(card) else torch.randn(2, 6, 3).double()


def _output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


@each_activation
def test_claim_foldable(card: Card) -> None:
    if card.extra is not None:
        assert not card.foldable  # what it computes depends on more than the layer before it
        return
    model, x = _behind_a_convolution(card)
    before, other = copy.deepcopy(model), torch.randn_like(x)
    try:
        wanted = _output(model, x)
    except NormkitError:
        assert not card.foldable  # it does not take what a convolution gives
        return
    rows = fold(model, x)
    assert isinstance(model[1], nn.Identity) == card.foldable, str(rows)
    # Products of order one in float64, in another order; the example proves the fold, the other input that it holds anywhere.
    assert_close(_output(model, x), wanted, rtol=1e-10, atol=1e-10)
    assert_close(_output(model, other), _output(before, other), rtol=1e-10, atol=1e-10)
