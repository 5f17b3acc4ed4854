"""What equals torch's layers, another method or a formula: from the start, in training, and with other options."""

import copy
import inspect
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.activations.divisive_norm import Field
from normkit.engine.library import library

Make = Callable[..., nn.Module]

# Of our class, what torch's name ends in, the arguments of both, and the input.
_CASES: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "batch 1d (N, C)": ("BatchNorm", "1d", (6,), {}, (8, 6)),
    "batch 1d": ("BatchNorm", "1d", (6,), {}, (4, 6, 5)),
    "batch 2d": ("BatchNorm", "2d", (6,), {}, (4, 6, 5, 3)),
    "batch 3d": ("BatchNorm", "3d", (6,), {}, (2, 6, 3, 4, 2)),
    "batch cumulative": ("BatchNorm", "2d", (6,), {"momentum": None}, (4, 6, 5, 3)),
    "batch without affine": ("BatchNorm", "2d", (6,), {"affine": False, "eps": 1e-3}, (4, 6, 5, 3)),
    "batch without statistics": ("BatchNorm", "2d", (6,), {"track_running_stats": False}, (4, 6, 5, 3)),
    "layer": ("LayerNorm", "", (6,), {}, (4, 5, 6)),
    "layer vector": ("LayerNorm", "", (6,), {}, (6,)),
    "layer of two axes": ("LayerNorm", "", ((5, 6),), {}, (4, 5, 6)),
    "layer without bias": ("LayerNorm", "", (6,), {"bias": False}, (4, 6)),
    "rms": ("RMSNorm", "", (6,), {}, (4, 5, 6)),
    "rms of two axes": ("RMSNorm", "", ((5, 6),), {"eps": 1e-3}, (4, 5, 6)),
    "group": ("GroupNorm", "", (3, 6), {}, (4, 6, 5, 3)),
    "group (N, C)": ("GroupNorm", "", (3, 6), {}, (4, 6)),
    "group 1d": ("GroupNorm", "", (2, 6), {}, (4, 6, 7)),
    "group 3d": ("GroupNorm", "", (1, 6), {}, (2, 6, 3, 4, 2)),
    "instance 1d": ("InstanceNorm", "1d", (6,), {}, (4, 6, 7)),
    "instance 2d": ("InstanceNorm", "2d", (6,), {}, (4, 6, 5, 3)),
    "instance tracked": ("InstanceNorm", "2d", (6,), {"affine": True, "track_running_stats": True}, (4, 6, 5, 3)),
    "instance 3d": ("InstanceNorm", "3d", (6,), {"affine": True}, (2, 6, 3, 4, 2)),
}
CASES: dict[str, tuple[Make, Make, tuple[int, ...]]] = {
    case: (partial(getattr(nk, name), *args, **options), partial(getattr(nn, f"{name}{rank}"), *args, **options), shape)
    for case, (name, rank, args, options, shape) in _CASES.items()
}


@pytest.mark.parametrize("case", CASES)
def test_keys_and_isinstance_checks_are_torchs(case: str) -> None:
    make, theirs_make, _ = CASES[case]
    ours, theirs = make(), theirs_make()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs).__mro__[1])


