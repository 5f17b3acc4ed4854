"""Built-in models and data, commands and pages are named wherever a user looks for them."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from normkit.cli import app
from normkit.lab.protocol import DATA, MODELS, load_factory

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/compare.md").read_text()


@pytest.mark.parametrize(("option", "builtin"), [("--model", MODELS), ("--data", DATA)])
def test_help_and_page_name_them_all(option: str, builtin: dict[str, str]) -> None:
    text = " ".join(CliRunner().invoke(app, ["compare", "--help"]).output.split())
    assert f" {', '.join(builtin)}, or package.module:factory" in text
    table = PAGE.split(f"| `{option}` |")[1].split("\n\n")[0]
    firsts = " ".join(row.split("|")[1] for row in table.splitlines()[2:])
    assert re.findall(r"`(\w+)`", firsts) == list(builtin)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vit_b16", "dit")])
def test_models_take_the_inputs_that_the_page_says(name: str) -> None:
    row = next(row for row in PAGE.splitlines() if row.startswith("| ") and f"`{name}`" in row)
    side, channels = (8, 1) if "8x8" in row.split("|")[3] else (32, 3)
    assert load_factory(name, MODELS)().eval()(torch.zeros(2, channels, side, side)).shape == (2, 10)


def test_the_readme_shows_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert "bench" in commands
    assert [name for name in commands if f"\n    normkit {name} " not in text] == []


def test_the_first_page_links_every_other() -> None:
    text = (ROOT / "docs/index.md").read_text()
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and f"({page.name})" not in text
    ] == []
