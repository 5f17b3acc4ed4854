"""The learning rate of every step."""

import math

from normkit.lab.settings import Settings
from normkit.schedules import linear_rate

# Where the step schedule takes the rate down, as parts of the run, and by how much.
STEPS, FACTOR = (0.5, 0.75), 0.1


def rate_at(settings: Settings, rate: float, step: int, steps: int) -> float:
    """Gives the learning rate of a step.

    Over ``warmup`` epochs the rate rises in equal steps: ``rate * (step + 1) / warm``. With t the part of what follows
    that is done, it then is ``rate`` (constant), ``rate * (1 + cos(pi t)) / 2`` (cosine), or ``rate`` times 0.1 for each
    half and three quarters of the whole run that are over (step). Steps count from 0.
    """
    warm = round(settings.warmup / settings.epochs * steps)

    def after(done: int) -> float:
        if settings.schedule == "constant":
            return 1.0
        if settings.schedule == "step":
            return FACTOR ** sum(step >= part * steps for part in STEPS)
        return 0.5 * (1.0 + math.cos(math.pi * done / max(steps - warm, 1)))

    # linear_rate counts from 1, and `after` what has been done.
    return rate * linear_rate(step + 1, warm, lambda done: after(done - 1))
