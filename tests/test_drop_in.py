"""Where torch has the class, ours is the same: arguments, defaults, values, gradients, buffers, state_dict, both ways."""

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.engine.library import library

Make = Callable[..., nn.Module]

CASES: dict[str, tuple[Make, Make, tuple[int, ...]]] = {
    "batch 1d (N, C)": (lambda **k: nk.BatchNorm(6, **k), lambda **k: nn.BatchNorm1d(6, **k), (8, 6)),
    "batch 1d": (lambda **k: nk.BatchNorm(6, **k), lambda **k: nn.BatchNorm1d(6, **k), (4, 6, 5)),
    "batch 2d": (lambda **k: nk.BatchNorm(6, **k), lambda **k: nn.BatchNorm2d(6, **k), (4, 6, 5, 3)),
    "batch 3d": (lambda **k: nk.BatchNorm(6, **k), lambda **k: nn.BatchNorm3d(6, **k), (2, 6, 3, 4, 2)),
    "batch cumulative": (
        lambda **k: nk.BatchNorm(6, momentum=None, **k),
        lambda **k: nn.BatchNorm2d(6, momentum=None, **k),
        (4, 6, 5, 3),
    ),
    "batch without affine": (
        lambda **k: nk.BatchNorm(6, affine=False, eps=1e-3, **k),
        lambda **k: nn.BatchNorm2d(6, affine=False, eps=1e-3, **k),
        (4, 6, 5, 3),
    ),
    "batch without statistics": (
        lambda **k: nk.BatchNorm(6, track_running_stats=False, **k),
        lambda **k: nn.BatchNorm2d(6, track_running_stats=False, **k),
        (4, 6, 5, 3),
    ),
    "layer": (lambda **k: nk.LayerNorm(6, **k), lambda **k: nn.LayerNorm(6, **k), (4, 5, 6)),
    "layer vector": (lambda **k: nk.LayerNorm(6, **k), lambda **k: nn.LayerNorm(6, **k), (6,)),
    "layer of two axes": (lambda **k: nk.LayerNorm((5, 6), **k), lambda **k: nn.LayerNorm((5, 6), **k), (4, 5, 6)),
    "layer without bias": (
        lambda **k: nk.LayerNorm(6, bias=False, **k),
        lambda **k: nn.LayerNorm(6, bias=False, **k),
        (4, 6),
    ),
    "rms": (lambda **k: nk.RMSNorm(6, **k), lambda **k: nn.RMSNorm(6, **k), (4, 5, 6)),
    "rms of two axes": (
        lambda **k: nk.RMSNorm((5, 6), eps=1e-3, **k),
        lambda **k: nn.RMSNorm((5, 6), eps=1e-3, **k),
        (4, 5, 6),
    ),
    "group": (lambda **k: nk.GroupNorm(3, 6, **k), lambda **k: nn.GroupNorm(3, 6, **k), (4, 6, 5, 3)),
    "group (N, C)": (lambda **k: nk.GroupNorm(3, 6, **k), lambda **k: nn.GroupNorm(3, 6, **k), (4, 6)),
    "group 1d": (lambda **k: nk.GroupNorm(2, 6, **k), lambda **k: nn.GroupNorm(2, 6, **k), (4, 6, 7)),
    "group 3d": (lambda **k: nk.GroupNorm(1, 6, **k), lambda **k: nn.GroupNorm(1, 6, **k), (2, 6, 3, 4, 2)),
    "instance 1d": (lambda **k: nk.InstanceNorm(6, **k), lambda **k: nn.InstanceNorm1d(6, **k), (4, 6, 7)),
    "instance 2d": (lambda **k: nk.InstanceNorm(6, **k), lambda **k: nn.InstanceNorm2d(6, **k), (4, 6, 5, 3)),
    "instance tracked": (
        lambda **k: nk.InstanceNorm(6, affine=True, track_running_stats=True, **k),
        lambda **k: nn.InstanceNorm2d(6, affine=True, track_running_stats=True, **k),
        (4, 6, 5, 3),
    ),
    "instance 3d": (
        lambda **k: nk.InstanceNorm(6, affine=True, **k),
        lambda **k: nn.InstanceNorm3d(6, affine=True, **k),
        (2, 6, 3, 4, 2),
    ),
}
# The orders of summation differ: a few units in the last place, more where they nearly cancel in a gradient.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", CASES)
def test_training_and_evaluation_equal_torch(case: str, last: bool, dtype: torch.dtype) -> None:
    make, theirs_make, shape = CASES[case]
    ours, theirs = make(dtype=dtype), theirs_make(dtype=dtype)
    same_weights(ours, theirs)
    tolerance = TOLERANCE[dtype]
    for step in range(5):
        x = torch.randn(shape, dtype=dtype) + 1
        if last and len(shape) > 2:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        mode = step < 4
        a, b = x.clone().requires_grad_(), x.clone().contiguous().requires_grad_()
        ya, yb = ours.train(mode)(a), theirs.train(mode)(b)
        direction = torch.randn_like(yb)
        assert_close(ya, yb, rtol=tolerance, atol=tolerance)
        wanted = torch.autograd.grad((yb * direction).sum(), [b, *theirs.parameters()])
        found = torch.autograd.grad((ya * direction).sum(), [a, *ours.parameters()])
        assert_close(found, wanted, rtol=10 * tolerance, atol=10 * tolerance)
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_load_both_ways_and_empty_batches_pass(case: str) -> None:
    make, theirs_make, shape = CASES[case]
    ours, theirs = make(), theirs_make()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    same_weights(ours, theirs)
    assert isinstance(ours, type(theirs).__mro__[1]), "isinstance checks written for torch must hold"
    if len(shape) > 1:
        before = copy.deepcopy(ours.state_dict())
        y = ours(torch.zeros(0, *shape[1:]))
        assert y.shape == (0, *shape[1:])
        for key, value in ours.state_dict().items():
            if key != "num_batches_tracked":
                assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (nk.BatchNorm, nn.BatchNorm2d),
        (nk.LayerNorm, nn.LayerNorm),
        (nk.RMSNorm, nn.RMSNorm),
        (nk.GroupNorm, nn.GroupNorm),
        (nk.InstanceNorm, nn.InstanceNorm2d),
    ],
)
def test_arguments_and_defaults_are_torchs(ours: type, theirs: type) -> None:
    mine, other = (inspect.signature(cls.__init__).parameters for cls in (ours, theirs))
    positional = [key for key, value in mine.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
    wanted = [key for key, value in other.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
    assert positional == [key for key in wanted if key not in ("device", "dtype")]
    for key in other:
        assert key in mine
        assert mine[key].default == other[key].default


def test_functions_equal_torchs() -> None:
    x = torch.randn(4, 6, 5)
    w, b = torch.randn(6), torch.randn(6)
    mean, var = torch.randn(6), torch.rand(6) + 0.5
    mine, other = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    assert_close(
        nk.functional.batch_norm(x, *mine, w, b, True, 0.3),
        F.batch_norm(x, *other, w, b, True, 0.3),
        rtol=1e-5,
        atol=1e-5,
    )
    assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert_close(nk.functional.batch_norm(x, *mine, w, b), F.batch_norm(x, *other, w, b), rtol=1e-5, atol=1e-5)
    assert_close(
        nk.functional.layer_norm(x, (5,), w[:5], b[:5]), F.layer_norm(x, (5,), w[:5], b[:5]), rtol=1e-5, atol=1e-5
    )
    assert_close(nk.functional.rms_norm(x, (5,), w[:5]), F.rms_norm(x, (5,), w[:5]), rtol=1e-5, atol=1e-5)
    assert_close(nk.functional.group_norm(x, 3, w, b), F.group_norm(x, 3, w, b), rtol=1e-5, atol=1e-5)
    assert_close(
        nk.functional.instance_norm(x, weight=w, bias=b), F.instance_norm(x, weight=w, bias=b), rtol=1e-5, atol=1e-5
    )
    mine, other = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    assert_close(nk.functional.instance_norm(x, *mine, w, b), F.instance_norm(x, *other, w, b), rtol=1e-5, atol=1e-5)
    assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [nk.BatchNorm(4), nk.GroupNorm(2, 4), nk.InstanceNorm(4)], ids=lambda m: type(m).__name__
)
def test_wrong_channels_are_refused_as_torch_refuses_them(layer: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"got 5 channels .*2x5x3.* wanted num_\w+=4"):
        layer(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="wanted at least 2"):
        layer(torch.zeros(4))


def test_other_refusals() -> None:
    with pytest.raises(RuntimeError, match=r"input of 2x5, wanted one that ends in normalized_shape=4"):
        nk.LayerNorm(4)(torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match=r"group_norm: 8 channels do not split into num_groups=3 .* 1, 2, 4, 8"):
        nk.functional.group_norm(torch.ones(2, 8), 3)
    with pytest.raises(ValueError, match=r"GroupNorm: 8 channels do not split into num_groups=3; .* 1, 2, 4, 8"):
        nk.GroupNorm(3, 8)
    with pytest.raises(ValueError, match=r"8 channels do not split .*input 6x8x5x7"):
        nk.functional.group_norm(torch.zeros(6, 8, 5, 7), 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nk.BatchNorm(4)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="one value for each statistic"):
        nk.InstanceNorm(4)(torch.zeros(2, 4, 1))
    for call in (
        lambda: nk.functional.batch_norm(torch.zeros(2, 3)),
        lambda: nk.functional.instance_norm(torch.zeros(2, 3, 4), use_input_stats=False),
    ):
        with pytest.raises(ValueError, match="needs running_mean"):
            call()
    for make in (
        lambda: nk.BatchNorm(4, layout="c n"),
        lambda: nk.LayerNorm(4, over="n"),
        lambda: nk.LayerNorm(4, per=""),
    ):
        with pytest.raises(ValueError, match=r"wanted|goes with"):
            make()


# The four layer norms of convolutional networks, and channels-last layouts


def test_layer_norms_of_convnets() -> None:
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    double = {"dtype": torch.float64}
    sample = nk.LayerNorm(6, over="c *", **double)
    assert_close(sample(x), nn.GroupNorm(1, 6, **double)(x))
    assert_close(nk.LayerNorm(6, over="c *", per="", **double)(x), sample(x))
    assert_close(nk.LayerNorm((6, 4, 3), **double)(x), sample(x))
    assert nk.LayerNorm(6, over="c *", per="").weight.shape == ()
    channels = nk.LayerNorm(6, over="c", eps=1e-6, **double)
    nn.init.normal_(channels.weight)
    moved = F.layer_norm(x.movedim(1, -1), (6,), channels.weight, channels.bias, 1e-6).movedim(-1, 1)
    assert_close(channels(x), moved)
    rms = nk.RMSNorm(6, over="c", **double)
    assert_close(rms(x), F.rms_norm(x.movedim(1, -1), (6,)).movedim(-1, 1))


@pytest.mark.parametrize("make", [nk.BatchNorm, nk.InstanceNorm, lambda c, **k: nk.GroupNorm(2, c, **k)])
def test_channels_last_layout_is_a_transposition(make: Make) -> None:
    first, last = make(6, dtype=torch.float64), make(6, layout="n * c", dtype=torch.float64)
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    assert_close(last(x.movedim(1, -1)), first(x).movedim(1, -1))
    assert_close(last.state_dict(), first.state_dict())
    assert last(x.movedim(1, -1).contiguous()).is_contiguous()
    assert last.eval()(x.movedim(1, -1).contiguous()).is_contiguous()
    assert "layout" in repr(last)


def test_identities_between_methods() -> None:
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    assert_close(nk.functional.group_norm(x, 6), nk.functional.instance_norm(x))
    assert_close(nk.functional.group_norm(x, 1), nk.functional.layer_norm(x, 6, over="c *"))
    assert_close(nk.functional.batch_norm(x[:1], training=True), nk.functional.instance_norm(x[:1]))
    as_channels = nk.functional.batch_norm(x.reshape(1, 18, 5), training=True).reshape(3, 6, 5)
    assert_close(nk.functional.instance_norm(x), as_channels)
    centred = x - x.mean(-1, keepdim=True)
    assert_close(nk.functional.rms_norm(centred, 5, eps=1e-5), nk.functional.layer_norm(x, 5))


def test_batch_norm_output_is_bounded_and_the_bound_is_reached() -> None:
    for n in (4, 16):
        x = torch.zeros(n, 1, dtype=torch.float64)
        x[0] = 1.0
        y = nk.functional.batch_norm(x, training=True, eps=1e-15)
        assert_close(y.max(), torch.tensor(float(n - 1), dtype=torch.float64).sqrt())
        assert nk.functional.batch_norm(torch.randn(n, 50), training=True).abs().max() <= (n - 1) ** 0.5


def test_compensation_can_undo_a_batch_norm_and_a_bias_before_it_cancels() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    mean, var = x.mean(0), x.var(0, correction=0)
    assert_close(nk.functional.batch_norm(x, None, None, (var + 1e-5).sqrt(), mean, training=True), x)
    assert_close(nk.functional.batch_norm(x + 5.0, training=True), nk.functional.batch_norm(x, training=True))


def test_a_shift_of_the_input_shifts_the_output() -> None:
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False)
    model = nn.Sequential(conv, nk.BatchNorm(4))
    x = torch.randn(2, 2, 6, 6)
    assert_close(model(x.roll((1, 2), (2, 3))), model(x).roll((1, 2), (2, 3)), rtol=1e-4, atol=1e-5)


