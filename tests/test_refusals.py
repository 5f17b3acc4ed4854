"""What layers, weights, data, gradients and the notation refuse, and what they say."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn, ones, zeros

import normkit as nk
from normkit import functional as F
from normkit import gradients as G
from normkit import preprocessing as P
from normkit import weights as W
from normkit.activations.adaptive_layer_norm import adaptive_layer_norm
from normkit.core.errors import BackendError, OptionError, ShapeError
from normkit.schedules import inverse_sqrt_rate, inverse_sqrt_warmup, linear_rate, linear_warmup
from normkit.weights.layout import weight_of
from normkit.weights.spectral_norm import power_iteration_square

Rows = list[tuple[Callable[[], object], str]]
WEIGHT = nn.Parameter(ones(2))


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(zeros(1))], lr=1.0)


def _exemplar() -> torch.Tensor:
    norm, x = nk.ExemplarNorm(4), torch.randn(3, 4, 5)
    return F.exemplar_norm(x, norm.moments(x), ones(3, 2), norm.weight, norm.bias)


def _conditioned(**options: object) -> object:
    return W.weight_conditioning(nn.Linear(3, 2), **options)


OPTIONS: Rows = [
    (
        lambda: nk.BatchNorm(4, activation="relu", save="output"),
        r"BatchNorm: .* can't undo activation='relu'.*wanted None or",
    ),
    (lambda: setattr(nk.GroupNorm(2, 4, save="output"), "activation", "silu"), "can't undo activation='silu'"),
    (lambda: nk.RMSNorm(4, cast="before weight", save="output"), "can't undo cast='before weight'"),
    (lambda: setattr(nk.AdaLayerNorm(4, 4), "save", "output"), "would be ignored"),
    (lambda: nk.BatchNorm(4, save="both"), "wanted 'input' or 'output'"),  # pyright: ignore[reportArgumentType]
    (lambda: nk.LayerNorm(5, activation="tanh"), "activation='tanh': wanted one of relu"),  # pyright: ignore[reportArgumentType]
    (lambda: setattr(nk.GroupNorm(1, 2), "activation", "tanh"), "activation='tanh': wanted one of relu"),
    (lambda: nk.BatchChannelNorm(4, 3), "must divide 4"),
    (lambda: nk.EstBatchNorm(4, momentum=-1), "momentum"),
    (lambda: nk.BatchGroupNorm(4, num_groups=3), "must divide 4: 1, 2, 4"),
    (lambda: nk.BatchGroupNorm(4, examples_per_group=0), "examples_per_group=0"),
    (lambda: nk.BatchGroupNorm(4, alpha=1.5), r"alpha=1\.5"),
    (lambda: nk.BatchGroupNorm(4, layout="c n"), "layout"),
    (lambda: F.RenormSchedule.constant(0.5), "r_max"),
    (lambda: nk.BatchRenorm(3, layout="c n"), "layout"),
    (lambda: nk.BatchRenorm(3, momentum=2), "momentum"),
    (lambda: nk.ConditionalNorm(4), "give one of them"),
    (lambda: nk.ConditionalNorm(4, classes=2, features=2), "give one of them"),
    (lambda: nk.ConditionalNorm(4, classes=2, over="c"), "over='c'"),
    (lambda: nk.SpatiallyAdaptiveNorm(4, 2, kernel_size=2), "an odd number"),
    (lambda: F.conditional_norm(ones(3, 4, 5), *ones(2, 3, 4), zeros(4), ones(4)), "keeps no running statistics"),
    (lambda: F.adaptive_instance_norm(ones(2, 3, 4), ones(2, 3, 5), ones(3)), "strength of shape 3"),
    (lambda: nk.ConditionedTokens("none"), "gradient='none'; wanted 'full' or 'detach'"),
    (lambda: nk.PreconditionedAttention(gradient="none"), "wanted 'full' or 'detach'"),
    (lambda: nk.PreconditionedAttention(0.0), "eps"),
    (lambda: F.Field(1, 0), "positions=0"),
    (lambda: nk.DivisiveNorm(4, sigma=0.0), "sigma=0"),
    (lambda: nk.LyuSimoncelliNorm(4, 2), "odd number"),
    (lambda: nk.HeegerNorm(4, 0.5), r"exponent=0\.5"),
    (lambda: nk.DynamicTanh((4, 5), layout="n c *"), "one number of channels"),
    (lambda: nk.DynamicTanh(4, layout="n d"), "layout='n d'"),
    (lambda: nk.DynamicTanh(4, form="relu"), "form='relu'; wanted 'tanh' or 'erf'"),
    (lambda: nk.ExemplarNorm(4, 0), "reduction=0"),
    (lambda: nk.FiLM(4, 6, layout="c n"), "layout='c n'"),
    (lambda: nk.FilterResponseNorm(3, learned_eps=True)(ones(2, 3, 5, dtype=torch.int64)), "int64"),
    (lambda: nk.GDN(3, beta_min=0.0), "beta_min=0"),
    (lambda: nk.GDN(3, gamma_init=-1.0), "gamma_init=-1"),
    (lambda: nk.GatedRMSNorm(6, groups=4), "groups=4; wanted one of 1, 2, 3, 6"),
    (lambda: nk.GhostBatchNorm(3, 0), "ghost_batch_size=0"),
    (lambda: nk.GhostBatchNorm(3, memory="last"), "memory='last'"),
    (lambda: nk.GhostBatchNorm(3, layout="c n"), "layout='c n'"),
    (lambda: F.ghost_batch_norm(ones(4, 2), 2, running_mean=zeros(2)), "go together"),
    (lambda: nk.GlobalResponseNorm(6, layout="nchw"), "layout='nchw'"),
    (lambda: F.global_response_norm(ones(2, 3, 5), over="c"), "over='c'"),
    (lambda: nk.LearnedScale(4, unit=0.0), "unit=0"),
    (lambda: nk.LocalContextNorm(6, 4), "it must divide 6: 1, 2, 3, 6"),
    (lambda: nk.LocalContextNorm(6, 2, 0), "window=0"),
    (lambda: nk.LocalContrastNorm(form="article"), "wanted 'response' or 'jarrett'"),
    (lambda: nk.LocalContrastNorm(form="jarrett", window=4), r"an odd one, e\.g\. 5"),
    (lambda: nk.LocalContrastNorm(window=0), "window=0; wanted whole numbers from 1"),
    (lambda: nk.LocalContrastNorm(size=0), "size=0, window=5; wanted whole numbers from 1"),
    (lambda: nk.LocalContrastNorm(k=-1.0), r"k=-1\.0; wanted a number from 0"),
    (lambda: nk.LocalContrastNorm(form="jarrett", sigma=0.0), "above 0"),
    (lambda: nk.LocalResponseNorm(0), "size=0"),
    (lambda: nk.LocalResponseNorm(5, k=-1.0), r"k=-1\.0; wanted a number from 0"),
    (lambda: nk.LocalResponseNorm(5, k=math.nan), "k=nan; wanted a number from 0"),
    (lambda: nk.MeanOnlyBatchNorm(3, layout="c n"), "layout='c n'"),
    (lambda: F.mean_only_batch_norm(ones(2, 3)), "needs running_mean"),
    (lambda: nk.PartialRMSNorm(8, 0.1), r"fraction=0\.1"),
    (lambda: nk.PartialRMSNorm(8, -1.0), r"fraction=-1\.0"),
    (lambda: nk.PartialRMSNorm(4, 0.5, guard="around"), "guard"),
    (lambda: F.partial_rms_norm(ones(2, 8), 1.2), r"a fraction from 0\.125 to 1"),
    (lambda: nk.PositionalNorm(correction=2), "correction=2"),
    *(
        (lambda given=given: nk.QueryKeyNorm(8, **given), "length of at least 2")
        for given in ({"length": None}, {"length": 1}, {"form": "rms", "length": 10})
    ),
    (lambda: nk.QueryKeyNorm(8, form="l2"), "form='l2'"),
    (lambda: nk.RecurrentBatchNorm(3, "frame"), "max_length"),
    (lambda: nk.RecurrentBatchNorm(3, "step"), "statistics='step'"),
    (lambda: nk.RecurrentBatchNorm(3, momentum=2.0), "momentum"),
    (lambda: nk.BatchNormRNN(3, 2, "gelu"), "nonlinearity"),
    (lambda: nk.LayerNormRecurrent(3, 5, "mamba"), "'lstm', 'gru', 'rnn'"),
    (lambda: nk.LayerNormRecurrent(3, 5, num_layers=0), "at least 1 layer"),
    (lambda: nk.LayerNormRNNCell(3, 5, nonlinearity="sin"), "nonlinearity='sin'"),
    (lambda: nk.Residual(nn.Identity(), nn.Identity, "before"), "placement='before'"),
    (lambda: nk.RMSNorm(4, cast="first"), "after weight"),
    (lambda: nk.RMSNorm(4, guard="around"), "guard='around'"),
    (lambda: setattr(nk.RMSNorm(4), "cast", "first"), "after weight"),
    (lambda: setattr(nk.RMSNorm(4, save="output"), "cast", "before weight"), "can't undo cast='before weight'"),
    (lambda: F.rms_norm(ones(2, 4), 4, cast="first"), "after weight"),
    *(
        (lambda wrong=wrong: nk.LayerNorm(4, dropout=wrong), f"LayerNorm: dropout={wrong!r}; wanted a probability")
        for wrong in (1.5, -0.1, math.nan, "a", None, True)
    ),
    *(
        (lambda make=make: setattr(make(4), "dropout", 0.5), r"\w+: dropout=0.5 would be ignored")
        for make in (nk.BatchNorm, nk.InstanceNorm, nk.ScaleNorm, nk.GhostBatchNorm)
    ),
    (lambda: nk.ScaleNorm(8, weight=nn.Parameter(ones(8))), "scalar"),
    (lambda: nk.SeeDNorm(6, heads=4), "6 features do not split into heads=4; wanted one of 1, 2, 3, 6"),
    (lambda: nk.SwitchableNorm(4, correction=2), "correction=2"),
    (lambda: F.switchable_norm(ones(2, 3, 5), ones(3), ones(3), zeros(3)), "go together"),
    (lambda: nk.SyncBatchNorm(3, layout="c n"), "layout"),
    (lambda: F.sync_batch_norm(ones(4, 3, 5), zeros(3)), "go together"),
    # Weights
    (lambda: weight_of(nn.Linear(2, 2), "kernel", "here"), "it has: weight, bias"),
    (lambda: W.WeightLayout().columns("rows"), "view='rows'"),
    (lambda: W.scaled_weight_standardization(nn.Linear(1, 4)), "one element for each output unit"),
    (lambda: W.ScaledWeightStandardization(gamma=0.0), "gamma"),
    (lambda: W.scaled_weight_standardization(nn.ReLU()), "no parameter 'weight'"),
    (lambda: W.weight_standardization(nn.Conv2d(3, 3, 1, groups=3)), "one element for each output unit"),
    (lambda: W.weight_standardization(nn.Linear(3, 2), correction=2), "correction=2"),
    (lambda: W.weight_norm(nn.Linear(3, 2), dim=2), "dim=2 of a weight of 2 axes"),
    (lambda: W.weight_norm(W.weight_norm(nn.Linear(3, 2))), "must come first"),
    (lambda: W.spectral_norm(nn.Linear(3, 2), dim=2), "dim=2 of a weight of 2 axes"),
    (lambda: W.spectral_norm(nn.Linear(3, 2), n_power_iterations=0), "n_power_iterations=0"),
    (lambda: _conditioned(mode="rows"), "mode='rows'"),
    (lambda: _conditioned(order="random"), "order='random'"),
    (lambda: _conditioned(gradient="half"), "gradient='half'"),
    (lambda: _conditioned(view="x"), "view='x'"),
    (lambda: _conditioned(path="x"), "path='x'"),
    (lambda: _conditioned(eps=0.0), r"eps=0\.0"),
    (lambda: _conditioned(eps=math.nan), "eps=nan"),
    (lambda: _conditioned(iterations=0), "iterations=0"),
    (lambda: _conditioned(mode="jacobi"), "square matrix"),
    (lambda: F.equilibrate(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), "jacobi"), "element 1 is zero"),
    (lambda: W.weight_conditioning(nn.LayerNorm(3)), "two axes or more"),
    (lambda: W.weight_conditioning(nn.Linear(1, 4)), "would freeze"),
    (lambda: W.weight_conditioning(nn.Linear(4, 1), "col"), "would freeze"),
    (lambda: W.weight_conditioning(nn.Conv2d(3, 3, 1, groups=3)), "would freeze"),
    (lambda: W.precondition(nn.Linear(3, 2)), "neither left= nor right="),
    (lambda: W.precondition(nn.Linear(3, 2), 2.0), "left is a float"),
    (lambda: W.precondition(nn.LayerNorm(3), ones(3)), "two axes or more"),
    (lambda: W.precondition(nn.Linear(3, 2), W.inverse_root_diagonal), "square"),
    (lambda: W.spectral_conditioning(nn.Linear(3, 2), shift=math.nan), "finite"),
    (lambda: W.spectral_conditioning(nn.Linear(3, 4), blocks=3), "4 output units .* blocks=3"),
    (lambda: W.spectral_conditioning(nn.LayerNorm(3)), "two axes or more"),
    # Data
    (lambda: P.MinMaxScaling(1, 1), "low below high"),
    (lambda: P.MinMaxScaling(0, math.inf), "two finite numbers"),
    (lambda: P.RobustScaling((75, 25)), "75"),
    (lambda: P.RobustScaling((-1, 50)), "-1"),
    (lambda: P.UnitLength(3), "order=3"),
    (lambda: P.GlobalContrast(regularizer=-1), "regularizer=-1"),
    (lambda: P.GlobalContrast(eps=0), "eps=0"),
    (lambda: P.ZScore(dtype=torch.int64), "int64"),
    (lambda: P.ZScore().fit(torch.full((2, 13), torch.nan)), r"column 0, 1, 2, .* 9 and 3 more"),
    (lambda: P.ImageStandardization("cifar"), "no published constants 'cifar'"),
    (lambda: P.ImageStandardization(3), "statistics=3"),
    (lambda: P.ImageStandardization(((0.5,), (0.0,))), "above 0"),
    (lambda: P.ImageStandardization(layout="c n"), "layout='c n'"),
    (lambda: P.ImageStandardization(maximum=0), "maximum=0"),
    (lambda: P.Whitening("cholesky"), "method='cholesky'"),
    (lambda: P.Whitening("zca", equalize=False), "changes nothing"),
    (lambda: P.Whitening(eps=-1), "eps=-1"),
    (lambda: P.Whitening(rank_tolerance=1), "rank_tolerance=1"),
    (lambda: P.Whitening(components=0), "components=0"),
    *(
        (
            lambda axes=axes, over=over, sizes=sizes: P.Whitening(support=nk.Support(axes, over=over, **sizes)),
            "one axis",
        )
        for axes, over, sizes in (("n *", "n", {}), ("n c d", "n", {}), ("n (g c)", "n c", {"g": 2}))
    ),
    # Gradients and schedules
    (lambda: G.GradNorm(0), "GradNorm"),
    (lambda: G.GradNorm(2, alpha=-1), "GradNorm"),
    (lambda: G.GradNorm(2, rate=-1), "GradNorm"),
    (lambda: G.GradNorm(2, minimum=0), "GradNorm"),
    (lambda: G.GradNorm(2, path="fast"), "GradNorm"),
    (lambda: G.GradNorm(2, step="adam"), "GradNorm"),
    (lambda: G.GradNorm(2)([WEIGHT.sum(), -WEIGHT.sum()], WEIGHT), "negative"),
    (lambda: G.GradNorm(2)([WEIGHT.sum(), ones(())], WEIGHT), "shared"),
    (lambda: G.GradNorm(2)([WEIGHT.sum(), nn.Parameter(ones(1)).sum()], WEIGHT), "shared"),
    (lambda: G.GradientNormalizer(nn.Linear(2, 2), "row"), "GradientNormalizer"),
    (lambda: G.GradientNormalizer(nn.Linear(2, 2), None), "GradientNormalizer"),
    (lambda: G.GradientNormalizer([WEIGHT], "layer"), "GradientNormalizer"),
    (lambda: G.GradientNormalizer(nn.Identity()), "GradientNormalizer"),
    (lambda: F.normalize_gradients([], "tensor"), "GradientNormalizer"),
    (lambda: G.Muon([WEIGHT], lr=-1.0), r"lr=-1\.0"),
    (lambda: G.Muon([WEIGHT], momentum=1.0), r"momentum=1\.0"),
    (lambda: G.Muon([WEIGHT], equilibrate="rows"), "equilibrate='rows'"),
    (lambda: G.Muon([WEIGHT], second_moment=2.0), r"second_moment=2\.0"),
    (lambda: G.Muon([{"params": [WEIGHT], "matrices": True}]), r"shape \(2,\) among the matrices"),
    (lambda: inverse_sqrt_rate(0, 8), "warm-up: step=0"),
    (lambda: inverse_sqrt_rate(1, 0), "warm-up: features=0"),
    (lambda: inverse_sqrt_warmup(_optimizer(), 8, 0), "warm-up: warmup=0"),
    (lambda: linear_rate(0, 4), "warm-up: step=0"),
    (lambda: linear_warmup(_optimizer(), -1), "warm-up: warmup=-1"),
]

_ONE = "one value for each statistic"
SHAPES: Rows = [
    (lambda: nk.BatchChannelNorm(4, 2)(ones(1, 4)), "more than 1 value"),
    (lambda: nk.BatchGroupNorm(4)(ones(1, 4)), "more than 1 value"),
    (lambda: nk.BatchRenorm(3)(ones(1, 3)), "more than 1 value"),
    (
        lambda: nk.LayerNorm(2).quantized(torch.nested.nested_tensor([ones(1, 2), ones(3, 2)], layout=torch.jagged)),
        "quantized: got a nested tensor",
    ),
    *(
        (lambda wrong=wrong: F.adaptive_instance_norm(ones(2, 3, 8), ones(wrong)), r"wanted n c \*")
        for wrong in ((2, 2, 8), (4, 3, 8), (8,))
    ),
    (lambda: F.adaptive_instance_norm(ones(2, 3, 1), ones(2, 3, 5)), _ONE),
    *(
        (lambda wrong=wrong: nk.AdaLayerNorm(8, 6)(ones(2, 5, 8), ones(wrong)), "wanted 2x6")
        for wrong in ((2, 5), (3, 6), (2, 4, 6), (5,))
    ),
    (lambda: adaptive_layer_norm(ones(2, 5, 8), *zeros(2, 2, 7)), "does not broadcast"),
    (lambda: nk.ConditionalNorm(4, features=7)(ones(3, 4, 5), ones(3, 6)), "wanted 7 features for each sample"),
    (lambda: nk.ConditionalNorm(4, 2)(ones(3, 4, 5), torch.tensor([0, 1])), "one class, or one share"),
    (lambda: nk.ConditionalNorm(4, 2)(ones(3, 4, 1), torch.tensor([0, 1, 1])), _ONE),
    (lambda: nk.SpatiallyAdaptiveNorm(4, 2)(ones(3, 4, 5), ones(3, 3, 5)), "3 samples and 2 channels of the map"),
    *(
        (lambda x=x, map=map: nk.SpatiallyAdaptiveNorm(4, 2, over="*")(zeros(x), zeros(map)), "at least one position")
        for x, map in (((3, 4, 5, 6), (3, 2, 0, 6)), ((3, 4, 0), (3, 2, 5)))
    ),
    (lambda: nk.ConditionedTokens()(ones(3)), "wanted .*, L, D"),
    (lambda: nk.DynamicTanh(4)(ones(2, 3)), "wanted one that ends in 4"),
    (lambda: nk.DynamicTanh(4, layout="n c *")(ones(2, 3, 4)), "with 4 channels"),
    (lambda: nk.ExemplarNorm(4)(ones(2, 4, 1, 1)), _ONE),
    (_exemplar, "wanted 3 for each of 3 samples"),
    (lambda: nk.FiLM(4, 6)(ones(2, 4, 3), ones(2, 5)), "wanted 2x6"),
    (lambda: F.film(ones(2, 4, 3), ones(2, 3), ones(2, 3)), "does not broadcast"),
    (lambda: nk.GatedRMSNorm(6)(ones(2, 6), ones(2, 3)), "got a gate of 2x3, wanted .* 2x6"),
    (lambda: nk.GhostBatchNorm(3, 1)(ones(4, 3)), "more than 1 value per channel"),
    (lambda: nk.HypersphereResidual(8)(ones(2, 8), ones(1, 8)), "wanted two alike"),
    (lambda: F.renormalize_(reads=[nn.LayerNorm(8)]), "LayerNorm has a weight of shape 8"),
    (lambda: F.renormalize_(writes=[nn.ReLU()]), "shape none"),
    (lambda: nk.LocalContextNorm(6, 2, (3, 3))(ones(2, 6, 5)), "2 windows for 1 spatial axes"),
    (lambda: nk.LocalContrastNorm()(ones(3)), "at least 2"),
    (lambda: nk.LocalResponseNorm()(ones(3)), "at least 2"),
    *((lambda call=call: call(ones(2, 1, 5)), _ONE) for call in (nk.PositionalNorm(), F.positional_moments)),
    (lambda: nk.QueryKeyNorm(8, "rms")(*ones(3, 2, 5, 24)), "features=8"),
    (lambda: nk.RecurrentBatchNorm(3)(ones(5, 4, 3), lengths=ones(2)), "wanted one length per sample"),
    (lambda: nk.RecurrentBatchNorm(3, "frame", 5)(ones(4, 3)), r"\(T, N, C\) frame-wise"),
    (lambda: nk.RecurrentBatchNorm(3, "frame", 5)(ones(4, 1, 3)), "more than 1 value"),
    (lambda: nk.LayerNormRecurrent(3, 5)(ones(0, 2, 3)), "at least one step"),
    (lambda: nk.LayerNormRecurrent(3, 5)(ones(7, 2, 3), zeros(1, 2, 5)), r"\(h, c\)"),
    (lambda: nk.LayerNormRecurrent(3, 5)(ones(7, 2, 3), mask=ones(2, 7).bool()), "mask"),
    (lambda: nk.SwitchableNorm(4)(ones(2, 4, 1, 1)), _ONE),
    (lambda: W.WeightLayout().matrix(zeros(3)), "two axes or more"),
    (lambda: W.precondition(nn.Linear(3, 2), ones(3)), "of 3; wanted 2, a diagonal, or 2x2"),
    (lambda: power_iteration_square(ones(2, 3)), "a square matrix"),
    (lambda: power_iteration_square(ones(2, 2), x=ones(3)), "a vector of 2 elements"),
    (lambda: W.power_iteration(ones(2)), "wanted a matrix"),
    (lambda: P.ImageStandardization(((0.5, 0.5), (0.1,))), "2 means and 1"),
    (lambda: P.RobustScaling().fit([ones(2, 3), ones(2, 4)]), "can't be concatenated"),
    (lambda: P.Whitening().fit(ones(3, 4, 5)), "wanted 2"),
    (lambda: G.GradNorm(2)([WEIGHT.sum()], WEIGHT), "2 tasks"),
]

REFUSALS: list[tuple[Callable[[], object], type[Exception], str]] = [
    *((call, OptionError, said) for call, said in OPTIONS),
    *((call, ShapeError, said) for call, said in SHAPES),
    (lambda: nk.LayerNorm(4)(zeros(2, 5)), RuntimeError, "input of 2x5, wanted one that ends in normalized_shape=4"),
    (lambda: F.group_norm(ones(2, 8), 3), RuntimeError, "group_norm: 8 channels do not .* num_groups=3 .* 1, 2, 4, 8"),
    (lambda: nk.GroupNorm(3, 8), ValueError, r"GroupNorm: 8 channels do not split into num_groups=3; .* 1, 2, 4, 8"),
    (lambda: F.group_norm(zeros(6, 8, 5, 7), 3), ValueError, r"8 channels do not split .*input 6x8x5x7"),
    *(
        (lambda make=make, shape=shape: make(4)(zeros(shape)), error, said)
        for make in (nk.BatchNorm, nk.InstanceNorm, lambda channels: nk.GroupNorm(2, channels))
        for shape, error, said in (
            ((2, 5, 3), RuntimeError, r"got 5 channels .*2x5x3.* wanted num_\w+=4"),
            ((4,), ValueError, "wanted at least 2"),
        )
    ),
    (lambda: nk.BatchNorm(4)(zeros(1, 4)), ValueError, "Expected more than 1 value per channel when training"),
    (lambda: nk.InstanceNorm(4)(zeros(2, 4, 1)), ValueError, _ONE),
    (lambda: F.batch_norm(zeros(2, 3)), ValueError, "needs running_mean"),
    (lambda: F.instance_norm(zeros(2, 3, 4), use_input_stats=False), ValueError, "needs running_mean"),
    (lambda: nk.BatchNorm(4, layout="c n"), ValueError, "wanted"),
    (lambda: nk.LayerNorm(4, over="n"), ValueError, "wanted"),
    (lambda: nk.LayerNorm(4, per=""), ValueError, "goes with"),
    (lambda: nk.Support("n c", over="d"), ValueError, "not there"),
    (lambda: nk.Support("n c", over="c").split((3,)), RuntimeError, "axes"),
    (lambda: _conditioned(mode="col", path="output"), BackendError, "scales columns too"),
    (lambda: W.weight_conditioning(nn.ConvTranspose2d(3, 2, 3), path="output"), BackendError, "ConvTranspose2d"),
]


@pytest.mark.parametrize(("call", "error", "said"), REFUSALS, ids=[said for _, _, said in REFUSALS])
def test_what_does_not_fit_is_refused(call: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
