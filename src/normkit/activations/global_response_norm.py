"""Global response normalization: weight each channel by its energy relative to that of the others."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.statistic import length
from normkit.core.support import Split, Support, check_shape
from normkit.engine import native_global_response
from normkit.engine.layer import check_channels


class GlobalResponseNorm(Module):
    """Weight each channel by its energy relative to the mean energy of all channels, and add the input.

    G_c = |x_c| over the positions, N_c = G_c / (mean over c of G_c + eps), y = weight * (x * N) + bias + x. Weight and bias
    start at 0, so the layer starts as the identity; N averages 1 over the channels. Training and evaluation compute the same.

    It loads the state_dict of timm's layer, whose weight and bias have additional axes of size 1, and that of the authors' layer,
    which calls them gamma and beta. A mask gives the form for masked autoencoders, where only visible positions enter; there the
    original code measures the energy over the visible positions of the whole batch, ``over="n *"``.

    Args:
        num_channels: channels C.
        eps: added to the mean energy. Default: 1e-6.
        layout: ``"n * c"`` for channels last, ``"n c *"`` for channels first. Default: ``"n * c"``, as in ConvNeXt V2.
        over: ``"*"`` for the energy of each sample, ``"n *"`` for that of the batch. Default: ``"*"``.

    Shape: (N, *, C) or, with channels first, (N, C, *); the output has the same shape.

    Raises:
        ShapeError: a number of channels other than ``num_channels``.
        OptionError: an unknown layout or ``over``.

    Reference: Woo, Debnath, Hu, Chen, Liu, Kweon, Xie, "ConvNeXt V2" (2023), https://arxiv.org/abs/2301.00808.

    >>> norm = GlobalResponseNorm(2)
    >>> _ = nn.init.ones_(norm.weight)
    >>> norm(torch.tensor([[[3.0, 1.0], [4.0, 0.0]]])).detach()
    tensor([[[ 8.0000,  1.3333],
             [10.6667,  0.0000]]])
    """

    shown = "{0.num_channels}, eps={0.eps}, layout={0.layout!r}, over={0.over!r}"
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        *,
        layout: str = "n * c",
        over: str = "*",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.eps, self.layout, self.over = num_channels, eps, layout, over
        self.register_affine((num_channels,), device=device, dtype=dtype)
        self.reset_parameters()
        _support(layout, over)

    def reset_parameters(self) -> None:
        """Set weight and bias to 0: the identity."""
        self.fill(weight=0, bias=0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, foreign in (("weight", "gamma"), ("bias", "beta")):
            if prefix + foreign in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + foreign)
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dim() == 4 and value.numel() == self.num_channels:
                state_dict[prefix + name] = value.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        check_channels("GlobalResponseNorm", input, self.num_channels, "num_channels", self.layout)
        return global_response_norm(
            input, self.weight, self.bias, self.eps, layout=self.layout, over=self.over, mask=mask
        )


def global_response_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layout: str = "n * c",
    over: str = "*",
    mask: Tensor | None = None,
) -> Tensor:
    """Global response normalization as a function; see GlobalResponseNorm. A weight of None counts as 1.

    With a mask (boolean, broadcasts over the input), elements where it is False enter no energy and become zero.

    >>> global_response_norm(torch.tensor([[[3.0, 1.0], [4.0, 0.0]]]))
    tensor([[[ 8.0000,  1.3333],
             [10.6667,  0.0000]]])
    """
    support = _support(layout, over)
    accumulation_dtype(input.dtype)  # refuses integers
    split = support.split(input.shape)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_shape("global_response_norm", name, parameter, split.shape[split.names.index("c")])
    definition = partial(_define, eps=eps, split=split, mask=mask)
    y = None
    if mask is None:
        axis = 1 if layout == "n c *" else -1
        y = native_global_response.weigh(input, weight, bias, axis, eps, over == "n *", definition)
    return definition(input, weight, bias) if y is None else y


def _define(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, split: Split, mask: Tensor | None
) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    if mask is not None:
        wide = torch.where(mask, wide, 0.0)
    energy = length(wide, split.dims)
    share = energy / (energy.mean(split.names.index("c"), keepdim=True) + eps)
    shape = [1] * x.dim()
    shape[split.names.index("c")] = -1
    gain = share if weight is None else share * weight.to(wide.dtype).view(shape)
    y = wide * (gain + 1)
    if bias is not None:
        y = y + bias.to(wide.dtype).view(shape)
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)


def _support(layout: str, over: str) -> Support:
    if layout not in ("n * c", "n c *") or over not in ("*", "n *"):
        raise OptionError(
            f"GlobalResponseNorm: layout={layout!r}, over={over!r}; wanted 'n * c' or 'n c *', and '*' or 'n *'"
        )
    return Support(layout, over=over)


CARD = Card(
    title="Global response normalization",
    word="grn",
    normalized_over="each sample's channels against one another, by their energy over all positions",
    formula="y = weight * (x * N) + bias + x,  N = |x_c| / (mean over c of |x_c| + eps)",
    paper=paper("woo2023convnext"),
    use_cases="ConvNeXt V2, after the activation in the wide part of a block",
    strengths="keeps channels from becoming alike; starts as the identity; independent of the batch",
    weaknesses="does not fix the scale of activations, so another norm must; needs the whole image",
    module=GlobalResponseNorm,
    functional=global_response_norm,
    make=lambda channels: GlobalResponseNorm(channels, layout="n c *"),
    build=lambda at: GlobalResponseNorm(at.channels, layout=at.axes, **at.factory),
    axes=("n c *", "n * c"),
    takes=(),
    over="c *",
    accompanies=True,
)
