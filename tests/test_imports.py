"""What may import what, what the package offers, and how layers and functions are called."""

import inspect
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from laws import ACTIVATIONS, call, name, sample_input
from normkit import METHODS, api
from normkit.catalogue.entry import NAMESPACES
from normkit.core.card import Card
from normkit.core.errors import ShapeError

ROOT = Path(__file__).parent.parent
SPACES = [nk, *(each for name in api.__all__ if isinstance(each := getattr(api, name), ModuleType))]
VERBS = {"accelerate", "apply_recipe", "audit", "condition", "convert", "fold", "recalibrate"}


def fresh(code: str) -> list[str]:
    """The words that code prints in a process of its own."""
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return process.stdout.split()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys, normkit; print('torch' in sys.modules, hasattr(normkit, '__wrapped__'))", 2 * ["False"]),
        ("import sys, normkit.catalogue.entry as e; e.entries(); print('torch' in sys.modules)", ["False"]),
        *((f"from {name} import *; print('METHODS' in dir())", ["True"]) for name in ("normkit", "normkit.catalogue")),
        *((f"import {name}; print('METHODS' in dir({name}))", ["True"]) for name in ("normkit", "normkit.catalogue")),
    ],
)
def test_names_wait_and_are_there_from_the_first_statement(code: str, said: list[str]) -> None:
    assert fresh(code) == said


def test_the_layers_import_torch_alone() -> None:
    loaded = fresh(
        "import sys, torch; before = set(sys.modules); import normkit; normkit.METHODS; "
        "print(*set(sys.modules) - before)"
    )
    assert "normkit.activations.batch_norm" in loaded
    assert {name.split(".")[0] for name in loaded} <= {"normkit", "torch", *sys.stdlib_module_names}


def test_the_layers_start_without_the_compiler() -> None:
    loaded = fresh("import sys, normkit; normkit.METHODS; print(*sys.modules)")
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(loaded)


def test_the_face_is_small() -> None:
    # torch.nn has 182 names and optax 190; what a reader can take in at once is far less.
    assert 60 <= len(nk.__all__) <= 80
    assert {name for name in dir(nk) if not name.startswith("__")} == set(nk.__all__) == set(api.__all__)


def test_every_public_name_is_reached_in_every_way() -> None:
    for space in SPACES:
        starred: dict[str, object] = {}
        exec(f"from {space.__name__} import *", starred)
        assert sorted(set(starred) - {"__builtins__"}) == sorted(space.__all__)
        for key in space.__all__:
            assert starred[key] is resolve_name(f"{space.__name__}:{key}") is getattr(space, key)
            assert key in dir(space)


def test_a_name_has_one_namespace() -> None:
    spaces = [space for space in SPACES if space is not nk]
    places = Counter(name for space in spaces for name in space.__all__)
    assert [name for name, number in places.items() if number > 1] == []
    # A name at the top is there alone, or is a verb, an error or the list, whose namespace has its kin.
    shared = set(places) & set(nk.__all__)
    assert shared == {"METHODS", "NormkitError", *VERBS}


def test_a_verb_is_not_hidden_by_its_module() -> None:
    verbs = ("weights.weight_norm", "surgery.fold", "surgery.select")
    imports = "; ".join(f"import normkit.{verb}" for verb in verbs)
    assert fresh(f"{imports}; print({', '.join(f'callable(normkit.{verb})' for verb in verbs)})") == 3 * ["True"]


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'normkit' has no attribute 'BachNorm'") as caught:
        nk.BachNorm  # noqa: B018
    assert caught.value.name == "BachNorm"  # by which Python suggests another


def test_imports_go_downward() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    process = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("card", METHODS, ids=lambda card: card.name)
def test_every_method_is_at_its_place(card: Card) -> None:
    assert resolve_name(f"{NAMESPACES[card.kind]}:{card.module.__name__}") is card.module
    assert getattr(nk.functional, card.functional.__name__) is card.functional


def test_every_layer_is_at_the_top() -> None:
    for path in sorted((ROOT / "src/normkit/activations").glob("[a-z]*.py")):
        module = f"normkit.activations.{path.stem}"
        for key, thing in vars(import_module(module)).items():
            if isinstance(thing, type) and issubclass(thing, nn.Module) and thing.__module__ == module:
                assert key.startswith("_") or getattr(nk, key) is thing


FUNCTIONS = {
    "batch_norm": (nk.functional.batch_norm, F.batch_norm),
    "layer_norm": (nk.functional.layer_norm, F.layer_norm),
    "rms_norm": (nk.functional.rms_norm, F.rms_norm),
    "group_norm": (nk.functional.group_norm, F.group_norm),
    "instance_norm": (nk.functional.instance_norm, F.instance_norm),
    "local_response_norm": (nk.functional.local_response_norm, F.local_response_norm),
}
# Attention's arguments are torch's too: query, key, value.
FIRST = {"query_key_norm": "query", "preconditioned_attention": "query"}


