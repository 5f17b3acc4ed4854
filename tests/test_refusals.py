"""What layers, weights and the notation refuse, and what they say."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.activations.batch_renorm import RenormSchedule
from normkit.activations.divisive_norm import Field
from normkit.core.errors import BackendError, OptionError, ShapeError
from normkit.weights.layout import WeightLayout, weight_of
from normkit.weights.power_iteration import power_iteration, power_iteration_square
from normkit.weights.scaled_weight_standardization import (
    ScaledWeightStandardization,
    scaled_weight_standardization,
)
from normkit.weights.spectral_norm import spectral_norm
from normkit.weights.weight_conditioning import weight_conditioning

REFUSALS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: nk.BatchChannelNorm(4, 3), OptionError, "must divide 4"),
    (lambda: nk.EstBatchNorm(4, momentum=-1), OptionError, "momentum"),
    (lambda: nk.BatchChannelNorm(4, 2)(torch.randn(1, 4)), ShapeError, "more than 1 value"),
    (lambda: RenormSchedule.constant(0.5), OptionError, "r_max"),
    (lambda: nk.BatchRenorm(3, layout="c n"), OptionError, "layout"),
    (lambda: nk.BatchRenorm(3, momentum=2), OptionError, "momentum"),
    (lambda: nk.BatchRenorm(3)(torch.randn(1, 3)), ShapeError, "more than 1 value"),
    (lambda: nk.ConditionalNorm(4), OptionError, "give one of them"),
    (lambda: nk.ConditionalNorm(4, classes=2, features=2), OptionError, "give one of them"),
    (lambda: nk.ConditionalNorm(4, classes=2, over="c"), OptionError, "over='c'"),
    (lambda: nk.SpatiallyAdaptiveNorm(4, 2, kernel_size=2), OptionError, "an odd number"),
    *(
        (
            lambda shapes=shapes: nk.SpatiallyAdaptiveNorm(4, 2, over="*")(*map(torch.zeros, shapes)),
            ShapeError,
            "at least one position",
        )
        for shapes in (((3, 4, 5, 6), (3, 2, 0, 6)), ((3, 4, 0), (3, 2, 5)))
    ),
    (lambda: Field(1, 0), OptionError, "positions=0"),
    (lambda: nk.DivisiveNorm(4, sigma=0.0), OptionError, "sigma=0"),
    (lambda: nk.LyuSimoncelliNorm(4, 2), OptionError, "odd number"),
    (lambda: nk.HeegerNorm(4, 0.5), OptionError, r"exponent=0\.5"),
    (
        lambda: nk.LayerNorm(4)(torch.zeros(2, 5)),
        RuntimeError,
        r"input of 2x5, wanted one that ends in normalized_shape=4",
    ),
    (
        lambda: nk.functional.group_norm(torch.ones(2, 8), 3),
        RuntimeError,
        r"group_norm: 8 channels do not split into num_groups=3 .* 1, 2, 4, 8",
    ),
    (lambda: nk.GroupNorm(3, 8), ValueError, r"GroupNorm: 8 channels do not split into num_groups=3; .* 1, 2, 4, 8"),
    (
        lambda: nk.functional.group_norm(torch.zeros(6, 8, 5, 7), 3),
        ValueError,
        r"8 channels do not split .*input 6x8x5x7",
    ),
    *(
        (lambda make=make, shape=shape: make(4)(torch.zeros(shape)), error, said)
        for make in (nk.BatchNorm, nk.InstanceNorm, lambda channels: nk.GroupNorm(2, channels))
        for shape, error, said in (
            ((2, 5, 3), RuntimeError, r"got 5 channels .*2x5x3.* wanted num_\w+=4"),
            ((4,), ValueError, "wanted at least 2"),
        )
    ),
    (lambda: nk.BatchNorm(4)(torch.zeros(1, 4)), ValueError, "Expected more than 1 value per channel when training"),
    (lambda: nk.InstanceNorm(4)(torch.zeros(2, 4, 1)), ValueError, "one value for each statistic"),
    (lambda: nk.DynamicTanh(4)(torch.ones(2, 3)), ShapeError, "wanted one that ends in 4"),
    (lambda: nk.DynamicTanh(4, layout="n c *")(torch.ones(2, 3, 4)), ShapeError, "with 4 channels"),
    (lambda: nk.DynamicTanh((4, 5), layout="n c *"), OptionError, "one number of channels"),
    (lambda: nk.DynamicTanh(4, layout="n d"), OptionError, "layout='n d'"),
    (lambda: nk.ExemplarNorm(4)(torch.ones(2, 4, 1, 1)), ShapeError, "one value for each statistic"),
    (lambda: nk.ExemplarNorm(4, 0), OptionError, "reduction=0"),
    (lambda: nk.FiLM(4, 6)(torch.randn(2, 4, 3), torch.randn(2, 5)), ShapeError, "wanted 2x6"),
    (lambda: nk.FiLM(4, 6, layout="c n"), OptionError, "layout='c n'"),
    (
        lambda: nk.functional.film(torch.randn(2, 4, 3), torch.randn(2, 3), torch.randn(2, 3)),
        ShapeError,
        "does not broadcast",
    ),
    (lambda: nk.FilterResponseNorm(3, learned_eps=True)(torch.ones(2, 3, 5, dtype=torch.int64)), OptionError, "int64"),
    (lambda: nk.GDN(3, beta_min=0.0), OptionError, "beta_min=0"),
    (lambda: nk.GDN(3, gamma_init=-1.0), OptionError, "gamma_init=-1"),
    (lambda: nk.GhostBatchNorm(3, 0), OptionError, "ghost_batch_size=0"),
    (lambda: nk.GhostBatchNorm(3, memory="last"), OptionError, "memory='last'"),
    (lambda: nk.GhostBatchNorm(3, layout="c n"), OptionError, "layout='c n'"),
    (lambda: nk.GhostBatchNorm(3, 1)(torch.randn(4, 3)), ShapeError, "more than 1 value per channel"),
    (
        lambda: nk.functional.ghost_batch_norm(torch.randn(4, 2), 2, running_mean=torch.zeros(2)),
        OptionError,
        "go together",
    ),
    (lambda: nk.GlobalResponseNorm(6, layout="nchw"), OptionError, "layout='nchw'"),
    (lambda: nk.functional.global_response_norm(torch.ones(2, 3, 5), over="c"), OptionError, "over='c'"),
    (lambda: nk.HypersphereResidual(8)(torch.randn(2, 8), torch.randn(1, 8)), ShapeError, "wanted two alike"),
    (lambda: weight_of(nn.Linear(2, 2), "kernel", "here"), OptionError, "it has: weight, bias"),
    (lambda: WeightLayout().columns("rows"), OptionError, "view='rows'"),
    (lambda: WeightLayout().matrix(torch.zeros(3)), ShapeError, "two axes or more"),
    (lambda: nk.LocalContextNorm(6, 4), OptionError, "it must divide 6: 1, 2, 3, 6"),
    (lambda: nk.LocalContextNorm(6, 2, 0), OptionError, "window=0"),
    (lambda: nk.LocalContextNorm(6, 2, (3, 3))(torch.ones(2, 6, 5)), ShapeError, "2 windows for 1 spatial axes"),
    (lambda: nk.LocalContrastNorm()(torch.ones(3)), ShapeError, "at least 2"),
    (lambda: nk.LocalResponseNorm(0), OptionError, "size=0"),
    (lambda: nk.LocalResponseNorm()(torch.ones(3)), ShapeError, "at least 2"),
    (lambda: nk.MeanOnlyBatchNorm(3, layout="c n"), OptionError, "layout='c n'"),
    (lambda: nk.functional.mean_only_batch_norm(torch.ones(2, 3)), OptionError, "needs running_mean"),
    (lambda: scaled_weight_standardization(nn.Linear(1, 4)), OptionError, "one element for each output unit"),
    (lambda: ScaledWeightStandardization(gamma=0.0), OptionError, "gamma"),
    (lambda: scaled_weight_standardization(nn.ReLU()), OptionError, "no parameter 'weight'"),
    (lambda: power_iteration_square(torch.ones(2, 3)), ShapeError, "a square matrix"),
    (lambda: power_iteration_square(torch.ones(2, 2), x=torch.ones(3)), ShapeError, "a vector of 2 elements"),
    (lambda: power_iteration(torch.ones(2)), ShapeError, "wanted a matrix"),
    (lambda: nk.RecurrentBatchNorm(3, "frame"), OptionError, "max_length"),
    (lambda: nk.RecurrentBatchNorm(3, "step"), OptionError, "statistics='step'"),
    (lambda: nk.RecurrentBatchNorm(3, momentum=2.0), OptionError, "momentum"),
    (lambda: nk.BatchNormRNN(3, 2, "gelu"), OptionError, "nonlinearity"),
    (
        lambda: nk.RecurrentBatchNorm(3)(torch.randn(5, 4, 3), lengths=torch.tensor([1, 2])),
        ShapeError,
        "wanted one length per sample",
    ),
    (lambda: nk.RecurrentBatchNorm(3, "frame", 5)(torch.randn(4, 3)), ShapeError, r"\(T, N, C\) frame-wise"),
    (lambda: nk.RecurrentBatchNorm(3, "frame", 5)(torch.randn(4, 1, 3)), ShapeError, "more than 1 value"),
    (lambda: nk.LayerNormRecurrent(3, 5, "mamba"), OptionError, "'lstm', 'gru', 'rnn'"),
    (lambda: nk.LayerNormRecurrent(3, 5, num_layers=0), OptionError, "at least 1 layer"),
    (lambda: nk.LayerNormRNNCell(3, 5, nonlinearity="sin"), OptionError, "nonlinearity='sin'"),
    (lambda: nk.Residual(nn.Identity(), nn.Identity, "before"), OptionError, "placement='before'"),
    (lambda: nk.RMSNorm(4, cast="first"), OptionError, "after weight"),
    (lambda: nk.RMSNorm(4, guard="around"), OptionError, "guard='around'"),
    (lambda: nk.functional.rms_norm(torch.randn(2, 4), 4, cast="first"), OptionError, "after weight"),
    (lambda: spectral_norm(nn.Linear(3, 2), dim=2), OptionError, "dim=2 of a weight of 2 axes"),
    (lambda: spectral_norm(nn.Linear(3, 2), n_power_iterations=0), OptionError, "n_power_iterations=0"),
    (lambda: nk.Support("n c", over="d"), ValueError, "not there"),
    (lambda: nk.Support("n c", over="c").split((3,)), RuntimeError, "axes"),
    (lambda: nk.SwitchableNorm(4)(torch.ones(2, 4, 1, 1)), ShapeError, "one value for each statistic"),
    (lambda: nk.SwitchableNorm(4, correction=2), OptionError, "correction=2"),
    (
        lambda: nk.functional.switchable_norm(torch.ones(2, 3, 5), torch.ones(3), torch.ones(3), torch.zeros(3)),
        OptionError,
        "go together",
    ),
    (lambda: weight_conditioning(nn.Linear(3, 2), "jacobi"), OptionError, "square matrix"),
    (
        lambda: nk.functional.equilibrate(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), "jacobi"),
        OptionError,
        "element 1 is zero",
    ),
    (lambda: weight_conditioning(nn.LayerNorm(3)), OptionError, "two axes or more"),
    (lambda: weight_conditioning(nn.Linear(3, 2), "col", path="output"), BackendError, "scales columns too"),
    (lambda: weight_conditioning(nn.ConvTranspose2d(3, 2, 3), path="output"), BackendError, "ConvTranspose2d"),
]


@pytest.mark.parametrize(("call", "error", "said"), REFUSALS, ids=[said for _, _, said in REFUSALS])
def test_what_does_not_fit_is_refused(call: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
