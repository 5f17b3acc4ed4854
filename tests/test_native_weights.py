"""Weights on the native kernels: equal to their definitions, one by one and together, and never stale."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from native_calls import in_threads
from normkit.engine.library import why_not
from normkit.weights import Equilibrate, SpectralNorm, WeightLayout, kernels, parametrization
from normkit.weights.parametrization import Parametrization, Share
from normkit.weights.weight_norm import WeightNorm
from normkit.weights.weight_standardization import ScaledWeightStandardization, WeightStandardization

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no native kernels: {why_not()}")

Make = Callable[[WeightLayout], nn.Module]
PARTS: dict[str, Make] = {
    "row": lambda layout: Equilibrate("row", layout, gain=1.5),
    "row, detached": lambda layout: Equilibrate("row", layout, gradient="detach"),
    "col": lambda layout: Equilibrate("col", layout),
    "col, unfold": lambda layout: Equilibrate("col", layout, view="unfold"),
    "rowcol": lambda layout: Equilibrate("rowcol", layout, gain=2.0),
    "rowcol, unfold": lambda layout: Equilibrate("rowcol", layout, view="unfold"),
    "rowcol, detached": lambda layout: Equilibrate("rowcol", layout, gradient="detach"),
    "rowcol, simultaneous": lambda layout: Equilibrate("rowcol", layout, order="simultaneous", gain=0.5),
    "rowcol, ruiz": lambda layout: Equilibrate("rowcol", layout, order="ruiz", iterations=3, gain=2.0),
    "rowcol, ruiz detached": lambda layout: Equilibrate("rowcol", layout, order="ruiz", gradient="detach"),
    "weight norm, 0": lambda _: WeightNorm(0),
    "weight norm, 1": lambda _: WeightNorm(1, eps=1e-3),
    "weight norm, one length": lambda _: WeightNorm(None),
    "standardization": lambda layout: WeightStandardization(layout),
    "standardization, outside": lambda layout: WeightStandardization(layout, correction=1, guard="outside"),
    "standardization, floor": lambda layout: WeightStandardization(layout, eps=0.9, guard="floor"),
    "scaled standardization": ScaledWeightStandardization,
}
# Vectors and their tails, one row and one column, short and long pieces, pieces too long for one task, several tasks.
SHAPES: dict[str, tuple[tuple[int, ...], WeightLayout]] = {
    "matrix": ((6, 11), WeightLayout()),
    "one row": ((1, 35), WeightLayout()),
    "one column": ((33, 1), WeightLayout()),
    "transposed": ((7, 19), WeightLayout(output_axis=1)),
    "groups": ((8, 3, 3, 3), WeightLayout(groups=2)),
    "transposed, groups": ((8, 3, 5), WeightLayout(output_axis=1, groups=4)),
    "long pieces": ((3, 4, 10, 10), WeightLayout(output_axis=1)),
    "many tasks": ((260, 257), WeightLayout()),
    "many tasks, transposed": ((260, 65, 3), WeightLayout(output_axis=1, groups=2)),
}
LARGE = {"long rows": ((2, 140_000), WeightLayout()), "few long pieces": ((2, 2, 70_000), WeightLayout(output_axis=1))}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(part: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Raw tensors of a parametrization: of the weight, rows have unlike lengths, and a row and a column are zero."""
    w = torch.randn(shape).double() * torch.randn(shape[0], *[1] * (len(shape) - 1)).double().exp()
    w[shape[0] // 2] = 0 if shape[0] > 2 else w[shape[0] // 2]
    w[:, shape[1] // 2] = 0 if shape[1] > 2 else w[:, shape[1] // 2]
    made = part.right_inverse(w)  # pyright: ignore[reportCallIssue]
    made = [made] if isinstance(made, Tensor) else [torch.randn_like(made[0]), made[1]]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def definition(part: nn.Module, raw: list[Tensor]) -> Tensor:
    """The parametrization without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "takes", lambda *_, **__: False)
        return part(*raw)


def close(got: Tensor, wanted: Tensor, eps: float, beside: Tensor | None = None) -> None:
    """Equal but for ``eps`` of each element, its row's mean and what is beside: a difference is rounded as its terms are."""
    scale = wanted.detach().double().abs()
    scale = scale + (scale.mean(dim=tuple(range(1, scale.dim())), keepdim=True) if scale.dim() > 1 else scale.mean())
    if beside is not None and beside.shape == scale.shape:
        scale = scale + beside
    assert ((got.detach().double() - wanted.detach().double()).abs() <= eps * scale).all()


@pytest.mark.parametrize(("shape", "layout"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_the_kernels_are_the_definition(make: Make, shape: tuple[int, ...], layout: WeightLayout) -> None:
    part = make(layout)
    raw = inputs(part, shape)
    if shape[1] == 1 and isinstance(part, WeightStandardization | ScaledWeightStandardization):
        return  # nothing but rounding is left
    if not isinstance(part, Parametrization) or part.share(*raw) is None:
        assert layout.output_axis == 1 or shape[1] == 1  # sets that no kernel knows, or an element less itself
        return
    got, wanted = part(*raw), definition(part, raw)
    d = torch.randn_like(wanted)
    # Sums of up to 1e5 roundings of float64, and iterations that pass them on.
    close(got, wanted, 1e-12)
    beside = (d * wanted / raw[-1]).detach().abs().nan_to_num(0.0, 0.0, 0.0)
    for a, b in zip(torch.autograd.grad(got, raw, d), torch.autograd.grad(wanted, raw, d), strict=True):
        close(a, b, 1e-10, beside)


LONG = ["row", "col", "rowcol", "weight norm, one length", "standardization", "scaled standardization"]


@pytest.mark.parametrize(("shape", "layout"), LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("name", LONG)
def test_long_sets_are_cut(name: str, shape: tuple[int, ...], layout: WeightLayout) -> None:
    test_the_kernels_are_the_definition(PARTS[name], shape, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), [SHAPES[name] for name in ("groups", "transposed, groups", "many tasks")])
@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_no_dtype_loses_more_than_the_definition(
    make: Make, shape: tuple[int, ...], layout: WeightLayout, dtype: torch.dtype
) -> None:
    part = make(layout)
    raw = inputs(part, shape, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in raw]
    if part.share(*raw) is None:  # pyright: ignore[reportCallIssue]
        return
    runs = []
    d = torch.randn(shape, dtype=torch.float64).to(dtype)
    for y, given in ((part(*raw), raw), (definition(part, raw), raw), (definition(part, wide), wide)):
        runs.append([y, *torch.autograd.grad(y, given, d.to(y.dtype))])
    eps = torch.finfo(dtype).eps
    for got, theirs, exact in zip(*runs, strict=True):
        assert got.dtype == dtype
        assert not got.isnan().any()
        # Where a zero row's gradient, divided by eps, has left a half type's range, the two may differ in which are infinite.
        usual = exact.abs() < torch.finfo(dtype).max / 4
        mean = exact.abs().mean(dim=tuple(range(1, exact.dim())), keepdim=True)
        scale = (exact.abs() + mean).detach().clamp_min(1e-30)  # zero rows are exact
        worst, allowed = (((one.double() - exact).abs() / scale)[usual].max() for one in (got, theirs))
        assert worst <= max(2 * allowed, 8 * eps)  # a sum of 260 products in another order


def test_a_large_mean_costs_no_accuracy() -> None:
    for shape, layout in (SHAPES["matrix"], SHAPES["transposed"], SHAPES["many tasks"], LARGE["long rows"]):
        part = WeightStandardization(layout)
        w = (torch.randn(shape) + 1e4).requires_grad_()  # itself rounded to 2^-10
        wide = w.detach().double().requires_grad_()
        got, wanted = part(w), part(wide)
        assert_close(got, wanted.float(), rtol=1e-4, atol=1e-4)
        d = torch.randn(shape)
        (found,), (like,) = torch.autograd.grad(got, w, d), torch.autograd.grad(wanted, wide, d.double())
        assert_close(found, like.float(), rtol=1e-3, atol=1e-3)


def test_nan_spoils_its_own_set_only() -> None:
    w = torch.randn(4, 300)
    w[1, 299] = float("nan")
    for part in (Equilibrate(), WeightStandardization()):
        assert part(w).isnan().all(1).tolist() == [False, True, False, False]
    assert Equilibrate("col")(w).isnan().all(0).nonzero().tolist() == [[299]]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(6, 11), (1, 5), (5, 1), (300, 4, 3, 3), (40, 1000)], ids=str)
def test_the_power_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    ours = SpectralNorm(w.detach(), n_power_iterations=2)
    theirs = copy.deepcopy(ours)
    # Power iterations amplify rounding by no more than a few times; a half type keeps vectors of half precision.
    eps = 40 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = max(eps, 2 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0)
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        assert ours.share(w) is not None
        before = ours._u._version
        got, wanted = ours(w), definition(theirs, [w])
        assert ours._u._version > before
        close(got, wanted, rounding)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert_close(a, b, rtol=0, atol=rounding)
        d = torch.randn_like(wanted)
        beside = (d * wanted / w).detach().double().abs()
        close(torch.autograd.grad(got, w, d)[0], torch.autograd.grad(wanted, w, d)[0], 4 * rounding, beside)


def test_the_power_step_from_nothing() -> None:
    part = SpectralNorm(torch.randn(4, 5))
    before = [buffer.clone() for buffer in part.buffers()]
    zero = torch.zeros(4, 5, requires_grad=True)
    y = part(zero)
    assert_close(list(part.buffers()), before)
    assert_close(torch.autograd.grad(y.sum(), zero)[0], torch.full((4, 5), 1e12))
    w = torch.randn(4, 5)
    for _ in range(200):
        part(w)
    assert_close(torch.linalg.matrix_norm(part.eval()(w), 2), torch.tensor(1.0))


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.7, 3.0])
@pytest.mark.parametrize("native", [True, False])
def test_sigma_below_its_floor_is_a_constant(eps: float, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(kernels, "library", lambda: None)
    w = (1e-3 * torch.randn(4, 5)).requires_grad_()
    d = torch.randn(4, 5)
    part = SpectralNorm(w.detach(), eps=eps)
    assert_close(torch.autograd.grad(part(w), w, d)[0], d / eps)


def shares(dtype: torch.dtype = torch.float32) -> list[Share]:
    found = []
    for make in PARTS.values():
        for shape, layout in SHAPES.values():
            part = make(layout)
            share = part.share(*inputs(part, shape, dtype))  # pyright: ignore[reportCallIssue]
            if share is not None:
                found.append(share)
    w = torch.randn(70, 600, dtype=dtype, requires_grad=True)
    return [*found, SpectralNorm(w.detach()).share(w) or found[0]]


def copied(share: Share) -> Share:
    return share._replace(vectors=tuple(v.clone() for v in share.vectors)) if share.vectors else share


def leaves(share: Share) -> list[Tensor]:
    return [tensor for tensor in (share.weight, share.gain) if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_for_many_is_one_by_one(dtype: torch.dtype) -> None:
    every = shares(dtype)
    copies = [copied(share) for share in every]
    many, alone = parametrization.normalize(every), [parametrization.normalize([share])[0] for share in copies]
    gradients = [torch.randn_like(y) for y in many]
    raw = [tensor for share in every for tensor in leaves(share)]
    assert_close(many, alone, rtol=0, atol=0)
    assert_close(torch.autograd.grad(many, raw, gradients), torch.autograd.grad(alone, raw, gradients), rtol=0, atol=0)


def test_threads_change_nothing() -> None:
    every = shares()
    raw = [tensor for share in every for tensor in leaves(share)]
    found, gradients = [], [torch.randn_like(share.weight) for share in every]
    for _ in in_threads(1, 3):
        torch.manual_seed(1)
        copies = [copied(share) for share in every]
        many = parametrization.normalize(copies)
        found.append([*many, *torch.autograd.grad(many, raw, gradients)])
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_derivatives_of_many() -> None:
    parts = [WeightNorm(), PARTS["rowcol, ruiz"](WeightLayout()), SpectralNorm(torch.randn(3, 4).double()).eval()]
    raw = [tensor for part in parts for tensor in inputs(WeightNorm() if part is parts[0] else Equilibrate(), (3, 4))]

    def many(g: Tensor, v: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return tuple(parametrization.normalize([parts[0].share(g, v), parts[1].share(w), parts[2].share(s)]))  # pyright: ignore

    with torch.no_grad():
        for tensor in raw[1:]:
            tensor.copy_(torch.randn(3, 4))
    assert torch.autograd.gradcheck(many, raw)
    assert torch.autograd.gradgradcheck(many, raw)


def test_a_weight_without_a_gradient_gets_none() -> None:
    one, two = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    made = parametrization.normalize([Equilibrate().share(w) for w in (one, two)])  # pyright: ignore
    made[1].sum().backward()
    assert one.grad is None
    assert two.grad is not None
    frozen = torch.randn(3, 4)
    made = parametrization.normalize([Equilibrate().share(w) for w in (frozen, two)])  # pyright: ignore
    assert not parametrization.normalize([])
    assert torch.autograd.grad(made[1].sum() + made[0].sum(), two)[0].isfinite().all()
