"""Sigmoids in the place of a norm, which compute no statistic: dynamic tanh and Derf."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.module import Module, trailing_sizes
from normkit.core.moments import accumulation_dtype
from normkit.core.place import Place, positive_number
from normkit.core.support import check_shape, show

Form = Literal["tanh", "erf"]
_ALPHA = positive_number("ALPHA", 0.5, of=lambda norm: norm.init_alpha)


class DynamicTanh(Module):
    """Squash each element by a sigmoid whose slope is one learned number.

    ``form="tanh"``: y = weight * tanh(alpha * x) + bias; ``form="erf"`` (Derf), with a learned shift too:
    y = weight * erf(alpha * x + shift) + bias. No statistic is computed: an element depends on no other. It replaces layer
    normalization in transformers, whose input and output are related much like this. The same in training and evaluation.

    The state_dict has the keys of the authors' code: alpha (one element), with ``form="erf"`` shift (one element), weight, bias.

    Args:
        normalized_shape: sizes of the trailing axes; with ``layout="n c *"``, the channels C.
        alpha: initial slope. Default: 0.5 (in language models the authors of tanh use 0.2 to 1 before attention).
        form: ``"tanh"`` or ``"erf"``. Default: ``"tanh"``.
        layout: ``"* d"`` for features last, ``"n c *"`` for channels first. Default: ``"* d"``.
        elementwise_affine: whether there are a weight (starts at 1) and a bias (at 0). Default: True.
        bias: False omits the bias. Default: True.

    Shape: (*, *normalized_shape), or (N, C, *) with channels first; the output has the same shape.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or has another number of channels.
        OptionError: an unknown form or layout, or several axes of channels.

    Reference: Zhu, Chen, He, LeCun, Liu, "Transformers without Normalization" (2025), https://arxiv.org/abs/2503.10622;
    Chen, Lu, Zhu, Sun, Liu, "Stronger Normalization-Free Transformers" (2025), https://arxiv.org/abs/2512.10938.

    >>> DynamicTanh(2)(torch.tensor([[1.0, -4.0]])).detach()
    tensor([[ 0.4621, -0.9640]])
    """

    shift: nn.Parameter | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha: float = 0.5,
        *,
        form: Form = "tanh",
        layout: str = "* d",
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = tuple(trailing_sizes("DynamicTanh", normalized_shape))
        check_options("DynamicTanh", form=(form, Form))
        self.init_alpha, self.layout = alpha, layout
        self.form: Form = form
        if layout not in ("* d", "n c *") or (layout == "n c *" and len(self.normalized_shape) != 1):
            raise OptionError(
                f"DynamicTanh: layout={layout!r} with normalized_shape={self.normalized_shape}; "
                "wanted '* d', or 'n c *' with one number of channels"
            )
        factory = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.empty(1, **factory))
        self.register_parameter("shift", nn.Parameter(torch.empty(1, **factory)) if form == "erf" else None)
        self.register_affine(self.normalized_shape, elementwise_affine, elementwise_affine and bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.fill(alpha=self.init_alpha, shift=0)

    def forward(self, input: Tensor) -> Tensor:
        for name in ("weight", "bias"):
            check_shape("DynamicTanh", name, getattr(self, name), *self.normalized_shape)
        if self.form == "tanh":
            return dynamic_tanh(input, self.alpha, self.weight, self.bias, layout=self.layout)
        assert self.shift is not None
        return dynamic_erf(input, self.alpha, self.shift, self.weight, self.bias, layout=self.layout)

    def extra_repr(self) -> str:
        form = "" if self.form == "tanh" else f", form={self.form!r}"
        return f"{self.normalized_shape}, alpha={self.init_alpha}{form}, layout={self.layout!r}"


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
    y = torch.tanh(_sloped(input, "dynamic_tanh", alpha))
    return _compensated(y, input, weight, bias, "dynamic_tanh", layout)


def dynamic_erf(
    input: Tensor,
    alpha: float | Tensor = 0.5,
    shift: float | Tensor = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: str = "* d",
) -> Tensor:
    """Derf as a function; see DynamicTanh with ``form="erf"``.

    >>> dynamic_erf(torch.tensor([[1.0, -4.0]]))
    tensor([[ 0.5205, -0.9953]])
    """
    y = torch.erf(_sloped(input, "dynamic_erf", alpha, shift) + shift)
    return _compensated(y, input, weight, bias, "dynamic_erf", layout)


def _sloped(x: Tensor, who: str, alpha: float | Tensor, *others: float | Tensor) -> Tensor:
    for name, number in zip(("alpha", "shift"), (alpha, *others), strict=False):
        if isinstance(number, Tensor) and number.numel() != 1:
            raise ShapeError(f"{who}: {name} has shape {show(number.shape)}, wanted one number; give a scalar tensor")
    wide = accumulation_dtype(x.dtype)
    return x.to(wide) * (alpha.to(wide) if isinstance(alpha, Tensor) else alpha)


def _compensated(y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, who: str, layout: str) -> Tensor:
    if weight is not None:
        y = y * _placed(weight, x, who, layout).to(y.dtype)
    if bias is not None:
        y = y + _placed(bias, x, who, layout).to(y.dtype)
    return y.to(x.dtype)


def _placed(parameter: Tensor, x: Tensor, who: str, layout: str) -> Tensor:
    """View a parameter so that it broadcasts over x."""
    if layout == "n c *":
        if x.dim() < 2 or parameter.shape != x.shape[1:2]:
            raise ShapeError(
                f"{who}: got an input of {show(x.shape)}, wanted n c * with {show(parameter.shape)} channels"
            )
        return parameter.view([-1] + [1] * (x.dim() - 2))
    if parameter.dim() > x.dim() or x.shape[x.dim() - parameter.dim() :] != parameter.shape:
        raise ShapeError(f"{who}: got an input of {show(x.shape)}, wanted one that ends in {show(parameter.shape)}")
    return parameter


def _build(at: Place, form: Form) -> DynamicTanh:
    layout = "n c *" if at.axes == "n c *" else "* d"
    affine = {"elementwise_affine": at.affine, "bias": at.bias}
    return DynamicTanh(at.shape, float(at.option), form=form, layout=layout, **affine, **at.factory)


CARD = Card(
    title="Dynamic tanh",
    word="dyt",
    normalized_over="nothing: each element separately, without a statistic",
    formula="y = weight * tanh(alpha * x) + bias",
    paper=paper("zhu2025transformers"),
    use_cases="transformers, instead of layer and root mean square normalization",
    strengths="no statistic, so nothing to reduce; independent of the batch and of other features",
    weaknesses="invariant to nothing: the scale of the input matters; alpha needs tuning in large language models",
    module=DynamicTanh,
    functional=dynamic_tanh,
    build=lambda at: _build(at, "tanh"),
    option=_ALPHA,
    axes=("n c *", "n * c", "trailing"),
    layout="* d",
)
CARD_DERF = Card(
    title="Dynamic erf (Derf)",
    word="derf",
    normalized_over="nothing: each element separately, without a statistic",
    formula="y = weight * erf(alpha * x + shift) + bias",
    paper=paper("chen2025stronger"),
    use_cases="transformers, instead of layer and root mean square normalization",
    strengths="no statistic; above dynamic tanh in its authors' experiments on images, speech and DNA",
    weaknesses="invariant to nothing: the scale of the input matters, and so does the initial slope",
    module=DynamicTanh,
    functional=dynamic_erf,
    make=lambda features: DynamicTanh(features, form="erf"),
    fits=lambda module: module.form == "erf",
    build=lambda at: _build(at, "erf"),
    option=_ALPHA,
    axes=("n c *", "n * c", "trailing"),
    layout="* d",
)
