"""Weight conditioning: its identities, its two exact forms, its modes on every layer."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from normkit.core.errors import BackendError
from normkit.engine.library import why_not
from normkit.functional import equilibrate
from normkit.weights import Equilibrate, WeightLayout, output_scaling, weight_conditioning, weight_layout

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "linear without bias, one sample": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "conv 1d, same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9)),
    "conv 2d, stride, groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 6)),
    "conv 2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "conv 2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect", bias=False), (2, 3, 5, 5)),
    "conv 2d, one sample": (lambda: nn.Conv2d(3, 4, (3, 1)), (3, 5, 5)),
    "conv 3d, dilation": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 4, 4, 4)),
}
ALL = [("row", {}), ("col", {}), ("col", {"view": "unfold"}), ("rowcol", {}), ("rowcol", {"order": "ruiz"})]
matrices = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9999))


def matrix(drawn: tuple[int, int, int]) -> Tensor:
    rows, columns, seed = drawn
    made = torch.Generator().manual_seed(seed)
    scale = torch.randn(rows, 1, generator=made, dtype=torch.float64).exp()
    return torch.randn(rows, columns, generator=made, dtype=torch.float64) * scale


def raw(layer: nn.Module) -> nn.Parameter:
    return layer.get_parameter("parametrizations.weight.original")


def derivatives(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output, gradients and gradients of the gradients, by input, raw weight and bias."""
    x = x.clone().requires_grad_()
    wrt = [x, *layer.parameters()]
    y = layer(x)
    first = torch.autograd.grad((y**3).sum(), wrt, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), wrt)
    return y, *first, *second


@pytest.mark.parametrize("options", [{}, {"gain": 1.5}, {"gradient": "detach"}], ids=str)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_scaling_the_output_is_rebuilding_the_weight(make, shape, options) -> None:
    by_output, x = make().double(), torch.randn(shape, dtype=torch.float64)
    by_weight = copy.deepcopy(by_output)
    weight_conditioning(by_output, path="output", **options)
    weight_conditioning(by_weight, path="weight", **options)
    # Sums of at most some hundred products of numbers up to 1e4: 1e-12 of the largest.
    for got, wanted in zip(derivatives(by_output, x), derivatives(by_weight, x), strict=True):
        assert_close(got, wanted, rtol=1e-12, atol=1e-12 * max(1.0, wanted.abs().max().item()))
    assert list(by_output.state_dict()) == list(by_weight.state_dict())
    assert_close(by_output.weight, by_weight.weight, rtol=0, atol=0)


def test_jacobi_scales_the_output_too() -> None:
    by_output, x = nn.Linear(4, 4).double(), torch.randn(3, 4).double()
    by_weight = copy.deepcopy(by_output)
    weight_conditioning(by_output, "jacobi", path="output")
    weight_conditioning(by_weight, "jacobi", path="weight")
    for got, wanted in zip(derivatives(by_output, x), derivatives(by_weight, x), strict=True):
        assert_close(got, wanted, rtol=1e-11, atol=1e-11 * max(1.0, wanted.abs().max().item()))
    assert_close(by_weight.weight.diagonal(), torch.ones(4).double())


@pytest.mark.parametrize("gradient", ["full", "detach"])
def test_gradients_in_closed_form(gradient) -> None:
    a, d = torch.randn(4, 5).double().requires_grad_(), torch.randn(4, 5).double()
    w = equilibrate(a, gradient=gradient)
    (da,) = torch.autograd.grad((w * d).sum(), [a])
    w, norm = w.detach(), a.detach().norm(dim=1, keepdim=True)
    wanted = d / norm if gradient == "detach" else (d - (d * w).sum(1, keepdim=True) * w) / norm
    assert_close(da, wanted)


