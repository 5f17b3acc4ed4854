"""The engine's door: every back end keeps the same contract, and corners mean what the definition says."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import normkit as nk
from normkit.engine.library import library

SCALES = ["rms", "norm", "max", "range", "std"]


@pytest.mark.parametrize("scale", SCALES)
def test_a_star_of_no_axes_reduces_nothing(scale: str) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    support = nk.Support("n c *", over="*")
    statistic = nk.Statistic(None, scale, 0.25, "floor")
    for backend in ("auto", "reference"):
        flat = nk.normalize(x, support, statistic=statistic, backend=backend)
        assert_close(flat, nk.normalize(x[..., None], support, statistic=statistic, backend=backend)[..., 0])


def test_composite_trailing_axes_are_one_axis_of_the_tensor() -> None:
    x = torch.randn(3, 8)
    found = nk.normalize(x, nk.Support("* (g d)", over="g d", g=2))
    assert_close(found, nk.functional.layer_norm(x, 8))


@pytest.mark.parametrize("backend", ["auto", "reference", "closed", "aten"])
def test_parameters_of_another_shape_are_refused_by_every_back_end(backend: str) -> None:
    rule = nk.RMSNorm(2).rule
    x = torch.randn(3, 2)
    for weight, bias in ((torch.ones(2), torch.ones(2, 1)), (torch.ones(1), None)):
        with pytest.raises(nk.errors.ShapeError, match="per 'd' has shape"):
            nk.functional.run(rule, x, weight, bias, backend=backend)


def test_what_comes_back_is_never_the_input_itself() -> None:
    x = torch.randn(2, 3)
    y = nk.normalize(x, nk.Support("n c", over="c"), statistic=nk.Statistic(None, None))
    assert_close(y, x)
    assert y.data_ptr() != x.data_ptr()


def test_one_element_with_correction_has_no_variance_but_a_derivative() -> None:
    x = torch.ones(2, 1, requires_grad=True)
    y = nk.normalize(x, nk.Support("n c", over="c"), statistic=nk.Statistic("mean", "std", 1e-5, "inside", 1))
    assert y.isnan().all()
    y.sum().backward()


@pytest.mark.parametrize(
    "layer", [nk.BatchNorm(3), nk.InstanceNorm(3, track_running_stats=True)], ids=["batch", "instance"]
)
def test_tracking_turned_off_later_is_as_in_torch(layer: nn.Module) -> None:
    theirs = nn.BatchNorm1d(3) if isinstance(layer, nk.BatchNorm) else nn.InstanceNorm1d(3, track_running_stats=True)
    x = torch.randn(4, 3, 5)
    for norm in (layer, theirs):
        norm(x + 2)
        norm.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert_close(layer.state_dict(), before)
    assert_close(layer.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_wholly_masked_sample_leaves_the_others_their_say() -> None:
    norm = nk.InstanceNorm(2, track_running_stats=True, momentum=1.0)
    x = torch.randn(3, 2, 6) + 5
    mask = torch.ones(3, 1, 6, dtype=torch.bool)
    mask[0] = False
    norm(x, mask=mask)
    assert_close(norm.running_mean, x[1:].mean((0, 2)))
    assert_close(norm.running_var, x[1:].var(2).mean(0))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("backend", ["reference", "closed", "auto", *(["native"] if library() else [])])
def test_an_activation_follows_in_the_same_pass(activation: Any, backend: Any) -> None:
    if backend == "native" and library() is None:
        pytest.skip("the kernels are not built")
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    after = {"relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}
    after["gelu_tanh"] = lambda y: F.gelu(y, approximate="tanh")
    makers = (nk.BatchNorm(4), nk.GroupNorm(2, 4), nk.InstanceNorm(4, affine=True), nk.LayerNorm(5), nk.RMSNorm(5))
    for norm in makers:
        norm.double().backend = backend
        plain = after[activation](norm(x))
        norm.activation = activation
        assert activation in repr(norm)
        fused = norm(x)
        assert_close(fused, plain, rtol=1e-10, atol=1e-10)  # float64, the same formulas
        inputs = [x, *norm.parameters()]
        found, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (fused, plain))
        assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "closed", "native", "auto"])
def test_the_sum_with_a_residual_is_normalized_and_handed_over(backend: Any) -> None:
    x, residual = (torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for norm in (nk.LayerNorm(5, activation="silu"), nk.GroupNorm(2, 4), nk.BatchNorm(4)):
        norm.double().backend = backend
        try:
            y, total = norm.after_sum(x, residual)
        except nk.errors.BackendError:
            pytest.skip("the kernels are not built")
        assert_close(total, x + residual, rtol=0, atol=0)
        assert_close(y, norm(x + residual), rtol=1e-12, atol=1e-12)  # the same numbers, normalized alike
        inputs = [x, residual, *norm.parameters()]
        found = torch.autograd.grad((y.square() + total.sin()).sum(), inputs)
        wanted = torch.autograd.grad((norm(x + residual).square() + (x + residual).sin()).sum(), inputs)
        assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(nk.errors.ShapeError, match="as the input is"):
        norm.after_sum(x, residual[:1])


def test_an_activation_that_is_not_known_is_refused_and_surgery_does_not_lose_one() -> None:
    for refuse in (
        lambda: nk.LayerNorm(5, activation="tanh"),
        lambda: setattr(nk.GroupNorm(1, 2), "activation", "tanh"),
    ):  # pyright: ignore[reportArgumentType]
        with pytest.raises(nk.errors.OptionError, match="activation='tanh': wanted one of relu"):
            refuse()
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 1), nk.BatchNorm(4, activation="relu"))
    nk.convert(model, "gn:2")
    assert model[1].activation == "relu"


def test_many_gradients_at_once() -> None:
    x = torch.randn(2, 3, 200, 20)
    for norm in (nk.BatchNorm(3), nk.LayerNorm(20), nk.BatchNorm(3).eval()):
        y = norm(z := x.clone().requires_grad_())
        directions = torch.randn(2, *x.shape)
        found = torch.autograd.grad(y, z, directions, is_grads_batched=True, retain_graph=True)[0]
        wanted = torch.stack([torch.autograd.grad(y, z, d, retain_graph=True)[0] for d in directions])
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # float32, sums over thousands of elements


@pytest.mark.parametrize(
    ("layer", "name", "value", "same"),
    [
        (nk.GroupNorm(2, 8), "num_groups", 4, nk.GroupNorm(4, 8)),
        (nk.RMSNorm(4), "offset", 1.0, nk.RMSNorm(4, offset=1.0)),
        (nk.BatchNorm(4), "layout", "n * c", nk.BatchNorm(4, layout="n * c")),
        (nk.GhostBatchNorm(8, 4), "ghost_batch_size", 2, nk.GhostBatchNorm(8, 2)),
        (nk.BatchGroupNorm(8, num_groups=2), "num_groups", 4, nk.BatchGroupNorm(8, num_groups=4)),
        (nk.PositionalNorm(), "correction", 0, nk.PositionalNorm(correction=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_follows_its_options(layer: nn.Module, name: str, value: Any, same: nn.Module) -> None:
    x = torch.randn(4, 4, 4, 4) if isinstance(same, nk.BatchNorm | nk.RMSNorm) else torch.randn(4, 8, 4, 4)
    layer(x)
    setattr(layer, name, value)
    same.load_state_dict(layer.state_dict())
    assert_close(layer(x), same(x))


def test_a_mask_that_empties_a_set_leaves_gradients_finite() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    for guard in ("inside", "outside", "floor"):
        x, weight = torch.randn(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
        rule = nk.Rule(nk.Support("* d", over="d"), nk.Statistic("mean", "std", guard=guard), nk.Affine("d"))
        nk.functional.run(rule, x, weight, mask=mask).sum().backward()
        assert x.grad is not None
        assert weight.grad is not None
        assert x.grad.isfinite().all()
        assert weight.grad.isfinite().all()