TORCHS = [getattr(nn, name) for name in ("BatchNorm2d", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm2d")]


@pytest.mark.parametrize(("ours", "theirs"), [(getattr(nk, of.__name__.removesuffix("2d")), of) for of in TORCHS])
def test_arguments_and_defaults_are_torchs(ours: type, theirs: type) -> None:
    mine, other = (inspect.signature(cls.__init__).parameters for cls in (ours, theirs))
    positional = [key for key, value in mine.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
    wanted = [key for key, value in other.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
    assert positional == [key for key in wanted if key not in ("device", "dtype")]
    for key in other:
        assert key in mine
        assert mine[key].default == other[key].default


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
        with pytest.raises(nk.errors.SurgeryError, match=r"activation='relu'.* add relu as a module after"):
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
    with pytest.raises(nk.errors.SurgeryError, match=f"sync_batchnorm: {type(norm).__name__} would lose {loses}"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))
    layer, x = nn.Linear(3, 4).eval(), torch.randn(5, 3)
    if fuses:
        fused = torch.nn.utils.fusion.fuse_linear_bn_eval(layer, norm.eval())
        assert_close(fused(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(nk.errors.SurgeryError, match=f"linear_bn_eval: {type(norm).__name__} would lose {loses}"):
            torch.nn.utils.fusion.fuse_linear_bn_eval(layer, norm.eval())


KINDS = product(("BatchNorm", "InstanceNorm"), (1, 2, 3))
RANKED = [(getattr(nn, f"{kind}{rank}d"), getattr(nk, kind), rank) for kind, rank in KINDS]


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
        q, scale = norm.quantized(x)
        assert (
            (q * scale - copy.deepcopy(norm).eval()(x)).abs() <= 0.6 * scale
        ).all()  # half a step, and float32's rounding


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


IMAGES, TOKENS, CLASSES = (6, 4, 5, 3), (3, 5, 8), torch.tensor([0, 2, 1, 0, 0, 2])
WHOLE, POSITION, INSTANCE, BATCH = Field(), Field(None, 1), Field(1, None), Field(1, None, samples=True)


def over_channels(norm: Callable[..., Tensor], *given: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    """A norm of the last axis, of images over their channels."""
    return lambda x: norm(x.movedim(1, -1), *given, **options).movedim(-1, 1)


def batch_norm(x: Tensor, *_: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def by_parts(size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([batch_norm(part) for part in x.split(size)])


def one_logit(k: int) -> nk.SwitchableNorm:
    norm = nk.SwitchableNorm(4)
    for logits in (norm.mean_weight, norm.var_weight):
        logits.data = torch.where(torch.arange(3) == k, 1000.0, -1000.0)
    return norm


def divisive(field: Field) -> Callable[[Tensor], Tensor]:
    return lambda x: nk.functional.divisive_norm(x, field, field, 1e-5**0.5)


# The first is the second, on an input of this shape and others.
SAME: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "SeeDNorm": (nk.SeeDNorm(8), lambda x: F.rms_norm(x, (8,), eps=1e-6), (TOKENS,)),
    "DynamicTanh": (nk.DynamicTanh(8), lambda x: torch.tanh(0.5 * x), (TOKENS,)),
    "DynamicTanh, bare": (nk.DynamicTanh(8, elementwise_affine=False), lambda x: torch.tanh(0.5 * x), (TOKENS,)),
    "DynamicTanh, erf": (nk.DynamicTanh(8, form="erf"), lambda x: torch.erf(0.5 * x), (TOKENS,)),
    "DynamicTanh, 0.8": (nk.DynamicTanh(8, 0.8, form="erf", bias=False), lambda x: torch.erf(0.8 * x), (TOKENS,)),
    "FiLM": (nk.FiLM(4, 6, zero=True), lambda x, condition: x, (IMAGES, (6, 6))),
    "AdaLayerNorm": (nk.AdaLayerNorm(8, 6), lambda x, _: F.layer_norm(x, (8,), eps=1e-6), (TOKENS, (3, 6))),
    "AdaLayerNormOutput": (nk.AdaLayerNormOutput(8, 6, 4), lambda x, _: x[..., :4] * 0, (TOKENS, (3, 6))),
    "ConditionalNorm": (nk.ConditionalNorm(4, classes=3), lambda x, _: F.instance_norm(x), (IMAGES, CLASSES)),
    "ConditionalNorm, vectors": (nk.ConditionalNorm(4, features=7), lambda x, _: F.instance_norm(x), (IMAGES, (6, 7))),
    "ConditionalNorm, batch": (nk.ConditionalNorm(4, classes=3, over="n *"), batch_norm, (IMAGES, CLASSES)),
    "ConditionalNorm, batch, vectors": (nk.ConditionalNorm(4, features=7, over="n *"), batch_norm, (IMAGES, (6, 7))),
    "GlobalResponseNorm": (nk.GlobalResponseNorm(8), lambda x: x, (TOKENS,)),
    "GlobalResponseNorm, images": (nk.GlobalResponseNorm(4, layout="n c *"), lambda x: x, (IMAGES,)),
    "GDN": (nk.GDN(4), lambda x: x / (1 + 0.1 * x**2).sqrt(), (IMAGES,)),
    "GDN, inverse": (nk.GDN(4, inverse=True), lambda x: x * (1 + 0.1 * x**2).sqrt(), (IMAGES,)),
    **{
        f"LocalContextNorm, {len(shape)}": (nk.LocalContextNorm(6, 3), nn.GroupNorm(2, 6), (shape,))
        for shape in ((2, 6), (2, 6, 7), (2, 6, 5, 4), (2, 6, 3, 4, 2))
    },
    **{
        f"PartialRMSNorm, {guard}": (
            nk.PartialRMSNorm(8, 1, 0.1, guard=guard),
            nk.RMSNorm(8, 0.1, guard=guard),
            (TOKENS,),
        )
        for guard in ("inside", "outside", "floor")
    },
    "divisive, sample": (divisive(WHOLE), lambda x: F.layer_norm(x, x.shape[1:]), (IMAGES,)),
    "divisive, instance": (divisive(INSTANCE), F.instance_norm, (IMAGES,)),
    "divisive, batch": (divisive(BATCH), batch_norm, (IMAGES,)),
    "divisive, position": (divisive(POSITION), over_channels(F.layer_norm, (4,)), (IMAGES,)),
    "LayerNorm, sample": (nk.LayerNorm(4, over="c *"), nn.GroupNorm(1, 4), (IMAGES,)),
    "LayerNorm, one weight": (nk.LayerNorm(4, over="c *", per=""), nn.GroupNorm(1, 4), (IMAGES,)),
    "LayerNorm, position": (
        nk.LayerNorm(4, over="c", eps=1e-6),
        over_channels(F.layer_norm, (4,), eps=1e-6),
        (IMAGES,),
    ),
    "RMSNorm, position": (nk.RMSNorm(4, over="c"), over_channels(F.rms_norm, (4,)), (IMAGES,)),
    "SwitchableNorm, batch": (one_logit(2), nn.BatchNorm2d(4), (IMAGES,)),
    "BatchChannelNorm": (nk.BatchChannelNorm(4, 2), nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)), (IMAGES,)),
    "GhostBatchNorm": (nk.GhostBatchNorm(4, 6), nn.BatchNorm2d(4), (IMAGES,)),
    "GhostBatchNorm, large": (nk.GhostBatchNorm(4, 99, momentum=None), nn.BatchNorm2d(4, momentum=None), (IMAGES,)),
    "BatchGroupNorm": (nk.BatchGroupNorm(4, None, None), batch_norm, (IMAGES,)),
    "BatchGroupNorm, ghost": (nk.BatchGroupNorm(4, None, 2), by_parts(2), (IMAGES,)),
    "BatchGroupNorm, uneven ghost": (nk.BatchGroupNorm(4, None, 4), by_parts(4), (IMAGES,)),
    "BatchGroupNorm, groups": (nk.BatchGroupNorm(4, 2, 1), nn.GroupNorm(2, 4), (IMAGES,)),
    "BatchGroupNorm, layer": (nk.BatchGroupNorm(4, 1, 1), nn.GroupNorm(1, 4), (IMAGES,)),
    "BatchGroupNorm, instance": (nk.BatchGroupNorm(4, None, 1), F.instance_norm, (IMAGES,)),
    "BatchGroupNorm, all": (nk.BatchGroupNorm(4, 1, None), lambda x: F.layer_norm(x, x.shape), (IMAGES,)),
}


@pytest.mark.parametrize("name", SAME)
def test_one_is_the_other(name: str) -> None:
    ours, theirs, given = SAME[name]
    for each in (ours, theirs):
        if isinstance(each, nn.Module):
            each.double()
    inputs = [each if isinstance(each, Tensor) else torch.randn(each, dtype=torch.float64) * 2 + 1 for each in given]
    # Beside the diagonal of GDN stands 2^-36 in place of 0.
    assert_close(ours(*inputs), theirs(*inputs), rtol=1e-7, atol=1e-9)
    if isinstance(theirs, nn.Module) and dict(theirs.named_buffers()):
        later = inputs[0] + 1
        assert_close(ours(later), theirs(later))
        assert_close(ours.eval()(later), theirs.eval()(later))
