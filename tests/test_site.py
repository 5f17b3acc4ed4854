"""The documentation's site: it builds without a warning, weighs little, and its text can be read in the light and in the dark."""

import html
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from test_pages import BROWSER, answer

ROOT = Path(__file__).parent.parent
PAGES = ("index", "install", "methods", "training-loop", "atlas", "reference/weights", "results/table1/result")

chromium = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium; apt-get install chromium, or .ci/run")
pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason="the site needs the extra [docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder


def ask(page: Path, script: str) -> Any:
    """What a script leaves on a copy of a page."""
    marked = page.with_name(f"{page.stem}-asked.html")
    marked.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return answer(page.parent, "--virtual-time-budget=8000", "--window-size=1300,3000", marked.as_uri())


def test_every_page_loads_little_and_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue  # it may be shown at any address, so its links begin at the root of a server
        text = page.read_text()
        links = re.findall(r"<(?:img|script|link)\b[^>]*?\b(?:src|href)=\"?([^\s\">]+)", text)
        links = {html.unescape(link) for link in links if not link.startswith(("data:", "#"))}
        assert not [link for link in links if "//" in link], page
        sizes = {link: (page.parent / link.partition("?")[0]).stat().st_size for link in links if link[-5:] != ".html"}
        pictures = sum(size for link, size in sizes.items() if link.endswith((".png", ".gif", ".svg")))
        inside = sum(map(len, re.findall(r"\bdata:image/[^\"'\s>]+", text)))
        rest, pictures = sum(sizes.values()) - pictures + len(text) - inside, pictures + inside
        assert rest < 1_000_000, page
        assert pictures < 3_000_000, page


@chromium
@pytest.mark.parametrize("name", PAGES)
def test_text_stands_out_from_its_ground(site: Path, name: str) -> None:
    found = ask(site / f"{name}.html", Path(__file__).with_name("contrast.js").read_text())
    assert found["default"][2] != found["slate"][2]
    for scheme in ("default", "slate"):
        texts, faint, _ = found[scheme]
        assert texts > 50
        assert faint == {}, scheme


SEARCH = """addEventListener("load", () => setTimeout(() => {
  document.querySelector("#__search").click();
  const box = document.querySelector("[data-md-component=search-query]");
  box.focus();
  box.value = "Lanczos";
  box.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
  const told = document.createElement("pre");
  told.id = "found";
  setTimeout(() => document.body.append(told), 3000);
  setInterval(() => told.textContent = document.querySelectorAll(".md-search-result__item").length, 100);
}, 1000))"""


@chromium
def test_search_works_from_the_folder(site: Path) -> None:
    assert ask(site / "install.html", SEARCH) > 0
