"""Every data normalization against the laws that all must keep, and against each claim on its card."""

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from laws import INPUTS, name
from normkit.core.card import Card
from normkit.core.errors import NormkitError, OptionError, ProtocolError, ShapeError
from normkit.core.support import Support
from normkit.engine.dispatch import run

FEATURES = 4

each_input = pytest.mark.parametrize("card", INPUTS, ids=name)
each_fitted = pytest.mark.parametrize("card", [card for card in INPUTS if card.running_state], ids=name)
each_streamed = pytest.mark.parametrize("card", [card for card in INPUTS if card.streams], ids=name)


def data(samples: int = 30, offset: float = 3.0) -> Tensor:
    """Features of unlike scales, correlated, off centre."""
    mix = torch.randn(FEATURES, FEATURES).double() + torch.diag(torch.tensor([1.0, 4.0, 0.5, 10.0])).double()
    return torch.randn(samples, FEATURES, dtype=torch.float64) @ mix + offset


def make(card: Card) -> Any:
    return card.make(FEATURES)


@each_input
def test_claims_of_state_and_of_streams(card: Card) -> None:
    made = make(card).fit(data())
    assert bool(made.state_dict()) == card.running_state
    assert not list(made.parameters())
    if not card.streams:
        with pytest.raises(ProtocolError, match="fit"):
            make(card).partial_fit(data())


@each_input
def test_nothing_of_other_samples_enters_a_transform(card: Card) -> None:
    made, x = make(card).fit(data()), data() + 7
    assert not card.batch_dependent
    assert card.train_equals_eval
    assert_close(made(x)[:1], made(x[:1]), rtol=1e-12, atol=1e-12)
    assert_close(made.train()(x), made.eval()(x), rtol=0, atol=0)
    before = copy.deepcopy(made.state_dict())
    made(x)
    if card.invertible:
        made.inverse_transform(made(x))
    assert_close(made.state_dict(), before, rtol=0, atol=0)


