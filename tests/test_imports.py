"""What may import what, and what the package offers."""

import subprocess
import sys
from pathlib import Path

import normkit as nk
from normkit.catalogue import METHODS

ROOT = Path(__file__).parent.parent


def test_the_layers_import_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import normkit; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    foreign = set(process.stdout.split()) & {
        *("lightning_fabric", "lightning", "matplotlib", "plotly", "rich", "scipy", "sklearn", "typer", "transformers"),
    }
    assert not foreign


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
