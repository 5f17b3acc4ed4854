"""What a comparison does beyond one sweep and equal epochs: further rates, equal time, a budget, and what its seeds can show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import ttest_rel

import lab_samples
from comparison_records import write_comparison
from normkit.core.errors import OptionError, RecordError
from normkit.lab import record, stats, task
from normkit.lab.comparison import _begun_with, _planned, remarks, tables
from normkit.lab.report.wording import judge
from normkit.lab.rounds import fit, measure
from normkit.lab.settings import Settings
from normkit.lab.stats import detectable, holm, over_seeds, over_seeds_and_samples, paired_interval
from normkit.lab.study import Made, Study
from normkit.lab.train.parallel import Processes, start_fabric

SMALL = replace(lab_samples.SMALL, extend=True)


def ran(folder: Path, settings: Settings = SMALL, text: StringIO | None = None, **options: Any) -> dict[str, Any]:
    console = {} if text is None else {"console": Console(file=text, width=300)}
    return lab_samples.compared(folder, settings, **console, **options)["result"]


@dataclass(frozen=True)
class Try:
    """A job with a rate."""

    rate: float
    path: str = ""


class Bowl:
    """A bench on which the score falls with the distance of a rate from the best one."""

    def __init__(self, best: float) -> None:
        self.best = best

    def sweep(self, function: Callable[[Any, Path], Any], jobs: Sequence[Try]) -> list[dict[str, Any]]:
        return [{"rate": job.rate, "score": -abs(job.rate / self.best - self.best / job.rate)} for job in jobs]


@given(st.floats(1e-6, 1e4), st.lists(st.integers(-3, 3), min_size=2, max_size=4, unique=True))
def test_a_sweep_extends_until_the_best_rate_is_inside(best: float, powers: list[int]) -> None:
    rates = sorted(10.0**power for power in powers)

    def look(found: Any) -> dict[str, Any]:
        return {"status": "ok", "score": found["score"], "loss": None, "reached": 1}

    jobs = {"a": [Try(rate) for rate in rates]}
    (row,) = stats.tune(Bowl(best), lambda *_: {}, jobs, look, lambda _, rate: Try(rate)).values()
    tried = [run["rate"] for run in row["sweep"]]
    below, above = sum(rate < rates[0] for rate in tried), sum(rate > rates[-1] for rate in tried)
    assert tried == sorted(set(tried))
    assert {*rates} <= {*tried}
    assert max(below, above) <= stats.FURTHER
    # Where it still lies at an edge, as many were tried beyond that edge as may be.
    assert not row["edge"] or stats.FURTHER == (below if row["rate"] == tried[0] else above)
    assert row["edge"] or tried[0] < row["rate"] < tried[-1]


def test_further_rates_are_said_and_recorded(tmp_path: Path) -> None:
    text = StringIO()
    result = ran(tmp_path, replace(SMALL, rates=(0.01, 0.02)), text)
    for recipe in result["recipes"]:
        tried = [run["rate"] for run in recipe["sweep"]]
        assert recipe["extended"]
        assert tried == sorted([0.01, 0.02, *recipe["extended"]])
        assert [two / one for one, two in pairwise(tried)] == pytest.approx([2.0] * (len(tried) - 1))
        assert f"{recipe['recipe']}: the best rate lies at the edge of the sweep; " in text.getvalue()
    assert "beyond the rates given" in text.getvalue()
    plain = ran(tmp_path / "plain", replace(SMALL, rates=(0.01, 0.02), extend=False))
    assert [recipe["extended"] for recipe in plain["recipes"]] == [[], []]


COSTS = {"keep": {"ratio": 1.0, "ratio_interval": None}, "keep+e": {"ratio": 1.5, "ratio_interval": (1.4, 1.6)}}


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the second recipe takes half as long again."""
    shared = {"ms_per_step": 2.0, "ms_quartiles": [1.0, 3.0], "mb_per_step": 1.0, "rounds": 6}
    costs = {name: {**shared, **cost} for name, cost in COSTS.items()}
    monkeypatch.setattr("normkit.lab.study.measure_costs", lambda *given: costs)


@pytest.mark.usefixtures("slower")
def test_equal_time_is_a_training_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, rates=(0.2,), equal_time=True)
    base, slow = ran(tmp_path / "out", settings)["recipes"]
    assert (base["equal_time"]["epochs"], slow["equal_time"]["epochs"]) == (3, 2)
    assert base["equal_time"]["test_score"] == base["test_score"]
    short = ran(tmp_path / "short", replace(settings, epochs=2, equal_time=False))["recipes"][1]
    assert slow["equal_time"]["test_score"] == short["test_score"]
    pairs = zip(short["runs"], base["runs"], strict=True)
    differences = [one["test_score"] - other["test_score"] for one, other in pairs]
    assert slow["equal_time"]["paired"]["differences"] == differences
    monkeypatch.setattr("normkit.lab.study.Trainer.train", lambda *given: pytest.fail("trained again"))
    text = StringIO()
    ran(tmp_path / "out", settings, text)  # read back
    assert "At keep's training time" in text.getvalue()


