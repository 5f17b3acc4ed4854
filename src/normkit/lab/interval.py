"""How sure a number is: Student's interval of paired differences, and that of a median."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from normkit.core.errors import OptionError


@dataclass(frozen=True)
class Interval:
    """A mean difference and how sure it is.

    Args:
        mean: of the differences; None when there is none.
        low: lower end of the interval; None with fewer than two differences.
        high: upper end; None with fewer than two differences.
        level: the coverage.
        differences: what was averaged, in the order of the seeds.
    """

    mean: float | None
    low: float | None
    high: float | None
    level: float
    differences: tuple[float, ...]


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Bounds the mean of paired differences.

        mean d -+ t[(1 + level) / 2, n - 1] * s / sqrt(n),   s the standard deviation with n - 1

    It takes differences for normal and independent over seeds. One difference has no interval.

    Args:
        differences: one a seed: this recipe's score less the baseline's.
        level: the coverage, between 0 and 1. Default: 0.95.

    Raises:
        OptionError: `level` is not between 0 and 1.

    Reference:
        Student 1908, The probable error of a mean, https://doi.org/10.1093/biomet/6.1.1

    >>> found = paired_interval([1.0, 2.0, 3.0])
    >>> round(found.low, 4), found.mean, round(found.high, 4)
    (-0.4841, 2.0, 4.4841)
    """
    from scipy.stats import t

    _check(level)
    count = len(differences)
    mean = fmean(differences) if count else None
    if mean is None or count < 2:
        return Interval(mean, None, None, level, tuple(differences))
    half = float(t.ppf((1 + level) / 2, count - 1)) * stdev(differences) / sqrt(count)
    return Interval(mean, mean - half, mean + half, level, tuple(differences))


def differences(these: Iterable[float | None], those: Iterable[float | None]) -> Interval:
    """The interval of what is left of some values when others of the same seeds are taken off them.

    Args:
        these: one a seed; a seed with None here or there is left out.
        those: likewise.

    >>> differences([3.0, 5.0, None], [1.0, 2.0, 2.0]).differences
    (2.0, 3.0)
    """
    pairs = zip(these, those, strict=True)
    return paired_interval([one - other for one, other in pairs if one is not None and other is not None])


def tell(found: Interval, form: str = "+.2f", scale: float = 1.0) -> str | None:
    """Writes a mean difference and its interval; None where there is none.

    Args:
        found: the difference.
        form: of the numbers. Default: ``"+.2f"``.
        scale: by which they are multiplied, such as 100 for percent. Default: 1.

    >>> tell(paired_interval([1.0, 2.0, 3.0])), tell(paired_interval([0.01]), "+.1f", 100)
    ('+2.00 [-0.48, +4.48]', '+1.0')
    """
    if found.mean is None:
        return None
    text = f"{scale * found.mean:{form}}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{scale * found.low:{form}}, {scale * found.high:{form}}]"


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Bounds the median of what values are drawn from, whatever its shape: two of the values in order.

        [x_(k), x_(n+1-k)],   k the largest with 2 P(Binomial(n, 1/2) < k) <= 1 - level

    Args:
        values: independent draws.
        level: the coverage, at least. Default: 0.95.

    Returns:
        The ends, or None where there are too few values for the level: fewer than 6 for 0.95.

    Raises:
        OptionError: `level` is not between 0 and 1.

    Reference:
        Thompson 1936, On confidence ranges for the median, https://doi.org/10.1214/aoms/1177732502

    >>> median_interval([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    (1.0, 6.0)
    """
    from scipy.stats import binom

    _check(level)
    count = len(values)
    place = int(binom.ppf((1 - level) / 2, count, 0.5))
    if not place:
        return None
    ordered = sorted(values)
    return ordered[place - 1], ordered[count - place]


def _check(level: float) -> None:
    if not 0 < level < 1:
        raise OptionError(f"level is {level}; wanted a number between 0 and 1, such as 0.95")
