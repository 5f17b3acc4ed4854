"""The report is a pure function of the records, says what they say, and asks nothing of the network."""

import copy
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report needs the extra [lab]")

import matplotlib
from rich.cells import cell_len
from rich.console import Console

from comparison_records import Page, charts, record_of, write_comparison
from normkit.core.errors import RecordError
from normkit.lab import comparison
from normkit.lab.perform import show
from normkit.lab.report import drawing, figures
from normkit.lab.report.canvas import LOOK
from normkit.lab.report.drawing import save
from normkit.lab.report.series import pictures
from normkit.lab.report.sheet import print_sheet, write_sheet
from normkit.lab.report.wording import cautions, findings, ms_per_step, number, verdict
from normkit.surgery.target import OVER_POSITIONS

HOSTILE = "<script>alert('$x$')</script>&\"[red]%{y}"
ALL_LOST = tuple((recipe, seed) for recipe in ("bn", "bn+ws", "bn+wn", "bn+e") for seed in range(3))


def printed(result: dict[str, Any], width: int, encoding: str = "utf-8") -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_sheet(comparison.EXPERIMENT, {"result": result}, Console(file=buffer, width=width))
    buffer.seek(0)
    return buffer.read()


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    return save(comparison.figures(result), folder / "figures")


def paged(result: dict[str, Any], folder: Path, title: str | None = None) -> str:
    found = record_of(result, title)
    return write_sheet(comparison.reread(found), found, [], folder).read_text(encoding="utf-8")


