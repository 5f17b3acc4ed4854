"""What a training step costs: time and memory, every recipe beside the others in one process."""

import random
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from normkit.lab.data.split import Data
from normkit.lab.interval import median_interval
from normkit.lab.memory import peak_bytes
from normkit.lab.parallel import place
from normkit.lab.seeding import reseed
from normkit.lab.settings import Settings
from normkit.lab.train import train_step

# So small a rate that no model leaves the range in which it was made: a step costs the same at any rate.
RATE = 1e-6


def measure_costs(
    models: Mapping[str, nn.Module],
    settings: Settings,
    data: Data,
    fabric: Fabric,
    budget: float = 8.0,
    rounds: tuple[int, int] = (5, 60),
    warm_up: int = 3,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Times forward, backward and update of each model on one batch of the train split.

    After a warm-up, each round runs one step of every model in an order shuffled anew, so that what slows the machine
    for a while slows all of them alike; medians and ratios are taken over rounds.

    Args:
        models: by recipe, the baseline first; trained in place.
        settings: of the comparison.
        data: the train split gives the batch.
        fabric: started.
        budget: seconds to aim at in all. Default: 8.
        rounds: the fewest and the most. Default: (5, 60).
        warm_up: steps of each model before. Default: 3.
        on_round: called after each round.

    Returns:
        By recipe: ``ms_per_step`` (median), ``ms_quartiles``, ``ratio`` (median of a round's time over the baseline's
        in that round), ``ratio_interval`` (its 95 % interval; None for the baseline and with fewer than 6 rounds),
        ``mb_per_step`` (10^6 bytes, see :func:`~normkit.lab.memory.peak_bytes`) and ``rounds``.
    """
    device = fabric.device
    size = min(settings.batch_size, len(data.train)) // fabric.world_size
    batch = data.train.batch(torch.arange(max(size, 1)), device)
    reseed(0, "cost", rank=fabric.global_rank)

    steps: dict[str, Callable[[], object]] = {}
    cleaners: dict[str, Callable[[], None]] = {}
    for recipe, model in models.items():
        placed = place(model, settings, RATE, fabric)
        placed.wrapped.train()
        steps[recipe] = lambda placed=placed: train_step(fabric, placed, settings, *batch)
        cleaners[recipe] = placed.optimizer.zero_grad

    memory = {}
    spent = 0.0
    for recipe, step in steps.items():
        for _ in range(warm_up - 1):
            step()
        cleaners[recipe]()
        memory[recipe] = peak_bytes(step, device)
        spent += _seconds(step, device)
    # All processes must do the same number of rounds.
    count = fabric.broadcast(int(min(max(budget / max(spent, 1e-9), rounds[0]), rounds[1])))

    times: dict[str, list[float]] = {recipe: [] for recipe in steps}
    shuffler = random.Random(0)
    for _ in range(count):
        for recipe in shuffler.sample(list(steps), len(steps)):
            times[recipe].append(1e3 * _seconds(steps[recipe], device))
        on_round()
    base = next(iter(times.values()))
    ratios = {recipe: [one / other for one, other in zip(taken, base, strict=True)] for recipe, taken in times.items()}
    return {
        recipe: {
            "ms_per_step": median(taken),
            "ms_quartiles": [quantiles(taken, n=4)[0], quantiles(taken, n=4)[2]],
            "ratio": median(ratios[recipe]),
            "ratio_interval": None if taken is base else median_interval(ratios[recipe]),
            "mb_per_step": memory[recipe] / 1e6,
            "rounds": count,
        }
        for recipe, taken in times.items()
    }


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
