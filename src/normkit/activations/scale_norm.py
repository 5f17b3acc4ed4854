"""ScaleNorm: scale each token to one learned length."""

from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.errors import OptionError
from normkit.core.rule import Rule
from normkit.core.support import show
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_last, tokens_rule


class ScaleNorm(Layer):
    """Divide each token by its Euclidean norm and multiply it by one learned scalar.

    y = weight * x / max(|x|, eps), the same in training and evaluation. With the initial weight sqrt(D) it is RMS
    normalization with one gain for all features. The published code gives each place in the network its own scalar; pass
    another layer's ``weight`` to share it, as in the paper's text.

    Args:
        features: features D.
        eps: floor of the norm. Default: 1e-5.
        weight: the scalar parameter of another ScaleNorm, to share; None for its own, which starts at sqrt(D). Default: None.

    Shape:
        (*, D); the output has the same shape.

    Raises:
        ShapeError: the input does not end in ``features``.
        OptionError: the weight to share is not a scalar.

    Reference:
        Nguyen and Salazar, "Transformers without Tears" (2019), https://arxiv.org/abs/1910.05895.

    >>> ScaleNorm(4)(torch.tensor([[0.0, 3.0, 0.0, 4.0]])).detach()
    tensor([[0.0000, 1.2000, 0.0000, 1.6000]])
    """

    shown = "{0.features}, eps={0.eps}"

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        *,
        weight: nn.Parameter | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if weight is not None and weight.dim() != 0:
            raise OptionError(
                f"ScaleNorm: weight= of shape {show(weight.shape)}; wanted another ScaleNorm's, a scalar parameter"
            )
        self.features, self.eps = features, eps
        self.register_parameter("bias", None)
        if weight is None:
            self.weight = nn.Parameter(torch.empty((), device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.weight = weight
        self.complete()

    def reset_parameters(self) -> None:
        """Set the weight to sqrt(D), even if it is shared."""
        self.fill(weight=self.features**0.5)

    def make_rule(self) -> Rule:
        return tokens_rule("norm", self.eps, "floor", per="")

    def check(self, input: Tensor) -> None:
        check_last("ScaleNorm", input, self.features)


def scale_norm(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """ScaleNorm as a function of a scalar weight; without one, each token gets length 1; see ScaleNorm.

    >>> scale_norm(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    return run(tokens_rule("norm", eps, "floor", per=""), input, weight, mask=mask, backend=backend)


CARD = Card(
    title="ScaleNorm",
    word="scale",
    normalized_over="each sample or token, over its features, to one learned length",
    formula="y = g * x / max(|x|, eps)",
    paper=Paper(
        "Nguyen, Toan Q. and Salazar, Julian",
        "Transformers without Tears: Improving the Normalization of Self-Attention",
        2019,
        "https://arxiv.org/abs/1910.05895",
    ),
    use_cases="transformers for translation with little data, with the norm before each branch",
    strengths="one parameter and no mean; all tokens on one sphere",
    weaknesses="no gain per feature; keeps the mean",
    module=ScaleNorm,
    functional=scale_norm,
    build=lambda at: ScaleNorm(at.channels, **at.factory),
    takes=(),
    rule=tokens_rule("norm", 1e-5, "floor", per=""),
    layout="* d",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)
