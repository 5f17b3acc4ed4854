"""What the README and the docs show runs as it stands, and what they list is current."""

import ast
import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import laws
import normkit as nk
import test_laws
import test_words
from normkit.catalogue import citation, drawing, entry, methods, page, table
from normkit.catalogue.table import with_tables
from normkit.cli import app
from normkit.core.card import Card
from normkit.engine import operator
from normkit.lab.experiments import FILES, names
from normkit.lab.models.convolutional import digits_inception
from normkit.lab.protocol import DATA, MODELS, load_factory
from normkit.surgery import target
from normkit.surgery.recipe import apply_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


# Of other people's trainers.
@pytest.mark.filterwarnings("ignore:.*(LeafSpec|pin_memory|num_workers|log_every_n_steps):Warning")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_of_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # where comparisons leave their records
    names: dict[str, object] = {}
    for block in blocks(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMKIT_DATA", raising=False)  # by which one of them reads photographs
    pytest.importorskip("matplotlib", reason="they draw by the extra [lab]").use("agg")
    names: dict[str, object] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            # The cell of sizes keeps small ones too.
            exec(compile(cell["metadata"].get("small", "".join(cell["source"])), str(path), "exec"), names)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda one: one.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        there = page.parent / place if place else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text()), link


def test_tables_of_methods_are_current() -> None:
    text = (ROOT / "docs/methods.md").read_text()
    assert with_tables(text) == text, "run: python -m normkit.catalogue.table docs/methods.md"


def test_the_readme_names_every_method_once() -> None:
    table = (ROOT / "README.md").read_text().partition("\n## Methods\n")[2].partition("\n## ")[0]
    rows = "".join(row for row in table.splitlines() if row.startswith("|"))
    assert sorted(re.findall(r"`(\w+)`", rows)) == sorted(card.name for card in nk.METHODS)


def test_there_is_one_version() -> None:
    citation, changes = (ROOT / "CITATION.cff").read_text(), (ROOT / "CHANGELOG.md").read_text()
    date = re.search(r"^date-released: (\S+)$", citation, flags=re.MULTILINE)
    assert f"\nversion: {nk.__version__}\n" in citation
    assert date
    assert f"\n## {nk.__version__} - {date[1]}\n" in changes


def test_the_map_of_the_readme_is_the_tree() -> None:
    listed = set(re.findall(r"^    src/normkit/(\w+)/", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    there = {path.parent.name for path in (ROOT / "src/normkit").glob("*/__init__.py")}
    assert listed == there


def test_every_page_is_in_the_menu_and_on_the_first_page() -> None:
    menu, first = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs/index.md").read_text()
    pages = list((ROOT / "docs").glob("*.md"))
    for path in (*pages, *(ROOT / "docs/reference").glob("*.md")):
        assert f"- {path.relative_to(ROOT / 'docs')}" in menu
    assert [path.name for path in pages if f"({path.name})" not in first] == ["index.md"]


def test_the_reference_has_every_name_once() -> None:
    text = "".join(page.read_text() for page in sorted((ROOT / "docs/reference").glob("*.md")))
    spaces = {name for name in nk.__all__ if isinstance(getattr(nk, name), ModuleType)}
    shown = set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))
    # What a package loads late stands in its api.
    modules = {f"normkit.{name}" + ".api" * (name == "catalogue") for name in spaces}
    callbacks = {"normkit.diagnostics.lightning", "normkit.diagnostics.transformers"}
    assert shown == {"normkit.api", "normkit.lab.outcome", *callbacks, *modules}
    # The verbs stand with surgery and diagnostics, the list with the catalogue, the base of all errors with the errors.
    elsewhere = {*nk.surgery.__all__, *nk.diagnostics.__all__, "METHODS", "NormkitError"}
    top = [name for name in re.findall(r"^ +- (\w+)$", text, flags=re.MULTILINE) if name in nk.__all__]
    assert sorted(top) == sorted(set(nk.__all__) - spaces - elsewhere)


