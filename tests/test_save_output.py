"""Norms that keep their output for the backward pass, and compute the normalized input again from it."""

import inspect
from collections.abc import Callable
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
TAKING = [
    card.name for card in METHODS if card.kind == "activation" and "save" in inspect.signature(card.module).parameters
]


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


def test_every_method_that_takes_it_is_here() -> None:
    assert sorted(TAKING) == ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_usual_ones(name: str, activation: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [made(name, activation=activation, save=save).to(dtype) for save in ("input", "output")]
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
    usual, ours = (
        kept_bytes(nn.Sequential(made(name, activation="leaky_relu", save=save), nn.Conv2d(16, 4, 3)), x)
        for save in ("input", "output")
    )
    assert usual - ours == x.nbytes


def test_what_has_no_inverse_is_refused() -> None:
    with pytest.raises(OptionError, match=r"BatchNorm: save=\"output\" can't undo activation='relu'.*wanted None or"):
        nk.BatchNorm(4, activation="relu", save="output")
    layer = nk.GroupNorm(2, 4, save="output")
    with pytest.raises(OptionError, match="can't undo activation='silu'"):
        layer.activation = "silu"
    with pytest.raises(OptionError, match="can't undo cast='before weight'"):
        nk.RMSNorm(4, cast="before weight", save="output")
    with pytest.raises(OptionError, match="would be ignored"):
        nk.AdaLayerNorm(4, 4).save = "output"
    with pytest.raises(OptionError, match="wanted 'input' or 'output'"):
        nk.BatchNorm(4, save="both")  # pyright: ignore[reportArgumentType]


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
    layers = [made("batch", activation="leaky_relu", save=save) for save in ("input", "output")]
    x, dy = torch.randn(4, 16, 9, 9), torch.randn(4, 16, 9, 9)

    def by_checkpoint(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    def by_autocast(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def after_sum(layer: nn.Module, x: Tensor) -> Tensor:
        y, total = layer.after_sum(x, 2 * x)
        return y + total

    for context in (by_checkpoint, by_autocast, after_sum):
        found, wanted = [], []
        for layer, into in zip(layers, (wanted, found), strict=True):
            t = x.clone().requires_grad_()
            into += torch.autograd.grad(context(layer, t), [t, *layer.parameters()], dy)
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32, sums of 324 numbers
    groups = [made("group", save=save) for save in ("input", "output")]
    usual, ours = (torch.func.grad(lambda t, norm=norm: (norm(t) * dy).sum())(x) for norm in groups)
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