# What torch lacks


def test_one_broken_batch_does_not_poison_running_statistics() -> None:
    norm = nk.BatchNorm(2)
    norm(torch.randn(8, 2))
    before = copy.deepcopy(norm.state_dict())
    norm(torch.tensor([[float("nan"), 1.0], [2.0, 3.0]]))
    assert_close(norm.running_mean[0], before["running_mean"][0])
    assert norm.running_mean[1] != before["running_mean"][1]
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()


def test_attributes_set_later_are_followed() -> None:
    norm, theirs = nk.BatchNorm(3), nn.BatchNorm1d(3)
    norm.momentum = theirs.momentum = 0.7
    norm.eps = theirs.eps = 0.1
    x = torch.randn(5, 3)
    assert_close(norm(x), theirs(x))
    assert_close(norm.running_var, theirs.running_var)


def test_torchs_own_tools_take_our_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nk.BatchNorm(4))
    batches = [torch.randn(16, 3) for _ in range(4)]
    torch.optim.swa_utils.update_bn(batches, model)
    wanted = torch.stack([model[0](batch).mean(0) for batch in batches]).mean(0)
    assert_close(model[1].running_mean, wanted)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(converted[1], nn.SyncBatchNorm)
    assert_close(converted.eval()(batches[0]), model.eval()(batches[0]))