def with_interval(result: dict[str, Any], index: int, low: float | None, high: float | None) -> dict[str, Any]:
    changed = copy.deepcopy(result)
    changed["recipes"][index]["paired"].update(low=low, high=high)
    return changed


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the time that fine figures take where their look is not asked for."""
    monkeypatch.setattr(drawing, "DPI", 40)


NAMES = (*("validation_score", "training_loss", "paired_differences"), *("learning_rates", "condition_numbers", "cost"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return write_comparison(out)


@pytest.fixture(scope="module")
def page(out: Path, result: dict[str, Any]) -> Page:
    return Page(paged(result, out))


@pytest.mark.parametrize("width", [80, 120, 160])
def test_table_fits_and_says_every_number(result: dict[str, Any], width: int) -> None:
    text = printed(result, width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    for recipe in result["recipes"]:
        assert recipe["recipe"] in text
        for value, kind in (
            (recipe["rate"], "rate"),
            (recipe["test_score"]["mean"], "score"),
            (recipe["test_score"]["std"], "score"),
            (recipe["paired"]["low"], "difference"),
            (ms_per_step(recipe, result)[0], "ms"),
            (recipe["cost"]["ratio"], "ratio"),
            (recipe["cost"]["mb_per_step"], "mb"),
            (recipe["condition"]["last"]["effective"][-1], "condition"),
        ):
            assert recipe is result["recipes"][0] or number(value, kind) in text
    assert "+-" in printed(result, width, encoding="ascii")
    assert "0.3†" in text
    assert "widen it with --rates" in " ".join(text.split())


def test_long_and_hostile_names_fold(tmp_path: Path) -> None:
    text = printed(write_comparison(tmp_path, recipes=(HOSTILE, "rms+e:rowcol@re:^blocks\\.[0-9]+\\.conv$")), 80)
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "[red]" in text


def test_better_than_a_baseline_whose_rate_is_at_the_edge_is_doubted(result: dict[str, Any]) -> None:
    changed = with_interval(result, 3, 0.001, 0.015)
    assert verdict(changed["recipes"][3], changed) == "better"
    changed["recipes"][0]["rate_at_edge"] = True
    assert "bn's\nlearning rate is\nat the edge" in verdict(changed["recipes"][3], changed)
    assert "bn's learning rate is at the edge of its sweep" in findings(changed)[0]
    # Of worse, the recipe's own learning rate may be the reason.
    changed = with_interval(with_interval(result, 3, 0.001, 0.015), 1, -0.02, -0.001)
    changed["recipes"][1]["rate_at_edge"] = True
    assert "bn+ws is worse than bn, but see † for bn+ws." in findings(changed)


def test_milliseconds_agree_with_the_ratio_whose_interval_is_shown(result: dict[str, Any]) -> None:
    changed = copy.deepcopy(result)
    changed["recipes"][1]["cost"].update(ms_per_step=11.0, ratio=1.5, ratio_interval=[1.25, 1.75])
    base = changed["recipes"][0]["cost"]["ms_per_step"]
    text = printed(changed, 120)
    assert f"{1.5 * base:.1f}" in text
    assert "1.50× [1.25, 1.75]" in text
    assert "shift with how busy the machine was" in " ".join(text.split())


def test_words_layers_and_changes_are_named(result: dict[str, Any]) -> None:
    text = " ".join(printed(result, 160).split())
    assert "wn: weight normalization (Salimans and Kingma 2016)" in text
    assert "stem.conv (first)" in text
    assert "head.linear (last)" in text
    assert "WeightNorm" in text
    changed = copy.deepcopy(result)
    changed["recipes"][1]["passed_over"] = ["pool: MaxPool2d has no weight"]
    assert "pool: MaxPool2d has no weight" in " ".join(printed(changed, 160).split())


def test_verdicts_and_findings_follow_the_interval(result: dict[str, Any]) -> None:
    for low, high, word in ((0.001, 0.02, "better"), (-0.02, -0.001, "worse"), (-0.001, 0.02, "no difference shown")):
        changed = with_interval(result, 3, low, high)
        assert verdict(changed["recipes"][3], changed).startswith(word)
    assert "includes zero: no difference shown" in findings(result)[0]
    sure = findings(with_interval(result, 3, 0.001, 0.015))[0]
    assert "better, as far as these seeds tell" in sure
    assert "+0.0010 to +0.0150" in sure
    assert "bn+ws is worse than bn." in findings(with_interval(result, 1, -0.02, -0.001))


def test_seeds_that_agree_are_the_reason_for_no_verdict(result: dict[str, Any]) -> None:
    changed = with_interval(result, 3, 0.01, 0.01)
    changed["recipes"][3]["paired"]["mean"] = 0.01
    assert verdict(changed["recipes"][3], changed).startswith("no difference shown")
    assert "0.0100 above the baseline bn, but all seeds agree, which leaves no spread" in findings(changed)[0]
    assert any(note.startswith("bn+e: all seeds agree on the difference from bn, so") for note in cautions(changed))
    assert not any("all seeds agree" in note for note in cautions(result))


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    result = write_comparison(tmp_path, seeds=1)
    assert "there is no interval" in findings(result)[0]
    assert verdict(result["recipes"][1], result) == "one seed: no interval"
    assert printed(result, 80).count("±") == 1  # in the title


def test_lost_runs_are_told(tmp_path: Path) -> None:
    result = write_comparison(tmp_path, diverged=(("bn+wn", 1), *((("bn+ws", seed)) for seed in range(3))))
    told = cautions(result)
    assert "bn+ws diverged in 3 of 3 seeds; it has no numbers." in told
    assert "bn+wn diverged in 1 of 3 seeds; its numbers are of the other 2." in told
    assert verdict(result["recipes"][1], result) == "diverged"


def test_a_norm_over_positions_of_a_causal_model_is_told(tmp_path: Path) -> None:
    result = write_comparison(tmp_path)
    assert not any("causal" in note for note in cautions(result))
    result["recipes"][1]["changes"] = [f"norm: LayerNorm(8) -> GroupNorm(4, 8) ({OVER_POSITIONS})"]
    assert f"{result['recipes'][1]['recipe']}: {OVER_POSITIONS}." in cautions(result)


def test_a_singular_weight_does_not_flatten_the_others(tmp_path: Path) -> None:
    result = write_comparison(tmp_path, epochs=4)
    result["recipes"][1]["condition"]["first"]["effective"] = [5e7, None, 4e7, 5e7]
    assert ">8e+06" in printed(result, 80)
    assert any("as good as singular" in note for note in cautions(result))
    axis = figures.figure(next(of for of in pictures(result) if of.name == "condition_numbers"), result).axes[0]
    assert axis.get_ylim()[1] < 1e3
    assert "bn+ws" in axis.texts[0].get_text()


def test_what_lost_a_seed_is_not_judged(tmp_path: Path) -> None:
    # The seeds that are left were chosen by how they fared, on either side.
    for lost, others in (("bn+e", ["bn+e"]), ("bn", ["bn+ws", "bn+wn", "bn+e"])):
        result = write_comparison(tmp_path / lost, diverged=((lost, 0),))
        for recipe in result["recipes"]:
            assert ("2 of 3 seeds,\nnot judged" == verdict(recipe, result)) == (recipe["recipe"] in others)
    assert "not judged" in findings(result)[0]


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("options", [{"seeds": 1}, {"diverged": ALL_LOST}, {"epochs": 2}, {"recipes": ("bn",)}])
def test_every_report_of_a_poor_comparison(tmp_path: Path, options: dict[str, Any]) -> None:
    result = write_comparison(tmp_path, **options)
    assert printed(result, 80)
    assert all(path.stat().st_size for path in draw(result, tmp_path))
    assert "<h1>" in paged(result, tmp_path)


@pytest.mark.usefixtures("coarse")
def test_all_null(tmp_path: Path) -> None:
    result = write_comparison(tmp_path, diverged=ALL_LOST)
    result["target"] = None
    for recipe in result["recipes"]:
        recipe.update(rate=None, changes=None, parameters=None, paired=None, cost=None, condition=None, test_score=None)
        for entry in recipe["sweep"] + recipe["runs"]:
            entry.update({key: None for key in entry if key.endswith(("score", "loss", "target"))})
    assert "every run diverged" in " ".join(printed(result, 80).split())
    draw(result, tmp_path)
    assert "every run diverged" in paged(result, tmp_path)


def test_page_numbers_are_their_values_rounded(page: Page, result: dict[str, Any]) -> None:
    assert len(page.numbers) > 80
    for value, title, text in page.numbers:
        assert value == title
        shown = re.fullmatch(r"([+\u2212]?[\d,]*\.?\d+(?:e[+-]\d+)?)\D*", text)
        if shown:  # minutes, hours and what is too large to resolve apart
            digits = shown[1].replace(",", "").replace("\u2212", "-")
            unit = 10.0 ** -len(digits.partition(".")[2].partition("e")[0])
            unit *= 10.0 ** int(digits.partition("e")[2] or 0)
            assert abs(float(digits) - float(value)) <= 0.5001 * unit
    known = {value for value, _, _ in page.numbers}
    for recipe in result["recipes"]:
        assert {repr(float(run["test_loss"])) for run in recipe["runs"]} <= known
        assert {repr(float(run["val_score"])) for run in recipe["sweep"]} <= known


def test_page_charts_equal_the_record(out: Path, result: dict[str, Any]) -> None:
    drawn = charts(paged(result, out))["panels"]
    for index, recipe in enumerate(result["recipes"]):
        texts = [(out / run["run"] / "metrics.jsonl").read_text(encoding="utf-8") for run in recipe["runs"]]
        lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
        scores = [sum(row[epoch]["val_score"] for row in lines) / 3 for epoch in range(20)]
        curve = next(line for line in drawn["validation"]["lines"] if line["recipe"] == index)
        # Both are float64 means of the same three numbers.
        assert curve["y"] == pytest.approx(scores, rel=1e-12)
        assert drawn["megabytes"]["rows"][index]["value"] == recipe["cost"]["mb_per_step"]
    means = [row["value"] for row in drawn["differences"]["rows"]]
    assert means == [recipe["paired"]["mean"] for recipe in result["recipes"][1:]]


def test_curves_open_at_the_end_of_training_where_they_lie_close(result: dict[str, Any]) -> None:
    (panel,) = pictures(result)[0].panels
    assert panel.close
    (start, stop), (low, high) = panel.close
    ends = [y for line in panel.lines for x, y in zip(line.x, line.y, strict=True) if x > 15 and y is not None]
    assert (round(start), round(stop)) == (10, 20)
    assert low <= min(ends) <= max(ends) <= high
    assert high - low < 0.1
    # One hopeless recipe of four does not stretch the view.
    hopeless = copy.deepcopy(result)
    for run in hopeless["recipes"][1]["runs"]:
        run["curve"]["val_score"] = [0.1] * 20
    (panel,) = pictures(hopeless)[0].panels
    assert panel.close
    assert panel.close[1][0] > 0.8


def test_page_fetches_nothing(page: Page, out: Path) -> None:
    assert not page.fetches
    assert not {"link", "base", "img", "iframe", "object", "embed"} & set(page.tags)
    # It may be mailed alone: what lies next to it is named, not linked.
    assert not page.links
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", "".join(page.scripts[:1]))
    assert len(text) < 500_000


def test_page_is_whole(page: Page, out: Path, result: dict[str, Any]) -> None:
    assert page.tags.count("h1") == 1
    assert {"main", "table", "caption", "figure", "figcaption", "noscript"} <= set(page.tags)
    words = " ".join(" ".join(page.words).split())
    folders = [run["run"] for recipe in result["recipes"] for run in recipe["runs"] + recipe["sweep"]]
    assert all((out / folder).is_dir() for folder in folders)
    changes, said = result["recipes"][3]["changes"], ("It covers", "It does not cover", "2.13.0+cpu")
    for text in (record_of(result)["command"], *changes, *said, *findings(result), *folders):
        assert text in words


@pytest.mark.usefixtures("coarse")
def test_page_escapes_what_the_records_say(tmp_path: Path) -> None:
    result = write_comparison(tmp_path, recipes=("bn", HOSTILE))
    result["task"]["score"] = HOSTILE
    result["recipes"][1]["changes"] = [HOSTILE]
    found = record_of(result, HOSTILE)
    for place in ("config", "environment"):
        found[place][HOSTILE] = HOSTILE
    found["command"] = shlex.quote(HOSTILE)
    page = Page(write_sheet(comparison.reread(found), found, [], tmp_path).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2
    assert not any("alert(" in script for script in page.scripts if not script.startswith("{"))
    data = next(script for script in page.scripts if script.startswith("{"))
    assert "<" not in data
    assert HOSTILE in "".join(page.words)
    assert draw(result, tmp_path)


@pytest.mark.usefixtures("coarse")
def test_same_records_give_the_same_figures_and_page(out: Path, result: dict[str, Any]) -> None:
    written = draw(result, out)
    before, page = [path.read_bytes() for path in written], paged(result, out)
    assert [path.read_bytes() for path in draw(result, out)] == before
    assert paged(result, out) == page
    assert {path.name for path in written} == {f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")}
    for path, content in zip(written, before, strict=True):
        assert content.startswith(b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else b"<?xml")
    assert {path.name for path in (out / "figures").iterdir()} == {path.name for path in written}


def test_figures_cut_nothing_and_leave_room_beside_long_names(tmp_path: Path) -> None:
    long = "gn:gcd4+e:rowcol@re:^blocks\\.[0-9]+\\.branch[0-9]+\\.conv$"
    lost = tuple((long, seed) for seed in range(3))
    result = write_comparison(tmp_path, recipes=("bn", "bn+wn", long), diverged=lost)
    result["recipes"][1]["cost"].update(ratio=1.2, ratio_interval=[0.4, 3.0])
    for each in comparison.figures(result):
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **LOOK}):
            figure = each.make()
            figure.draw_without_rendering()
        drawn = figure.get_tightbbox()
        # 0.02 inches for how letters are rounded to pixels.
        assert min(drawn.x0, drawn.y0) > -0.02, each.name
        assert drawn.x1 < figure.get_figwidth() + 0.02, each.name
        assert drawn.y1 < figure.get_figheight() + 0.02, each.name
        for axis in figure.axes:
            assert axis.get_window_extent().width > 0.2 * figure.bbox.width
            if each.name == "cost":
                ends = [float(x) for line in axis.get_lines() for x in line.get_xdata()]
                assert max(ends, default=0) < axis.get_xlim()[1]


def test_unwritable_folder_is_named(tmp_path: Path, result: dict[str, Any]) -> None:
    (tmp_path / "figures").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(RecordError, match="figures"):
        draw(result, tmp_path)


@pytest.mark.usefixtures("coarse")
def test_all_of_a_comparison_is_shown_as_of_any_experiment(tmp_path: Path, result: dict[str, Any]) -> None:
    found = record_of(result)
    show(comparison.reread(found), found, tmp_path, Console(quiet=True))
    assert {path.name for path in tmp_path.iterdir()} >= {"figures", "report.html", "result.md"}
    text = (tmp_path / "result.md").read_text()
    for words in ("`normkit compare --data digits", "Each recipe tries every learning rate", *findings(result)):
        assert words in text
