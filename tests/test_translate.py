"""Checkpoints of every form of a weight load into every other, and conditioned models are plain when they are to be."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import normkit as nk
from normkit.surgery import plain, translate
from normkit.weights import weight_norm

FORMS: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda layer: layer,
    "weight norm, hooks": nn.utils.weight_norm,
    "weight norm": parametrizations.weight_norm,
    "ours": weight_norm,
    "spectral norm, hooks": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
}


def _model(form: str) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3), nn.Flatten(), nn.Linear(108, 2)]
    for layer in layers:
        if hasattr(layer, "weight"):
            FORMS[form](layer)
    return nn.Sequential(*layers, nn.BatchNorm1d(2)).double().eval()


# torch calls its older weight norm deprecated.
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("there", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_into_every_other(form: str, there: str) -> None:
    theirs, ours, x = _model(form), _model(there), torch.randn(2, 3, 6, 6).double()
    theirs.train()(x)
    if "spectral" in there and "spectral" in form:  # torch's vectors of the two forms converge in different ways
        theirs.eval()
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    if "spectral" in there and "spectral" not in form:
        ours.eval()(x)
        wanted = theirs.get_submodule("3").weight
        found = ours.get_submodule("3").weight
        assert_close(found / found.norm(), wanted / wanted.norm())  # the direction; its length is one by definition
    else:
        assert_close(ours.eval()(x), theirs.eval()(x))


def test_what_has_no_place_is_said() -> None:
    state = _model("plain").state_dict()
    with pytest.raises(nk.errors.SurgeryError, match=r"in no form: 0.weight; .*no place in the model: 0.kernel"):
        translate({key.replace("0.weight", "0.kernel"): value for key, value in state.items()}, _model("plain"))
    renamed = {f"net.{key}": value for key, value in state.items() if "tracked" not in key}
    found = translate(renamed, _model("plain"), rename=lambda key: key.removeprefix("net."))
    assert list(found) == list(state)
    with pytest.raises(nk.errors.SurgeryError, match=r"0.bias: got 5, the model wants 4"):
        translate({**state, "0.bias": torch.ones(5)}, _model("plain"))
    with pytest.raises(nk.errors.SurgeryError, match="several keys one name"):
        translate(state, _model("plain"), rename=lambda key: "a")


@pytest.mark.parametrize("recipe", ["keep+e@all", "keep+wn", "keep+sn"])
def test_a_model_is_plain_for_a_while_and_reads_plain_checkpoints(recipe: str) -> None:
    model, x = _model("plain"), torch.randn(2, 3, 6, 6).double()
    keys = list(model.state_dict())
    nk.apply_recipe(model, recipe)
    wanted, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    with plain(model):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        assert_close(model(x), wanted)
    assert set(state) == set(keys)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    other = nk.apply_recipe(_model("plain"), recipe).model
    other.load_state_dict(translate(state, other))
    if recipe != "keep+sn":  # whose vectors start over
        assert_close(other(x), wanted)
    with pytest.raises(KeyError), plain(model):
        raise KeyError
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
