"""Checkpoints of every form of a weight load into every other, and conditioned models are plain when they are to be."""

import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import normkit as nk
from normkit.surgery import accept, adopt, plain, translate
from normkit.weights import scaled_weight_standardization, weight_norm

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


def test_a_model_without_memory_is_given_values() -> None:
    theirs = nn.Linear(3, 3)
    ours = weight_norm(nn.Linear(3, 3, device="meta"))
    ours.load_state_dict(translate(theirs.state_dict(), ours), assign=True)
    assert_close(ours.weight, theirs.weight)
    for put in (nk.weights.spectral_norm, parametrizations.spectral_norm):
        with pytest.raises(nk.errors.SurgeryError, match="meta device"):
            translate(theirs.state_dict(), put(nn.Linear(3, 3, device="meta")))


class Twice(nn.Module):
    """A layer, a norm and a head under two names each, by being the same module or by the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(3, 3), nn.RMSNorm(3)
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)
        self.b, self.again, self.head.weight = self.a, self.norm, self.embedding.weight


@pytest.mark.parametrize("how", ["kernels", "from one", "parametrized", "left out"])
def test_what_stands_in_two_places_is_translated_in_both(how: str) -> None:
    theirs, ours = Twice(), Twice()
    wanted = {key: value.clone() for key, value in theirs.state_dict().items()}
    if how == "kernels":
        given = translate(wanted, theirs, to="flax")
        found = translate(given, ours, source="flax")
    elif how == "from one":
        given = {key: value - 1 if key in ("norm.weight", "again.weight") else value for key, value in wanted.items()}
        found = translate(given, ours, from_one=True)
    elif how == "parametrized":
        weight_norm(ours.a)
        found = translate(translate(wanted, ours), Twice())
    else:
        given = {key: value for key, value in wanted.items() if key not in ("head.weight", "again.weight", "b.bias")}
        accept(Twice()).model.load_state_dict(given)
        found = translate(given, ours)
    assert_close(found, wanted)


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
    out = translate(before, model, to="plain")
    assert_close(out, {key: state[key] for key in out}, rtol=0, atol=0)
    assert set(out) == set(keys)


def _first(key: str) -> str:
    return key.replace("body.", "")


@pytest.mark.parametrize("way", ["itself", "copied", "pickled", "inside another"])
@pytest.mark.parametrize("recipe", ["keep+e@all", "keep+wn", "keep+sn", "keep"])
def test_load_state_dict_takes_plain_checkpoints_once_a_model_accepts_them(recipe: str, way: str) -> None:
    wanted = {f"body.{key}": value + value.new_ones(()) for key, value in _model("plain").state_dict().items()}
    model = _model("plain")
    nk.apply_recipe(model, recipe)
    keys = list(model.state_dict())
    changes = accept(model, rename=_first)
    made = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}.get(way, lambda m: m)(model)
    if way == "inside another":
        nn.ModuleDict({"a": made}).load_state_dict({f"a.{key}": value for key, value in wanted.items()})
    else:
        made.load_state_dict(wanted)
    assert list(made.state_dict()) == keys
    with plain(made):
        found = {f"body.{key}": value for key, value in made.state_dict().items()}
    if recipe in ("keep", "keep+wn"):
        assert_close(found, wanted)
    for key in ("body.0.bias", "body.4.running_var"):
        assert_close(found[key], wanted[key], rtol=0, atol=0)
    made.load_state_dict(made.state_dict())  # its own form as before
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0.bias.*Unexpected key.*0.offset"):
        made.load_state_dict({key.replace("0.bias", "0.offset"): value for key, value in wanted.items()})
    changes.undo()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(wanted)


def _arrays(model: nn.Module, framework: str) -> dict[str, Any]:
    """A model's tensors as the other framework has them, by hand."""
    pytest.importorskip("numpy", reason="arrays as flax and keras give them")
    conv, depth, linear, norm = model[0], model[1], model[4], model[2]
    state = {
        ("conv", "kernel"): conv.weight.permute(2, 3, 1, 0),
        ("conv", "bias"): conv.bias,
        ("depth", "kernel" if framework == "flax" else "depthwise_kernel"): depth.weight.permute(2, 3, 1, 0),
        ("dense", "kernel"): linear.weight.t(),
        ("bn", "scale" if framework == "flax" else "gamma"): norm.weight,
        ("bn", "bias" if framework == "flax" else "beta"): norm.bias,
        ("bn", "mean" if framework == "flax" else "moving_mean"): norm.running_mean,
        ("bn", "var" if framework == "flax" else "moving_variance"): norm.running_var,
        ("rms", "scale"): model[5].weight,
    }
    if framework == "keras":
        mixed = state["depth", "depthwise_kernel"]  # (*positions, in, multiples), as one filter per input here
        state["depth", "depthwise_kernel"] = mixed.transpose(2, 3)
        return {f"{layer}/{leaf}:0": value.detach().numpy().copy() for (layer, leaf), value in state.items()}
    nested: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for (layer, leaf), value in state.items():
        kind = "batch_stats" if leaf in ("mean", "var") else "params"
        nested[kind].setdefault(layer, {})[leaf] = value.detach().numpy().copy()
    return nested


