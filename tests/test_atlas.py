"""The atlas of support sets: its data, its reading of the notation beside Python's, and the page in a browser."""

import json
import random
import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

import normkit as nk
from normkit.catalogue.diagram import members
from normkit.core.errors import NormkitError
from normkit.engine.plan import plan
from test_browser import BROWSER, browse

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS / "extensions"))
import atlas  # noqa: E402

chromium = pytest.mark.skipif(
    BROWSER is None, reason="there is no Chromium; apt-get install chromium, or .ci/run as root"
)
PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>{style}</style><body data-md-color-scheme="default"><div id="atlas" class="atlas"></div>{island}
<script>{support}</script><script>{script}</script>
<pre id="found"></pre><script>document.getElementById("found").textContent = JSON.stringify({found})</script>"""


def found(folder: Path, expression: str, *, ui: bool, width: int = 1200) -> Any:
    """What a JavaScript expression gives on the page; the console must stay silent."""
    text = PAGE.format(
        style=(DOCS / "stylesheets/atlas.css").read_text(),
        island=atlas.on_page_markdown("<!-- atlas -->"),
        support=(DOCS / "javascripts/support.js").read_text(),
        script=(DOCS / "javascripts/atlas.js").read_text() if ui else "",
        found=expression,
    )
    (folder / "atlas.html").write_text(text, encoding="utf-8")
    dom, said = browse(folder, f"--window-size={width},900", "--dump-dom", (folder / "atlas.html").as_uri())
    assert said == []
    answer = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert answer, dom[-2000:]
    return json.loads(unescape(answer[1]))


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
        yield {
            "axes": text,
            "over": " ".join(over),
            "given": given,
            "size": draw.choice((1, 2, 4, 6)),
            "last": draw.random() < 0.5,
        }


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


@chromium
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


@chromium
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
