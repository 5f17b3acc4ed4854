"""What may import what, and what the package offers."""

import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest
from torch import nn

import normkit as nk
from normkit import api
from normkit.catalogue import METHODS
from normkit.catalogue.entry import NAMESPACES
from normkit.core.card import Card

ROOT = Path(__file__).parent.parent
SPACES = [nk, *(each for name in api.__all__ if isinstance(each := getattr(api, name), ModuleType))]
VERBS = {"accelerate", "apply_recipe", "audit", "condition", "convert", "fold", "recalibrate"}


def fresh(code: str) -> list[str]:
    """The words that code prints in a process of its own."""
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return process.stdout.split()


def test_the_package_waits_for_its_names() -> None:
    assert fresh("import sys, normkit; print('torch' in sys.modules, hasattr(normkit, '__wrapped__'))") == 2 * ["False"]


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


def test_the_catalogue_waits_for_its_names_too() -> None:
    assert fresh(
        "import sys, normkit.errors, normkit.catalogue.entry as e; e.entries(); print('torch' in sys.modules)"
    ) == ["False"]


def test_the_face_is_small() -> None:
    # torch.nn has 182 names and optax 190; what a reader can take in at once is far less.
    assert 60 <= len(nk.__all__) <= 80
    assert {name for name in dir(nk) if not name.startswith("__")} == set(nk.__all__) == set(api.__all__)


def test_every_public_name_is_reached_in_every_way() -> None:
    for space in SPACES:
        starred: dict[str, object] = {}
        exec(f"from {space.__name__} import *", starred)
        assert set(starred) - {"__builtins__"} == set(space.__all__)
        for name in space.__all__:
            assert starred[name] is resolve_name(f"{space.__name__}:{name}") is getattr(space, name)
            assert name in dir(space)


@pytest.mark.parametrize("first", ["normkit", "normkit.catalogue"])
def test_names_are_there_from_the_first_statement(first: str) -> None:
    assert fresh(f"from {first} import *; print('METHODS' in dir())") == ["True"]
    assert fresh(f"import {first}; print('METHODS' in dir({first}))") == ["True"]


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
        for name, thing in vars(import_module(f"normkit.activations.{path.stem}")).items():
            if (
                isinstance(thing, type)
                and issubclass(thing, nn.Module)
                and thing.__module__ == f"normkit.activations.{path.stem}"
            ):
                assert name.startswith("_") or getattr(nk, name) is thing


def test_public_names_are_there_once() -> None:
    for space in SPACES:
        assert sorted(set(space.__all__)) == sorted(space.__all__)
        assert all(hasattr(space, name) for name in space.__all__)
