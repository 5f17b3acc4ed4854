"""Filter response normalization: divide each channel of each sample by its root mean square, then apply a learned threshold."""

from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import ShapeError
from normkit.core.moments import accumulation_dtype
from normkit.core.place import one_of
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, place, show
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


CARD = Card(
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
