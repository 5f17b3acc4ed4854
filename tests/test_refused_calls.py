"""What surgery, diagnostics and the networks of the lab refuse, and what they say."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, ones
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import normkit as nk
from foreign_norms import Conv1D, wired
from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.catalogue.table import with_tables
from normkit.core.errors import NotationError, OptionError, ShapeError, SurgeryError
from normkit.diagnostics.conditioning import operator_norm, operator_spectrum
from normkit.diagnostics.curvature import hessian, hessian_condition, hessian_extremes
from normkit.lab.data.sequences import draw
from normkit.lab.models.nerf import OccupancyField
from normkit.lab.models.vit import Block, Encoder, VisionTransformer
from normkit.residual import Residual, place
from normkit.surgery import adopt, data_dependent_init, freeze, norm_penalty, param_groups, place_norms, translate
from normkit.surgery import reassign_spectral_ as reassign
from normkit.surgery.example_weighing import choose_alpha, weigh_examples
from normkit.surgery.select import select
from normkit.weights import weight_conditioning, weight_norm
from test_conditioning import case, mlp
from test_models import small_vit
from test_residual import stack, twice

LINEAR, BATCH, TOKENS = nn.Linear(2, 2), nn.BatchNorm1d(3), torch.randn(8, 4, 5)
NOISE = wired(lambda self, x: x + torch.randn_like(x))
RULE, RUNNING = nk.Rule(nk.Support("n c", over="c")), nk.functional.RunningStatistics(torch.zeros(2), torch.ones(2))
TANH, DATA = case("tanh")
CROSS = nn.functional.cross_entropy
PAIR = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


class Checkpointed(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, input.requires_grad_(), use_reentrant=True)


def nothing(y: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return math.nan * y.square().sum()


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def hinted() -> Any:
    return place_norms(encoder(), "hybrid").model(torch.randn(1, 4, 8), is_causal=True)


def parametrized() -> Any:
    model = encoder()
    parametrizations.weight_norm(model.layers[0].linear1)
    return place_norms(model, "deep")


def packed() -> Any:
    model = nn.Sequential(nn.LSTM(4, 6, batch_first=True))
    nk.convert(model, "layer_norm_lstm")
    return model(nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 4), [5, 3], batch_first=True))


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    # Rules
    (lambda: nk.functional.run(RULE, ones(2, 3), ones(3)), ValueError, "no compensation"),
    (lambda: nk.functional.run(RULE, ones(2, 3), running=RUNNING), ValueError, "no memory"),
    (lambda: nk.normalize(ones(2, 3), RULE.support, mask=ones(2, 3)), ValueError, r"torch.bool.*mask.bool\(\)"),
    (lambda: nk.normalize(ones(2, 3), RULE.support, mask=ones(4, 3) > 0), ValueError, "does not broadcast"),
    (lambda: nk.Rule(RULE.support, compensation=nk.Affine("d")), ValueError, "not in Support"),
    (lambda: nk.Rule(RULE.support, compensation=nk.Affine("c n")), ValueError, "order"),
    # Where
    (lambda: select(LINEAR, "frist_last"), NotationError, r"'frist_last' is not .*'first_last'.*hidden.*re:PATTERN"),
    (lambda: select(LINEAR, "re:("), NotationError, "can't be read"),
    (lambda: select(PAIR, "re:fc"), SurgeryError, r"'re:fc' chooses nothing.*that exist: 0$"),
    (lambda: select(nn.Sequential(nn.ReLU())), SurgeryError, "exist: none"),
    (lambda: select(nn.Sequential(LINEAR, Conv1D(2, 2)), "hidden"), SurgeryError, "'hidden' chooses .*exist: 0, 1$"),
    (lambda: select(nn.Sequential(nn.LazyLinear(3))), SurgeryError, "0: its weight has no size yet; run"),
    (lambda: select(LINEAR, ["head"]), NotationError, "where is a list; wanted a word, 're:PATTERN' or a function"),  # pyright: ignore[reportArgumentType]
    (lambda: nk.condition(LINEAR, where="head"), NotationError, r"'head' is not known.*layers by name: 're:head'"),
    (lambda: nk.condition(LINEAR, "rows"), SurgeryError, r"wanted 'row', .*did you mean 'row'"),
    (lambda: nk.condition(LINEAR, "col", left=ones(2)), OptionError, "wanted one of them"),
    (lambda: nk.condition(LINEAR, "spectral"), SurgeryError, "'attention' chooses nothing"),
    (
        lambda: nk.condition(nn.Conv2d(4, 8, 1, groups=2), left=ones(2, 4, 4), where="all"),
        SurgeryError,
        "left of a matrix of 2x4x2 is of 2x4x4; wanted 4, a diagonal, or 4x4; one tensor serves all groups",
    ),
    # Statistics
    (lambda: nk.recalibrate(BATCH, [TOKENS], estimator="median"), OptionError, "estimator"),
    (lambda: nk.recalibrate(BATCH, [TOKENS], limit=0), OptionError, "limit=0"),
    (lambda: nk.recalibrate(BATCH, []), SurgeryError, "no batches"),
    (lambda: nk.recalibrate(nn.LayerNorm(3), [TOKENS]), SurgeryError, "no batch normalization"),
    (lambda: freeze(nn.Sequential(nn.LayerNorm(3))), SurgeryError, "no layer of the model keeps running statistics"),
    (lambda: freeze(BATCH, statistics=False, affine=False), OptionError, "leave nothing to freeze"),
    (lambda: choose_alpha(nn.ReLU(), lambda m: 0.0), SurgeryError, "no BatchGroupNorm"),
    (lambda: choose_alpha(BatchGroupNorm(4), lambda m: 0.0, [2.0]), OptionError, "from 0 to 1"),
    (lambda: weigh_examples(nn.BatchNorm1d(3, track_running_stats=False)), SurgeryError, "no batch normalization"),
    (lambda: weigh_examples(nn.BatchNorm1d(3), count=1), OptionError, "count=1"),
    (lambda: adopt(nn.Sequential(BATCH), "keras", momentum=5.0), OptionError, "from 0 to 1"),
    (lambda: adopt(nn.Sequential(nn.LayerNorm(4)), "keras", eps=-1.0), OptionError, "eps from 0"),
    (lambda: adopt(PAIR, "jax"), OptionError, "framework='jax'; wanted"),
    # Folding and weights
    (lambda: nk.fold(PAIR, torch.randn(2, 4)), SurgeryError, r"training mode.*model\.eval\(\)"),
    (lambda: nk.fold(nn.Sequential(LINEAR).eval(), torch.randn(2, 5)), SurgeryError, "does not run on the example"),
    (lambda: nk.fold(nn.Sequential(LINEAR, NOISE).eval(), ones(2, 2)), SurgeryError, "same finite output twice"),
    (lambda: nk.fold(encoder().eval(), centring=True), OptionError, r"centring=True.*give example="),
    (lambda: reassign(nn.ReLU()), SurgeryError, "chooses nothing"),
    (lambda: reassign(LINEAR, memory={}), OptionError, "exact keeps no vectors"),
    (lambda: reassign(LINEAR, exact=False, n_power_iterations=0), OptionError, "n_power_iterations=0"),
    *(
        (lambda layer=layer: data_dependent_init(layer, TOKENS), SurgeryError, cure)
        for layer, cure in (
            (weight_norm(nn.Linear(5, 5), dim=1), "with dim=0"),
            (weight_norm(nn.Linear(5, 3), dim=None), "with dim=0"),
            (parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 3)), "with dim=1"),
            (weight_norm(nn.ConvTranspose1d(4, 4, 3, groups=2), dim=1), "without groups"),
            (weight_conditioning(weight_norm(nn.Linear(5, 3))), "before that is put on"),
            (nn.Linear(5, 3), r"no Linear, Conv.*keep\+wn"),
            (wired(lambda self, x: x, layer=weight_norm(nn.Linear(5, 3))), "reaches none"),
        )
    ),
    (lambda: param_groups(nn.LayerNorm(2), 0.0, norm_decay=-1), OptionError, "norm_decay=-1"),
    (lambda: norm_penalty(nn.LayerNorm(2), 0.1, 2), OptionError, "gamma_target=2"),
    (lambda: translate({"params/kernel": ones(2, 2, 3)}, nn.Linear(6, 3), source="flax"), SurgeryError, "flatten it"),
    (hinted, SurgeryError, "give the mask"),
    (parametrized, SurgeryError, "put those on afterwards"),
    (packed, ShapeError, "pad_packed_sequence"),
    # Placements
    (lambda: place_norms(place_norms(stack("encoder"), "pre").model, "deep"), SurgeryError, r"already; call undo"),
    (lambda: place_norms(twice(), "scaled"), SurgeryError, r"layers.2: it is a layer from above once more"),
    (lambda: place_norms(nn.Linear(2, 2), "pre"), SurgeryError, "no TransformerEncoder"),
    (lambda: place_norms(stack("encoder"), "hybird"), OptionError, "did you mean 'hybrid'"),
    (lambda: place_norms(stack("decoder"), "hybrid"), SurgeryError, "layers.0: hybrid was published"),
    (lambda: place("mix", layer=1), OptionError, "depth=None; wanted depth="),
    (lambda: place("scaled"), OptionError, "wanted layer="),
    (lambda: Residual(nn.Identity(), nn.Identity, "depp", depth=2), OptionError, "did you mean 'deep'"),
    # Diagnostics
    *(
        (lambda whole=whole: hessian_extremes(TANH, nothing, DATA, dense=whole), OptionError, "not finite")
        for whole in (0, 1000)
    ),
    (lambda: hessian(nn.Sequential(Checkpointed(4, 3)).double(), CROSS, DATA), OptionError, "use_reentrant=False"),
    (lambda: hessian(TANH, CROSS, iter(DATA)), OptionError, "walked only once"),
    (lambda: hessian(TANH, CROSS, []), OptionError, "no batches"),
    (lambda: hessian(TANH, CROSS, DATA, matrix="fisher"), OptionError, "matrix='fisher'"),
    (
        lambda: hessian(mlp().double().requires_grad_(False), CROSS, DATA),
        OptionError,
        "no parameter of the model is trained",
    ),
    (lambda: hessian_extremes(TANH, CROSS, DATA, dense=0, tolerance=1e-14, limit=20), OptionError, "larger limit="),
    (lambda: hessian_condition(TANH, CROSS, DATA, "constnt"), OptionError, r"wanted .*did you mean 'constant'"),
    *(
        (lambda size=size: operator_spectrum(ones(1, 1, 3), size), ShapeError, "one size per axis of taps")
        for size in ((2,), (3, 3), (2, 2, 2))
    ),
    (lambda: operator_spectrum(ones(3, 1, 3), (4,), groups=2), ShapeError, "groups=2"),
    (lambda: operator_norm(nn.Conv2d(3, 4, 3, stride=2), (7, 8)), ShapeError, "stride 2x2 on inputs of size 7x8"),
    (lambda: operator_norm(nn.Conv2d(3, 4, 3, dilation=3), (6, 6)), ShapeError, "one size per axis of taps"),
    (lambda: nk.Monitor(nn.LazyLinear(3)), OptionError, "run the model once"),
    (lambda: nk.Monitor(LINEAR, every=0), OptionError, "every=0"),
    (lambda: nk.audit(nn.LazyLinear(3), TOKENS), OptionError, "run the model once"),
    (lambda: with_tables("nothing here"), NotationError, "<!-- methods -->"),
    # Networks of the lab
    (lambda: Block(12, 5), OptionError, "heads is 5, which does not divide 12 features"),
    (
        lambda: VisionTransformer(size=32, patch=3, features=12, depth=1, heads=3),
        OptionError,
        "patch is 3, which does not divide the image size 32",
    ),
    (lambda: small_vit()(ones(1, 3, 16, 16)), ShapeError, r"wanted \(n, c, 32, 32\)"),
    (lambda: draw("reverse", 1, 4), OptionError, "no task"),
    (lambda: OccupancyField("gauss"), OptionError, r"'gauss'.*'gaussian', 'sine', 'relu'"),
    (lambda: Encoder(11, 7, features=8, heads=3), OptionError, "heads"),
    (lambda: Encoder(11, 7, features=8, norm="bn"), OptionError, "norm"),
]


@pytest.mark.parametrize(("call", "error", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_what_does_not_fit_is_refused(call: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
