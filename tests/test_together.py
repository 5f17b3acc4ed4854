"""Weights of a model on the native kernels: together or one by one they are the same, and never stale."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from normkit.core.errors import BackendError
from normkit.engine.library import why_not
from normkit.weights import kernels, scaled_weight_standardization, spectral_norm, weight_standardization
from normkit.weights.parametrization import together
from normkit.weights.weight_conditioning import Equilibrate, weight_conditioning
from normkit.weights.weight_norm import WeightNorm, weight_norm

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no native kernels: {why_not()}")


def network() -> nn.Sequential:
    body = weight_standardization(nn.Conv2d(4, 4, 3)), weight_norm(nn.Conv2d(4, 4, 3)), nn.Flatten()
    head = scaled_weight_standardization(nn.Linear(16, 5)), spectral_norm(nn.Linear(5, 5))
    last = weight_conditioning(nn.Linear(5, 2), "rowcol"), nn.Linear(2, 2)
    return nn.Sequential(weight_conditioning(nn.Conv2d(3, 4, 3)), nn.ReLU(inplace=True), *body, *head, *last)


X = torch.randn(2, 3, 8, 8)


def gradients(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(model(X).square().sum(), list(model.parameters())))


def test_together_computes_the_same() -> None:
    model = network()
    twin = copy.deepcopy(model)
    wanted = gradients(twin)
    with together(model):
        assert model[0].weight is model[0].weight
        assert len({id(model[k].weight.grad_fn) for k in (0, 2, 3, 5, 6, 7)}) <= 6
        y = model(X)
        y2 = model(X)
    assert_close(y2, y, rtol=0, atol=0)
    got = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    assert_close(list(got), wanted, rtol=0, atol=0)
    assert_close(*(each[6].get_buffer("parametrizations.weight.0._u") for each in (model, twin)))
    assert model[0].weight is not model[0].weight


def test_together_leaves_what_it_does_not_know() -> None:
    model = nn.Sequential(weight_conditioning(nn.Linear(3, 3)), weight_conditioning(nn.Linear(3, 3)), nn.Linear(3, 3))
    parametrize.register_parametrization(model[1], "weight", nn.Softmax(1))
    parametrize.register_parametrization(model[2], "weight", nn.Softmax(1))
    seen = []
    model[0].get_submodule("parametrizations.weight").register_forward_hook(lambda *_: seen.append(1))
    wanted = model(X.flatten()[:3])
    with together(model):
        assert_close(model(X.flatten()[:3]), wanted)
    assert seen == [1, 1]


def changes(layer: nn.Module, raw: nn.Parameter) -> dict[str, Callable[[], object]]:
    state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}

    def step() -> None:
        optimizer = torch.optim.SGD([raw], 0.5)
        raw.grad = torch.randn_like(raw)
        optimizer.step()

    return {
        "step": step,
        "load": lambda: layer.load_state_dict(state),
        "through data": lambda: raw.data.copy_(torch.randn_like(raw)),
        "data": lambda: setattr(raw, "data", torch.randn_like(raw)),
        "assign": lambda: setattr(layer, "weight", torch.randn(4, 5)),
        "double": layer.double,
        "larger": lambda: setattr(raw, "data", torch.randn(4, 8, dtype=raw.dtype)),
    }


@pytest.mark.parametrize("change", ["step", "load", "through data", "data", "assign", "double", "larger"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_is_never_stale(change: str, grad: bool) -> None:
    layer = weight_conditioning(nn.Linear(5, 4))
    raw = layer.get_parameter("parametrizations.weight.original")
    with torch.set_grad_enabled(grad):
        held = layer.weight
        kept = held.detach().clone()
        layer(torch.randn(2, 5)).sum()
        changes(layer, raw)[change]()
        assert_close(layer.weight, raw / raw.norm(dim=1, keepdim=True))
        with together(layer):
            assert_close(layer.weight, raw / raw.norm(dim=1, keepdim=True))
        assert_close(held, kept, rtol=0, atol=0)


def test_changing_an_option_changes_the_weight() -> None:
    layer = weight_conditioning(nn.Linear(5, 4))
    before = layer.weight
    layer.get_submodule("parametrizations.weight.0").gain = 3.0  # pyright: ignore[reportAttributeAccessIssue]
    assert_close(layer.weight, 3 * before)


def test_memory_is_taken_again_only_when_nothing_holds_it() -> None:
    layer = weight_conditioning(nn.Linear(50, 40))
    place = layer.weight.data_ptr()
    assert layer.weight.data_ptr() == place  # the first one is gone
    held = layer.weight
    again = layer.weight
    assert again.data_ptr() != held.data_ptr()
    for hold in (lambda w: w.detach().numpy(), lambda w: w.detach().flatten()[3:], lambda w: (w * w).sum()):
        with torch.no_grad():
            layer.get_parameter("parametrizations.weight.original").normal_()
        wanted = layer.weight.detach().clone()
        held = hold(layer.weight)
        layer.get_parameter("parametrizations.weight.original").data.normal_()
        assert not torch.equal(layer.weight, wanted)
        assert_close(torch.as_tensor(held).detach(), torch.as_tensor(hold(wanted)))
    with torch.inference_mode():
        inside = layer.weight
    assert_close(layer.weight, inside.clone())
    layer.weight.sum().backward()


def test_a_graph_holds_its_weights() -> None:
    layer, x = weight_conditioning(nn.Linear(5, 5).double()), torch.randn(3, 5).double()
    raw = layer.get_parameter("parametrizations.weight.original")
    y = layer(layer(x))  # two weights at once
    loss = y.sin().sum()
    wanted = torch.autograd.grad(loss, raw, retain_graph=True)
    layer(x).sum().backward()
    assert_close(torch.autograd.grad(loss, raw), wanted, rtol=0, atol=0)
    y = layer(x).sum()
    with torch.no_grad():
        raw.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_freed_memory_is_refused() -> None:
    """As FSDP frees it; many of torch's own operators read it and crash."""
    for layer in network():
        if parametrize.is_parametrized(layer):
            for parameter in layer.get_submodule("parametrizations.weight").parameters():
                parameter.untyped_storage().resize_(0)
            with pytest.raises(BackendError, match="has no memory"):
                print(layer.weight)
            with pytest.raises(BackendError, match="has no memory"), together(layer):
                pass


