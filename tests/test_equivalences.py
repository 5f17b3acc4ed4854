"""Where methods start, and what they are with other options: another method, torch's, or a formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.activations.divisive_norm import Field

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
