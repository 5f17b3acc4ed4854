"""Timing variants of one computation against one another: in turns, in one process."""

import random
import time
from collections.abc import Callable, Mapping

# A sample lasts at least this long, so that the clock does not show: short calls are repeated.
SAMPLE_SECONDS = 2e-4
WARM_UP = 3


def race(
    variants: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Times variants by ``samples`` and takes the first quartile of each: noise only adds.

    >>> sorted(race({"a": lambda: None, "b": lambda: sum(range(1000))}, rounds=5))
    ['a', 'b']
    """
    return {name: quartile(times) for name, times in samples(variants, rounds, clock).items()}


def quartile(times: list[float]) -> float:
    """The first quartile, one of the times."""
    return sorted(times)[len(times) // 4]


def samples(
    variants: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Times each variant in every round, in a reshuffled order: what slows a machine for a while slows all of them alike.

    On a machine that others use, ``time.process_time`` as the clock counts what a single thread computes, without its waiting.
    """
    repeats = {name: _warm(run) for name, run in variants.items()}
    found: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            run, times = variants[name], repeats[name]
            start = clock()
            for _ in range(times):
                run()
            found[name].append((clock() - start) / times)
    return found


def _warm(run: Callable[[], object]) -> int:
    """Runs it until caches and allocators are warm; how often it fits into a sample."""
    fastest = float("inf")
    for _ in range(WARM_UP):
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return max(1, round(SAMPLE_SECONDS / max(fastest, 1e-7)))