def test_saved_tensors_that_came_back_otherwise_are_refused() -> None:
    layer = weight_norm(nn.Linear(5, 4))
    for back in (lambda t: t[:2], Tensor.double, Tensor.t, lambda t: t.expand(3, *t.shape), lambda t: t.to("meta")):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back):
            weight = layer.weight
        with pytest.raises(RuntimeError):
            weight.sum().backward()


def test_without_the_library_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    wanted = gradients(copy.deepcopy(model))
    monkeypatch.setattr(kernels, "library", lambda: None)
    with together(model):
        y = model(X)
    got = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    # float32's sums in another order.
    assert_close(list(got), wanted, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(4, 6)
    assert [kernels.takes(t) for t in (w, w.t(), w.to("meta"))] == [True, False, False]
    images = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    assert [kernels.takes(images, rows=rows) for rows in (True, False)] == [True, False]
    assert not kernels.takes(w, torch.ones(4, 1).double())
    assert WeightNorm().share(torch.ones(4, 1).double(), w) is None
    assert_close(WeightNorm()(torch.ones(4, 1).double(), w), w / w.norm(dim=1, keepdim=True))
    assert kernels.plan_for((1, 0, 3, 1), torch.float32) is None
    assert Equilibrate()(torch.randn(0, 3)).shape == (0, 3)
    monkeypatch.setattr(kernels, "entry", lambda name: lambda *_: 1)
    with pytest.raises(MemoryError):
        Equilibrate()(w)