@given(matrices)
def test_what_each_mode_gives(drawn) -> None:
    a = matrix(drawn)
    ones = {dim: torch.ones(a.shape[1 - dim]).double() for dim in (0, 1)}
    assert_close(equilibrate(a, "row").norm(dim=1), ones[1])
    assert_close(equilibrate(a, "col").norm(dim=0), ones[0])
    rows = a / a.norm(dim=1, keepdim=True)
    assert_close(equilibrate(a, "rowcol"), rows / rows.norm(dim=0))
    wanted = a / a.norm(dim=1, keepdim=True) / a.norm(dim=0)
    assert_close(equilibrate(a, "rowcol", order="simultaneous"), wanted)
    if a.shape[0] == a.shape[1]:
        assert_close(equilibrate(a, "jacobi"), a / a.diagonal().unsqueeze(1))
    assert_close(equilibrate(a, "row", gain=3.0), 3 * equilibrate(a, "row"))


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 999))
def test_ruiz_tends_to_rows_alike_and_columns_alike(rows, columns, seed) -> None:
    a = matrix((rows, columns, seed))
    found = equilibrate(a, "rowcol", order="ruiz", iterations=200)
    for dim in (0, 1):
        norms = found.norm(dim=dim)
        # The rate of convergence depends on the matrix; these have no zeros, and 200 steps are plenty.
        assert_close(norms, norms.mean().expand_as(norms), rtol=1e-4, atol=0)


def test_a_zero_row_stays_zero_and_the_floor_holds_its_gradient() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    w = equilibrate(a, eps=1e-3)
    assert_close(w.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    (d,) = torch.autograd.grad(w.sum(), [a])
    assert_close(d[1], torch.tensor([1e3, 1e3]))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(3, 4, 2)]
)
@pytest.mark.parametrize("view", ["operator", "unfold"])
def test_rows_and_columns_of_convolutions_become_unit(layer, view) -> None:
    layout = weight_layout(layer)
    for mode, support in (("row", layout.rows), ("col", layout.columns(view))):
        w = equilibrate(layer.weight.detach(), mode, layout=layout, view=view)
        split = support.split(w.shape)
        norms = torch.linalg.vector_norm(w.reshape(split.shape), dim=split.dims)
        assert_close(norms, torch.ones_like(norms))


def test_assigning_stores_the_raw_weight() -> None:
    layer = weight_conditioning(nn.Linear(5, 4), gain=2.0)
    w = torch.randn(4, 5)
    layer.weight = w
    assert_close(raw(layer).detach(), w, rtol=0, atol=0)
    assert_close(layer.weight.detach(), 2 * w / w.norm(dim=1, keepdim=True))
    layer.weight = layer.weight.detach()
    assert_close(layer.weight.detach(), 2 * w / w.norm(dim=1, keepdim=True))


def test_the_raw_weight_is_the_same_parameter_and_stays_tied() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    parameter = first.weight
    optimizer = torch.optim.SGD([parameter], 0.1)
    weight_conditioning(first)
    weight_conditioning(second)
    assert raw(first) is raw(second) is parameter
    before = first.weight.detach().clone()
    (first(torch.randn(2, 4)) * second(torch.randn(2, 4))).sum().backward()
    optimizer.step()
    assert not torch.equal(first.weight, before)
    assert_close(first.weight, second.weight, rtol=0, atol=0)
    twins = copy.deepcopy(nn.ModuleList([first, second]))
    assert raw(twins[0]) is raw(twins[1]) is not parameter


