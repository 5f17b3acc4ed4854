"""The five support sets that lectures show, found by differentiating the layers themselves.

An output of a normalization depends on the elements that share its statistic and on no others, so the non-zeros of its gradient
by the input are the support set. LayerNorm stands here twice: in a ConvNet it normalizes a sample, in a transformer a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.activations.layer_norm import LayerNorm

_IMAGES, _TOKENS = ("samples", "channels", "positions"), ("samples", "tokens", "features")


@dataclass(frozen=True)
class Slide:
    """A layer in training mode, and the axes of its input in the picture."""

    title: str
    layer: nn.Module
    labels: tuple[str, str, str] = _IMAGES
    order: tuple[int, int, int] = (0, 2, 1)


SLIDES = {
    "slide_batch_norm": Slide("BatchNorm", BatchNorm(6)),
    "slide_layer_norm_convnet": Slide("LayerNorm in a ConvNet", LayerNorm(6, over="c *")),
    "slide_layer_norm_transformer": Slide("LayerNorm in a transformer", LayerNorm(6), _TOKENS, (0, 1, 2)),
    "slide_instance_norm": Slide("InstanceNorm", InstanceNorm(6)),
    "slide_group_norm": Slide("GroupNorm", GroupNorm(2, 6)),
}


def reached(slide: Slide) -> Tensor:
    """Which elements of three samples, six channels and four positions change the first place of the last channel.

    >>> reached(SLIDES["slide_instance_norm"]).sum(2).tolist()
    [[0, 0, 0, 0, 0, 4], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    """
    images = slide.labels == _IMAGES
    x = torch.rand((3, 6, 4) if images else (3, 4, 6), generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = slide.layer(x)[(0, 5, 0) if images else (0, 0, 5)]
    (gradient,) = torch.autograd.grad(output, x)
    return gradient != 0
