"""What every weight method is held to, on every kind of layer."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.hooks import RemovableHandle

from laws import WEIGHTS
from laws import name as name_of
from normkit.core.card import Invariance
from normkit.core.errors import OptionError, ShapeError
from normkit.weights import spectral_conditioning, spectral_norm, weight_conditioning, weight_norm
from normkit.weights.parametrization import together
from variants import WEIGHT_FORMS

# The exact norm is not in here: where singular values meet, as zero rows make them, vectors have no derivative.
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    card.name: card.make for card in (*WEIGHTS, *WEIGHT_FORMS) if card.name != "spectral_norm_exact"
}
ON_LINEAR = [pytest.param(method, id=name) for name, method in METHODS.items()]


def raw(layer: nn.Module) -> list[Tensor]:
    return list(layer.get_submodule("parametrizations.weight").parameters())


@pytest.mark.parametrize("method", ON_LINEAR)
def test_training_under_functional_transforms_is_training(method) -> None:
    layer, x = method(nn.Linear(5, 4).double()), torch.randn(3, 5).double()
    twin = copy.deepcopy(layer)
    parameters = {key: value.detach() for key, value in layer.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters, x)
    wanted = torch.autograd.grad(twin(x).square().sum(), list(twin.parameters()))
    assert_close(list(got.values()), list(wanted))
    assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))  # vectors, improved once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ON_LINEAR)
def test_parameters_of_another_dtype(method, dtype) -> None:
    layer, x = method(nn.Linear(5, 4)).eval(), torch.randn(3, 5)
    wanted = layer(x)
    narrow = {key: value.detach().to(dtype) for key, value in layer.named_parameters()}
    y = torch.func.functional_call(layer, narrow, (x.to(dtype),))
    assert y.dtype == dtype
    assert_close(y.float(), wanted, rtol=0.05, atol=0.05)  # a few roundings of bfloat16
    assert_close(layer(x), wanted, rtol=0, atol=0)


CHANGES: dict[Invariance, Callable[[Tensor], Tensor]] = {
    "weight scale": lambda w: w * 3,
    "weight shift": lambda w: w + w.std() * torch.randn(w.shape[1], dtype=w.dtype),
    "row scale": lambda w: w * torch.cat([torch.full((1, 1), 3.0, dtype=w.dtype), torch.ones_like(w[1:, :1])]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("card", WEIGHTS, ids=name_of)
def test_invariances_are_those_of_the_card(card, change) -> None:
    layer = card.make(nn.Linear(50, 4).double())
    v, x = raw(layer)[-1], torch.randn(3, 50, dtype=torch.float64)
    with torch.no_grad():
        v.mul_(1e4)  # so that no eps shows
        [layer.weight for _ in range(200)]  # power iteration converges
        before = layer.eval()(x)
        v.copy_(CHANGES[change](v))
        [layer.train().weight for _ in range(200)]
    difference = (layer.eval()(x) - before).abs().max().item()
    assert difference < 1e-6 if change in card.invariances else difference > 1e-2


@pytest.mark.parametrize("card", WEIGHTS, ids=name_of)
def test_cards_name_what_is_here(card) -> None:
    layer = card.make(nn.Conv2d(4, 6, 3))
    part = layer.get_submodule("parametrizations.weight")[0]
    assert type(part) is card.module
    assert card.kind == "weight"
    assert card.foldable
    assert part.extra_repr()


@pytest.mark.parametrize("method", ON_LINEAR)
def test_zero_rows_and_columns_never_give_nan(method) -> None:
    layer = method(nn.Linear(5, 4).double())
    with torch.no_grad():
        for parameter in raw(layer):
            if parameter.shape == (4, 5):
                parameter[1], parameter[:, 2] = 0, 0
    for _ in range(2):
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad(layer(x).square().sum(), [x, *raw(layer)], create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), [x, *raw(layer)])
        assert all(g.isfinite().all() for g in (*first, *second))
        with torch.no_grad():
            for parameter in raw(layer):
                parameter.zero_()


NO_ZEROS = ("weight_norm", "spectral_norm", "weight_conditioning")


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith(NO_ZEROS)])
def test_a_trained_weight_of_zeros_is_warned_of(name: str) -> None:
    layer = nn.Linear(5, 4)
    nn.init.zeros_(layer.weight)
    twin, meta = copy.deepcopy(layer), copy.deepcopy(layer).to("meta")
    with pytest.warns(UserWarning, match=r"weight of Linear \(4x5\).*zero.*leave this layer out"):
        METHODS[name](layer)
    METHODS[name](twin.requires_grad_(False))  # is not trained
    if "spectral" not in name:
        METHODS[name](meta)  # has no values yet
    layer(torch.randn(3, 5)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("method", ON_LINEAR)
def test_a_zero_weight_recovers(method) -> None:
    layer = method(nn.Linear(5, 4, bias=False))
    kept = [parameter.detach().clone() for parameter in raw(layer)]
    x = torch.randn(3, 5)
    for value in (torch.zeros(4, 5), None):
        with torch.no_grad():
            for parameter, before in zip(raw(layer), kept, strict=True):
                parameter.copy_(before if value is None else torch.zeros_like(before))
        y = layer(x)
        assert (y.abs().sum() > 0) == (value is None or method is spectral_conditioning)  # which adds a constant


@pytest.mark.parametrize("method", ON_LINEAR)
def test_a_shallow_copy_shares_its_weight(method) -> None:
    layer, x = method(nn.Linear(5, 4)).eval(), torch.randn(3, 5)
    twin = copy.copy(layer)
    assert raw(twin)[0] is raw(layer)[0]
    assert_close(twin(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("method", ON_LINEAR)
def test_raw_tensors_are_found_by_name(method) -> None:
    """As plain attributes, which FSDP and replicas make of parameters, and registered again in another order."""
    layer, x = method(nn.Linear(5, 4)).eval(), torch.randn(3, 5)
    held = layer.get_submodule("parametrizations.weight")
    expected, parameters = layer(x), dict(held.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        delattr(held, name)
        setattr(held, name, parameter * 1)
    assert_close(layer(x), expected, rtol=0, atol=0)
    with together(layer):
        assert_close(layer(x), expected, rtol=0, atol=0)
    for name, parameter in reversed(parameters.items()):
        delattr(held, name)
        held.register_parameter(name, parameter)
    assert_close(layer(x), expected, rtol=0, atol=0)
    with together(layer):
        assert_close(layer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("rows", [4000, 2])
@pytest.mark.parametrize("method", ON_LINEAR)
def test_a_weight_that_changed_its_size_is_made_or_refused(method, rows, one_call) -> None:
    layer = method(nn.Linear(5, 4)).eval()
    held = [parameter for parameter in raw(layer) if parameter.shape == (4, 5)]
    for parameter in held:
        parameter.data = torch.randn(rows, 5)
    lengths = [parameter for parameter in raw(layer) if 4 in parameter.shape]
    with together(layer) if one_call else nullcontext():
        if lengths or layer.get_submodule("parametrizations.weight.0").state_dict():
            with pytest.raises(ShapeError, match=r"wanted|resize"):
                print(layer.weight)
        else:
            assert layer.weight.shape == (rows, 5)
            assert layer.weight.isfinite().all()


@pytest.mark.parametrize("method", ON_LINEAR)
def test_tensors_that_no_kernel_may_read(method) -> None:
    layer = method(nn.Linear(5, 4).double()).eval()
    part = layer.get_submodule("parametrizations.weight")[0]
    plain = [parameter.detach().clone() for parameter in raw(layer)]
    expected = part(*plain)
    negated = [torch._neg_view(-tensor) for tensor in plain]  # pyright: ignore[reportPrivateImportUsage]
    strided = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in plain]
    wrapped = [TwoTensor(tensor, tensor.clone()) for tensor in plain]
    for tensors in (negated, strided, [*plain[:-1], negated[-1]], [*negated[:-1], plain[-1]]):
        assert_close(part(*tensors), expected)
    assert_close(part(*wrapped).a, expected)
    assert part.to("meta")(*[tensor.to("meta") for tensor in plain]).shape == expected.shape


@pytest.mark.parametrize("method", ON_LINEAR)
def test_gradients_that_no_kernel_may_read(method) -> None:
    layer = method(nn.Linear(5, 4).double()).eval()
    g = torch.randn(4, 5).double()
    wanted = torch.autograd.grad(layer.weight, raw(layer), g)
    negated = torch._neg_view(-g)  # pyright: ignore[reportPrivateImportUsage]
    for odd in (negated, torch.stack([g, g], -1)[..., 0]):
        assert_close(torch.autograd.grad(layer.weight, raw(layer), odd), wanted)
    one = torch.ones((), dtype=torch.float64)
    summed = torch.autograd.grad(layer.weight.sum(), raw(layer))
    assert_close(torch.autograd.grad(layer.weight, raw(layer), one.expand(4, 5)), summed)


@pytest.mark.parametrize("method", ON_LINEAR)
def test_under_cached_the_weight_is_made_once(method) -> None:
    layer, x = method(nn.Linear(5, 4)).eval(), torch.randn(3, 5)
    expected = layer(x)
    with parametrize.cached():
        kept = layer.weight
        assert_close(layer(x), expected)
        assert layer.weight is kept
        assert copy.deepcopy(layer).weight is not kept


@pytest.mark.parametrize("method", ON_LINEAR)
def test_hooks_and_frozen_weights_stay(method) -> None:
    layer = nn.Linear(5, 4)
    layer.weight.requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    method(layer)(torch.randn(3, 5))
    assert calls == [1]
    assert not any(parameter.requires_grad for parameter in raw(layer))


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], RemovableHandle]] = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("where", ["parametrizations.weight", "parametrizations.weight.0"])
@pytest.mark.parametrize("method", ON_LINEAR)
def test_hooks_on_the_making_of_a_weight_run(method, where, hook) -> None:
    layer, calls = method(nn.Linear(64, 64)), []  # of one sample, so that scaling the output would be cheaper
    hook(layer.get_submodule(where), lambda *_: calls.append(1))
    for context in (nullcontext(), together(layer)):
        calls.clear()
        with context:
            layer(torch.randn(1, 64)).sum().backward()
        assert calls == [1]


@pytest.mark.parametrize("method", ON_LINEAR)
def test_copies_and_pickles_keep_nothing_of_the_kernels(method) -> None:
    layer = method(nn.Linear(5, 4))
    layer(torch.randn(3, 5))
    part = layer.get_submodule("parametrizations.weight.0")
    whole = pickle.loads(pickle.dumps(part)), copy.deepcopy(part)
    assert not any(twin._spare._free for twin in whole if hasattr(twin, "_spare"))
    assert all(twin._plans == {} for twin in (*whole, copy.copy(part)))


@pytest.mark.parametrize("method", ON_LINEAR)
def test_training_mode_is_kept(method) -> None:
    layer = method(nn.Linear(5, 4).eval())
    assert not any(module.training for module in layer.modules())


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("method", ON_LINEAR)
def test_what_has_no_weight_is_refused(method) -> None:
    with pytest.raises(OptionError, match="has no parameter 'weight'"):
        method(nn.ReLU())
    with pytest.raises(OptionError, match="run the layer once"):
        method(nn.LazyLinear(3))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("method", ON_LINEAR)
def test_memory_formats_agree(method, channels_last) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).double()
    other = copy.deepcopy(layer)
    if channels_last:
        other = other.to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    method(layer)
    torch.manual_seed(1)
    method(other)
    g = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    assert_close(other.weight, layer.weight, rtol=1e-12, atol=1e-12)
    wanted, got = (torch.autograd.grad((one.weight * g).sum(), raw(one)) for one in (layer, other))
    assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [weight_norm, spectral_norm, weight_conditioning])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_copies_of_a_recurrent_layer_are_whole(make, method) -> None:
    layer, x = make(3, 4), torch.randn(2, 2, 3)
    method(layer, name="weight_hh_l0")
    layer.eval()
    wanted = layer(x)[0]  # torch keeps the weights of this pass in a list
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(other(x)[0], wanted, rtol=0, atol=0)
        other(x)[0].sum().backward()
        assert all(parameter.grad is not None for parameter in other.parameters())
        assert all(parameter.grad is None for parameter in layer.parameters())
        for parameter in other.parameters():
            parameter.data.zero_()
        assert_close(layer(x)[0], wanted, rtol=0, atol=0)