@pytest.mark.parametrize("path", ["auto", "weight", "output"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amp", [False, True])
def test_dtypes_of_the_output(path, weight_dtype, amp) -> None:
    layer = weight_conditioning(nn.Linear(64, 8).to(weight_dtype), path=path)
    wide = copy.deepcopy(layer).double()
    x = torch.randn(4, 64).to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if amp else weight_dtype)
    # bfloat16 rounds weights, inputs and outputs to 2^-9 of each; the dot product of unit rows with 64 normals is about 1.
    assert_close(y.double(), wide(x.double()), rtol=2e-2, atol=4e-2)


def test_float16_never_sees_the_raw_product() -> None:
    layer = nn.Linear(64, 8, bias=False).half()
    with torch.no_grad():
        layer.weight.fill_(3e4)
    weight_conditioning(layer)
    assert_close(layer(torch.ones(1, 64).half()), torch.full((1, 8), 8.0).half())


def chosen(layer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> str:
    calls = []
    product = output_scaling._product
    monkeypatch.setattr(output_scaling, "_product", lambda *a: calls.append(1) or product(*a))
    layer(x)
    return "output" if calls else "weight"


def test_auto_scales_few_outputs_and_rebuilds_small_weights(monkeypatch) -> None:
    layer = weight_conditioning(nn.Linear(256, 8))
    assert chosen(layer, torch.randn(4, 256), monkeypatch) == "output"
    between = "weight" if why_not() is None else "output"  # without the kernels rebuilding takes more passes
    assert chosen(layer, torch.randn(16, 256), monkeypatch) == between
    conv = weight_conditioning(nn.Conv2d(64, 8, 3))
    assert chosen(conv, torch.randn(1, 64, 3, 3), monkeypatch) == "output"
    assert chosen(conv, torch.randn(1, 64, 9, 9), monkeypatch) == between
    with torch.no_grad():
        assert chosen(layer, torch.randn(128, 256), monkeypatch) == "output"
        assert chosen(layer, torch.randn(256, 256), monkeypatch) == "weight"
        with parametrize.cached():
            assert chosen(layer, torch.randn(4, 256), monkeypatch) == "weight"


def test_the_way_survives_a_copy_and_goes_with_the_parametrization(monkeypatch) -> None:
    layer = copy.deepcopy(weight_conditioning(nn.Linear(256, 8), path="output"))
    assert chosen(layer, torch.randn(999, 256), monkeypatch) == "output"
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert chosen(layer, torch.randn(4, 256), monkeypatch) == "output"
    parametrize.remove_parametrizations(layer, "weight")
    assert chosen(layer, torch.randn(4, 256), monkeypatch) == "weight"


def test_another_parametrization_on_top() -> None:
    for path in ("auto", "output"):
        layer = weight_conditioning(nn.Linear(256, 8), path=path)
        parametrize.register_parametrization(layer, "weight", nn.Softmax(1))
        x = torch.randn(1, 256)
        if path == "auto":
            assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        else:
            with pytest.raises(BackendError, match="more than one parametrization"):
                layer(x)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    layer = weight_conditioning(Doubling(256, 8))
    x = torch.randn(1, 256)
    assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(BackendError, match="computes its output differently"):
        weight_conditioning(Doubling(256, 8), path="output")


@pytest.mark.parametrize("path", ["auto", "output"])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_compiles_as_one_graph(make, shape, path) -> None:
    layer, x = weight_conditioning(make().double(), path=path), torch.randn(shape, dtype=torch.float64)
    expected = layer(x)
    torch.compiler.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_attention_and_embeddings() -> None:
    attention = weight_conditioning(nn.MultiheadAttention(8, 2, batch_first=True), "col", "in_proj_weight")
    assert_close(attention.in_proj_weight.view(3, 8, 8).norm(dim=1), torch.ones(3, 8))
    x = torch.randn(2, 3, 8)
    attention(x, x, x)[0].sum().backward()
    words = weight_conditioning(nn.Embedding(7, 3))
    assert_close(words(torch.arange(7)).norm(dim=1), torch.ones(7))


def test_it_says_what_it_does() -> None:
    weight_conditioning(nn.Linear(1, 4), "row", gradient="detach")  # by a constant one weight in a row may be
    assert "mode='rowcol', order='ruiz', iterations=10" in repr(Equilibrate("rowcol", order="ruiz"))
    assert "path='auto'" in repr(weight_conditioning(nn.Linear(3, 2)))
    assert Equilibrate(layout=WeightLayout(1)).row_factors(torch.ones(2, 3)) is None
