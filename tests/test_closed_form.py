"""The closed-form backward against the definition, for every statistic and guard that it takes."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from normkit.core.statistic import Statistic
from normkit.core.support import Split
from normkit.engine import closed_form

SPLIT = Split((3, 4, 5), ("n", "c", "*"), (0, 2))
STATISTICS = [
    Statistic(center, scale, eps, guard, correction)
    for (center, scale), eps, guard, correction in itertools.product(
        [("mean", "std"), (None, "rms"), (None, "norm")], [1e-5, 0.3], ["inside", "outside", "floor"], [0, 1]
    )
    if correction == 0 or scale == "std"
]


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: f"{s.scale} {s.guard} {s.eps:g} {s.correction}")
def test_value_and_derivatives_are_those_of_the_definition(statistic: Statistic) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    y, inverse, _ = closed_form.normalize(x, SPLIT, statistic)
    center, scale, _ = statistic.measure(x, SPLIT)
    assert scale is not None
    assert_close(y, (x if center is None else x - center) / scale)
    assert_close(inverse, 1 / scale)
    assert torch.autograd.gradcheck(lambda x: closed_form.normalize(x, SPLIT, statistic)[:2], x)
    assert torch.autograd.gradgradcheck(lambda x: closed_form.normalize(x, SPLIT, statistic)[:2], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-12, 1e-7, 1e-5, 0.1, 0.3, 3.0])
@pytest.mark.parametrize("below", [0.9, 0.0])
def test_under_the_floor_the_scale_is_a_constant(eps: float, below: float, dtype: torch.dtype) -> None:
    statistic = Statistic(None, "norm", eps, "floor")
    x = torch.zeros(1, 3, dtype=dtype)
    x[0, 0] = below * eps
    x.requires_grad_()
    y, _, _ = closed_form.normalize(x, Split((1, 3), ("o", "*"), (1,)), statistic)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, torch.full_like(x, 1 / eps))
