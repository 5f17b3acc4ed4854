"""Statistics of an experiment: means over seeds, paired gains, their intervals and verdicts, and the choice of rates."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

import numpy as np

from normkit.lab.sweep import Job

OK, DIVERGED = "ok", "diverged"
BETTER, WORSE, EVEN, SINGLE = "better", "worse", "no difference shown", "one seed, no interval"
ABSENT = "–"
FURTHER = 3  # rates beyond an end of a sweep
DRAWS, CHUNK = 2000, 100  # of the bootstrap, and how many at once, to bound memory
POWER = 0.8
MOST = 1000  # seeds that are counted up to
Row = Mapping[str, Any]
Tried = Mapping[str, Any]  # a run: "rate", "status", "score", "loss", and "reached", which is how far it came


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


@dataclass(frozen=True)
class Interval:
    """A mean difference and how sure it is."""

    mean: float | None  # of the differences; None when there is none
    low: float | None  # lower end of the interval; None with fewer than two differences
    high: float | None  # upper end; None with fewer than two differences
    level: float
    differences: tuple[float, ...]  # what was averaged, in the order of the seeds


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Bounds the mean of paired differences.

        mean d -+ t[(1 + level) / 2, n - 1] * s / sqrt(n),   s the standard deviation with n - 1

    It takes differences for normal and independent over seeds. One difference has no interval.

    Reference: Student 1908, The probable error of a mean, https://doi.org/10.1093/biomet/6.1.1

    >>> found = paired_interval([1.0, 2.0, 3.0])
    >>> round(found.low, 4), found.mean, round(found.high, 4)
    (-0.4841, 2.0, 4.4841)
    """
    low, high = spread.ends(level) if (spread := over_seeds(differences)) else (None, None)
    return Interval(fmean(differences) if differences else None, low, high, level, tuple(differences))


def differences(these: Iterable[float | None], those: Iterable[float | None], level: float = 0.95) -> Interval:
    """Interval of the seed-paired differences; a seed with None on either side is left out.

    >>> differences([3.0, 5.0, None], [1.0, 2.0, 2.0]).differences
    (2.0, 3.0)
    """
    pairs = zip(these, those, strict=True)
    return paired_interval([one - other for one, other in pairs if one is not None and other is not None], level)


def gain(runs: Iterable[Row], base: Iterable[Row], field: str) -> Interval:
    """Bounds the mean gain of some runs over a baseline's of the same seeds; runs with None in `field` are left out.

    >>> gain([{"seed": 0, "x": 3.0}, {"seed": 1, "x": 5.0}], [{"seed": 1, "x": 4.0}], "x").differences
    (1.0,)
    """
    known = {run["seed"]: run[field] for run in base}
    shared = [run for run in runs if run["seed"] in known]
    return differences([run[field] for run in shared], [known[run["seed"]] for run in shared])


def judge(low: float | None, high: float | None) -> str:
    """Says what the interval of a paired gain shows, where more is better.

    >>> judge(0.1, 0.3), judge(-0.3, -0.1), judge(-0.1, 0.2), judge(0.2, 0.2), judge(None, None)
    ('better', 'worse', 'no difference shown', 'no difference shown', 'one seed, no interval')
    """
    if low is None or high is None:
        return SINGLE
    if math.isclose(low, high):
        # Scores come in whole samples, so a few seeds can agree but for rounding by chance: no spread to judge by.
        return EVEN
    return BETTER if low > 0 else WORSE if high < 0 else EVEN


def judge_runs(runs: Sequence[Row], base: Sequence[Row], field: str) -> str:
    """Says what the gain of some runs over a baseline's of the same seeds shows, as :func:`judge`.

    It is not judged where a run diverged, on either side: those that are left were chosen by how they fared.

    >>> base = [{"seed": seed, "x": x} for seed, x in enumerate((1.0, 2.0, 4.0))]
    >>> judge_runs([{**run, "x": 1.1 * run["x"] + 5} for run in base], base, "x"), judge_runs(base[:1], base, "x")
    ('better', 'one seed, no interval')
    >>> judge_runs([*base[:2], {"seed": 2, "x": None}], base, "x")
    '2 of 3 seeds, not judged'
    """
    found = gain(runs, base, field)
    seeds, pairs = len({run["seed"] for run in runs} & {run["seed"] for run in base}), len(found.differences)
    return f"{pairs} of {seeds} seeds, not judged" if pairs < seeds else judge(found.low, found.high)


