"""What is taken of a checkpoint goes by its value, once and not again; what cannot be is refused by name."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import normkit as nk
from normkit.surgery import accept, translate
from normkit.weights import scaled_weight_standardization, weight_norm


def _zero_row(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.get_parameter("weight")[1] = 0
    return layer


def _square(put: Callable[[nn.Module], object] = lambda layer: layer) -> nn.Module:
    layer = nn.Linear(3, 3)
    put(layer)
    return layer.eval()


def _gained() -> nn.Module:
    layer = scaled_weight_standardization(_square())
    layer.get_parameter("parametrizations.weight.original0").data *= torch.tensor([2.0, 0.5, -1.0])
    return nk.fold(layer).model


def _lengths(dim: int | None) -> Callable[[nn.Module], object]:
    return lambda layer: parametrizations.weight_norm(layer, dim=dim)


def _recipe(word: str) -> Callable[[nn.Module], object]:
    return lambda layer: nk.apply_recipe(layer, f"keep+{word}@all")


# Where the same keys mean another weight, or the parametrization's own inverse does; the refusal where there is no way.
VALUES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "lengths of columns": (lambda: _square(_lengths(1)), _lengths(0), ""),
    "one length": (lambda: _square(_lengths(None)), lambda layer: weight_norm(layer, dim=1), ""),
    "lengths of rows": (lambda: _square(weight_norm), _lengths(None), ""),
    "a zero row": (lambda: _zero_row(_square()), weight_norm, ""),
    "a zero row, normalized": (lambda: weight_norm(_zero_row(_square())), lambda layer: layer, ""),
    "a zero row for torch": (lambda: _zero_row(_square()), _lengths(0), "zero row, of which torch's weight"),
    "a shift": (_square, _recipe("sc"), ""),
    "gains": (_gained, scaled_weight_standardization, ""),
    "roots of rows": (_square, _recipe("preconditioning"), "Precondition makes another weight .* no inverse"),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_weight_goes_by_its_value(case: str) -> None:
    make, put, said = VALUES[case]
    theirs, ours = make(), _square(put)
    state = {f"0.{key}": value for key, value in theirs.state_dict().items()}
    if said:
        with pytest.raises(nk.errors.SurgeryError, match=f"0.weight.*{said}"):
            translate(state, nn.Sequential(ours))
        return
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("from_one", [True, False])
def test_a_models_own_gains_are_not_moved_again(tmp_path: Path, from_one: bool) -> None:
    model = nn.Sequential(nn.RMSNorm(3) if from_one else nk.RMSNorm(3, offset=1.0))
    changes = accept(model, from_one=from_one)
    model.load_state_dict({"0.weight": torch.tensor([0.5, 0.0, 1.0])})
    wanted = torch.tensor([0.5, 0.0, 1.0]) + (1 if from_one else -1)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    for own in (model.state_dict(), copy.deepcopy(model.state_dict()), torch.load(tmp_path / "own.pt")):
        model.load_state_dict(own)
        assert_close(model[0].weight.detach(), wanted, rtol=0, atol=0)
    whole = nn.ModuleList([model])
    whole.load_state_dict(whole.state_dict())
    assert_close(model[0].weight.detach(), wanted, rtol=0, atol=0)
    changes.undo()
    assert not model._state_dict_hooks


def test_a_square_transposed_convolution_is_read_by_its_kind() -> None:
    for put in (nn.utils.spectral_norm, parametrizations.spectral_norm, nk.weights.spectral_norm):
        theirs, ours = put(nn.ConvTranspose2d(3, 3, 2)).eval(), nn.ConvTranspose2d(3, 3, 2)
        x = torch.randn(2, 3, 4, 4)
        wanted = theirs(x)
        ours.load_state_dict(translate(theirs.state_dict(), ours))
        assert_close(ours(x), wanted)


class Product(nn.Module):
    """Of two tensors that are not those of weight norm, with an inverse where there is a gain per unit."""

    def __init__(self, gains: bool) -> None:
        super().__init__()
        self.gains = gains

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a[:, None] * b if self.gains else a @ b

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(weight)) if self.gains else torch.eye(len(weight)), weight.clone()


@pytest.mark.parametrize("gains", [False, True])
def test_two_tensors_are_not_always_those_of_weight_norm(gains: bool) -> None:
    product = parametrize.register_parametrization(_square(), "weight", Product(gains))
    standardized = scaled_weight_standardization(_square() if gains else nn.Conv2d(3, 4, 3))
    for theirs, ours in ((product, _square()), (standardized, _square() if gains else nn.Conv2d(3, 4, 3))):
        state = {f"0.{key}": value for key, value in theirs.state_dict().items()}
        with pytest.raises(nk.errors.SurgeryError, match=r"0.weight is kept as two tensors, .* no lengths"):
            translate(state, nn.Sequential(ours))
    theirs = _square()
    product.load_state_dict(translate(theirs.state_dict(), product))
    assert_close(product.weight, theirs.weight)


@pytest.mark.parametrize("size", [1e-3, 1.0])
@pytest.mark.parametrize("word", ["ws", "scaled_weight_standardization", "e:rowcol", "e"])
def test_the_plain_weight_of_a_method_that_forgets_its_length_is_the_raw_one(word: str, size: float) -> None:
    theirs, ours = _square(), _square(_recipe(word))
    theirs.get_parameter("weight").data *= size
    accept(ours)
    ours.load_state_dict(theirs.state_dict())
    _recipe(word)(theirs)
    assert_close((ours.weight, ours.state_dict()), (theirs.weight, theirs.state_dict()), rtol=0, atol=0)


PUTS: dict[str, Callable[[nn.Module], object]] = {
    "weight norm, hooks": nn.utils.weight_norm,
    "weight norm": _lengths(0),
    "our weight norm": weight_norm,
    "spectral norm, hooks": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "gains": scaled_weight_standardization,
    "e": _recipe("e"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("shape", [(7, 4), (3, 5), (3, 4, 1)], ids=str)
@pytest.mark.parametrize("put", PUTS)
def test_another_shape_is_said_by_name(put: str, shape: tuple[int, ...]) -> None:
    model = nn.Linear(4, 3)
    PUTS[put](model)
    state = {"0.weight": torch.ones(shape), "0.bias": torch.ones(3)}
    wanted = f"0.weight: got {'x'.join(map(str, shape))}, the model wants 3x4"
    with pytest.raises(nk.errors.SurgeryError, match=wanted):
        translate(state, nn.Sequential(model))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("put", PUTS)
def test_a_weight_that_is_not_finite_is_handed_on(put: str, bad: float) -> None:
    theirs, ours = nn.Linear(4, 3), nn.Linear(4, 3)
    PUTS[put](ours)
    with torch.no_grad():
        theirs.weight[1, 1] = bad
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    assert not all(value.isfinite().all() for value in ours.state_dict().values())


class Double(nn.Module):
    """A parametrization with an inverse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_a_parametrized_buffer_is_given_its_value() -> None:
    theirs, ours = nn.Module(), nn.Module()
    for each in (theirs, ours):
        each.register_buffer("scale", torch.randn(3))
    parametrize.register_parametrization(ours, "scale", Double())
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    assert_close(ours.scale, theirs.scale)
