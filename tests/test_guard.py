"""What was right for one call is not taken for right in the next, and what comes back from autograd is looked at again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from laws import ACTIVATIONS, call, layer, name, sample_input
from normkit.core.card import Card
from normkit.core.errors import BackendError
from normkit.engine import abi
from normkit.engine.layer import Layer
from normkit.engine.library import library, why_not

needs_kernels = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")
LAYERS = [card for card in ACTIVATIONS if card.exact_gradient and card.extra is None]
NORMS: list[tuple[Callable[..., Any], tuple[int, ...]]] = [
    (nk.LayerNorm, (6, 4)),
    (lambda c: nk.GroupNorm(2, c), (3, 4, 5, 5)),
    (nk.BatchNorm, (3, 4, 5, 5)),
    (lambda c: nk.LocalResponseNorm(3), (3, 4, 5, 5)),
    (nk.GlobalResponseNorm, (3, 5, 5, 4)),
]


def gradients(made: nn.Module, card: Card, x: Tensor) -> list[Tensor]:
    z = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(card, made, z)
    return list(torch.autograd.grad(y.square().sum(), [z, *made.parameters()], allow_unused=True))


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


@pytest.mark.parametrize("card", LAYERS, ids=name)
@pytest.mark.parametrize("back", [contiguous, Tensor.clone], ids=["contiguous", "clone"])
def test_saved_tensors_may_come_back_in_another_form(card: Card, back: Callable[[Tensor], Tensor]) -> None:
    made = layer(card, dtype=torch.float32)
    x = sample_input(card, dtype=torch.float32)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    wanted = gradients(made, card, x)
    gradients(made, card, x)  # warm
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), back):
        found = gradients(made, card, x)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-4)  # float32; only a wrong reading of memory is farther off


@needs_kernels
@pytest.mark.parametrize(("make", "shape"), NORMS)
def test_a_saved_tensor_may_come_back_wider(make: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    made, x = make(4), torch.randn(shape, requires_grad=True)
    wanted = torch.autograd.grad(made(x).square().sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.double, lambda t: t):
        found = torch.autograd.grad(made(x).square().sum(), x)
    assert_close(found, wanted)


@needs_kernels
@pytest.mark.parametrize(("make", "shape"), NORMS)
def test_a_saved_tensor_of_another_shape_is_refused(make: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1] if t.dim() > 1 else t):
        y = make(4)(x)
        with pytest.raises(RuntimeError):
            y.sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("make", [nk.LayerNorm, nk.RMSNorm, nk.ScaleNorm], ids=lambda make: make.__name__)
def test_a_warm_layer_takes_a_nested_tensor(make: type) -> None:
    made = make(4)
    made(torch.randn(2, 4))
    parts = [torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)]
    nested = torch.nested.nested_tensor(parts)
    for part, found in zip(parts, made.double()(nested).unbind(), strict=True):
        assert_close(found, made(part))
    assert made.explain(nested).backend == "nested"
    assert made(torch.nested.nested_tensor([], dtype=torch.float64)).dtype == torch.float64


def test_a_default_device_is_not_where_a_kernel_works() -> None:
    for made in (nk.BatchNorm(4), nk.LayerNorm(4), nk.BatchNorm(4).eval()):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(8, 4, dtype=dtype, requires_grad=True)
            wanted = torch.autograd.grad(made(x).float().square().sum(), x)
            with torch.device("meta"):
                found = torch.autograd.grad(made(x).float().square().sum(), x)
            assert_close(found, wanted)


@pytest.mark.parametrize("card", [card for card in LAYERS if card.rule is not None], ids=name)
def test_a_gradient_counts_once_where_the_scale_comes_from_the_input(card: Card) -> None:
    made, x = layer(card), sample_input(card).requires_grad_()
    if not isinstance(made, Layer):
        return
    parameters = {key: (x * p.mean()).mean() + p.detach() for key, p in made.named_parameters()}
    y = torch.func.functional_call(made, parameters, (x,))
    y = y[0] if isinstance(y, tuple) else y
    once, again = (
        torch.autograd.grad(y.square().sum(), x, create_graph=k, retain_graph=True)[0] for k in (False, True)
    )
    assert_close(once, again)


@needs_kernels
def test_a_parameter_of_another_kind_is_another_call() -> None:
    x, base = torch.randn(3, 4), torch.randn(4, 2)
    for weight in (base[:, 0], torch._neg_view(torch.randn(4)), base[:, 0], nn.Parameter(torch.randn(4))):  # pyright: ignore[reportPrivateImportUsage]
        assert_close(nk.functional.layer_norm(x, (4,), weight), F.layer_norm(x, (4,), weight.clone()))


@needs_kernels
def test_an_error_keeps_no_frame_alive() -> None:
    lengths = []
    for _ in range(3):
        with pytest.raises(BackendError) as caught:
            abi.checked(3)
        lengths.append(len(caught.traceback))
    assert len(set(lengths)) == 1


@needs_kernels
def test_a_layer_keeps_more_than_its_last_call() -> None:
    made = nk.LayerNorm(4)
    inputs = [torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)]
    for x in inputs:
        made(x)
    known = made.__dict__["_known"]
    for x in inputs * 2:
        assert_close(made(x), F.layer_norm(x, (4,)))
    assert made.__dict__["_known"] is known
    made.register_parameter("bias", None)
    assert_close(made(inputs[0]), F.layer_norm(inputs[0], (4,)))


@needs_kernels
def test_the_operator_has_a_second_derivative() -> None:
    made = nk.LayerNorm(4).double()
    made.backend = "native"
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(made, (x.detach(),)).module()
    found = []
    for run in (exported, made):
        (first,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_close(*found)
