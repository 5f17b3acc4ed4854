"""What a layer does in one pass with its norm: dropout without a mask, int8 rows, and a backward pass by the output alone."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.catalogue.methods import METHODS
from normkit.core.errors import BackendError, OptionError
from normkit.engine.library import library, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)

# (N, 16, 9, 9), by kernels for sets that lie together, for lanes, and with a gain per channel, group or element.
LAYERS: dict[str, Callable[..., Any]] = {
    "batch": lambda **options: nk.BatchNorm(16, **options),
    "instance": lambda **options: nk.InstanceNorm(16, affine=True, **options),
    "group": lambda **options: nk.GroupNorm(4, 16, **options),
    "layer": lambda **options: nk.LayerNorm((9, 9), **options),
    "layer over channels": lambda **options: nk.LayerNorm(16, over="c", **options),
    "rms": lambda **options: nk.RMSNorm((16, 9, 9), offset=1.0, bias=True, **options),
    "without parameters": lambda **options: nk.LayerNorm((9, 9), elementwise_affine=False, **options),
}


def made(kind: str, **options: Any) -> Any:
    layer = LAYERS[kind](**options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():  # gains of both signs, not near zero
        values = torch.rand(parameter.shape, generator=generator) + 0.5
        signs = torch.randn(parameter.shape, generator=generator).sign()
        parameter.data = values * signs - (getattr(layer, "offset", 0.0) if name == "weight" else 0)
    return layer


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def both(kind: str, **options: Any) -> list[Any]:
    """The layer that keeps its input, and the one that keeps its output."""
    return [made(kind, save=save, **options) for save in ("input", "output")]


def test_every_method_that_takes_it_is_here() -> None:
    layers = [card for card in METHODS if card.kind == "activation"]
    taking = [card.module for card in layers if "save" in inspect.signature(card.module).parameters]
    assert {*taking} == {type(make()) for make in LAYERS.values()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_usual_ones(name: str, activation: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [layer.to(dtype) for layer in both(name, activation=activation)]
    for memory in (torch.contiguous_format, torch.channels_last):
        x = (3 * torch.randn(4, 16, 9, 9) + 5).to(dtype).to(memory_format=memory)
        dy = torch.randn_like(x)
        usual, found = (gradients(layer, x, dy) for layer in layers)
        assert torch.equal(usual[0], found[0])
        for one, other in zip(found[1:], usual[1:], strict=True):
            # A normalized input is off by eps (|normalized| + |bias / gain|), up to 6 eps here, and sums of them by less.
            room = 8 * torch.finfo(dtype).eps * float(other.abs().max())
            assert_close(one, other, rtol=0, atol=room)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _y = model(x.clone().requires_grad_())
    return sum(sizes.values())


@pytest.mark.parametrize("name", LAYERS)
def test_a_tensor_less_is_kept_before_a_convolution(name: str) -> None:
    x = torch.randn(4, 16, 9, 9)
    layers = both(name, activation="leaky_relu")
    usual, ours = (kept_bytes(nn.Sequential(layer, nn.Conv2d(16, 4, 3)), x) for layer in layers)
    assert usual - ours == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gain_that_is_too_small_is_refused_in_training(dtype: torch.dtype) -> None:
    layer = nk.BatchNorm(4, save="output", dtype=dtype)
    x, few = torch.randn(8, 4, dtype=dtype, requires_grad=True), torch.finfo(dtype).eps ** 0.5
    layer.weight.data[2], layer.bias.data[2] = few, 0.9
    layer(x).sum().backward()
    layer.bias.data[2] = 1.2
    with torch.no_grad():
        layer(x)  # nothing is undone without a backward pass
    with pytest.raises(
        OptionError, match=r"can't undo a gain of .* \(element 2 of 4, 1 are too small\), wanted at least"
    ):
        layer(x)
    assert layer.explain(x).kept == "its output"
    layer.eval()(x).sum().backward()
    assert "keeps its input (by given statistics) for the backward pass" in str(layer.explain(x))
    layer.train().backend = "reference"
    assert "its input (the output is kept by normkit's kernel alone" in layer.explain(x).kept


def test_second_and_batched_derivatives_are_refused() -> None:
    layer, x = nk.LayerNorm(8, save="output"), torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    with pytest.raises(BackendError, match="no second derivatives"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="batched gradients"):
        torch.autograd.grad(y, x, torch.randn(2, 3, 8), is_grads_batched=True)


def test_contexts() -> None:
    torch.manual_seed(0)
    layers = both("batch", activation="leaky_relu")
    x, dy = torch.randn(4, 16, 9, 9), torch.randn(4, 16, 9, 9)

    def by_autocast(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def after_sum(layer: nn.Module, x: Tensor) -> Tensor:
        y, total = layer.after_sum(x, 2 * x)
        return y + total

    for context in (partial(checkpoint, use_reentrant=False), by_autocast, after_sum):
        found, wanted = [], []
        for layer, into in zip(layers, (wanted, found), strict=True):
            t = x.clone().requires_grad_()
            into += torch.autograd.grad(context(layer, t), [t, *layer.parameters()], dy)
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32, sums of 324 numbers
    usual, ours = (torch.func.grad(lambda t, norm=norm: (norm(t) * dy).sum())(x) for norm in both("group"))
    assert torch.equal(usual, ours)  # under transforms the input is kept
    y = layers[1](x.clone().requires_grad_())
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_accelerate_hands_it_to_the_layers() -> None:
    class NormReLU(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    done = nk.accelerate(nn.Sequential(nn.LayerNorm(8), NormReLU(8)), save="output")
    assert [norm.save for norm in done.model.children()] == ["output", "input"]
    assert "keeps its input" in str(done)


@DTYPES
@pytest.mark.parametrize("kind", [nk.LayerNorm, nk.RMSNorm])
def test_dropout_zeroes_its_share_and_keeps_the_mean(kind: type[nn.Module], dtype: torch.dtype) -> None:
    p, layer, x = 0.3, kind(77, dropout=0.3, dtype=dtype), torch.randn(301, 77, dtype=dtype)
    torch.manual_seed(1)
    y, other = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, layer(x))
    full = layer.eval()(x)
    dropped, again = (y == 0).double(), (other == 0).double()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped.mean() - p) < 5 * deviation
    pairs = [(dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1]), (dropped, again)]
    for one, two in pairs:  # neighbours and calls are independent
        assert abs((one * two).mean() - p * p) < 5 * deviation
    assert_close(y, torch.where(y == 0, 0, full / (1 - p)), rtol=4 * torch.finfo(dtype).eps, atol=0)  # rounded twice


def test_gradients_through_dropout() -> None:
    layer = nk.LayerNorm(16, dropout=0.5).double()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return layer(x)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)
    again = checkpoint(seeded, x, use_reentrant=False)
    (found,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (again, seeded(x)))
    assert torch.equal(found, wanted)
    assert found.count_nonzero() > 0
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert 0 < (compiled(x) == 0).sum() < x.numel()
    y, total = layer.after_sum(x, x)
    assert 0 < (y == 0).sum() < y.numel()
    assert torch.equal(total, 2 * x)


def test_a_layer_that_hands_dropout_on_drops() -> None:
    class Named(nk.RMSNorm):
        def __init__(self, features: int) -> None:
            super().__init__(features, dropout=0.5)

    layer, x = Named(64), torch.ones(64)
    assert all((y == 0).any() for y in (layer(x), layer.after_sum(x, x)[0]))


@DTYPES
@pytest.mark.parametrize("width", [7, 1024, 5000])
def test_rows_are_rounded_as_from_the_output(width: int, dtype: torch.dtype) -> None:
    for layer in (nk.LayerNorm(width, dtype=dtype), nk.RMSNorm(width, offset=1.0, dtype=dtype, activation="silu")):
        x = torch.randn(2, 9, width, dtype=dtype)
        x[1, 3], x[0, 2, 4] = 0, torch.nan
        q, scale = layer.quantized(x)
        layer.backend = "reference"
        wanted, by = layer.quantized(x)
        assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, x.shape, torch.float32, (2, 9, 1))
        # Two roundings of the output to its dtype may differ, and with them whole numbers next to a half.
        assert_close(scale, by, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=0, equal_nan=True)
        real = scale.isfinite().expand(x.shape)
        assert (q[real].int() - wanted[real].int()).abs().max() <= (2 if dtype == torch.bfloat16 else 1)
        assert q[1, 3].eq(0).all()
        assert scale[0, 2].isnan()


class Residual(nn.Module):
    """Adds in place; a dropout that does so in training alone stands in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(inplace=True), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += x
        return self.last(y)


