"""Attention on normalized queries and keys, or with normalized outputs."""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, show
from normkit.engine.dispatch import run
from normkit.engine.layer import Layer, tokens_rule

Form = Literal["cosine", "rms", "layer"]


@remembered
def query_key_norm_rule(form: Form = "cosine", eps: float = 1e-6) -> Rule:
    """The normalization of queries and keys, as data."""
    check_options("QueryKeyNorm", form=(form, Form))
    statistic = {
        "cosine": Statistic(None, "norm", eps, "floor"),
        "rms": Statistic(None, "rms", eps),
        "layer": Statistic("mean", "std", eps),
    }[form]
    return Rule(Support("* d", over="d"), statistic, Affine("" if form == "cosine" else "d"))


class QueryKeyNorm(Module):
    """Scaled dot-product attention on normalized queries and keys.

    ``"cosine"``, as published: softmax(g * q / |q| . k / |k|) v, where the learned scalar g replaces 1 / sqrt(D).
    ``"rms"`` and ``"layer"``, as in recent large models: RMS or layer normalization of q and k over the head's features,
    with a weight each, then softmax(q . k / sqrt(D)) v. Where something comes between norm and attention, such as a rotary
    embedding, use ``normalize`` and attend yourself, with ``scale``.

    Args:
        features: features D of one head.
        form: ``"cosine"``, ``"rms"`` or ``"layer"``. Default: "cosine".
        length: L, the 97.5th percentile of the training sequences' lengths: g starts at log2(L^2 - L). Needed by the cosine
            form, and by it alone.
        eps: floor of the norm (cosine), else added inside the root. Default: 1e-6.

    Shape: queries (*, L, D), keys (*, S, D), values (*, S, E); output (*, L, E).

    Raises:
        OptionError: an unknown form, or the cosine form without a length of at least 2.
        ShapeError: queries or keys do not end in ``features``.

    Reference: Henry, Dachapally, Pawar, Chen, "Query-Key Normalization for Transformers" (2020),
    https://arxiv.org/abs/2010.04245; layer normalization of both, Dehghani et al., "Scaling Vision Transformers to 22
    Billion Parameters" (2023), https://arxiv.org/abs/2302.05442.

    >>> attention = QueryKeyNorm(2, length=2)
    >>> q, k = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0], [0.0, 5.0]])
    >>> attention(q, k, torch.eye(2)).detach()  # softmax of 1 * (1, 0)
    tensor([[0.7311, 0.2689]])
    """

    shown = "{0.features}, form={0.form!r}"
    unusual: ClassVar = {"length": None}

    def __init__(
        self,
        features: int,
        form: Form = "cosine",
        *,
        length: int | None = None,
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        query_key_norm_rule(form, eps)
        if (form == "cosine") != (length is not None) or (length is not None and length < 2):
            raise OptionError(
                f"QueryKeyNorm: form={form!r} with length={length}; wanted a length of at least 2 with the cosine form, "
                "as its gain starts at log2(L^2 - L), and none with the others"
            )
        self.features, self.form, self.length = features, form, length
        self.q_norm = _HeadNorm(features, form, eps, True, device, dtype)
        self.k_norm = _HeadNorm(features, form, eps, form != "cosine", device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()
        if self.length is not None:
            self.q_norm.fill(weight=math.log2(self.length**2 - self.length))

    @property
    def scale(self) -> float:
        """The factor of the dot products of normalized queries and keys: 1 for cosines, else 1 / sqrt(D)."""
        return 1.0 if self.form == "cosine" else self.features**-0.5

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize queries, including the gain, and keys, for attention with ``scale``."""
        return self.q_norm(query), self.k_norm(key)

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
        (query, key), dropout = self.normalize(query, key), dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=self.scale)


class _HeadNorm(Layer):
    def __init__(self, features: int, form: Form, eps: float, weighted: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.form: Form = form
        shape = () if form == "cosine" else (features,)
        self.register_affine(shape, weighted, form == "layer", device=device, dtype=dtype)
        self.complete()

    def make_rule(self) -> Rule:
        return query_key_norm_rule(self.form, self.eps)

    def check(self, input: Tensor) -> None:
        if input.dim() < 1 or input.shape[-1] != self.features:
            raise ShapeError(
                f"QueryKeyNorm: got queries or keys of {show(input.shape)}, wanted features={self.features} of one head last; "
                "split the heads before, e.g. x.unflatten(-1, (heads, -1)).transpose(-2, -3)"
            )


def query_key_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    form: Form = "cosine",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normalize queries and keys as a function; the cosine form's weights are scalars; see QueryKeyNorm.

    >>> query_key_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]]), torch.tensor(10.0))
    (tensor([[6., 8.]]), tensor([[0., 1.]]))
    """
    rule = query_key_norm_rule(form, eps)
    return run(rule, query, query_weight, query_bias), run(rule, key, key_weight, key_bias)


def _example_key_and_value(x: Tensor) -> tuple[Tensor, Tensor]:
    """Make keys that follow the queries, and values that do not, so that the output shows the attention weights."""
    value = torch.linspace(-1, 1, x[0].numel() if len(x) else math.prod(x.shape[1:]), device=x.device)
    return x.flip(1) + x, value.square().view(x.shape[1:]).expand(x.shape).to(x.dtype)


CARD = Card(
    title="Query-key normalization",
    wordless="it replaces attention's product of queries and keys, not a norm of one input",
    normalized_over="each query and key of a head, over its features",
    formula="softmax(g * q / |q| . k / |k|) v",
    paper=paper("henry2020querykey"),
    use_cases="large transformers, where unbounded attention logits make training diverge",
    strengths="bounded logits, so attention does not collapse to one key at large rates or scales",
    weaknesses="two more reductions per head; can't be added to a trained network without changing its function",
    module=QueryKeyNorm,
    functional=query_key_norm,
    make=lambda features: QueryKeyNorm(features, length=5),
    layout="* d",
    extra=_example_key_and_value,
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)


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

    Shape: queries (*, L, D), keys (*, S, D), values (*, S, E); output (*, L, E).

    Raises:
        OptionError: an unknown ``gradient``, or an ``eps`` that is not above 0.

    Reference: Saratchandran, "Preconditioned Attention" (2026), https://arxiv.org/abs/2603.27153.

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


CARD_PRECONDITIONED_ATTENTION = Card(
    title="Preconditioned attention",
    wordless="it replaces attention's product, not a norm of one input",
    normalized_over="what each query gets of a head, over its features",
    formula="y_i = a_i / max(|a_i|, eps), A = softmax(q k^T / sqrt(D)) v",
    paper=paper("saratchandran2026preconditioned"),
    use_cases="attention of transformers, from the start of training",
    strengths="unit rows, whatever the values' scale; one reduction more per head; no parameters",
    weaknesses="as we read it from its figure and from others' code; loses the length of what a query gets",
    module=PreconditionedAttention,
    functional=preconditioned_attention,
    make=lambda features: PreconditionedAttention(),
    rule=tokens_rule("norm", 1e-12, "floor"),
    layout="* d",
    extra=lambda x: (x.flip(1) + x, 2 * x - 1),  # keys and values that follow the queries
)