_NAMES = {"conv": "0", "depth": "1", "bn": "2", "dense": "4", "rms": "5"}


def _ours(key: str) -> str:
    layer, _, leaf = key.partition(".")
    return f"{_NAMES[layer]}.{leaf}"


def _imported() -> nn.Module:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), depthwise, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5, bias=False))
    model.append(nn.RMSNorm(5)).train()(torch.randn(6, 3, 6, 6))
    return model.eval()


@pytest.mark.parametrize("recipe", ["keep", "keep+wn"])
@pytest.mark.parametrize("framework", ["flax", "keras"])
def test_what_other_frameworks_keep(framework: str, recipe: str) -> None:
    theirs, model, x = _imported(), _imported(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_().add_(3)
    nk.apply_recipe(model, recipe)
    state = _arrays(theirs, framework)
    model.load_state_dict(translate(state, model, source=framework, rename=_ours))
    assert_close(model(x), theirs(x))
    once = _imported()
    accept(once, source=framework, rename=_ours)
    once.load_state_dict(state)
    assert_close(once(x), theirs(x), rtol=0, atol=0)
    out = translate(model.state_dict(), model, to=framework)
    assert {key.rpartition("/")[2] for key in out} >= {"kernel", "scale", "bias"}
    again = translate(out, _imported(), source=framework)
    assert_close(dict(again), {**theirs.state_dict(), "2.num_batches_tracked": again["2.num_batches_tracked"]})
    state["batch" if framework == "keras" else "params"] = state.get("params", {}) | {"extra": theirs[0].bias}
    with pytest.raises((nk.errors.SurgeryError, KeyError), match="extra"):
        translate(state, model, source=framework, rename=lambda key: _ours(key) if "extra" not in key else key)
    with pytest.raises(nk.errors.SurgeryError, match="transposed convolution"):
        translate({"kernel": torch.ones(2, 2, 3, 4)}, nn.ConvTranspose2d(3, 4, 2, bias=False), source=framework)
    for layer, said in ((nn.ConvTranspose2d(3, 4, 2), "transposed convolution"), (nn.LSTM(3, 3), "of LSTM, whose")):
        with pytest.raises(nk.errors.SurgeryError, match=said):
            translate(layer.state_dict(), layer, to=framework)
    packed = nn.ModuleDict({"a": nn.MultiheadAttention(3, 1, bias=False)})
    with pytest.raises(nk.errors.SurgeryError, match=r"a.weight is of MultiheadAttention"):
        translate({"a/kernel": torch.ones(3, 9)}, packed, source=framework, rename=lambda key: "a.in_proj_weight")


def test_heads_of_attention_and_half_types() -> None:
    ml = pytest.importorskip("ml_dtypes", reason="numpy's bfloat16, which jax gives")
    model, x = nn.ModuleDict({"query": nn.Linear(6, 8), "out": nn.Linear(8, 6)}), torch.randn(2, 6)
    q, out = (model[key].weight.detach().t() for key in ("query", "out"))
    bias = {"query": model["query"].bias.detach().view(2, 4), "out": model["out"].bias.detach()}
    given = {"query": {"kernel": q.reshape(6, 2, 4)}, "out": {"kernel": out.reshape(2, 4, 6)}}
    arrays = {key: {**given[key], "bias": bias[key]} for key in given}
    assert_close(translate({"params": arrays}, model, source="flax"), dict(model.state_dict()), rtol=0, atol=0)
    half = {name: {k: v.numpy().astype(ml.bfloat16) for k, v in parts.items()} for name, parts in arrays.items()}
    model.load_state_dict(translate({"params": half}, model, source="flax"))
    wanted = nn.functional.linear(x, q.bfloat16().float().t(), bias["query"].flatten().bfloat16().float())
    assert_close(model["query"](x), wanted)
    arrays["out"]["bias"] = bias["out"].numpy().astype(ml.float8_e5m2)
    with pytest.raises(nk.errors.SurgeryError, match=r"params.out.bias is of float8_e5m2.*cast it"):
        translate({"params": arrays}, model, source="flax")


def test_gains_that_count_from_one() -> None:
    x, gain = torch.randn(3, 4), torch.tensor([1.5, 0.5, 2.0, 1.0])
    counted, plain_norm = nk.RMSNorm(4, offset=1.0), nn.Sequential(nn.RMSNorm(4, 1e-6))
    state = {"0.weight": gain - 1}
    plain_norm.load_state_dict(translate(state, plain_norm, from_one=True))
    assert_close(plain_norm[0].weight.detach(), gain)
    assert_close(translate(plain_norm.state_dict(), plain_norm, to="plain", from_one="re:0"), state)
    model = nn.Sequential(counted)
    model.load_state_dict(translate(state, model))
    assert_close(model[0].weight.detach(), gain - 1, rtol=0, atol=0)
    model.load_state_dict(translate({"0.weight": gain}, model, from_one=False))
    assert_close(model[0].weight.detach(), gain - 1)
    nk.convert(model, "ln")  # a gain of 1 + the parameter
    bias = {"0.bias": torch.zeros(4)}
    for given in (translate(state | bias, model), translate({"0.weight": gain} | bias, model, from_one=False)):
        model.load_state_dict(given)
        assert_close(model[0].weight.detach(), gain)
    assert_close(translate(model.state_dict(), model, to="plain")["0.weight"], state["0.weight"], rtol=0, atol=0)
    assert model(x).shape == x.shape


def test_timms_scaled_convolutions_and_frozen_norms() -> None:
    class ScaledStdConv2d(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 2)
            self.gain = nn.Parameter(torch.rand(4, 1, 1, 1))

    theirs = nn.Sequential(ScaledStdConv2d(), nn.BatchNorm2d(4))
    ours = nn.Sequential(scaled_weight_standardization(nn.Conv2d(3, 4, 2)), nn.BatchNorm2d(4))
    nk.convert(ours, "frozen_bn")
    ours.load_state_dict(translate(theirs.state_dict(), ours, source="timm"))
    raw = ours[0].parametrizations.weight
    assert_close((raw.original0, raw.original1), (theirs[0].gain.view(4), theirs[0].weight), rtol=0, atol=0)
    back = translate(ours.state_dict(), theirs)
    assert_close(back, dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_files(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ending == "safetensors":
        pytest.importorskip("safetensors", reason="the format's own package")
    path, other = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    nk.apply_recipe(tied, "keep+e@all")
    wanted = translate(tied.state_dict(), tied, to="plain", save=path)
    assert_close(translate(path, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), save=str(other)), wanted)
    assert list(translate(str(other), tied)) == list(tied.state_dict())
    pair = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        translate({key: value + 1 for key, value in wanted.items()}, copy.deepcopy(pair), save=other)
    assert_close(translate(other, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), wanted)  # as it was
    assert {each.name for each in tmp_path.iterdir()} == {path.name, other.name}
    if ending == "safetensors":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(nk.errors.SurgeryError, match="pip install safetensors"):
            translate(path, tied)
    else:
        torch.save([1], path)
        with pytest.raises(nk.errors.SurgeryError, match="wanted tensors by name; got a list"):
            translate(path, tied)
        torch.save(tied, path)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            translate(path, tied)
        torch.save({"state_dict": wanted, "epoch": 3}, path)
        translate(path, tied)


def test_norms_adopt_another_frameworks_constants() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nk.GroupNorm(2, 4), nn.LayerNorm(4), nk.RMSNorm(4), nn.Linear(4, 4))
    model(torch.randn(3, 4))
    before = [dict(vars(layer)) for layer in model]
    changes = adopt(model, "keras")
    assert [vars(layer)["eps"] for layer in list(model)[:4]] == [1e-3, 1e-3, 1e-3, 1e-6]
    assert model[0].momentum == 0.01
    assert_close(model[1](torch.zeros(1, 4)), torch.zeros(1, 4))
    changes.undo()
    assert [vars(layer)["eps"] for layer in list(model)[:4]] == [old["eps"] for old in before[:4]]
    assert [row.note for row in adopt(model, "flax", where="re:0", eps=1e-5, momentum=0.9)] == []
    assert [row.note for row in adopt(model, "torch", where="re:0", momentum=0.9)] == ["momentum 0.1 -> 0.9"]
    notes = [row.note for framework in ("timm", "torch") for row in adopt(model, framework, where="re:3")]
    assert notes == ["eps None -> 1e-06", "eps 1e-06 -> None"]
