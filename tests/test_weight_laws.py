"""What every weight method is held to, on every kind of layer."""

import copy
import io
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
from normkit.weights.multi_tensor import together
from normkit.weights.scaled_weight_standardization import scaled_weight_standardization
from normkit.weights.spectral_norm import spectral_norm
from normkit.weights.weight_conditioning import weight_conditioning
from normkit.weights.weight_norm import weight_norm
from normkit.weights.weight_standardization import weight_standardization

METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": weight_norm,
    "weight norm, one length": lambda layer: weight_norm(layer, dim=None),
    "weight norm, inputs": lambda layer: weight_norm(layer, dim=1),
    "spectral norm": spectral_norm,
    "standardization": weight_standardization,
    "standardization, outside": lambda layer: weight_standardization(layer, correction=1, guard="outside"),
    "scaled standardization": scaled_weight_standardization,
    "row": lambda layer: weight_conditioning(layer, "row", path="weight"),
    "row, gain": lambda layer: weight_conditioning(layer, "row", gain=1.5),
    "row, detached": lambda layer: weight_conditioning(layer, "row", gradient="detach"),
    "col": lambda layer: weight_conditioning(layer, "col"),
    "col, unfold": lambda layer: weight_conditioning(layer, "col", view="unfold"),
    "rowcol": lambda layer: weight_conditioning(layer, "rowcol"),
    "rowcol, simultaneous": lambda layer: weight_conditioning(layer, "rowcol", order="simultaneous"),
    "rowcol, ruiz": lambda layer: weight_conditioning(layer, "rowcol", order="ruiz", iterations=3),
    **{card.name: card.make for card in WEIGHTS},  # so that a new card is held to all of it
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 7)),
    "conv 2d, groups": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
        (2, 4, 7, 6),
    ),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2, bias=False), (2, 2, 4, 4, 4)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}
EACH = [pytest.param(method, *layer, id=f"{m}-{n}") for m, method in METHODS.items() for n, layer in LAYERS.items()]
# The gradient of a detached preconditioner is not the derivative, by design.
EXACT = [case for case in EACH if "detached" not in str(case.id)]
ON_LINEAR = [pytest.param(method, id=name) for name, method in METHODS.items()]


def raw(layer: nn.Module) -> list[Tensor]:
    return list(layer.get_submodule("parametrizations.weight").parameters())


@pytest.mark.parametrize(("method", "make", "shape"), EACH)
def test_what_is_folded_computes_the_same(method, make, shape) -> None:
    layer = method(make().double()).eval()
    plain, x = type(make()), torch.randn(shape, dtype=torch.float64)
    before = layer(x)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert type(layer) is plain
    assert_close(layer(x), before, rtol=1e-12, atol=1e-12)  # scaling the output rounds otherwise than the weight does


@pytest.mark.parametrize(("method", "make", "shape"), EACH)
def test_a_state_dict_carries_everything(method, make, shape) -> None:
    layer, other = method(make()).eval(), method(make()).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "make", "shape"), EACH)
def test_half_weights_keep_their_dtype_and_are_measured_in_float32(method, make, shape, dtype) -> None:
    layer = make().to(dtype)
    wide = copy.deepcopy(layer).double()
    torch.manual_seed(1)
    method(layer).eval()
    torch.manual_seed(1)
    method(wide).eval()
    for buffer, other in zip(wide.buffers(), layer.buffers(), strict=True):
        buffer.copy_(other)  # random vectors differ by dtype
    # One rounding of each element to the half type, and float32's sums, which show where an element is nearly 0.
    assert_close(layer.weight.double(), wide.weight, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert layer.weight.dtype == dtype
    layer.weight.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == dtype for parameter in raw(layer))