@pytest.mark.usefixtures("slower")
def test_hours_of_a_full_training(tmp_path: Path) -> None:
    base, slow = ran(tmp_path, replace(SMALL, rates=(0.2,), full_epochs=90))["recipes"]
    assert base["full_hours"] == pytest.approx(4 * 90 * 2e-3 / 3600)  # 128 samples are 4 steps of 32
    assert slow["full_hours"] == pytest.approx(1.5 * base["full_hours"])


SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4)


@given(st.floats(11, 1e6), SECONDS, st.integers(1, 100), st.booleans(), st.booleans())
def test_a_budget_is_kept(budget: float, seconds: list[float], epochs: int, extend: bool, equal: bool) -> None:
    settings = Settings(budget=budget, epochs=epochs, extend=extend, equal_time=equal)
    times = {str(place): each for place, each in enumerate(seconds)}
    try:
        found = fit(settings, times)
    except OptionError:
        return
    runs = len(found.rates) + extend + len(found.seeds) - 1 + equal * len(found.seeds)
    assert sum(seconds) * runs * found.epochs <= budget
    assert 1 <= found.epochs <= epochs
    assert len(found.seeds) >= 3
    assert set(found.rates) <= set(settings.rates)
    # Epochs are given up only where seeds and rates are.
    assert found.epochs == epochs or (len(found.rates), len(found.seeds)) == (3, 3)


def test_a_budget_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"budget is 12 s; 3 rates and 3 seeds .* about 89 s; wanted at least that"):
        fit(Settings(budget=12.0), {"bn": 10.5})
    settings, text = replace(SMALL, rates=(), seeds=(0,), budget=60.0), StringIO()
    monkeypatch.setattr("normkit.lab.comparison.measure", lambda made: {"keep": 0.5, "keep+e": 0.7})
    first = ran(tmp_path, settings, text)
    assert "a budget of 60 s fits 3 epochs per run, 4 rates and 5 seeds of each recipe" in text.getvalue()
    assert {len(recipe["runs"]) for recipe in first["recipes"]} == {5}
    monkeypatch.setattr("normkit.lab.comparison.measure", lambda made: pytest.fail("measured again"))
    assert ran(tmp_path, settings) == first
    monkeypatch.setattr("normkit.lab.comparison.measure", lambda made: {"keep": 0.5, "keep+e": 0.7})
    with pytest.raises(RecordError, match=r"budget is 60\.0 there, 70\.0 now"):
        ran(tmp_path, replace(settings, budget=70.0))
    # Replacing records that is stopped goes on as it was planned, though times differ each time they are measured.
    plan = {**record.read_json(tmp_path / "config.json"), "epochs": 2}
    record.write_json(tmp_path / "overwrite.json", {"wanted": plan, "removed": True})
    planned = _planned(Study(settings), _begun_with(tmp_path, True), Processes(start_fabric(settings)))
    assert planned.epochs == 2


def test_what_an_epoch_takes_is_measured() -> None:
    found = measure(Made(Study(SMALL, lab_samples.model, lab_samples.data)))
    assert list(found) == ["keep", "keep+e"]
    assert min(found.values()) > 0


@pytest.mark.parametrize(
    ("model", "data"), [(lab_samples.model, lab_samples.data), (lab_samples.one_output, lab_samples.regression),
                        (lab_samples.Tagger, lab_samples.tokens), (lab_samples.model, lab_samples.dataset)]
)  # fmt: skip
def test_what_samples_add_up_to_is_the_score(tmp_path: Path, model: Any, data: Any) -> None:
    settings = replace(SMALL, recipes=("keep",), seeds=(0,), rates=(0.05,), epochs=1)
    run = ran(tmp_path, settings, model=model, data=data)["recipes"][0]["runs"][0]
    marks = record.read_numbers(tmp_path / run["run"] / "test.npz")
    targets = Made(Study(settings, model, data)).data.test.targets
    part = marks.sum() / float(task.sizes(targets).sum())
    # Squared errors are kept in single precision.
    assert (1 - part if targets.is_floating_point() else part) == pytest.approx(run["test_score"], rel=1e-5)


def test_resampled_intervals(tmp_path: Path) -> None:
    settings = replace(SMALL, seeds=(0, 1, 2), rates=(0.2,), epochs=2)
    plain = ran(tmp_path, settings)["recipes"][1]["paired"]
    found = ran(tmp_path, replace(settings, resample=True))["recipes"][1]["paired"]
    assert (plain["covers"], found["covers"]) == (["seeds"], ["seeds", "test samples"])
    assert (found["mean"], (found["low"] + found["high"]) / 2) == (plain["mean"], pytest.approx(found["mean"]))
    assert found["high"] - found["low"] > 0


