"""Preconditioned attention: each row of what a head gives is divided by its norm."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.card import Card, Paper
from normkit.core.errors import OptionError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.engine.dispatch import run
from normkit.engine.layer import tokens_rule

Gradient = Literal["full", "detach"]


class PreconditionedAttention(Module):
    """Scaled dot-product attention C A with A = softmax(q k^T / sqrt(D)) v and the diagonal C = diag(1 / |a_i|).

    Each row of A, what one query gets from one head, comes out with unit norm: row equilibration, as weight conditioning does it,
    of the matrix that queries, keys and values make. Training and evaluation compute the same, and it has no parameters.

    The paper's text could not be read whole: that C is diagonal and depends on queries, keys and values is its own figure, that
    it holds the inverse norms of the rows of A is from a reimplementation by others.

    Args:
        eps: floor of a norm. Default: 1e-12.
        gradient: ``"full"`` differentiates through C, ``"detach"`` takes it as a constant. Default: "full".

    Shape:
        queries (*, L, D), keys (*, S, D), values (*, S, E); output (*, L, E).

    Raises:
        OptionError: an unknown ``gradient``, or an ``eps`` that is not above 0.

    Reference:
        Saratchandran, "Preconditioned Attention: Enhancing Efficiency in Transformers" (2026), https://arxiv.org/abs/2603.27153.

    >>> PreconditionedAttention()(torch.zeros(1, 2), torch.zeros(2, 2), torch.tensor([[6.0, 0.0], [0.0, 8.0]]))
    tensor([[0.6000, 0.8000]])
    """

    shown = "eps={0.eps}, gradient={0.gradient!r}"

    def __init__(self, eps: float = 1e-12, *, gradient: Gradient = "full") -> None:
        super().__init__()
        check_options("PreconditionedAttention", gradient=(gradient, Gradient))
        if not eps > 0:
            raise OptionError(f"PreconditionedAttention: eps={eps}; wanted a number above 0, the floor of a norm")
        self.eps = eps
        self.gradient: Gradient = gradient

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        dropout: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, by ``torch.nn.functional.scaled_dot_product_attention``, whose mask it takes; dropout is in training only."""
        options = {"dropout": dropout if self.training else 0.0, "is_causal": is_causal, "gradient": self.gradient}
        return preconditioned_attention(query, key, value, mask, self.eps, **options)


def preconditioned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-12,
    *,
    dropout: float = 0.0,
    is_causal: bool = False,
    gradient: Gradient = "full",
) -> Tensor:
    """Preconditioned attention as a function; see PreconditionedAttention.

    >>> preconditioned_attention(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    wide = accumulation_dtype(query.dtype)
    rows = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
    if gradient == "full":
        return run(tokens_rule("norm", eps, "floor"), rows)
    x = rows.to(wide)
    return (x / torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True).clamp_min(eps)).to(rows.dtype)


def _example_key_and_value(x: Tensor) -> tuple[Tensor, Tensor]:
    """Make keys and values that follow the queries."""
    return x.flip(1) + x, 2 * x - 1


CARD = Card(
    title="Preconditioned attention",
    wordless="it replaces attention's product, not a norm of one input",
    normalized_over="what each query gets of a head, over its features",
    formula="y_i = a_i / max(|a_i|, eps), A = softmax(q k^T / sqrt(D)) v",
    paper=Paper(
        "Saratchandran, Hemanth",
        "Preconditioned Attention: Enhancing Efficiency in Transformers",
        2026,
        "https://arxiv.org/abs/2603.27153",
    ),
    use_cases="attention of transformers, from the start of training",
    strengths="unit rows, whatever the values' scale; one reduction more per head; no parameters",
    weaknesses="as we read it from its figure and from others' code; loses the length of what a query gets",
    module=PreconditionedAttention,
    functional=preconditioned_attention,
    make=lambda features: PreconditionedAttention(),
    rule=tokens_rule("norm", 1e-12, "floor"),
    layout="* d",
    extra=_example_key_and_value,
)
