"""The page in a real browser: no errors, nothing cut, and what one points at, clicks and drags responds."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report needs the extra [lab]")

from matplotlib.image import imread

from comparison_records import record_of, write_comparison
from normkit.lab import comparison
from normkit.lab.report.drawing import styles
from normkit.lab.report.sheet import write_sheet

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A Chromium without a sandbox runs as root too; it asks nothing of the network, and keeps nothing.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--no-first-run",
)
DARK = "--blink-settings=preferredColorScheme=0"
LONG = "gn:gcd4+e:rowcol@re:^blocks\\.[0-9]+\\.branch[0-9]+\\.conv$"
RECIPES = ("bn", "bn+ws", "bn+wn", LONG)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="there is no Chromium; apt-get install chromium, or .ci/run as root"
)

# Headless Chromium has no window below 500 pixels, so the page lies in a frame of the width of a phone.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="frame" style="border:0" width="{width}" height="6000" srcdoc="{page}"></iframe><script>{script}</script>"""
SCRIPT = Path(__file__).with_name("page_check.js")


def browse(folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """What Chromium prints, and what the page's console said."""
    assert BROWSER
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "LANG": "C"}
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def look(page: Path, width: int, *flags: str) -> dict[str, Any]:
    """The page at a width, as it looks and as it responds."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(
        FRAME.format(width=width, page=html.escape(page.read_text()), script=SCRIPT.read_text()), encoding="utf-8"
    )
    text, said = browse(page.parent, *flags, f"--window-size={max(width, 500)},900", "--dump-dom", frame.as_uri())
    assert said == []
    found = re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)
    assert found, text[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    found = record_of(write_comparison(folder, recipes=RECIPES))
    return write_sheet(comparison.reread(found), found, [], folder)


@pytest.mark.parametrize("width", [400, 1200])
def test_page_responds_and_nothing_is_cut(page: Path, width: int) -> None:
    found = look(page, width)
    assert found["width"] <= width
    assert found["cut"] == []
    assert found["overlapping"] == []
    assert found["silent"] == []
    assert found["hidden"] > 0
    assert found["back"] == 0
    assert found["views"] == ["end of training", "whole training"]
    for recipe in RECIPES:
        assert f"{recipe}: 0." in found["validation"]
    assert "seeds: " in found["differences"]


def test_dark_page_has_its_own_colours(page: Path) -> None:
    light, dark = look(page, 400), look(page, 400, DARK)
    assert light["ground"] == "rgb(255, 255, 255)"
    assert dark["ground"] == "rgb(21, 22, 26)"
    assert light["line"] != dark["line"]


@pytest.mark.parametrize("flags", [(), (DARK,)])
def test_what_must_be_there_is_painted(page: Path, flags: tuple[str, ...]) -> None:
    picture = page.with_suffix(".png")
    _, said = browse(page.parent, *flags, "--window-size=1200,6000", f"--screenshot={picture}", page.as_uri())
    assert said == []
    pixels = set(np.unique(np.rint(255 * imread(picture)[..., :3]).astype(int) @ (1 << 16, 1 << 8, 1)).tolist())
    for each in styles(list(RECIPES), RECIPES[0]):
        assert int((each.dark if flags else each.light)[1:], 16) in pixels
