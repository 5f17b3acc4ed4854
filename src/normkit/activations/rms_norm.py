"""Root mean square normalization: layer normalization without centring, by all features or by the first of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, check_options
from normkit.core.module import Module, trailing_sizes
from normkit.core.place import one_of, positive_number
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Guard, Statistic
from normkit.core.support import Support
from normkit.engine.call import Call, Output, Save
from normkit.engine.dispatch import Activation, Backend, in_whole_numbers, perform
from normkit.engine.layer import Cast, Layer, check_features, check_last, features_support
from normkit.engine.reference import activate


@remembered
def rms_norm_rule(
    rank: int = 1, eps: float | None = None, over: str | None = None, guard: Guard = "inside", offset: float = 0.0
) -> Rule:
    """RMS normalization over the last ``rank`` axes, or over ``"c"`` or ``"c *"`` of a channels-first input, as data."""
    support, per = features_support("RMSNorm", rank, over)
    return Rule(support, Statistic(None, "rms", eps, guard), Affine(per, offset))


class RMSNorm(Layer, nn.RMSNorm):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch calls its input x here alone
    """Divide each sample, token or position by the root mean square of its features.

    y = weight * x / sqrt(E[x^2] + eps), the same in training and evaluation. With default arguments it is
    ``torch.nn.RMSNorm``. Published forms differ in eps, in the offset of the weight, and in when a half type is rounded:

    ========================  =======================================  =====================
    form                      arguments                                weight starts at
    ========================  =======================================  =====================
    torch                     ``eps=None``                             1
    the paper's code          ``eps=1e-8, guard="outside"``            1
    the same in TensorFlow    ``eps=1e-8``                             1
    Llama, Mistral, T5        ``eps=1e-6, cast="before weight"``       1
    Gemma                     ``eps=1e-6, offset=1.0``                 0
    ========================  =======================================  =====================

    Checkpoints of all these forms load: the key is ``weight``.

    ``normalized_shape``, ``over``, ``activation``, ``save`` and ``dropout``, shapes and their errors are those of LayerNorm.

    Args:
        eps: added to the mean square; None for the machine epsilon of the statistics' dtype, at least float32. Default: None.
        elementwise_affine: whether there is a weight. Default: True.
        bias: True adds a bias (starts at 0). Default: False.
        guard: where eps enters: ``"inside"`` the root, ``"outside"`` it (added), or as its ``"floor"``. Default: "inside".
        offset: added to the weight, which starts at 1 - offset. With 1, weight decay pulls the gain toward 1. Default: 0.
        cast: when a half type is rounded: ``"after weight"`` rounds once at the end, ``"before weight"`` rounds the
            normalized input to its dtype before multiplying. The same in float32 and float64. Default: "after weight".

    Raises:
        OptionError: an unknown ``over``, ``guard`` or ``cast``; ``save="output"`` with a ``cast`` that rounds twice.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), https://arxiv.org/abs/1910.07467.

    >>> RMSNorm(2, elementwise_affine=False)(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]])
    """

    offset: float = 0.0  # torch's constructor calls reset_parameters, which reads it, before ours can set it
    cast: Cast = "after weight"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        bias: bool = False,
        over: str | None = None,
        guard: Guard = "inside",
        offset: float = 0.0,
        cast: Cast = "after weight",
        activation: Activation | None = None,
        save: Save = "input",
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        shape = trailing_sizes("RMSNorm", normalized_shape)
        check_features("RMSNorm", shape, over, None)
        super().__init__(shape, eps, elementwise_affine, device=device, dtype=dtype)
        self.over, self.offset, self.cast = over, offset, cast
        self.activation, self.save, self.dropout = activation, save, dropout
        self.guard: Guard = guard
        self.register_parameter("bias", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()
        self.complete()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cast":
            check_options("RMSNorm", cast=(value, Cast))
            self._check_cast(self.save, value)
        super().__setattr__(name, value)

    def _check_save(self, save: Any, activation: str | None) -> None:
        self._check_cast(save, self.cast)
        super()._check_save(save, activation)

    def _check_cast(self, save: Any, cast: Cast) -> None:
        if save == "output" and cast != "after weight":
            raise OptionError(f'RMSNorm: save="output" can\'t undo cast={cast!r}, which rounds twice; use save="input"')

    def reset_parameters(self) -> None:
        self.fill(weight=1 - self.offset, bias=0)

    def make_rule(self) -> Rule:
        return rms_norm_rule(len(self.normalized_shape), self.eps, self.over, self.guard, self.offset)

    def check(self, input: Tensor) -> None:
        check_features("RMSNorm", self.normalized_shape, self.over, None, input)

    def _perform(self, call: Call) -> Output:
        if not _rounds_first(self.cast, call.x):
            return super()._perform(call)
        self._fits(call.x)
        return _round_first(call)

    def _quantize(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if not _rounds_first(self.cast, input):
            return super()._quantize(input)
        return in_whole_numbers(self._perform(self._call(input, None)).y)

    def extra_repr(self) -> str:
        options = {
            "over": None,
            "guard": "inside",
            "offset": 0.0,
            "cast": "after weight",
            "activation": None,
            "save": "input",
            "dropout": 0.0,
        }
        return super().extra_repr() + (", bias=True" if self.bias is not None else "") + self.repr_options(**options)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    over: str | None = None,
    guard: Guard = "inside",
    offset: float = 0.0,
    cast: Cast = "after weight",
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """RMS normalization as a function, with the arguments of ``torch.nn.functional.rms_norm``; see RMSNorm.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,))
    tensor([[0.8485, 1.1314]])
    """
    shape = trailing_sizes("rms_norm", normalized_shape)
    check_features("rms_norm", shape, over, None, input)
    check_options("rms_norm", cast=(cast, Cast))
    rule = rms_norm_rule(len(shape), eps, over, guard, offset)
    call = Call(rule, input, weight, bias, mask=mask, backend=backend)
    return (_round_first(call) if _rounds_first(cast, input) else perform(call)).y


@remembered
def _bare(rule: Rule) -> Rule:
    return Rule(rule.support, rule.statistic)


def _rounds_first(cast: Cast, x: Tensor) -> bool:
    """Whether there is anything to round before the weight: in float32 and float64 there is not."""
    return cast == "before weight" and x.dtype.itemsize < 4


def _round_first(call: Call) -> Output:
    """Normalize, round to the input's dtype, and only then scale, shift and activate."""
    rule, x, weight, bias, mask = call.rule, call.x, call.weight, call.bias, call.mask
    assert rule.compensation is not None
    found = perform(call._replace(rule=_bare(rule), weight=None, bias=None, activation=None))
    y, split = found.y, rule.support.split(x.shape)
    wide = y.dtype if weight is None else torch.promote_types(y.dtype, weight.dtype)
    y = rule.compensation.apply(y.reshape(split.shape).to(wide), split, weight, bias).reshape(x.shape).to(x.dtype)
    y = y if mask is None or bias is None else torch.where(mask, y, 0.0)
    return found._replace(y=activate(y, call.activation))


