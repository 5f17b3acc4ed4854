"""The engine: every back end keeps the same contract, and what was right for one call is not taken for right in the next."""

import copy
import itertools
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from laws import ACTIVATIONS, call, layer, name, sample_input
from normkit import Layer, Statistic
from normkit.core.card import Card
from normkit.core.errors import BackendError
from normkit.core.support import Split
from normkit.engine import abi, closed_form
from normkit.engine.library import library, why_not

BACKENDS = ["reference", "closed", "auto", *(["native"] if library() else [])]
needs_kernels = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")


@pytest.mark.parametrize("scale", ["rms", "norm", "max", "range", "std"])
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


def test_a_wholly_masked_sample_leaves_the_others_their_say() -> None:
    norm = nk.InstanceNorm(2, track_running_stats=True, momentum=1.0)
    x = torch.randn(3, 2, 6) + 5
    mask = torch.ones(3, 1, 6, dtype=torch.bool)
    mask[0] = False
    norm(x, mask=mask)
    assert_close((norm.running_mean, norm.running_var), (x[1:].mean((0, 2)), x[1:].var(2).mean(0)))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_activation_follows_in_the_same_pass(activation: Any, backend: Any) -> None:
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_with_a_residual_is_normalized_and_handed_over(backend: Any) -> None:
    x, residual = (torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for norm in (nk.LayerNorm(5, activation="silu"), nk.GroupNorm(2, 4), nk.BatchNorm(4)):
        norm.double().backend = backend
        y, total = norm.after_sum(x, residual)
        assert_close(total, x + residual, rtol=0, atol=0)
        assert_close(y, norm(x + residual), rtol=1e-12, atol=1e-12)  # the same numbers, normalized alike
        inputs = [x, residual, *norm.parameters()]
        found = torch.autograd.grad((y.square() + total.sin()).sum(), inputs)
        wanted = torch.autograd.grad((norm(x + residual).square() + (x + residual).sin()).sum(), inputs)
        assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(nk.errors.ShapeError, match="as the input is"):
        norm.after_sum(x, residual[:1])


def test_surgery_does_not_lose_an_activation() -> None:
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


# The closed-form backward against the definition, for every statistic and guard that it takes

SPLIT = Split((3, 4, 5), ("n", "c", "*"), (0, 2))
STATISTICS = [
    Statistic(center, scale, eps, guard, correction)
    for (center, scale), eps, guard, correction in itertools.product(
        [("mean", "std"), (None, "rms"), (None, "norm")], [1e-5, 0.3], ["inside", "outside", "floor"], [0, 1]
    )
    if correction == 0 or scale == "std"
]


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: f"{s.scale} {s.guard} {s.eps:g} {s.correction}")
def test_value_and_derivatives_are_those_of_the_definition(statistic: Statistic) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    y, inverse, _ = closed_form.normalize(x, SPLIT, statistic)
    center, scale, _ = statistic.measure(x, SPLIT)
    assert scale is not None
    assert_close(y, (x if center is None else x - center) / scale)
    assert_close(inverse, 1 / scale)
    assert torch.autograd.gradcheck(lambda x: closed_form.normalize(x, SPLIT, statistic)[:2], x)
    assert torch.autograd.gradgradcheck(lambda x: closed_form.normalize(x, SPLIT, statistic)[:2], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-12, 1e-7, 1e-5, 0.1, 0.3, 3.0])
@pytest.mark.parametrize("below", [0.9, 0.0])
def test_under_the_floor_the_scale_is_a_constant(eps: float, below: float, dtype: torch.dtype) -> None:
    statistic = Statistic(None, "norm", eps, "floor")
    x = torch.zeros(1, 3, dtype=dtype)
    x[0, 0] = below * eps
    x.requires_grad_()
    y, _, _ = closed_form.normalize(x, Split((1, 3), ("o", "*"), (1,)), statistic)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, torch.full_like(x, 1 / eps))


# Rounding errors of the kernels against float64: no larger than torch's, whatever the mean, the layout and the dtype

accuracy = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "accuracy.py")))


@needs_kernels
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize("method", accuracy.METHODS, ids=lambda m: m.name)
def test_errors_are_at_most_torch_s(method: Any, dtype: torch.dtype) -> None:
    for layout in method.layouts():
        for kind in (*accuracy.RATIOS, accuracy.OUTLIER):
            cell = accuracy.cell(method, layout, dtype, kind, small=True)
            # One unit in the last place of the largest value: where either result is rounded is chance.
            assert cell.excess() <= 1, cell


@needs_kernels
@pytest.mark.parametrize("scale", [1e-23, 1e-30, 1e22])
@pytest.mark.parametrize("shape", [(6, 40), (3, 9000), (4, 8, 6, 6), (300, 700)])
def test_squares_beyond_float32_do_not_spoil_a_set(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * scale
    for norm in (nk.LayerNorm(shape[-1], eps=0.0), nk.RMSNorm(shape[-1], eps=0.0), nk.BatchNorm(shape[1], eps=0.0)):
        exact = copy.deepcopy(norm).double()
        norm.backend = "native"
        assert_close(norm(x).double(), exact(x.double()), rtol=1e-5, atol=1e-6)  # float32


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


@pytest.mark.parametrize("card", LAYERS, ids=name)
@pytest.mark.parametrize("back", [Tensor.contiguous, Tensor.clone], ids=["contiguous", "clone"])
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
def test_a_saved_tensor_may_come_back_wider_but_not_shorter(make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    made, x = make(4), torch.randn(shape, requires_grad=True)
    wanted = torch.autograd.grad(made(x).square().sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.double, lambda t: t):
        found = torch.autograd.grad(made(x).square().sum(), x)
    assert_close(found, wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1] if t.dim() > 1 else t):
        y = make(4)(x)
        with pytest.raises(RuntimeError):
            y.sum().backward()


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
    once, again = (torch.autograd.grad(y, x, y, create_graph=k, retain_graph=True)[0] for k in (False, True))
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