@pytest.mark.parametrize(("method", "make", "shape"), EXACT)
def test_first_and_second_derivatives(method, make, shape) -> None:
    layer = method(make().double()).eval()
    parts = layer.get_submodule("parametrizations.weight")[0]
    inputs = tuple(torch.randn_like(parameter).requires_grad_() for parameter in raw(layer))
    assert torch.autograd.gradcheck(parts, inputs)
    assert torch.autograd.gradgradcheck(parts, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, as forward mode is set up
@pytest.mark.parametrize("method", [case for case in ON_LINEAR if "detached" not in str(case.id)])
def test_derivatives_to_order_four_agree_in_both_modes(method) -> None:
    layer = method(nn.Linear(5, 4).double()).eval()
    part, start = layer.get_submodule("parametrizations.weight")[0], [w.detach() for w in raw(layer)]
    along, weights = [torch.randn_like(w) for w in start], torch.randn(4, 5).double()
    zero, one = torch.zeros((), dtype=torch.float64, requires_grad=True), torch.ones((), dtype=torch.float64)

    def f(t: Tensor) -> Tensor:
        return (part(*[w + t * d for w, d in zip(start, along, strict=True)]) * weights).sum().sin()

    def derivative(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: torch.func.jvp(g, (t,), (one,))[1]

    y, g = f(zero), f
    for _ in range(4):
        (y,) = torch.autograd.grad(y, zero, create_graph=True)
        g = derivative(g)
        assert_close(g(zero.detach()), y.detach(), rtol=1e-9, atol=1e-9)


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
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert all(value.shape[0] == 3 and value.isfinite().all() for value in each.values())


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


NO_ZEROS = ("weight norm", "weight_norm", "spectral", "row", "col", "weight_conditioning")


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
        assert (y.abs().sum() > 0) == (value is None)


@pytest.mark.parametrize("method", ON_LINEAR)
def test_a_copy_is_whole_and_of_its_own(method) -> None:
    layer = method(nn.Linear(5, 4)).eval()
    twin = copy.deepcopy(layer)
    again = copy.deepcopy(twin)
    x = torch.randn(3, 5)
    expected = layer(x)
    assert_close(twin(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in raw(twin):
            parameter.copy_(torch.randn_like(parameter))
    assert_close(layer(x), expected, rtol=0, atol=0)
    with parametrize.cached():
        assert layer.weight is layer.weight
        assert layer.weight is not twin.weight
    parametrize.remove_parametrizations(twin, "weight")
    assert type(twin) is nn.Linear
    assert_close(layer(x), expected, rtol=0, atol=0)
    assert_close(again(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ON_LINEAR)
def test_a_pickle_and_a_shallow_copy_compute_the_same(method) -> None:
    model = nn.Sequential(method(nn.Linear(5, 4)).eval(), nn.ReLU(), method(nn.Linear(4, 3)).eval())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(3, 5)
    for twin in (torch.load(file, weights_only=False), copy.copy(model)):
        assert_close(twin(x), model(x), rtol=0, atol=0)
    one = copy.copy(model[0])
    assert raw(one)[0] is raw(model[0])[0]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    parametrize.remove_parametrizations(twin[0], "weight")
    assert_close(twin(x), model(x))


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


@pytest.mark.parametrize("method", ON_LINEAR)
def test_replicas_get_gradients_through_the_copies(method) -> None:
    """What torch.nn.parallel.replicate does, without a second device."""
    model = nn.Sequential(method(nn.Linear(5, 4)), nn.Tanh(), method(nn.Linear(4, 2))).eval()
    x, parameters = torch.randn(3, 5), list(model.parameters())
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    modules = list(model.modules())
    copies = {id(parameter): parameter * 1 for parameter in parameters}
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        for key, child in module._modules.items():
            setattr(replica, key, replicas[id(child)])
        for key, parameter in module._parameters.items():
            setattr(replica, key, copies[id(parameter)])
    y = replicas[id(model)](x)
    assert_close(torch.autograd.grad(y.square().sum(), parameters), wanted)


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
    assert_close(
        torch.autograd.grad(layer.weight, raw(layer), one.expand(4, 5)),
        torch.autograd.grad(layer.weight.sum(), raw(layer)),
    )


@pytest.mark.parametrize("method", ON_LINEAR)
def test_under_cached_the_weight_is_made_once(method) -> None:
    layer, x = method(nn.Linear(5, 4)).eval(), torch.randn(3, 5)
    expected = layer(x)
    with parametrize.cached():
        kept = layer.weight
        assert_close(layer(x), expected)
        assert layer.weight is kept


@pytest.mark.parametrize("method", ON_LINEAR)
def test_compiles_as_one_graph(method) -> None:
    layer = method(nn.Linear(5, 4).double()).eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = layer(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    torch.compiler.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(got.square().sum(), list(layer.parameters()))
    assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch batches some operators one by one
@pytest.mark.parametrize("method", ON_LINEAR)
def test_works_under_functional_transforms(method) -> None:
    layer = method(nn.Linear(5, 4).double()).eval()
    state = {key: value.detach() for key, value in layer.named_parameters()}
    stacked = {key: torch.stack([value, value * 1.5]) for key, value in state.items()}
    buffers, x = dict(layer.named_buffers()), torch.randn(3, 5, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, {**parameters, **buffers}, (x,)).square().sum()

    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    together = torch.func.vmap(torch.func.grad(loss))(stacked)
    for (key, _), wanted in zip(layer.named_parameters(), expected, strict=True):
        assert_close(together[key][0], wanted)


@pytest.mark.parametrize("method", ON_LINEAR)
def test_autocast_gives_its_dtype(method) -> None:
    layer = method(nn.Linear(5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in raw(layer))


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
    for twin in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part), copy.copy(part)):
        assert twin._plans == {}


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
