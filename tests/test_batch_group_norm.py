"""Batch/group normalization: its corners, what it remembers, and inference that weighs the example."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.activations.batch_group_norm import BatchGroupNorm, batch_group_norm, example_weighing
from normkit.core.errors import OptionError, ShapeError


def _x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 4, 5, 3)), dtype=torch.float64) * 2 + 3


CORNERS = {
    "batch norm": (None, None, lambda x: nn.BatchNorm2d(4).double()(x)),
    "ghost batch norm": (None, 2, lambda x: torch.cat([nn.BatchNorm2d(4).double()(part) for part in x.split(2)])),
    "uneven ghost batch norm": (None, 4, lambda x: torch.cat([nn.BatchNorm2d(4).double()(p) for p in x.split(4)])),
    "group norm": (2, 1, lambda x: nn.GroupNorm(2, 4).double()(x)),
    "layer norm": (1, 1, lambda x: nn.LayerNorm(x.shape[1:], elementwise_affine=False)(x)),
    "instance norm": (None, 1, lambda x: nn.InstanceNorm2d(4)(x)),
    "batch and layer": (1, None, lambda x: (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(corner: str) -> None:
    groups, examples, like = CORNERS[corner]
    x = _x().requires_grad_()
    direction = torch.randn_like(x)
    norm = BatchGroupNorm(4, groups, examples).double()
    y, wanted = norm(x), like(x)
    assert_close(y, wanted)
    assert_close(batch_group_norm(x, groups, examples), wanted)
    gradients = [torch.autograd.grad((out * direction).sum(), x)[0] for out in (y, wanted)]
    assert_close(*gradients)


@pytest.mark.parametrize(("groups", "examples"), [(None, None), (None, 4), (None, 1), (2, 2), (2, 1), (1, None)])
def test_memory_averages_raw_moments_of_each_channel(groups: int | None, examples: int | None) -> None:
    x, norm = _x(), BatchGroupNorm(4, groups, examples, momentum=0.3).double()
    first, second = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    for step in range(1, 4):
        norm(x * step)
        first = 0.7 * first + 0.3 * (x * step).mean((0, 2, 3))
        second = 0.7 * second + 0.3 * (x * step).square().mean((0, 2, 3))
    assert_close(norm.running_mean, first)
    assert_close(norm.running_var, second - first.square())
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (6, 4)])
def test_equation_three(alpha: float, groups: int | None, shape: tuple[int, ...]) -> None:
    x, norm = _x(*shape), BatchGroupNorm(4, groups, 2, alpha=alpha).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm(x)
    first, var = norm.state_dict()["running_mean"], norm.state_dict()["running_var"]
    second = var + first.square()
    y = torch.empty_like(x)
    for n in range(6):
        for c in range(4):
            group = [c] if groups is None else range(c // 2 * 2, c // 2 * 2 + 2)
            mean = sum(alpha * x[n, k].mean() + (1 - alpha) * first[k] for k in group) / len(group)
            square = sum(alpha * x[n, k].square().mean() + (1 - alpha) * second[k] for k in group) / len(group)
            deviation = (square - mean.square() + norm.eps).sqrt()
            y[n, c] = norm.weight[c] * (x[n, c] - mean) / deviation + norm.bias[c]
    norm.eval()
    assert_close(norm(x), y)
    assert_close(norm(x[2:3]), y[2:3])


def test_evaluation_keeps_accuracy_beside_a_large_mean() -> None:
    x = torch.randn(8, 4, 64) + 1e4
    norm = BatchGroupNorm(4, alpha=0.5, momentum=1.0)
    norm(x)
    exact = example_weighing(x.double(), norm.running_mean.double(), norm.running_var.double(), alpha=0.5)
    # A mean of 1e4 is known to half a unit in its last place, 5e-4 deviations.
    assert_close(norm.eval()(x).double(), exact, rtol=0, atol=2e-3)


def test_what_does_not_fit_is_refused() -> None:
    for options, match in (
        ({"num_groups": 3}, "must divide 4: 1, 2, 4"),
        ({"examples_per_group": 0}, "examples_per_group=0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"layout": "c n"}, "layout"),
    ):
        with pytest.raises(OptionError, match=match):
            BatchGroupNorm(4, **options)
    with pytest.raises(ShapeError, match="more than 1 value"):
        BatchGroupNorm(4)(torch.randn(1, 4))