def tell(found: Interval, form: str = "+.2f", scale: float = 1.0) -> str | None:
    """Writes a mean difference and its interval, times `scale`, such as 100 for percent; None where there is none.

    >>> tell(paired_interval([1.0, 2.0, 3.0])), tell(paired_interval([0.01]), "+.1f", 100)
    ('+2.00 [-0.48, +4.48]', '+1.0')
    """
    if found.mean is None:
        return None
    text = f"{scale * found.mean:{form}}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{scale * found.low:{form}}, {scale * found.high:{form}}]"


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bounds the median of what values are drawn from, whatever its shape: two of the values in order.

        [x_(k), x_(n+1-k)],   k the largest with 2 P(Binomial(n, 1/2) < k) <= 0.05

    None where there are too few values: fewer than 6.

    Reference: Thompson 1936, On confidence ranges for the median, https://doi.org/10.1214/aoms/1177732502

    >>> median_interval([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    (1.0, 6.0)
    """
    from scipy.stats import binom

    count = len(values)
    place = int(binom.ppf(0.025, count, 0.5))
    if not place:
        return None
    ordered = sorted(values)
    return ordered[place - 1], ordered[count - place]


def over_seeds_and_samples(gains: np.ndarray, sizes: np.ndarray) -> Spread | None:
    """The spread of a difference over seeds and test samples, by the bootstrap of both; None with fewer than two seeds.

    Each of 2,000 draws takes seeds and samples with replacement, the same samples for every seed and both recipes (a
    sample counts a Poisson number of times). With S seeds the bootstrap of seeds is S / (S - 1) too narrow in variance,
    which is made up for; the error is then judged by Student's t with S - 1 degrees of freedom. It is conservative: what
    seed and sample do together is counted more than once. `gains` ``(seeds, samples)`` are what each sample adds to the
    score of the recipe less what it adds to the baseline's; a score is a sum over samples divided by the sum of `sizes`
    ``(samples,)``.

    Reference: Owen 2007, The pigeonhole bootstrap, https://doi.org/10.1214/07-AOAS122
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

    Reference: Holm 1979, A simple sequentially rejective multiple test procedure, https://www.jstor.org/stable/4615733

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


def seeds_for(difference: float, spread: float, level: float = 0.95) -> int | None:
    """How many seeds find a true difference in four of five comparisons; None where more than :data:`MOST` would be needed.

    >>> seeds_for(0.01, 0.01), seeds_for(0.001, 1.0)
    (10, None)
    """
    counts = range(2, MOST + 1)
    place = bisect_left(counts, True, key=lambda seeds: detectable(spread, seeds, level) <= difference)
    return counts[place] if place < len(counts) else None


def quantile(part: float, freedom: int) -> float:
    """A quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(part, freedom))


def known(values: Iterable[float | None]) -> list[float]:
    """The values that are there; a run that diverged has none."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known, or None.

    >>> mean([1.0, None, 3.0])
    2.0
    """
    values = known(values)
    return fmean(values) if values else None


def spread(values: Iterable[float | None], form: str = ".3f", scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, times `scale`, with how many runs have no value.

    >>> spread([0.5, 0.7], ".1f", 100), spread([0.25, None], ".2f"), spread([None])
    ('60.0 ± 14.1', '0.25 (1 of 2 without)', '–')
    """
    values = list(values)
    there = [scale * value for value in known(values)]
    if not there:
        return ABSENT
    text = f"{fmean(there):{form}}" + (f" ± {stdev(there):{form}}" if len(there) > 1 else "")
    lost = len(values) - len(there)
    return f"{text} ({lost} of {len(values)} without)" if lost else text


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose keys have the wanted values.

    >>> where([{"a": 1, "b": 2}, {"a": 3, "b": 2}], a=3)
    [{'a': 3, 'b': 2}]
    """
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def by_step(rows: Sequence[Sequence[Row]], value: Callable[[Row], float | None]) -> Any:
    """Steps, and at each the mean, lowest and highest value over runs that came so far: four lists of one length.

    >>> by_step([[{"step": 1, "x": 2.0}], [{"step": 1, "x": 4.0}]], lambda row: row["x"])
    ([1], [3.0], [2.0], [4.0])
    """
    found: dict[int, list[float]] = {}
    for run in rows:
        for row in run:
            if (there := value(row)) is not None:
                found.setdefault(row["step"], []).append(there)
    steps = sorted(found)
    return steps, [fmean(found[s]) for s in steps], [min(found[s]) for s in steps], [max(found[s]) for s in steps]


class Rated(Job, Protocol):
    """A job with a learning rate."""

    @property
    def rate(self) -> float:
        """Its rate."""
        ...


class Sweeper(Protocol):
    """What does jobs, such as a bench."""

    def sweep(self, function: Callable[[Any, Path], Row], jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Does jobs, and gives their results in order."""
        ...


def tune(
    bench: Sweeper,
    learn: Callable[[Any, Path], Row],
    rows: Mapping[str, Sequence[Rated]],
    look: Callable[[Row], Tried],
    beyond: Callable[[str, float], Rated] | None = None,
) -> dict[str, dict[str, Any]]:
    """Tries the rates of each row, a job for each, and chooses the best.

    ``look`` says of a job's result on validation data "status", "score", "loss" and "reached"; ``beyond(name, rate)``
    gives a row's job at a further rate (:func:`further`). By name the result has ``sweep``, all that was tried, by
    rate, ``rate``, the chosen one, and ``edge``, whether a better one may lie beyond.
    """
    given = {name: [job.rate for job in tried] for name, tried in rows.items()}
    sweeps: dict[str, list[Tried]] = {name: [] for name in rows}
    waiting = [(name, job) for name, tried in rows.items() for job in tried]
    while waiting:
        for (name, job), found in zip(waiting, bench.sweep(learn, [job for _, job in waiting]), strict=True):
            sweeps[name] = sorted([*sweeps[name], {"rate": job.rate, **look(found)}], key=lambda run: run["rate"])
        rates = {name: further(sweep, given[name]) for name, sweep in sweeps.items() if beyond is not None}
        waiting = [
            (name, beyond(name, rate)) for name, rate in rates.items() if rate is not None and beyond is not None
        ]
    chosen = {name: best(sweep)["rate"] for name, sweep in sweeps.items()}
    return {
        name: {"sweep": sweep, "rate": chosen[name], "edge": at_edge(chosen[name], sweep)}
        for name, sweep in sweeps.items()
    }


def further(sweep: Sequence[Tried], given: Sequence[float]) -> float | None:
    """The next rate to try where the best lies at an edge of a sweep: as far from it as its neighbour is, as a ratio.

    None where the best lies inside, or :data:`FURTHER` were tried beyond that end of the `given` rates.

    >>> runs = [{"rate": r, "status": "ok", "score": r, "loss": None, "reached": 1} for r in (0.25, 1.0)]
    >>> further(runs, (0.25, 1.0)), further(runs, (0.25,)), further(runs[:1], (0.25,))
    (4.0, 4.0, None)
    """
    rates, rate = [run["rate"] for run in sweep], best(sweep)["rate"]
    if not at_edge(rate, sweep):
        return None
    low = rate == rates[0]
    step = rates[0] / rates[1] if low else rates[-1] / rates[-2]
    tried = sum(each < min(given) if low else each > max(given) for each in rates)
    return float(f"{rate * step:.3g}") if tried < FURTHER else None


def best(sweep: Iterable[Tried]) -> Tried:
    """Chooses the run with the highest score; of equals, the one with the lowest loss, then rate.

    Runs without a score come last, the longest-lived first.

    >>> best([{"rate": r, "status": "ok", "score": s, "loss": 1.0, "reached": 1} for r, s in ((0.1, 0.5), (1.0, 0.5))])["rate"]
    0.1
    """

    def merit(run: Tried) -> tuple[float, ...]:
        if not scored(run):
            return (0, run["reached"], 0.0, -run["rate"])
        return (1, run["score"], -math.inf if run["loss"] is None else -run["loss"], -run["rate"])

    return max(sweep, key=merit)


def at_edge(rate: float, sweep: Iterable[Tried]) -> bool:
    """Whether a rate is the smallest or the largest of those tried, so that a better one may lie beyond."""
    rates = [run["rate"] for run in sweep]
    return len(rates) > 1 and rate in (min(rates), max(rates))


def scored(run: Tried) -> bool:
    """Whether a run came to its end with a score; a record holds None for one that is not finite."""
    return run["status"] == OK and run["score"] is not None
