"""Root mean square normalization: layer normalization without centring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_features, features_support


def rms_norm_rule(rank: int = 1, eps: float | None = None, over: str | None = None) -> Rule:
    """RMS normalization over the last ``rank`` axes, or over ``"c"`` or ``"c *"`` of a channels-first input, as data.

    >>> rms_norm_rule().formula()
    'y = weight * x / sqrt(E[x^2] + eps) + bias'
    """
    support, per = features_support("RMSNorm", rank, over)
    return Rule(support, Statistic(None, "rms", eps), Affine(per))


class RMSNorm(Layer, nn.RMSNorm):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch calls its input x here alone
    """Divide each sample, token or position by the root mean square of its features.

    y = weight * x / sqrt(E[x^2] + eps), the same in training and evaluation. Without ``over`` it is ``torch.nn.RMSNorm``.

    Args:
        normalized_shape: sizes of the trailing axes; with ``over``, the channels C.
        eps: added to the mean square; None for the machine epsilon of the dtype in which statistics are kept (float32 for
            half types). Default: None (Llama uses 1e-6).
        elementwise_affine: whether there is a weight (starts at 1). Default: True.
        over: ``"c"`` or ``"c *"`` of an input ``"n c *"``; None for the trailing axes. Default: None.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (*, *normalized_shape), or (N, C, *) with ``over``, to the same.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or has other channels.
        OptionError: another ``over``.

    Reference:
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), https://arxiv.org/abs/1910.07467.

    >>> RMSNorm(2, elementwise_affine=False)(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        over: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device=device, dtype=dtype)
        self.over = over
        self.register_parameter("bias", None)
        check_features("RMSNorm", shape, over, None)
        _ = self.rule  # made now, so that a compiler finds it ready

    def make_rule(self) -> Rule:
        return rms_norm_rule(len(self.normalized_shape), self.eps, self.over)

    def check(self, input: Tensor) -> None:
        check_features("RMSNorm", self.normalized_shape, self.over, None, input)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.over is None else f", over={self.over!r}")


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    over: str | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """RMS normalization as a function, with the arguments of ``torch.nn.functional.rms_norm``; see RMSNorm.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,))
    tensor([[0.8485, 1.1314]])
    """
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    check_features("rms_norm", shape, over, None, x)
    return run(rms_norm_rule(len(shape), eps, over), x, weight, mask=mask, backend=backend)


CARD = Card(
    name="rms_norm",
    title="Root mean square normalization",
    kind="activation",
    word="rms",
    normalized_over="each sample or token, over its features, without centring",
    formula="y = weight * x / sqrt(E[x^2] + eps)",
    paper=Paper(
        "Zhang, Biao and Sennrich, Rico",
        "Root Mean Square Layer Normalization",
        2019,
        "https://arxiv.org/abs/1910.07467",
    ),
    use_cases="large language models",
    strengths="cheaper than layer normalization and usually as good; sound in half precision with float32 statistics",
    weaknesses="leaves the mean: not invariant to a shift of the features",
    module=RMSNorm,
    functional=rms_norm,
    make=RMSNorm,
    rule=rms_norm_rule(),
    layout="* d",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)
