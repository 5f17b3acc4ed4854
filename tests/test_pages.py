"""Pages: results from their records, tables in a terminal, the report and the atlas in a real browser."""

import html
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

import normkit as nk
from comparison_records import record_of, write_comparison
from normkit.catalogue.diagram import members
from normkit.core.errors import NormkitError
from normkit.engine.plan import plan
from normkit.lab import comparison
from normkit.lab.experiment import Table
from normkit.lab.experiments import FILES, names, reshow
from normkit.lab.report import drawing
from normkit.lab.report.palette import styles
from normkit.lab.report.sheet import write_sheet
from normkit.lab.report.terminal import cell, print_table, side_by_side

RESULTS = Path(__file__).parents[1] / "docs/results"
PAGES = sorted(page.parent.name for page in RESULTS.glob("*/result.md"))


def test_every_page_has_its_record() -> None:
    assert all((RESULTS / name / "result.json").exists() for name in PAGES)
    assert set(PAGES) <= {name for kind in FILES for name in names(kind)}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn_from_its_record(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "DPI", 20)  # figures are compared by name alone
    page, text = RESULTS / name, (RESULTS / name / "result.json").read_text()
    shutil.copy(page / "result.json", tmp_path)
    reshow(tmp_path)
    # Words of the experiment or the catalogue have changed: `normkit report docs/results/NAME` draws the page again.
    assert (tmp_path / "result.md").read_text() == (page / "result.md").read_text()
    pictures = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert pictures == {path.name for path in (page / "figures").glob("*.png")}
    assert len(text) < 400_000
    assert not re.search(r"/(work|tmp|home|root)/", text)
    assert json.loads(text)["experiment"]["name"] == name


def printed(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(table, console)
    return console.export_text()


def test_a_wide_table_is_parted_for_a_narrow_terminal() -> None:
    table = Table("T", ["name", "one two three", "b", "c"], [["row", "1", "2" * 12, "3"]])
    assert side_by_side(table, Console(width=80)) == [[0, 1, 2, 3]]
    assert side_by_side(table, Console(width=30)) == [[0, 1, 2], [0, 3]]
    assert side_by_side(table, Console(width=5)) == [[0, 1], [0, 2], [0, 3]]
    assert "one two three" in printed(table, 80)
    assert "2" * 12 in printed(table, 30)


WORDS = st.lists(st.text("abcdef", min_size=1, max_size=14), min_size=1, max_size=5).map(" ".join)
CELLS = st.one_of(st.none(), st.floats(allow_nan=False), st.integers(), WORDS, st.just("[bold]"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(*(st.lists(c, min_size=n, max_size=n) for c in (WORDS, CELLS)))))
def test_a_terminal_of_80_columns_shows_all_cells_and_headings(drawn: tuple[list[str], list[Any]]) -> None:
    columns, row = drawn
    shown = printed(Table("T", columns, [row, row[::-1]]), 80)
    for text in (*columns, *map(cell, row)):
        for word in text.split():
            assert word in shown


def test_many_recipes_are_told_apart() -> None:
    looks = styles([str(index) for index in range(20)], "0")
    assert len({(look.light, look.marker, look.line) for look in looks}) == 20


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A Chromium without a sandbox runs as root too; it asks nothing of the network, and keeps nothing.
FLAGS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr --no-first-run".split()
DARK = "--blink-settings=preferredColorScheme=0"
LONG = "gn:gcd4+e:rowcol@re:^blocks\\.[0-9]+\\.branch[0-9]+\\.conv$"
RECIPES = ("bn", "bn+ws", "bn+wn", LONG)

needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")

# Headless Chromium has no window below 500 pixels, so the page lies in a frame of the width of a phone.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="frame" style="border:0" width="{width}" height="6000" srcdoc="{page}"></iframe><script>{script}</script>"""
SCRIPT = Path(__file__).with_name("page_check.js")


def browse(folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """What Chromium prints, and what the page's console said."""
    assert BROWSER
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", *arguments]
    environ = {**os.environ, "LANG": "C"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environ)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def answer(folder: Path, *arguments: str) -> Any:
    """What a page has in its element "found"; the console must stay silent."""
    text, said = browse(folder, *arguments, "--dump-dom")
    assert said == []
    found = re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)
    assert found, text[-2000:]
    return json.loads(html.unescape(found[1]))


def look(page: Path, width: int, *flags: str) -> dict[str, Any]:
    """The page at a width, as it looks and as it responds."""
    frame = page.with_name(f"frame-{width}.html")
    inside = FRAME.format(width=width, page=html.escape(page.read_text()), script=SCRIPT.read_text())
    frame.write_text(inside, encoding="utf-8")
    return answer(page.parent, *flags, f"--window-size={max(width, 500)},900", frame.as_uri())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    found = record_of(write_comparison(folder, recipes=RECIPES))
    return write_sheet(comparison.reread(found), found, [], folder)


@needs_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_page_responds_and_nothing_is_cut(page: Path, width: int) -> None:
    found = look(page, width)
    assert found["width"] <= width
    assert (found["cut"], found["overlapping"], found["silent"]) == ([], [], [])
    assert found["hidden"] > 0
    assert (found["back"], found["views"]) == (0, ["end of training", "whole training"])
    for recipe in RECIPES:
        assert f"{recipe}: 0." in found["validation"]
    assert "seeds: " in found["differences"]


@needs_browser
@pytest.mark.parametrize("flags", [(), (DARK,)])
def test_what_must_be_there_is_painted(page: Path, flags: tuple[str, ...]) -> None:
    picture = page.with_suffix(".png")
    _, said = browse(page.parent, *flags, "--window-size=1200,6000", f"--screenshot={picture}", page.as_uri())
    assert said == []
    pixels = set(np.unique(np.rint(255 * imread(picture)[..., :3]).astype(int) @ (1 << 16, 1 << 8, 1)).tolist())
    for each in styles(list(RECIPES), RECIPES[0]):
        assert int((each.dark if flags else each.light)[1:], 16) in pixels


DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS / "extensions"))
import atlas  # noqa: E402

PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>{style}</style><body data-md-color-scheme="default"><div id="atlas" class="atlas"></div>{island}
<script>{support}</script><script>{script}</script>
<pre id="found"></pre><script>document.getElementById("found").textContent = JSON.stringify({found})</script>"""


def found(folder: Path, expression: str, *, ui: bool, width: int = 1200) -> Any:
    """What a JavaScript expression gives on the page."""
    text = PAGE.format(
        style=(DOCS / "stylesheets/atlas.css").read_text(),
        island=atlas.on_page_markdown("<!-- atlas -->"),
        support=(DOCS / "javascripts/support.js").read_text(),
        script=(DOCS / "javascripts/atlas.js").read_text() if ui else "",
        found=expression,
    )
    (folder / "atlas.html").write_text(text, encoding="utf-8")
    return answer(folder, f"--window-size={width},900", (folder / "atlas.html").as_uri())


def notations(number: int) -> Iterator[dict[str, Any]]:
    """Random notations, right and wrong ones, with sizes and an element."""
    draw = random.Random(7)
    names = ["n", "c", "g", "d", "h2", "_x", "\u03b1", "*"]
    for _ in range(number):
        axes, left = [], draw.sample(names, len(names))
        for _ in range(draw.randint(1, 4)):
            inner = draw.choice((1, 1, 1, 2, 3))
            group, left = left[:inner], left[inner:]
            axes.append(f"({' '.join(group)})" if inner > 1 else "".join(group))
        if draw.random() < 0.1:
            axes.insert(draw.randrange(len(axes) + 1), draw.choice(("(", ")", "2a", "*", "n", "()", "c-d")))
        text = draw.choice((" ", "  ")).join(axes)
        words = re.findall(r"[\w*]+", text) or ["n"]
        over = draw.sample(words, draw.randint(0, len(words)))
        given = {name: draw.choice((1, 2, 3)) for name in words if name != "*" and draw.random() < 0.6}
        size, last = draw.choice((1, 2, 4, 6)), draw.random() < 0.5
        yield {"axes": text, "over": " ".join(over), "given": given, "size": size, "last": last}


def in_python(row: dict[str, Any]) -> list[Any] | None:
    """What Python makes of a notation: its split, the elements that share the first one's statistic, the loop nest."""
    try:
        support = nk.Support(row["axes"], over=row["over"])
        inside = {name for group in support.groups if len(group) > 1 for name in group}
        support = nk.Support(row["axes"], over=row["over"], **{k: v for k, v in row["given"].items() if k in inside})
        shape = [row["size"]] * len(support.groups)
        split = support.split(shape)
    except (NormkitError, SyntaxError):
        return None
    order = list(range(len(shape)))
    if row["last"] and len(shape) > 2:
        order.append(order.pop(1))
    x = torch.empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])
    nest = plan(split, x.view(split.shape).stride(), None)
    shared = members(support, shape).flatten().int().tolist()
    return [list(split.shape), shared, None if isinstance(nest, str) else nest.kind]


