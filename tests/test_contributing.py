"""The method that CONTRIBUTING adds in one file really gets everything."""

import importlib.util
import inspect
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

import laws
import test_laws
import test_words
from normkit.catalogue import citation, drawing, entry, methods, page, table
from normkit.core.card import Card
from normkit.surgery import target

ROOT = Path(__file__).parent.parent


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file, as a module, with its card in the catalogue."""
    (source,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    path = tmp_path / "positional_group_norm.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("positional_group_norm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "positional_group_norm", module)
    spec.loader.exec_module(module)
    more = (*methods.METHODS, module.CARD)
    for place in (methods, table, citation, drawing):
        monkeypatch.setattr(place, "METHODS", more)
    known = (*entry.entries(), entry.describe(module.CARD))
    for place in (entry, page):
        monkeypatch.setattr(place, "entries", lambda: known)
    monkeypatch.setattr(test_laws, "RULES", [*test_laws.RULES, module.CARD])
    return module


def laws_for(card: Card) -> Iterator[tuple[str, object, dict[str, object]]]:
    """Every law that a card alone decides, with each value of its other arguments."""
    for name, law in vars(test_laws).items():
        parameters = inspect.signature(law).parameters if name.startswith("test_") else {}
        if "card" not in parameters or "data" in parameters or "monkeypatch" in parameters:
            continue  # not a law over cards, or one that needs more than a card and plain values
        cases: list[dict[str, object]] = [{}]
        for mark in getattr(law, "pytestmark", []):
            argument, values = mark.args[:2]
            if argument == ("card", "backend"):
                cases = [{**case, "backend": backend} for case in cases for _, backend in laws.on_back_ends([card])]
            elif argument != "card":
                cases = [{**case, argument: value} for case in cases for value in values]
            elif isinstance(values, test_laws.Applying) and not values.applies(card):
                cases = []
        for case in cases:
            yield name, law, {"card": card, **case}


def test_it_keeps_the_laws(added: ModuleType) -> None:
    kept = 0
    for name, law, arguments in laws_for(added.CARD):
        try:
            law(**arguments)  # pyright: ignore[reportCallIssue]
        except pytest.skip.Exception:
            continue
        except AssertionError as error:
            raise AssertionError(f"{name} {arguments}: {error}") from error
        kept += 1
    assert kept > 30


def test_it_has_a_page_a_picture_a_row_and_a_citation(added: ModuleType, tmp_path: Path) -> None:
    out = io.StringIO()
    page.show_page("positional_group_norm", Console(file=out, width=100))
    page.list_table(Console(file=out, width=160))
    assert out.getvalue().count("positional_group_norm") >= 2
    assert "◆" in out.getvalue()
    (picture,) = drawing.draw_methods(["positional_group_norm"], tmp_path)
    assert picture.stat().st_size > 2000
    assert "Positional group normalization" in table.methods_table()
    assert "Positional group normalization" in table.comparison_table()
    assert citation.methods_in(added.PositionalGroupNorm(1, 2)) == [added.CARD]


@pytest.mark.parametrize("model", test_words.MODELS)
def test_its_word_stands_in_models(added: ModuleType, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "METHODS", methods.METHODS)
    test_words.test_every_activation_method_has_a_word_that_stands_somewhere_or_a_reason(added.CARD)
    test_words.test_every_word_stands_in_a_model_or_says_why_not(added.CARD, model)
    test_words.test_a_norm_that_stands_by_its_word_is_read_back(added.CARD)
