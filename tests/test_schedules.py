"""Warm-up schedules: closed forms, and torch's optimizers that follow them."""

import pytest
import torch
from torch import nn

from normkit.schedules import inverse_sqrt_rate, inverse_sqrt_warmup, linear_rate, linear_warmup


def test_inverse_sqrt_is_the_closed_form() -> None:
    for features, warmup in ((512, 4000), (64, 10), (1, 1)):
        peak = (features * warmup) ** -0.5
        for step in (1, 2, warmup - 1, warmup, warmup + 1, 4 * warmup):
            if step < 1:
                continue
            wanted = features**-0.5 * min(step**-0.5, step * warmup**-1.5)
            assert inverse_sqrt_rate(step, features, warmup) == pytest.approx(wanted, rel=1e-12)
            assert inverse_sqrt_rate(step, features, warmup) <= peak * (1 + 1e-12)
        assert inverse_sqrt_rate(warmup, features, warmup) == pytest.approx(peak, rel=1e-12)
        assert inverse_sqrt_rate(4 * warmup, features, warmup) == pytest.approx(peak / 2, rel=1e-12)


def test_linear_is_the_closed_form() -> None:
    assert [linear_rate(t, 4) for t in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [linear_rate(t, 2, lambda s: 1 / (1 + s)) for t in range(1, 5)] == [0.5, 1.0, 0.5, 1 / 3]
    assert linear_rate(1, 0) == 1.0


def test_optimizers_follow_them_from_the_first_step_and_resume() -> None:
    rates = {
        "inverse": (lambda o: inverse_sqrt_warmup(o, 16, 3), lambda t: 2.0 * inverse_sqrt_rate(t, 16, 3)),
        "linear": (
            lambda o: linear_warmup(o, 3, lambda s: 0.9**s),
            lambda t: 2.0 * linear_rate(t, 3, lambda s: 0.9**s),
        ),
    }
    for make, wanted in rates.values():
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=2.0)
        schedule = make(optimizer)
        for step in range(1, 8):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted(step), rel=1e-12)
            parameter.grad = torch.ones(1)
            optimizer.step()
            schedule.step()
        fresh = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        again = make(fresh)
        fresh.load_state_dict(optimizer.state_dict())
        again.load_state_dict(schedule.state_dict())
        assert again.get_last_lr() == schedule.get_last_lr()
        assert fresh.param_groups[0]["lr"] == pytest.approx(wanted(8), rel=1e-12)
