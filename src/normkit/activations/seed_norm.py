"""SeeDNorm: root mean square normalization whose gain depends on the token itself, so that its length is not lost."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.errors import OptionError, ShapeError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.support import check_shape, divisors
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import tokens_rule


class SeeDNorm(Module):
    """Divide each token by its root mean square and scale it by a gain computed from the token.

    y = (weight + tanh(<x, beta>) * alpha) * x / sqrt(E[x^2] + eps), with <x, beta> one number per token and weight, alpha, beta
    vectors of D. It starts as RMS normalization, as beta starts at 0. With several heads the features are split into as many
    parts, and the gain of each part comes from its own <x, beta>, whose variance is smaller. Training and evaluation compute
    the same. The initial values follow restatements by others, as the authors have published no code.

    Args:
        features: features D.
        eps: added to the mean square. Default: 1e-6.
        heads: number of parts into which the features are split for <x, beta>. Default: 1.

    Shape:
        (*, D); the output has the same shape.

    Raises:
        ShapeError: the input has another number of features.
        OptionError: the features do not split into the heads.

    Reference:
        Cai, Zhu, Liu, Min, "SeeDNorm: Self-Rescaled Dynamic Normalization" (2025), https://arxiv.org/abs/2510.22777.

    >>> norm = SeeDNorm(2)
    >>> _ = nn.init.constant_(norm.beta, 0.1)
    >>> norm(torch.tensor([[3.0, 4.0], [30.0, 40.0]])).detach()
    tensor([[1.3614, 1.8151],
            [1.6971, 2.2627]])
    """

    shown = "{0.features}, eps={0.eps}"
    unusual: ClassVar = {"heads": 1}
    weight: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter

    def __init__(
        self, features: int, eps: float = 1e-6, *, heads: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        _check_heads("SeeDNorm", features, heads)
        self.features, self.eps, self.heads = features, eps, heads
        for name in ("weight", "alpha", "beta"):
            self.register_parameter(name, nn.Parameter(torch.empty(features, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and alpha to 1 and beta to 0: RMS normalization."""
        self.fill(weight=1, alpha=1, beta=0)

    def forward(self, input: Tensor) -> Tensor:
        return seed_norm(input, self.weight, self.alpha, self.beta, self.eps, heads=self.heads)


def seed_norm(
    input: Tensor,
    weight: Tensor,
    alpha: Tensor,
    beta: Tensor,
    eps: float = 1e-6,
    *,
    heads: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """SeeDNorm over the last axis as a function; see SeeDNorm.

    >>> one = torch.ones(2)
    >>> seed_norm(torch.tensor([[3.0, 4.0]]), one, one, one / 10)
    tensor([[1.3614, 1.8151]])
    """
    if input.dim() < 1:
        raise ShapeError("seed_norm: got an input without axes; wanted (*, D)")
    for name, part in (("weight", weight), ("alpha", alpha), ("beta", beta)):
        check_shape("seed_norm", name, part, input.shape[-1])
    _check_heads("seed_norm", input.shape[-1], heads)
    wide = accumulation_dtype(input.dtype)
    x = input.to(wide)
    inner = (x * beta.to(wide)).unflatten(-1, (heads, -1)).sum(-1, keepdim=True)
    gain = (torch.tanh(inner) * alpha.to(wide).unflatten(-1, (heads, -1))).flatten(-2) + weight.to(wide)
    return (run(tokens_rule("rms", eps), x, backend=backend) * gain).to(input.dtype)


def _check_heads(who: str, features: int, heads: int) -> None:
    if heads < 1 or features % heads:
        raise OptionError(
            f"{who}: {features} features do not split into heads={heads}; wanted one of {divisors(features)}"
        )


CARD = Card(
    title="SeeDNorm",
    word="seed",
    normalized_over="each sample or token, over its features, without centring",
    formula="y = (weight + tanh(<x, beta>) * alpha) * x / sqrt(E[x^2] + eps)",
    paper=Paper(
        "Cai, Wenrui and Zhu, Defa and Liu, Qingjie and Min, Qiyang",
        "SeeDNorm: Self-Rescaled Dynamic Normalization",
        2025,
        "https://arxiv.org/abs/2510.22777",
    ),
    use_cases="language models and vision transformers, instead of root mean square normalization",
    strengths="keeps the information in the token's length; starts as root mean square normalization",
    weaknesses="a second reduction per token and three parameters per feature; not invariant to the token's scale",
    module=SeeDNorm,
    functional=seed_norm,
    build=lambda at: SeeDNorm(at.channels, at.eps, **at.factory),
    takes=("weight",),
    over="d",
    layout="* d",
)