@each_input
def test_claim_invertible(card: Card) -> None:
    made, x = make(card).fit(data()), data()
    if card.invertible:
        # Covariances of condition up to 1e4 are undone in float64.
        assert_close(made.inverse_transform(made.transform(x)), x, rtol=1e-9, atol=1e-9)
        assert_close(made.transform(made.inverse_transform(x)), x, rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises(ProtocolError, match="not kept"):
            made.inverse_transform(x)


@each_streamed
@given(cuts=st.lists(st.integers(0, 30), max_size=6))
def test_a_stream_of_any_batch_sizes_equals_all_at_once(card: Card, cuts: list[int]) -> None:
    x = data()
    whole, stream = make(card).fit(x), make(card)
    bounds = [0, *sorted(cuts), 30]
    parts = [x[a:b] for a, b in pairwise(bounds)]
    for part in parts:
        stream.partial_fit(part)
    # Eigenvalues of a covariance whose condition is 1e4 magnify the last place.
    assert_close(stream.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-10)
    again = make(card).fit(data() * 9).fit(iter(parts))  # forgets what it was fitted on before
    assert_close(again.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-10)


@each_input
def test_fits_pairs_iterables_and_loaders(card: Card) -> None:
    x = data()
    wanted = make(card).fit(x).state_dict()
    labels = torch.arange(30)
    loader = DataLoader(TensorDataset(x, labels), batch_size=7)
    for source in (loader, (x, labels), [x[:10], x[10:]], ((p, None) for p in x.split(4))):
        assert_close(make(card).fit(source).state_dict(), wanted, rtol=1e-9, atol=1e-10)
    for source in (TensorDataset(x), "data", {"x": x}, 3, [x.numpy()], [()]):
        with pytest.raises(ProtocolError, match=r"DataLoader"):
            make(card).fit(source)


@each_input
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_known_is_refused_and_named(card: Card, bad: float) -> None:
    made, x = make(card).fit(data()), data()
    before = copy.deepcopy(made.state_dict())
    x[5, 2] = bad
    member = "2" if card.running_state else "5"
    fits = [made.fit, made.partial_fit] if card.streams else [made.fit]
    for fit in fits:
        with pytest.raises(OptionError, match=rf"NaN or infinity in \w+ {member};"):
            fit(x)
        assert_close(made.state_dict(), before, rtol=0, atol=0)


@each_fitted
def test_transforming_before_fitting_is_refused(card: Card) -> None:
    made = make(card)
    for verb in (made, made.transform, made.inverse_transform):
        with pytest.raises(ProtocolError, match=r"fit\(data\)"):
            verb(data())
    for nothing in ([], data()[:0], [data()[:0]]):
        with pytest.raises(OptionError, match="no sample"):
            made.fit(nothing)


@each_fitted
def test_another_number_of_features_is_refused(card: Card) -> None:
    made, x = make(card).fit(data()), data()
    for verb in (made.transform, made.inverse_transform, *([made.partial_fit] if card.streams else [])):
        with pytest.raises(ShapeError):
            verb(x[:, :3])
    with pytest.raises(ShapeError):
        make(card).fit([x, x[:, :3]])
    assert_close(make(card).fit(x)(x), made.fit(x)(x), rtol=0, atol=0)
    made.fit(x[:, :3])  # afresh, it may be any
    assert made(x[:, :3]).shape == (30, 3)


@each_input
def test_constant_features(card: Card) -> None:
    x = data()
    x[:, 1] = 0.1
    made = make(card).fit(x)
    y = made(x)
    assert y.isfinite().all()
    if card.running_state:
        assert_close(y[:, 1], y[:1, 1].expand(len(x)), rtol=0, atol=1e-12)
    if card.invertible:
        assert_close(made.inverse_transform(y), x, rtol=1e-9, atol=1e-9)
    zeros = torch.zeros_like(x)
    y = make(card).fit(zeros)(zeros)
    assert_close(y, zeros, rtol=0, atol=0)


@each_input
def test_state_dict_copy_and_pickle_round_trip(card: Card) -> None:
    x = data()
    model = nn.Sequential(make(card), nn.Linear(FEATURES, 2, dtype=torch.float64))
    model[0].fit(x)
    fresh = nn.Sequential(make(card), nn.Linear(FEATURES, 2, dtype=torch.float64))
    fresh.load_state_dict(model.state_dict(), strict=True)
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(other(x), model(x), rtol=0, atol=0)
        assert repr(other) == repr(model)
    if card.streams:
        more = data() * 2
        assert_close(fresh[0].partial_fit(more).state_dict(), model[0].partial_fit(more).state_dict(), rtol=0, atol=0)


@each_input
def test_keeps_dtype_and_is_near_float64(card: Card) -> None:
    x = data()
    exact = make(card).fit(x)(x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = x.to(dtype)
        made = make(card).fit(z)
        wanted = make(card).fit(z.double())
        y = made(z)
        assert y.dtype == dtype
        eps = torch.finfo(dtype).eps
        # The same numbers in float64 arithmetic: what is left is one rounding of the output.
        assert_close(y.double(), wanted(z.double()), rtol=2 * eps, atol=2 * eps)
        as_module = made.to(dtype)
        floating = [value.dtype for value in as_module.state_dict().values() if value.is_floating_point()]
        assert all(kept == (dtype if dtype == torch.float32 else torch.float64) for kept in floating)
        if dtype == torch.float32:
            # Rounded statistics, magnified by covariances of condition 1e4.
            assert_close(as_module(z).double(), exact, rtol=1e-3, atol=1e-3)
        assert as_module(z).dtype == dtype
        if card.invertible:
            assert as_module.inverse_transform(as_module(z)).dtype == dtype
    with pytest.raises(OptionError, match="int64"):
        make(card).fit(torch.ones(3, FEATURES, dtype=torch.int64))
    with pytest.raises(OptionError, match="int64"):
        make(card).fit(x)(torch.ones(3, FEATURES, dtype=torch.int64))


@each_input
def test_zero_has_a_gradient(card: Card) -> None:
    made = make(card).fit(data())
    zero = torch.zeros(1, FEATURES, dtype=torch.float64, requires_grad=True)
    made(zero).sum().backward()
    assert zero.grad.isfinite().all()


@each_input
def test_the_function_is_fit_and_transform(card: Card) -> None:
    x = data()
    options = {"statistics": None} if card.name == "image_standardization" else {}
    assert_close(card.functional(x, **options), make(card).fit(x)(x), rtol=1e-12, atol=1e-12)
    assert card.functional.__name__ == card.name


@pytest.mark.parametrize("card", [card for card in INPUTS if card.rule is not None], ids=name)
def test_a_card_with_a_rule_is_that_rule_on_its_training_data(card: Card) -> None:
    x = data()
    assert_close(make(card).fit(x)(x), run(card.rule, x), rtol=1e-9, atol=1e-9)


# Of images each sample is by itself.
APART = [card for card in INPUTS if card.running_state and card.name != "image_standardization"]


@pytest.mark.parametrize("card", APART, ids=name)
def test_the_support_keeps_no_sample_of_the_training_data(card: Card) -> None:
    with pytest.raises(NormkitError, match="samples apart"):
        card.module(support=Support("n d", over="d"))
