"""Paired intervals against scipy's own paired t test."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from normkit.lab.stats import paired_interval


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_equals_scipy(count: int, level: float) -> None:
    rng = np.random.default_rng(count)
    ours, theirs = rng.normal(0.9, 0.02, count), rng.normal(0.88, 0.02, count)
    expected = ttest_rel(ours, theirs).confidence_interval(level)
    found = paired_interval(list(ours - theirs), level)
    assert found.low == pytest.approx(expected.low, rel=1e-9)  # two ways to sum a few doubles
    assert found.high == pytest.approx(expected.high, rel=1e-9)
    assert found.mean == pytest.approx(np.mean(ours - theirs))


@pytest.mark.parametrize(
    ("differences", "mean", "end"), [([], None, None), ([0.25], 0.25, None), ([0.5, 0.5, 0.5], 0.5, 0.5)]
)
def test_few_and_equal_differences(differences: list[float], mean: float | None, end: float | None) -> None:
    found = paired_interval(differences)
    assert (found.mean, found.low, found.high) == (mean, end, end)


def test_differences_that_agree_to_the_last_digit_decide_nothing() -> None:
    from normkit.lab.report.wording import judge

    paired = {"mean": 0.01, "low": 0.01, "high": 0.01, "n": 3}
    recipe = {"recipe": "bn+e", "test_score": {"mean": 0.9, "n": 3}, "runs": [{"status": "ok"}], "paired": paired}
    assert judge(recipe, "bn") == "even"
    assert judge({**recipe, "paired": {**paired, "low": 0.005}}, "bn") == "better"