def test_torchs_tools_never_lose_an_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nk.BatchNorm(4, activation="relu")).eval()
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    tools: list[Callable[[], Any]] = [
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)),
        lambda: torch.nn.utils.fusion.fuse_conv_bn_eval(*model),  # pyright: ignore[reportArgumentType]
        lambda: torch.nn.utils.fusion.fuse_linear_bn_eval(nn.Linear(3, 4).eval(), model[1]),
    ]
    for tool in tools:
        with pytest.raises(nk.errors.SurgeryError, match=r"activation='relu'.* add relu after"):
            tool()
    model[1].activation = None
    assert_close(tools[1]()(x), model(x), rtol=1e-4, atol=1e-5)
    model[1].activation = "relu"
    assert model[1].eps == 1e-5
    assert_close(model(x), before)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch.ao.quantization.fuse_modules(model, ["0", "1"])


@pytest.mark.parametrize(
    ("norm", "loses", "fuses"),
    [
        (nk.BatchNorm(4, layout="n * c"), "layout='n \\* c'; replace it by normkit's SyncBatchNorm", True),
        (nk.SyncBatchNorm(4, layout="n * c"), "layout", True),
        (nk.GhostBatchNorm(4), "its sub-batches", True),
        (nk.EstBatchNorm(4), "its estimates", True),
        (nk.BatchChannelNorm(4, 2), "its second step", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_torchs_tools_refuse_what_they_would_change(norm: Any, loses: str, fuses: bool) -> None:
    with pytest.raises(
        nk.errors.SurgeryError, match=f"convert_sync_batchnorm: {type(norm).__name__} would lose {loses}"
    ):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))
    layer, x = nn.Linear(3, 4).eval(), torch.randn(5, 3)
    if fuses:
        fused = torch.nn.utils.fusion.fuse_linear_bn_eval(layer, norm.eval())
        assert_close(fused(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(
            nk.errors.SurgeryError, match=f"fuse_linear_bn_eval: {type(norm).__name__} would lose {loses}"
        ):
            torch.nn.utils.fusion.fuse_linear_bn_eval(layer, norm.eval())


RANKED = [
    (getattr(nn, f"{kind}{rank}d"), getattr(nk, kind), rank)
    for kind in ("BatchNorm", "InstanceNorm")
    for rank in (1, 2, 3)
]


@pytest.mark.parametrize(("theirs", "ours", "rank"), RANKED, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("take", ["layer", "accelerate"])
def test_layers_in_torchs_place_know_their_rank(theirs: type, ours: type, rank: int, take: str) -> None:
    other = theirs(4, affine=True)
    model = nn.Sequential(copy.deepcopy(other))
    norm = ours(4, affine=True, spatial=rank) if take == "layer" else nk.accelerate(model).model[0]
    assert type(norm) is ours
    assert norm.spatial == rank
    assert f"spatial={rank}" in repr(norm)
    for axes in range(1, 7):
        x = torch.randn([4] * axes)  # whatever axis is taken for the channels has their number
        try:
            wanted = other(x)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error).removesuffix(")"))):
                norm(x)
            continue
        assert_close(norm(x), wanted, rtol=1e-5, atol=1e-5)
        assert norm.explain(x).backend
        assert_close(norm.after_sum(x, x)[1], 2 * x)


def test_a_batch_norm_that_becomes_an_instance_norm_keeps_its_batch() -> None:
    changed = nk.convert(nn.Sequential(nn.BatchNorm1d(4)), "in").model
    with pytest.raises(nk.errors.ShapeError, match="one value for each statistic"):
        changed(torch.randn(4, 4))
    changed = nk.convert(nn.Sequential(nn.InstanceNorm2d(4)), "bn").model
    with pytest.raises(nk.errors.ShapeError, match="expected 4D input"):
        changed(torch.randn(4, 4, 4))


def test_explain_says_which_and_why() -> None:
    x = torch.randn(2, 6, 4, 4)
    norm = nk.GroupNorm(3, 6)
    explanation = norm.explain(x)
    assert explanation.backend == ("aten" if library() is None else "native")
    assert "2 samples x 3 groups = 6, over 2 channels x 16 positions = 32 elements" in str(explanation)
    rms = nk.RMSNorm(6, over="c")
    explanation = rms.explain(x)
    if library() is None:
        assert explanation.backend == "closed"
        assert "no fused kernel" in explanation.why
    else:
        assert explanation.backend == "native"
        assert "the kept axes are contiguous" in explanation.why
    with pytest.raises(nk.errors.BackendError, match=r"aten.*no fused kernel"):
        nk.functional.run(rms.rule, x, backend="aten")
    with pytest.raises(ValueError, match="wanted one of auto, reference"):
        nk.functional.run(norm.rule, x, backend="fast")


def test_normalize_is_open_to_new_support_sets() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    tiles = nk.Support("n c h (s w)", over="h w", s=2)
    y = nk.normalize(x, tiles, torch.ones(2, 3), per="n c")
    assert_close(y[..., :3], nk.functional.instance_norm(x[..., :3].contiguous()))
    assert torch.autograd.gradgradcheck(lambda x: nk.normalize(x, tiles), x)
    with pytest.raises(ValueError, match="per="):
        nk.normalize(x, tiles, torch.ones(3))


def test_tensors_and_parameters_that_do_not_fit_are_refused() -> None:
    rule = nk.Rule(nk.Support("n c", over="c"))
    with pytest.raises(ValueError, match="no compensation"):
        nk.functional.run(rule, torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="no memory"):
        nk.functional.run(
            rule, torch.zeros(2, 3), running=nk.functional.RunningStatistics(torch.zeros(2), torch.ones(2))
        )
    with pytest.raises(ValueError, match=r"torch.bool.*mask.bool\(\)"):
        nk.normalize(torch.zeros(2, 3), rule.support, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="does not broadcast"):
        nk.normalize(torch.zeros(2, 3), rule.support, mask=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="not in Support"):
        nk.Rule(nk.Support("n c", over="c"), compensation=nk.Affine("d"))
    with pytest.raises(ValueError, match="order"):
        nk.Rule(nk.Support("n c", over="c"), compensation=nk.Affine("c n"))


def test_results_are_tensors_of_the_callers() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    for backend in ("reference", "closed", "aten"):
        y: Tensor = nk.functional.layer_norm(x, 3, backend=backend)
        y.mul_(2.0)
        y.sum().backward()


def test_padding_comes_out_as_zero_in_evaluation_too() -> None:
    norm = nk.BatchNorm(3)
    x = torch.randn(2, 3, 4)
    norm(x)
    mask = torch.tensor([True, True, True, False])
    y = norm.eval()(x, mask=mask)
    assert (y[..., 3] == 0).all()
    assert_close(y[..., :3], norm(x)[..., :3])


def test_explain_knows_whether_statistics_are_remembered() -> None:
    x = torch.randn(2, 3, 4)
    tracked = nk.InstanceNorm(3, track_running_stats=True)
    if library() is not None:
        assert {norm.explain(x).backend for norm in (nk.InstanceNorm(3), tracked, tracked.eval())} == {"native"}
        return
    assert nk.InstanceNorm(3).explain(x).backend == "aten"
    assert tracked.explain(x).backend == "closed"
    assert "does not return the statistics" in tracked.explain(x).why
    assert tracked.eval().explain(x).backend == "aten"