IN_JAVASCRIPT = """rows.map(({axes, over, given, size, last}) => {
  try {
    const support = Support.read(axes, over);
    const inside = new Set(support.groups.filter((group) => group.length > 1).flat());
    const sizes = Object.fromEntries(Object.entries(given).filter(([name]) => inside.has(name)));
    const split = Support.split(support, support.groups.map(() => size), sizes);
    return [split.shape, Support.members(split, 0).map(Number), Support.nest(split, Support.order(support, last))];
  } catch (error) {
    if (error instanceof Support.NotationError) return null;
    throw error;
  }
})"""


@needs_browser
def test_javascript_reads_a_thousand_notations_as_python_does(tmp_path: Path) -> None:
    rows = list(notations(1000))
    wanted = [in_python(row) for row in rows]
    assert 100 < sum(row is None for row in wanted) < 900
    got = found(tmp_path, f"((rows) => {IN_JAVASCRIPT})({json.dumps(rows)})", ui=False)
    for row, ours, theirs in zip(rows, wanted, got, strict=True):
        assert theirs == ours, row


MOVED = """(() => {
  const at = () => document.querySelector('.atlas-grid button[tabindex="0"]');
  const key = (key) => at().dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const choose = (id, value, kind) => {
    const box = document.getElementById(id);
    box.value = value;
    box.dispatchEvent(new Event(kind));
  };
  const look = () => ({
    said: document.querySelector(".atlas-said, .atlas-error").textContent,
    at: at()?.getAttribute("aria-label"),
    set: document.querySelectorAll(".atlas-grid .set").length,
    facts: document.querySelector(".atlas-facts")?.textContent ?? "",
  });
  const seen = [look()];
  choose("atlas-method", "layer_norm", "change"); seen.push(look());
  choose("atlas-method", "group_norm", "change"); key("ArrowRight"); key("ArrowDown"); key("PageDown"); seen.push(look());
  document.querySelector('.atlas-cube polygon[data-at="0"]').dispatchEvent(new Event("click")); seen.push(look());
  choose("atlas-size-0", "2", "change"); choose("atlas-memory", "last", "change"); seen.push(look());
  choose("atlas-over", "c k", "input"); seen.push(look());
  return {seen, wide: document.documentElement.scrollWidth, options: document.querySelectorAll("#atlas-method option").length};
})()"""


@needs_browser
@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_answers_keys_clicks_and_text(tmp_path: Path, width: int) -> None:
    page = found(tmp_path, MOVED, ui=True, width=width)
    first, layer, group, clicked, small, wrong = page["seen"]
    assert first["said"] == "One statistic for each of 6 channels, over 4 samples \u00d7 5 positions = 20."
    assert first["set"] == 19
    assert "over 6 features" in layer["said"]
    assert group["at"] == "element 1, 1, 1"
    assert group["set"] == 9  # two channels of five positions, but for the element itself
    assert "loop nest: row" in group["facts"]
    assert "nn.GroupNorm" in group["facts"]
    assert clicked["at"] == "element 0, 0, 0"
    assert "2 samples \u00d7 2 groups = 4" in small["said"]
    assert "loop nest: block" in small["facts"]
    assert "over= names axis 'k'" in wrong["said"]
    assert page["wide"] <= width
    assert page["options"] == 1 + sum(card.rule is not None for card in nk.METHODS)


def test_lines_to_copy_run() -> None:
    by_name = {card.name: card for card in nk.METHODS}
    for name, row in atlas.elsewhere().items():
        names = {"nk": nk, "x": torch.randn(8, 64), "layer": torch.nn.Linear(4, 6), "model": torch.nn.Linear(3, 2)}
        made = eval(row["line"], names)
        if by_name[name].kind in ("activation", "input"):
            assert isinstance(made, by_name[name].module), name


def test_names_of_torch_exist() -> None:
    for row in atlas.elsewhere().values():
        if first := row.get("torch", "").split(",")[0]:
            owner = torch.nn.functional if first.startswith("F.") else torch
            for part in first.removeprefix("F.").split("."):
                owner = getattr(owner, part)