CARD = Card(
    title="Root mean square normalization",
    word="rms",
    normalized_over="each sample or token, over its features, without centring",
    formula="y = weight * x / sqrt(E[x^2] + eps)",
    paper=paper("zhang2019root"),
    use_cases="large language models",
    strengths="needs no mean, and is usually as good as layer normalization; sound in half precision with float32 statistics",
    weaknesses="keeps the mean: not invariant to a shift of the features",
    module=RMSNorm,
    functional=rms_norm,
    build=lambda at: RMSNorm(at.shape, at.eps, at.affine, over=at.over, **at.factory),
    option=one_of("AXES", "c", "c *", of=lambda norm: getattr(norm, "over", None) or ""),
    axes=("n c *", "n * c", "trailing"),
    rule=rms_norm_rule(),
    layout="* d",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)


_SUPPORT = Support("* d", over="d")


class PartialRMSNorm(Module):
    """Divide each token by the root mean square of its first features.

    y = weight * x / (sqrt(E[x_1^2 .. x_k^2]) + eps) with k = int(D * fraction): all D features are divided. A fraction of 1 is
    RMS normalization. Training and evaluation compute the same.

    ``guard``, ``elementwise_affine`` and ``bias`` are those of RMSNorm, with the guard "outside" (added) by default.

    Args:
        features: features D.
        fraction: fraction of the features that are measured, in (0, 1]. Default: 0.0625, as published.
        eps: keeps the divisor above zero. Default: 1e-8.

    Shape: (*, D); the output has the same shape.

    Raises:
        OptionError: the fraction leaves no feature, or is above 1; an unknown guard.
        ShapeError: the input does not end in ``features``.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), https://arxiv.org/abs/1910.07467.

    >>> PartialRMSNorm(4, fraction=0.5)(torch.tensor([[3.0, 3.0, 6.0, 9.0]])).detach()
    tensor([[1., 1., 2., 3.]])
    """

    shown = "{0.features}, fraction={0.fraction}, eps={0.eps}, guard={0.guard!r}"
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        fraction: float = 0.0625,
        eps: float = 1e-8,
        elementwise_affine: bool = True,
        *,
        guard: Guard = "outside",
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.measured = _count("PartialRMSNorm", features, fraction)
        self.features, self.fraction, self.eps = features, fraction, eps
        self.guard: Guard = guard
        Statistic(None, "rms", eps, guard)  # refuses another guard now rather than at the first input
        self.register_affine((features,), elementwise_affine, bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        check_last("PartialRMSNorm", input, self.features)
        return _normalize(input, self.measured, self.weight, self.bias, Statistic(None, "rms", self.eps, self.guard))


def partial_rms_norm(
    input: Tensor,
    fraction: float = 0.0625,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-8,
    *,
    guard: Guard = "outside",
) -> Tensor:
    """Partial RMS normalization over the last axis as a function; see PartialRMSNorm.

    >>> partial_rms_norm(torch.tensor([[3.0, 3.0, 6.0, 9.0]]), 0.5)
    tensor([[1., 1., 2., 3.]])
    """
    measured = _count("partial_rms_norm", input.shape[-1], fraction)
    return _normalize(input, measured, weight, bias, Statistic(None, "rms", eps, guard))


def _count(who: str, features: int, fraction: float) -> int:
    count = int(features * fraction)
    if not 1 <= count <= features:
        raise OptionError(
            f"{who}: fraction={fraction} of {features} features measures {count}; wanted at least 1 and at most all: "
            f"a fraction from {1 / features:.4g} to 1"
        )
    return count


def _normalize(x: Tensor, measured: int, weight: Tensor | None, bias: Tensor | None, statistic: Statistic) -> Tensor:
    part = x[..., :measured]
    _, scale, _ = statistic.measure(part, _SUPPORT.split(part.shape))
    assert scale is not None
    return Affine("d").apply(x / scale, _SUPPORT.split(x.shape), weight, bias).to(x.dtype)


CARD_PARTIAL_RMS = Card(
    title="Partial root mean square normalization (pRMSNorm)",
    word="prms",
    normalized_over="each sample or token, over the first of its features",
    formula="y = weight * x / (sqrt(E[x_1^2 .. x_k^2]) + eps)",
    paper=paper("zhang2019root"),
    use_cases="where the reduction dominates the cost",
    strengths="as good as RMS normalization in the paper's tasks, measuring 6.25 % of the features",
    weaknesses="seldom faster in practice, as all features must be read anyway; noisy where features are few or differ much",
    module=PartialRMSNorm,
    functional=partial_rms_norm,
    make=lambda features: PartialRMSNorm(features, fraction=0.5),
    build=lambda at: PartialRMSNorm(at.channels, float(at.option), elementwise_affine=at.affine, **at.factory),
    option=positive_number("FRACTION", 0.0625, of=lambda norm: norm.fraction, most=1.0),
    over="d",
    layout="* d",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)