def test_without_a_spread_of_samples_the_bootstrap_is_students_t() -> None:
    seeds = np.array([0.1, 0.3, 0.2, -0.1])
    found = over_seeds_and_samples(np.repeat(seeds[:, None], 500, 1), np.ones(500))
    wanted = over_seeds(list(seeds))
    assert found
    assert wanted
    assert (found.mean, found.freedom) == (pytest.approx(wanted.mean), wanted.freedom)
    # 2,000 draws give a standard deviation to 1 / sqrt(2 * 2000) = 1.6 %; four times that.
    assert found.error == pytest.approx(wanted.error, rel=0.064)


def test_resampled_intervals_cover_what_both_draw() -> None:
    drawn, held = np.random.default_rng(1), 0
    for _ in range(200):
        gains = 0.02 + drawn.normal(0, 0.02, (4, 1)) + drawn.normal(0, 0.3, (1, 200)) + drawn.normal(0, 0.2, (4, 200))
        found = over_seeds_and_samples(gains, np.ones(200))
        assert found
        low, high = found.ends(0.95)
        held += low <= 0.02 <= high
    assert held >= 184  # of a true coverage of 0.95 this fails once in ten thousand times


@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(0, 1), max_size=6))
def test_holm_is_its_definition(chances: dict[str, float]) -> None:
    found = holm(chances)
    ranked = sorted(chances.values())
    for name, p in chances.items():
        before = [min(1.0, (len(ranked) - place) * each) for place, each in enumerate(ranked) if each <= p]
        assert found[name] == max(before) >= p


@pytest.mark.parametrize(("seeds", "level"), [(2, 0.9), (3, 0.95), (5, 0.99), (12, 0.95)])
def test_a_detectable_difference_is_found_in_four_of_five(seeds: int, level: float) -> None:
    least = detectable(1.0, seeds, level)
    drawn = np.random.default_rng(0).normal(least, 1.0, (4000, seeds))
    found = (over_seeds(list(row)) for row in drawn)
    shown = sum(each is not None and each.ends(level)[0] > 0 for each in found)
    # A share of 0.8 among 4,000 has the standard deviation 0.0063; four of these.
    assert shown / 4000 == pytest.approx(0.8, abs=0.026)
    assert stats.seeds_for(detectable(0.7, seeds, level) * (1 + 1e-9), 0.7, level) == seeds


def test_verdicts_on_all_recipes_together(tmp_path: Path) -> None:
    result = write_comparison(tmp_path)
    (table,) = (each for each in tables(result) if each.title == "All recipes judged together")
    for row, recipe in zip(table.rows, result["recipes"][1:], strict=True):
        assert row[0] == recipe["recipe"]
        assert recipe["paired"]["holm"] >= recipe["paired"]["p"]
        better = recipe["paired"]["holm"] <= 0.05
        assert (row[3] != "no difference shown") == better
    assert any("true difference of" in remark and "four of five" in remark for remark in remarks(result))


def test_what_is_free_changes_over_the_runs_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path, replace(SMALL, extend=False))
    monkeypatch.setattr("normkit.lab.study.Trainer.train", lambda *given: pytest.fail("trained again"))
    narrow = ran(tmp_path, replace(SMALL, extend=False, level=0.5, target=0.1, rates=(0.2,)))
    assert [len(recipe["sweep"]) for recipe in narrow["recipes"]] == [1, 1]
    assert (narrow["target"]["score"], narrow["recipes"][1]["paired"]["level"]) == (0.1, 0.5)


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_equals_scipy(count: int, level: float) -> None:
    rng = np.random.default_rng(count)
    ours, theirs = rng.normal(0.9, 0.02, count), rng.normal(0.88, 0.02, count)
    expected = ttest_rel(ours, theirs).confidence_interval(level)
    found = paired_interval(list(ours - theirs), level)
    assert found.low == pytest.approx(expected.low, rel=1e-9)  # two ways to sum a few doubles
    assert (found.high, found.mean) == (pytest.approx(expected.high, rel=1e-9), pytest.approx(np.mean(ours - theirs)))


def test_few_and_equal_differences_decide_nothing() -> None:
    for differences, mean, end in (([], None, None), ([0.25], 0.25, None), ([0.5] * 3, 0.5, 0.5)):
        found = paired_interval(differences)
        assert (found.mean, found.low, found.high) == (mean, end, end)
    paired = {"mean": 0.01, "low": 0.01, "high": 0.01, "n": 3}
    recipe = {"recipe": "bn+e", "test_score": {"mean": 0.9, "n": 3}, "runs": [{"status": "ok"}], "paired": paired}
    assert judge(recipe, "bn") == "even"
    assert judge({**recipe, "paired": {**paired, "low": 0.005}}, "bn") == "better"
