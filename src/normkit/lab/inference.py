"""What the intervals of a comparison leave open: other test samples, several recipes at once, and what its seeds can show."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

DRAWS = 2000
CHUNK = 100  # draws at once, to bound memory
POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """A mean difference and the standard error that it is judged by."""

    mean: float
    error: float
    freedom: int  # degrees of freedom of Student's t

    def ends(self, level: float) -> tuple[float, float]:
        """The interval: mean -+ t[(1 + level) / 2, freedom] * error."""
        half = quantile((1 + level) / 2, self.freedom) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """The chance of a difference as large where there is none, by Student's t; None without a spread to judge by."""
        from scipy.stats import t

        return float(2 * t.sf(abs(self.mean) / self.error, self.freedom)) if self.error > 0 else None


def over_seeds(differences: Sequence[float]) -> Spread | None:
    """The spread of paired differences over seeds; None with fewer than two.

    >>> over_seeds([1.0, 2.0, 3.0]).freedom, round(over_seeds([1.0, 2.0, 3.0]).p, 4)
    (2, 0.0742)
    """
    count = len(differences)
    if count < 2:
        return None
    error = stdev(differences) / math.sqrt(count)
    # Differences that agree but for rounding leave no spread to judge by.
    return Spread(fmean(differences), 0.0 if math.isclose(min(differences), max(differences)) else error, count - 1)


def over_seeds_and_samples(gains: np.ndarray, sizes: np.ndarray) -> Spread | None:
    """The spread of a difference over seeds and test samples, by the bootstrap of both; None with fewer than two seeds.

    Each of 2,000 draws takes seeds and samples with replacement, the same samples for every seed and both recipes (a sample
    counts a Poisson number of times). With S seeds the bootstrap of seeds is S / (S - 1) too narrow in variance, which is made
    up for; the error is then judged by Student's t with S - 1 degrees of freedom. It is conservative: what seed and sample do
    together is counted more than once.

    `gains` ``(seeds, samples)`` are what each sample adds to the score of the recipe less what it adds to the
    baseline's; a score is a sum over samples divided by the sum of `sizes` ``(samples,)``.

    Reference:
        Owen 2007, The pigeonhole bootstrap, https://doi.org/10.1214/07-AOAS122
    """
    seeds, samples = gains.shape
    if seeds < 2:
        return None
    drawn, found = np.random.default_rng(0), []
    for _ in range(DRAWS // CHUNK):
        times = drawn.poisson(1.0, (CHUNK, samples))
        weights = drawn.multinomial(seeds, [1 / seeds] * seeds, CHUNK) / seeds
        found.append(((times @ gains.T) * weights).sum(1) / np.maximum(times @ sizes, 1e-300))
    error = float(np.concatenate(found).std()) * math.sqrt(seeds / (seeds - 1))
    return Spread(float(gains.mean(0).sum() / sizes.sum()), error, seeds - 1)


def holm(chances: Mapping[str, float | None]) -> dict[str, float]:
    """Adjusts p-values of several comparisons: below 1 - level, the chance that any verdict is wrong is at most that.

        p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)),   p_(1) <= ... <= p_(m)

    Reference:
        Holm 1979, A simple sequentially rejective multiple test procedure, https://www.jstor.org/stable/4615733

    >>> holm({"ln": 0.01, "gn": 0.04, "in": 0.03, "none": None})
    {'ln': 0.03, 'in': 0.06, 'gn': 0.06}
    """
    ranked = sorted((p, name) for name, p in chances.items() if p is not None)
    found, highest = {}, 0.0
    for place, (p, name) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - place) * p))
        found[name] = highest
    return found


def detectable(spread: float, seeds: int, level: float = 0.95) -> float:
    """The least true difference that is found in four of five comparisons.

        delta * s / sqrt(n),   P(T > t[(1 + level) / 2, n - 1]) = 0.8 for T of the noncentral t(n - 1, delta)

    >>> round(detectable(0.01, 3), 4), round(detectable(0.01, 10), 4)
    (0.0326, 0.01)
    """
    from scipy.optimize import brentq
    from scipy.stats import nct

    least = quantile((1 + level) / 2, seeds - 1)
    delta: Any = brentq(lambda delta: nct.sf(least, seeds - 1, delta) - POWER, 0, 3 * least + 10)
    return delta * spread / math.sqrt(seeds)


def seeds_for(difference: float, spread: float, level: float = 0.95, most: int = 1000) -> int | None:
    """How many seeds find a true difference in four of five comparisons; None where more than `most` would be needed.

    >>> seeds_for(0.01, 0.01), seeds_for(0.001, 1.0)
    (10, None)
    """
    counts = range(2, most + 1)
    place = bisect_left(counts, True, key=lambda seeds: detectable(spread, seeds, level) <= difference)
    return counts[place] if place < len(counts) else None


def quantile(part: float, freedom: int) -> float:
    """A quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(part, freedom))