def test_every_recipe_shown_for_the_built_in_model_applies_to_it() -> None:
    sources = [*PAGES, ROOT / "src/normkit/cli/laboratory.py", ROOT / "Makefile"]
    lines = [line for path in sources for line in path.read_text().splitlines() if "--recipes" in line]
    lines = [line for line in lines if line[0] != "|"]
    shown = {recipe for line in lines if "--model" not in line for recipe in re.findall(r"--recipes ([\w:,+@]+)", line)}
    assert shown
    for recipes in shown:
        for recipe in recipes.split(","):
            apply_recipe(digits_inception(), recipe)


def test_every_experiment_is_listed() -> None:
    text = (ROOT / "docs/experiments.md").read_text()
    for kind in FILES:
        for name in names(kind):
            assert re.search(rf"^\|[^|]*`{re.escape(name)}`[^|]*\|", text, flags=re.MULTILINE), name


def test_every_result_has_its_place_and_its_figures() -> None:
    index, nav = (ROOT / "docs/results/index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    pages = sorted((ROOT / "docs/results").glob("*/result.md"))
    assert pages
    for path in pages:
        place = path.relative_to(ROOT / "docs/results").as_posix()
        assert f"]({place})" in index, place
        assert f"results/{place}" in nav, place
        for figure in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text()):
            assert (path.parent / figure).exists(), f"{place}: {figure}"


def test_the_page_of_what_we_lean_on_is_current() -> None:
    first = re.findall(r"^\| `(torch\.[\w.]+)` \|", (ROOT / "docs/lean-on.md").read_text(), flags=re.MULTILINE)
    used = internals()
    for name in used:
        assert any(f"{name}.".startswith(f"{listed}.") for listed in first), f"{name}, used in {used[name]}"
        assert resolve_name(name) is not None
    for listed in first:
        assert any(f"{name}.".startswith(f"{listed}.") for name in used), f"{listed} is used no more"


def test_the_compiler_reads_the_mark_that_we_set() -> None:
    def marked() -> bool:
        return True

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) == vars(operator.available)


def test_the_table_of_contexts_is_current() -> None:
    compatibility = importlib.import_module("compatibility")
    text = compatibility.PAGE.read_text()
    assert compatibility.with_table(text) == text, "run: python tests/compatibility.py"


# Built-in models and data, commands and pages are named wherever a user looks for them

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


# The method that CONTRIBUTING adds in one file really gets everything


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


# The parts of torch that begin with an underscore and that the package uses, found in its sources

SOURCE = Path(__file__).parent.parent / "src/normkit"


def private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in dotted.split("."))


def chain(node: ast.AST) -> str:
    """The dotted name that an expression is, or ""."""
    if isinstance(node, ast.Name):
        return node.id
    inner = chain(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if isinstance(node, ast.Attribute) and inner else ""


def used(path: Path) -> Iterator[str]:
    """The full names of torch's private parts in a file."""
    tree = ast.parse(path.read_text())
    meant: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                top = name.name.split(".")[0]
                meant[name.asname or top] = name.name if name.asname else top
        elif isinstance(node, ast.ImportFrom):
            meant |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    yield from (full for full in meant.values() if full.startswith("torch.") and private(full))
    for node in ast.walk(tree):
        first, _, rest = chain(node).partition(".")
        full = f"{meant.get(first, '')}.{rest}"
        if rest and full.startswith("torch.") and private(full):
            yield full


def internals() -> dict[str, set[str]]:
    """Each private part of torch in the package, the longest names of them, with the files that use it."""
    found: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if "lab" in path.parts:
            continue
        names = set(used(path))
        for name in names:
            if not any(other.startswith(f"{name}.") for other in names):
                found.setdefault(name, set()).add(path.relative_to(SOURCE).as_posix())
    return found