RELU = nn.ReLU(inplace=True)
# A model, whether it is seen running, and what its norms keep.
IN_PLACE: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "behind": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), RELU), False, "input"),
    "through a view": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), RELU), False, "input"),
    "by a parent": (lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)), RELU), False, "input"),
    "later": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), RELU), False, "output"),
    "later, seen": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), RELU), True, "output"),
    "an operator, seen": (Residual, True, "output input input"),
    "nothing": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), False, "output"),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_norm_whose_output_is_changed_keeps_its_input(case: str) -> None:
    make, seen, wanted = IN_PLACE[case]
    model, x = make(), torch.randn(2, 4, 5, 5)
    done = nk.accelerate(model, save="output", example=x if seen else None)
    assert [norm.save for norm in model.modules() if isinstance(norm, nk.BatchNorm)] == wanted.split()
    assert ["keeps its input, as" in row.note for row in done] == [kept == "input" for kept in wanted.split()]
    model(x).sum().backward()


def test_a_norm_whose_gain_is_too_small_keeps_its_input() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(model[2].weight)
    done = nk.accelerate(model, save="output")
    assert ["gain" in row.note for row in done] == [False, True]
    model(torch.randn(2, 4, 5, 5)).sum().backward()


def test_the_error_after_a_change_in_place_says_the_cure() -> None:
    y = nk.LayerNorm(8, save="output")(torch.randn(3, 8, requires_grad=True))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        y.sum().backward()
    assert 'use save="input"' in caught.value.__notes__[0]


def test_rows_of_nothing_and_rows_beyond_float32() -> None:
    q, scale = nk.LayerNorm(4, over="c").quantized(torch.empty(2, 4, 0))
    assert (q.shape, scale.tolist()) == ((2, 4, 0), torch.zeros(2, 4, 1).tolist())
    layer = nk.RMSNorm(2, dtype=torch.float64)
    nn.init.constant_(layer.weight, 1e300)
    for layer.backend in ("auto", "reference"):
        q, scale = layer.quantized(torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
        assert_close(
            (q.double(), scale), (torch.zeros(2, 2).double(), torch.tensor([[torch.nan], [0.0]])), equal_nan=True
        )
