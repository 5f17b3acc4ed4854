"""The pages under docs/results are what ``normkit report`` makes of the small records next to them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from normkit.lab.experiments import FILES, names, reshow
from normkit.lab.report import drawing

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
