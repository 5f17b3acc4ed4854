"""Dynamic tanh: a squashing function with a learned slope that replaces a norm and needs no statistic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.errors import OptionError, ShapeError
from normkit.core.module import Module, trailing_sizes
from normkit.core.moments import accumulation_dtype
from normkit.core.place import positive_number
from normkit.core.support import check_shape, show


class DynamicTanh(Module):
    """Squash each element by a hyperbolic tangent whose slope is one learned number.

    y = weight * tanh(alpha * x) + bias. No statistic is computed: an element depends on no other. It replaces layer
    normalization in transformers, whose input and output are related in much the same way.
    Training and evaluation compute the same.

    The state_dict has the keys of the authors' code: alpha (one element), weight, bias.

    Args:
        normalized_shape: sizes of the trailing axes; with ``layout="n c *"``, the channels C.
        alpha: initial slope. Default: 0.5 (in language models the authors use 0.2 to 1 before attention).
        layout: ``"* d"`` for features last, ``"n c *"`` for channels first. Default: ``"* d"``.
        elementwise_affine: whether there are a weight (starts at 1) and a bias (at 0). Default: True.
        bias: False omits the bias. Default: True.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        (*, *normalized_shape), or (N, C, *) with channels first; the output has the same shape.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or has another number of channels.
        OptionError: another layout, or several axes of channels.

    Reference:
        Zhu, Chen, He, LeCun, Liu, "Transformers without Normalization" (2025), https://arxiv.org/abs/2503.10622.

    >>> DynamicTanh(2)(torch.tensor([[1.0, -4.0]])).detach()
    tensor([[ 0.4621, -0.9640]])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        *,
        layout: str = "* d",
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = tuple(trailing_sizes("DynamicTanh", normalized_shape))
        self.init_alpha, self.layout = alpha, layout
        if layout not in ("* d", "n c *") or (layout == "n c *" and len(self.normalized_shape) != 1):
            raise OptionError(
                f"DynamicTanh: layout={layout!r} with normalized_shape={self.normalized_shape}; "
                "wanted '* d', or 'n c *' with one number of channels"
            )
        factory = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.empty(1, **factory))
        self.register_affine(self.normalized_shape, elementwise_affine, elementwise_affine and bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to its initial value, the weight to 1 and the bias to 0."""
        super().reset_parameters()
        self.fill(alpha=self.init_alpha)

    def forward(self, input: Tensor) -> Tensor:
        for name in ("weight", "bias"):
            check_shape("DynamicTanh", name, getattr(self, name), *self.normalized_shape)
        return dynamic_tanh(input, self.alpha, self.weight, self.bias, layout=self.layout)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, alpha={self.init_alpha}, layout={self.layout!r}"


def dynamic_tanh(
    input: Tensor,
    alpha: float | Tensor = 0.5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "* d",
) -> Tensor:
    """Dynamic tanh as a function; see DynamicTanh.

    >>> dynamic_tanh(torch.tensor([[1.0, -4.0]]))
    tensor([[ 0.4621, -0.9640]])
    """
    wide = accumulation_dtype(input.dtype)
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        raise ShapeError(f"dynamic_tanh: alpha has shape {show(alpha.shape)}, wanted one number; give a scalar tensor")
    y = torch.tanh(input.to(wide) * (alpha.to(wide) if isinstance(alpha, Tensor) else alpha))
    if weight is not None:
        y = y * _placed(weight, input, layout).to(wide)
    if bias is not None:
        y = y + _placed(bias, input, layout).to(wide)
    return y.to(input.dtype)


def _placed(parameter: Tensor, x: Tensor, layout: str) -> Tensor:
    """View a parameter so that it broadcasts over x."""
    if layout == "n c *":
        if x.dim() < 2 or parameter.shape != x.shape[1:2]:
            raise ShapeError(
                f"dynamic_tanh: got an input of {show(x.shape)}, wanted n c * with {show(parameter.shape)} channels"
            )
        return parameter.view([-1] + [1] * (x.dim() - 2))
    if parameter.dim() > x.dim() or x.shape[x.dim() - parameter.dim() :] != parameter.shape:
        raise ShapeError(
            f"dynamic_tanh: got an input of {show(x.shape)}, wanted one that ends in {show(parameter.shape)}"
        )
    return parameter


CARD = Card(
    name="dynamic_tanh",
    title="Dynamic tanh",
    kind="activation",
    word="dyt",
    normalized_over="nothing: each element separately, without a statistic",
    formula="y = weight * tanh(alpha * x) + bias",
    paper=Paper(
        "Zhu, Jiachen and Chen, Xinlei and He, Kaiming and LeCun, Yann and Liu, Zhuang",
        "Transformers without Normalization",
        2025,
        "https://arxiv.org/abs/2503.10622",
    ),
    use_cases="transformers, in place of layer and root mean square normalization",
    strengths="no statistic, so nothing to reduce; independent of the batch and of other features",
    weaknesses="invariant to nothing: the scale of the input matters; alpha needs tuning in large language models",
    module=DynamicTanh,
    functional=dynamic_tanh,
    make=DynamicTanh,
    build=lambda at: DynamicTanh(
        at.shape,
        float(at.option),
        layout="n c *" if at.axes == "n c *" else "* d",
        elementwise_affine=at.affine,
        bias=at.bias,
        **at.factory,
    ),
    option=positive_number("ALPHA", 0.5, of=lambda norm: norm.init_alpha),
    axes=("n c *", "n * c", "trailing"),
    layout="* d",
)
