"""Filter and global response normalization: by each channel's energy, alone or relative to that of the others."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import ShapeError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.place import one_of
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic, length
from normkit.core.support import Split, Support, check_shape, place, show
from normkit.engine import native_global_response
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_channels

_SUPPORT = Support("n c *", over="*")


@remembered
def filter_response_norm_rule(eps: float = 1e-6) -> Rule:
    """Filter response normalization, without its threshold, as data."""
    return Rule(_SUPPORT, Statistic(None, "rms", eps), Affine("c"))


class FilterResponseNorm(Layer):
    """Divide each channel of each sample by its root mean square over the positions, and cut off below a learned threshold.

    y = max(weight * x / sqrt(E[x^2] + |eps|) + bias, tau). The threshold replaces the nonlinearity: as nothing is centred, a
    rectifier would cut at the wrong value. Training and evaluation compute the same, whatever else is in the batch.

    The state_dict has the keys of timm's ``FilterResponseNormTlu2d``: weight, bias, tau. On a single position only x / |x|
    remains, the sign; there the paper learns eps.

    Args:
        num_features: channels C.
        eps: added to the mean square. Default: 1e-6 (timm uses 1e-5).
        tlu: whether there is a threshold; it starts at 0, as a rectifier. Default: True.
        learned_eps: whether eps is learned, as the absolute value of a parameter ``eps_weight`` that starts at ``eps``, for
            which the paper then uses 1e-4. Default: False.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        ShapeError: a number of channels other than ``num_features``.

    Reference: Singh and Krishnan, "Filter Response Normalization Layer" (2019), https://arxiv.org/abs/1911.09737.

    >>> FilterResponseNorm(1)(torch.tensor([[[3.0, -4.0]]])).detach()
    tensor([[[0.8485, 0.0000]]])
    """

    tau: nn.Parameter | None
    eps_weight: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        tlu: bool = True,
        learned_eps: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        factory = {"device": device, "dtype": dtype}
        self.register_affine((num_features,), **factory)
        self.register_parameter("tau", nn.Parameter(torch.empty(num_features, **factory)) if tlu else None)
        self.register_parameter("eps_weight", nn.Parameter(torch.empty(1, **factory)) if learned_eps else None)
        self.reset_parameters()
        self.complete()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.fill(tau=0, eps_weight=self.eps)

    def make_rule(self) -> Rule:
        return filter_response_norm_rule(self.eps)

    def check(self, input: Tensor) -> None:
        check_channels("FilterResponseNorm", input, self.num_features, "num_features", "n c *")

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check(input)
        eps = self.eps if self.eps_weight is None else self.eps_weight
        return filter_response_norm(input, self.weight, self.bias, self.tau, eps, mask=mask, backend=self.backend)

    def extra_repr(self) -> str:
        more = ", learned_eps=True" if self.eps_weight is not None else ""
        return f"{self.num_features}, eps={self.eps}, tlu={self.tau is not None}{more}"


def filter_response_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps: float | Tensor = 1e-6,
    *,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Filter response normalization as a function; see FilterResponseNorm. Without ``tau`` there is no threshold.

    Elements where the mask (boolean, broadcasts over the input) is False enter no statistic and become zero. A learned ``eps`` is
    a tensor of one element, whose absolute value counts; it runs by the definition only.

    >>> filter_response_norm(torch.tensor([[[3.0, -4.0]]]))
    tensor([[[ 0.8485, -1.1314]]])
    """
    if isinstance(eps, Tensor):
        if eps.numel() != 1:
            raise ShapeError(f"filter_response_norm: eps of shape {show(eps.shape)}; wanted one element")
        y = _with_learned_eps(input, weight, bias, eps, mask)
    else:
        y = run(filter_response_norm_rule(eps), input, weight, bias, mask=mask, backend=backend)
    if tau is None:
        return y
    y = torch.maximum(y, place(tau, "c", _SUPPORT.split(input.shape)).to(y.dtype))
    return y if mask is None else torch.where(mask, y, 0.0)


def _with_learned_eps(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Tensor, mask: Tensor | None
) -> Tensor:
    """Compute the rule with eps as a tensor."""
    split = _SUPPORT.split(x.shape)
    wide = x.to(accumulation_dtype(x.dtype))
    if mask is not None:
        wide = torch.where(mask, wide, 0.0)
    count = max(split.count, 1) if mask is None else mask.expand(x.shape).sum(split.dims, keepdim=True).clamp_min(1)
    square = wide.square().sum(split.dims, keepdim=True) / count if split.dims else wide.square()
    y = Affine("c").apply(wide * (square + eps.to(wide.dtype).abs()).rsqrt(), split, weight, bias)
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)


CARD_FILTER_RESPONSE = Card(
    title="Filter response normalization",
    word="frn",
    normalized_over="each sample and channel, over all positions, without centring; then a learned threshold",
    formula="y = max(weight * x / sqrt(E[x^2] + eps) + bias, tau)",
    paper=paper("singh2019filter"),
    use_cases="convolutional networks where batches are small, as in detection",
    strengths="independent of the batch; the same in training and at inference; its threshold replaces the activation",
    weaknesses="weak on maps of few positions; needs a warm-up of the learning rate",
    module=FilterResponseNorm,
    functional=filter_response_norm,
    # The laws hold for the rule; the threshold after it is a nonlinearity.
    make=lambda channels: FilterResponseNorm(channels, tlu=False),
    build=lambda at: FilterResponseNorm(at.channels, at.eps, at.option == "tlu", **at.factory),
    option=one_of("tlu", "tlu", of=lambda norm: "" if norm.tau is None else "tlu"),
    rule=filter_response_norm_rule(),
    invariances=frozenset({"weight scale", "row scale", "data scale", "sample scale"}),
)


class GlobalResponseNorm(Module):
    """Weight each channel by its energy relative to the mean energy of all channels, and add the input.

    G_c = |x_c| over the positions, N_c = G_c / (mean over c of G_c + eps), y = weight * (x * N) + bias + x. Weight and bias
    start at 0, so the layer starts as the identity; N averages 1 over the channels. Training and evaluation compute the same.

    It loads the state_dict of timm's layer, whose weight and bias have axes of size 1, and that of the authors', which calls them
    gamma and beta. A mask gives the form for masked autoencoders, where only visible positions enter; there the original code
    measures the energy over those of the whole batch, ``over="n *"``.

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
        axes = {"layout": self.layout, "over": self.over}
        return global_response_norm(input, self.weight, self.bias, self.eps, mask=mask, **axes)


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
    check_options("GlobalResponseNorm", layout=(layout, ("n * c", "n c *")), over=(over, ("*", "n *")))
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
