"""A budget of time: how many epochs, rates and seeds fit it, by what an epoch of each recipe is measured to take."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from normkit.core.errors import OptionError
from normkit.lab.say import counted
from normkit.lab.settings import Settings
from normkit.lab.study import Made
from normkit.lab.train.cost import RATE, measure_costs
from normkit.lab.train.trainer import Trainer

# Rates and seeds; the first that fit are taken. Seeds narrow the intervals, so they come before more epochs than asked for.
PLANS = ((4, 10), (4, 5), (4, 3), (3, 3))
SLACK = 1.25  # checkpoints, sweeps that go on beyond one rate, a machine that is busier later
COSTS = 10.0  # seconds, to time steps side by side
LOOKED = 4  # batches of validation data that are timed


def fit(settings: Settings, seconds: Mapping[str, float]) -> Settings:
    """Chooses epochs, rates and seeds so that all trainings take no longer than the budget.

    Of rates as many of those given as the plan has, from the middle; epochs as given, and fewer where even the smallest
    plan does not fit with them. `seconds` are of an epoch of each recipe, its validation included.
    """
    assert settings.budget is not None
    rates = seeds = runs = 0
    epoch, left = SLACK * sum(seconds.values()), settings.budget - COSTS
    for most, seeds in PLANS:
        rates = min(most, len(settings.rates))
        further = settings.extend and rates > 1
        # The run of the first seed at the chosen rate is one of the sweep.
        runs = rates + further + seeds - 1 + settings.equal_time * seeds
        if epoch * runs * settings.epochs <= left:
            break
    epochs = min(settings.epochs, int(left / (epoch * runs)))
    if epochs < 1:
        raise OptionError(
            f"budget is {settings.budget:g} s; {rates} rates and {seeds} seeds of every recipe, for one epoch, take about "
            f"{epoch * runs + COSTS:.0f} s; wanted at least that, or fewer recipes"
        )
    start = (len(settings.rates) - rates) // 2
    return replace(
        settings,
        epochs=epochs,
        warmup=settings.warmup * epochs / settings.epochs,
        rates=settings.rates[start : start + rates],
        seeds=tuple(range(seeds)),
    )


def fitted(settings: Settings) -> str:
    """Says what a budget chose."""
    counts = [
        counted(settings.epochs, "epoch"),
        counted(len(settings.rates), "rate"),
        counted(len(settings.seeds), "seed"),
    ]
    return f"a budget of {settings.budget:g} s fits {counts[0]} per run, {counts[1]} and {counts[2]} of each recipe"


def measure(made: Made) -> dict[str, float]:
    """Measures what an epoch of each recipe takes, with validation and condition numbers, by a few steps."""
    settings, data, fabric = made.settings, made.data, made.fabric
    seed = settings.seeds[0]
    models = {recipe: made.apply(seed, recipe)[0] for recipe in settings.recipes}
    costs = measure_costs(models, settings, data, fabric, budget=2.0, rounds=(3, 10), warm_up=2)
    part = data.val.take(torch.arange(min(len(data.val), LOOKED * 4 * settings.batch_size)))
    steps, found = max(1, len(data.train) // settings.batch_size), {}
    for recipe in settings.recipes:
        trainer = Trainer(RATE, seed, settings, made.apply(seed, recipe)[0], data, fabric, Path())
        taken = []
        for look in (lambda one=trainer: one.evaluate(part), trainer.conditions):
            begun = time.perf_counter()
            look()
            taken.append(time.perf_counter() - begun)
        found[recipe] = steps * costs[recipe]["ms_per_step"] / 1e3 + taken[0] * len(data.val) / len(part) + taken[1]
    return found
