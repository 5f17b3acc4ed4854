"""What a training step costs: time and memory, all recipes side by side in one process."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any, Generic, TypeVar

import torch
from lightning_fabric import Fabric
from torch import nn

from normkit.lab.data.split import Data
from normkit.lab.memory import keep_memory, peak_bytes
from normkit.lab.seeding import reseed
from normkit.lab.settings import Settings
from normkit.lab.stats import median_interval
from normkit.lab.sweep import Work
from normkit.lab.train.parallel import place
from normkit.lab.train.trainer import train_step
from normkit.weights.parametrization import release

# So small a rate that no model leaves the range in which it was made: a step costs the same at any rate.
RATE = 1e-6
_BLOCK = 1 << 21  # numbers: blocks of up to 8 MiB, more than the caches of a core


R = TypeVar("R")


@dataclass(frozen=True)
class Step:
    """A training step."""

    take: Callable[[], object]  # does it: forward, backward and update
    model: nn.Module

    def clear(self) -> None:
        """Drops what the step recreates and leaves: gradients, and the memory of effective weights, kept for the next."""
        self.model.zero_grad()
        release(self.model)


@dataclass(frozen=True)
class Costs(Work, Generic[R], path="{0.rows[0].subject}/costs"):
    """Measures what a step of several rows costs, side by side, in about `budget` seconds; the baseline comes first."""

    rows: tuple[R, ...]  # frozen dataclasses with a subject, a folder; the baseline first
    budget: float = 20.0


def measure_costs(
    models: Mapping[str, nn.Module],
    settings: Settings,
    data: Data,
    fabric: Fabric,
    budget: float = 8.0,
    rounds: tuple[int, int] = (6, 60),
    warm_up: int = 3,
) -> dict[str, dict[str, Any]]:
    """Times a step of each recipe's model on one batch of the train split, as :func:`measure_steps` does."""
    size = min(settings.batch_size, len(data.train)) // fabric.world_size
    batch = data.train.batch(torch.arange(max(size, 1)), fabric.device)
    reseed(0, "cost", rank=fabric.global_rank)
    steps = {}
    for recipe, model in models.items():
        placed = place(model, settings, RATE, fabric)
        placed.wrapped.train()
        steps[recipe] = Step(partial(train_step, fabric, placed, settings, *batch), placed.model)
    return measure_steps(steps, fabric.device, budget, rounds, warm_up, fabric.broadcast)


def measure_steps(
    steps: Mapping[str, Step],
    device: torch.device,
    budget: float = 8.0,
    rounds: tuple[int, int] = (6, 60),
    warm_up: int = 3,
    agree: Callable[[int], int] = int,
) -> dict[str, dict[str, Any]]:
    """Times training steps side by side, the baseline first.

    After a warm-up, each round takes one step of each in a reshuffled order, so that what slows the machine for a
    while slows all of them alike; medians and ratios are taken over rounds. On a CPU each step's tensors lie in other
    places of memory than the last one's: else a step would be faster or slower than its own copy throughout, by up to
    5 %, for the sets of the cache that its tensors happen to share (Curtsinger and Berger 2013, "Stabilizer"). `budget` is in
    seconds; `agree` makes one number of rounds of those that the processes would do.

    Gives ``ms_per_step`` (median), ``ms_quartiles``, ``ratio`` (median of a round's time over the baseline's in that round),
    ``ratio_interval`` (of 95 %; None for the baseline and with fewer than 6 rounds), ``mb_per_step`` (10^6 bytes) and ``rounds``.
    """
    if device.type == "cpu":
        keep_memory()
    memory = {}
    spent = 0.0
    for name, step in steps.items():
        for _ in range(warm_up - 1):
            step.take()
        step.clear()
        memory[name] = peak_bytes(step.take, device)
        spent += _seconds(step.take, device)
    count = agree(int(min(max(budget / max(spent, 1e-9), rounds[0]), rounds[1])))

    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffler = random.Random(0)
    for _ in range(count):
        for name in shuffler.sample(list(steps), len(steps)):
            # While blocks of random sizes are held, what is allocated lies in other places.
            cpu = device.type == "cpu"
            elsewhere = [torch.empty(shuffler.randrange(1, _BLOCK)) for _ in range(4)] if cpu else []
            times[name].append(1e3 * _seconds(steps[name].take, device))
            del elsewhere
    base = next(iter(times.values()))
    ratios = {name: [one / other for one, other in zip(taken, base, strict=True)] for name, taken in times.items()}
    return {
        name: {
            "ms_per_step": median(taken),
            "ms_quartiles": [quantiles(taken, n=4)[0], quantiles(taken, n=4)[2]],
            "ratio": median(ratios[name]),
            "ratio_interval": None if taken is base else median_interval(ratios[name]),
            "mb_per_step": memory[name] / 1e6,
            "rounds": count,
        }
        for name, taken in times.items()
    }


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
