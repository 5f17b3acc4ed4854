"""What the README and the docs show runs as it stands, and what they list is current."""

import importlib
import json
import re
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType

import pytest
import torch

import normkit as nk
from internals import internals
from normkit.catalogue.table import with_tables
from normkit.core.errors import NotationError
from normkit.engine import operator
from normkit.lab.experiments import FILES, names
from normkit.lab.models.convolutional import digits_inception
from normkit.surgery.recipe import apply_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings(
    "ignore:.*(LeafSpec|pin_memory|num_workers|log_every_n_steps):Warning"
)  # other people's trainers
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
    heads = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda path: path.stem
)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        there = page.parent / place if place else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text()), link


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/methods.md"], ids=lambda path: path.name)
def test_tables_of_methods_are_current(page: Path) -> None:
    text = page.read_text()
    assert with_tables(text) == text, "run: python -m normkit.catalogue.table README.md docs/methods.md"


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(NotationError, match="<!-- methods -->"):
        with_tables("nothing here")


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


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/reference").glob("*.md")):
        assert f"- {page.relative_to(ROOT / 'docs')}" in menu


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
    lines = [
        line for page in sources for line in page.read_text().splitlines() if "--recipes" in line and line[0] != "|"
    ]
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
    for page in pages:
        place = page.relative_to(ROOT / "docs/results").as_posix()
        assert f"]({place})" in index, place
        assert f"results/{place}" in nav, place
        for figure in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / figure).exists(), f"{place}: {figure}"


def test_the_page_of_what_we_lean_on_is_current() -> None:
    first = re.findall(r"^\| `(torch\.[\w.]+)` \|", (ROOT / "docs/lean-on.md").read_text(), flags=re.MULTILINE)
    used = internals()
    for name in used:
        assert any(f"{name}.".startswith(f"{listed}.") for listed in first), f"{name}, used in {used[name]}"
    for listed in first:
        assert any(f"{name}.".startswith(f"{listed}.") for name in used), f"{listed} is used no more"


def test_what_we_lean_on_is_there() -> None:
    for name in internals():
        assert resolve_name(name) is not None


def test_the_compiler_reads_the_mark_that_we_set() -> None:
    def marked() -> bool:
        return True

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) == vars(operator.available)


def test_the_table_of_contexts_is_current() -> None:
    compatibility = importlib.import_module("compatibility")
    text = compatibility.PAGE.read_text()
    assert compatibility.with_table(text) == text, "run: python tests/compatibility.py"
