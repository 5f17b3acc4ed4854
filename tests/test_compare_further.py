"""What a comparison does beyond one sweep and equal epochs: further rates, equal time, a budget, and what its seeds can show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import lab_samples
from normkit.lab.comparison import compare
from normkit.lab.settings import Settings
from normkit.lab.stats import FURTHER, tune

SMALL = Settings(
    recipes=("keep", "keep+e"), seeds=(0, 1), rates=(0.05, 0.2), epochs=3, batch_size=32, accelerator="cpu"
)


def ran(folder: Path, settings: Settings = SMALL, text: StringIO | None = None, **options: Any) -> dict[str, Any]:
    console = Console(quiet=True) if text is None else Console(file=text, width=300)
    options = {"model": lab_samples.model, "data": lab_samples.data, "report": False, **options}
    return compare(settings, folder, console=console, **options)["result"]


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

    (row,) = tune(
        Bowl(best), lambda *_: {}, {"a": [Try(rate) for rate in rates]}, look, lambda _, rate: Try(rate)
    ).values()
    tried = [run["rate"] for run in row["sweep"]]
    below, above = sum(rate < rates[0] for rate in tried), sum(rate > rates[-1] for rate in tried)
    assert tried == sorted(set(tried))
    assert {*rates} <= {*tried}
    assert max(below, above) <= FURTHER
    # Where it still lies at an edge, as many were tried beyond that edge as may be.
    assert not row["edge"] or FURTHER == (below if row["rate"] == tried[0] else above)
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


def test_what_is_free_changes_over_the_runs_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path, replace(SMALL, extend=False))
    monkeypatch.setattr("normkit.lab.study.Trainer.train", lambda *given: pytest.fail("trained again"))
    narrow = ran(tmp_path, replace(SMALL, extend=False, level=0.5, target=0.1, rates=(0.2,)))
    assert [len(recipe["sweep"]) for recipe in narrow["recipes"]] == [1, 1]
    assert narrow["target"]["score"] == 0.1
    assert narrow["recipes"][1]["paired"]["level"] == 0.5
