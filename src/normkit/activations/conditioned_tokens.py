"""Tokens whose matrix is conditioned once, between the embedding and the first layer."""

from typing import Literal

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.errors import ShapeError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype, full_precision
from normkit.core.support import show

Gradient = Literal["full", "detach"]


class ConditionedTokens(Module):
    """Add C = s_1 U V^T to each sample's token matrix X = U S V^T, where s_1 is its largest singular value.

    Singular values s_i become s_i + s_1, so that the condition number 2 s_1 / (s_1 + s_n) is at most 2, and the singular vectors
    stay. It stands once, between the embedding (with its positions) and the first layer. Each token's correction depends on all
    tokens of its sample: not for causal models. Training and evaluation compute the same.

    The paper's text could not be read whole: that such a C comes from the singular value decomposition of X and bounds the
    condition number by 2 is from summaries, its form from the same authors' paper on spectral conditioning.

    Args:
        gradient: ``"detach"`` takes C as a constant of the step; ``"full"`` differentiates through the decomposition, whose
            derivative does not exist where singular values meet. Default: "detach".

    Shape: (*, L, D): L tokens of D features; the output has this shape. The decomposition is taken in at least float32.

    Raises:
        OptionError: an unknown ``gradient``.
        ShapeError: an input of fewer than two axes.

    Reference: Saratchandran, Lucey (2025), https://arxiv.org/abs/2505.12789.

    >>> ConditionedTokens()(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    tensor([[8., 0.],
            [0., 5.]])
    """

    shown = "gradient={0.gradient!r}"

    def __init__(self, gradient: Gradient = "detach") -> None:
        super().__init__()
        check_options("ConditionedTokens", gradient=(gradient, Gradient))
        self.gradient: Gradient = gradient

    def forward(self, input: Tensor) -> Tensor:
        return conditioned_tokens(input, gradient=self.gradient)


def conditioned_tokens(input: Tensor, *, gradient: Gradient = "detach") -> Tensor:
    """Conditioned embedded tokens as a function; see ConditionedTokens.

    >>> conditioned_tokens(torch.tensor([[3.0, 0.0]]))
    tensor([[6., 0.]])
    """
    if input.dim() < 2:
        raise ShapeError(f"conditioned_tokens: got an input of {show(input.shape)}; wanted tokens, (*, L, D)")
    x = input.to(accumulation_dtype(input.dtype))
    u, s, vt = torch.linalg.svd(x.detach() if gradient == "detach" else x, full_matrices=False)
    with full_precision(x):
        return (x + s[..., :1, None] * (u @ vt)).to(input.dtype)


CARD = Card(
    title="Conditioned embedded tokens",
    wordless="it stands behind the embedding, not in a norm's place",
    normalized_over="each sample's token matrix",
    formula="Y = X + s_1 U V^T, X = U S V^T",
    paper=paper("saratchandran2025enhancing"),
    use_cases="transformers that see all tokens, between the embedding and the first layer",
    strengths="bounds the condition number of the first layer's input by 2; no parameters",
    weaknesses="as we read it from summaries; a singular value decomposition per sample; lets tokens see later ones",
    module=ConditionedTokens,
    functional=conditioned_tokens,
    make=lambda features: ConditionedTokens(),
    layout="* d",
    exact_gradient=False,
    over="* d",
)