@pytest.mark.parametrize("card", [card for card in METHODS if card.kind in ("activation", "input")], ids=name)
def test_the_first_argument_is_the_input(card: Card) -> None:
    assert next(iter(inspect.signature(card.functional).parameters)) == FIRST.get(card.name, "input")
    if card.kind == "activation":
        assert list(inspect.signature(card.module.forward).parameters)[1] == FIRST.get(card.name, "input")


@pytest.mark.parametrize("which", FUNCTIONS)
def test_functions_take_torchs_keywords(which: str) -> None:
    ours, theirs = FUNCTIONS[which]
    wanted = [key for key in inspect.signature(theirs).parameters if key != "cudnn_enabled"]
    assert list(inspect.signature(ours).parameters)[: len(wanted)] == wanted
    values: dict[str, Tensor | float | bool | tuple[int, ...]] = {
        "input": torch.randn(2, 4, 6), "running_mean": torch.zeros(4), "running_var": torch.ones(4),
        "normalized_shape": (6,), "num_groups": 2, "size": 3, "k": 1.0, "eps": 1e-3,
    }  # fmt: skip
    size = 6 if "normalized_shape" in wanted else 4
    values |= {"weight": torch.rand(size), "bias": torch.rand(size)}
    given = {key: value for key, value in values.items() if key in wanted}
    assert_close(ours(**given), theirs(**given))


def numpys(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(numpys(each) for each in value)
    return np.int64(value) if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("card", ACTIVATIONS, ids=name)
def test_sizes_may_be_numpys(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = card.make(4).eval(), sample_input(card, dtype=torch.float32)
    build, signature = type(plain).__init__, inspect.signature(type(plain).__init__)

    def with_numpys(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for key, value in bound.arguments.items():
            bound.arguments[key] = numpys(value)
        build(*bound.args, **bound.kwargs)

    monkeypatch.setattr(type(plain), "__init__", with_numpys)
    made = card.make(4).eval()
    made.load_state_dict(plain.state_dict())
    assert_close(call(card, made, x), call(card, plain, x), rtol=0, atol=0)
    assert not [key for key, value in vars(made).items() if isinstance(value, np.integer)]


def test_functions_take_numpys_sizes_too() -> None:
    x, f, two = torch.randn(2, 6, 6), nk.functional, np.int64(2)
    for function, *sizes in (
        *((f.layer_norm, 6), (f.rms_norm, (6,)), (f.group_norm, 2), (f.ghost_batch_norm, 2)),
        *((f.batch_group_norm, 2, 2), (f.local_context_norm, 2, 2), (f.local_response_norm, 2)),
    ):
        assert_close(function(x, *numpys(tuple(sizes))), function(x, *sizes), rtol=0, atol=0)
    assert_close(nk.normalize(x, nk.Support("n (g c) *", over="c *", g=two)), f.group_norm(x, 2), rtol=0, atol=0)


@pytest.mark.parametrize("function", [nk.functional.layer_norm, nk.functional.rms_norm, F.layer_norm, F.rms_norm])
def test_no_axes_are_no_normalized_shape(function: Any) -> None:
    with pytest.raises(RuntimeError, match="at least"):
        function(torch.ones(3), ())
    for layer in (nk.LayerNorm, nk.RMSNorm):
        with pytest.raises(ShapeError, match="at least one trailing axis"):
            layer(())


def test_a_batch_without_channels_passes_as_in_torch() -> None:
    for training in (True, False):
        empty, none = torch.zeros(0), torch.zeros(0)
        assert nk.functional.batch_norm(empty, none, none, training=training).shape == (0,)
        assert F.batch_norm(empty, none, none, training=training).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 1), 1), *((shape, 4) for shape in ((1, 4), (1, 4, 1), (2, 4), (1, 4, 2), (0, 4)))]
)
@pytest.mark.parametrize("mode", [True, False])
def test_one_value_a_group_is_refused_where_torch_refuses_it(shape: tuple[int, ...], groups: int, mode: bool) -> None:
    x, layers = torch.randn(shape), (nk.GroupNorm(groups, shape[1]), nn.GroupNorm(groups, shape[1]))
    calls = [lambda f=f: f(x) for f in (layer.train(mode) for layer in layers)]
    calls += [lambda f=f: f(x, groups) for f in (nk.functional.group_norm, F.group_norm)]
    if shape[0] == 1 and x.numel() == groups:
        for each in calls:
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                each()
    else:
        for each in calls:
            assert each().shape == shape
