"""What may import what, and what the package offers."""

import subprocess
import sys
from pathlib import Path

import pytest

import normkit as nk
from normkit import api
from normkit.catalogue import METHODS

ROOT = Path(__file__).parent.parent


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


def test_every_public_name_is_reached_in_every_way() -> None:
    assert fresh("import normkit, normkit.api as api; print(set(api.__all__) <= set(dir(normkit)))") == ["True"]
    assert fresh("from normkit import *; import normkit.api as api; print({*api.__all__} <= {*dir()})") == ["True"]
    for name in api.__all__:
        assert getattr(nk, name) is getattr(api, name)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'normkit' has no attribute 'BachNorm'") as caught:
        nk.BachNorm  # noqa: B018
    assert caught.value.name == "BachNorm"  # by which Python suggests another


def test_imports_go_downward() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    process = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def test_every_method_is_in_the_package() -> None:
    for card in METHODS:
        for thing in (card.module, card.functional):
            assert getattr(nk, thing.__name__, None) is thing, f"normkit.{thing.__name__} is missing"


def test_public_names_are_there_once() -> None:
    assert len(set(nk.__all__)) == len(nk.__all__)
    for name in nk.__all__:
        assert hasattr(nk, name)
