"""Paired intervals against scipy's own paired t test."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from normkit.core.errors import OptionError
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


def test_one_difference_has_no_interval() -> None:
    found = paired_interval([0.25])
    assert (found.mean, found.low, found.high) == (0.25, None, None)


def test_no_difference_has_no_mean() -> None:
    found = paired_interval([])
    assert (found.mean, found.low, found.high) == (None, None, None)


def test_equal_differences_have_no_width() -> None:
    found = paired_interval([0.5, 0.5, 0.5])
    assert (found.low, found.high) == (0.5, 0.5)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 95.0, float("nan")])
def test_level_outside_its_range(level: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        paired_interval([0.1, 0.2], level)


def test_differences_that_agree_to_the_last_digit_decide_nothing() -> None:
    from normkit.lab.report.wording import judge

    paired = {"mean": 0.01, "low": 0.01, "high": 0.01, "n": 3}
    recipe = {"recipe": "bn+e", "test_score": {"mean": 0.9, "n": 3}, "runs": [{"status": "ok"}], "paired": paired}
    assert judge(recipe, "bn") == "even"
    assert judge({**recipe, "paired": {**paired, "low": 0.005}}, "bn") == "better"
