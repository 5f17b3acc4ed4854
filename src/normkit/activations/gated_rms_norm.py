"""Root mean square normalization whose gain depends on the input: on the token itself (SeeDNorm), or on a gate as in Mamba-2."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_shape, divisors, show
from normkit.engine.dispatch import Backend, run
from normkit.engine.gate import gated
from normkit.engine.layer import Cast, tokens_rule


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

    Shape: (*, D); the output has the same shape.

    Raises:
        ShapeError: the input has another number of features.
        OptionError: the features do not split into the heads.

    Reference: Cai, Zhu, Liu, Min, "SeeDNorm" (2025), https://arxiv.org/abs/2510.22777.

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


CARD_SEED = Card(
    title="SeeDNorm",
    word="seed",
    normalized_over="each sample or token, over its features, without centring",
    formula="y = (weight + tanh(<x, beta>) * alpha) * x / sqrt(E[x^2] + eps)",
    paper=paper("cai2025seednorm"),
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


@remembered
def gated_rms_norm_rule(eps: float = 1e-5, groups: int = 1) -> Rule:
    """The normalization inside, over groups of features, as data."""
    if groups == 1:
        return Rule(Support("* d", over="d"), Statistic(None, "rms", eps), Affine("d"))
    return Rule(Support("* (g d)", over="d", g=groups), Statistic(None, "rms", eps), Affine("(g d)"))


class GatedRMSNorm(Module):
    """RMS normalization of an input that is gated by the SiLU of another, before or after normalizing.

    ``norm_before_gate=True`` (Qwen3-Next): y = weight * x / sqrt(E[x^2] + eps) * silu(gate). ``norm_before_gate=False``
    (Mamba-2's default in transformers): the same norm of x * silu(gate). Without a gate it is RMS normalization. Training and
    evaluation compute the same. Checkpoints of both load: the key is ``weight``.

    Args:
        features: features D.
        eps: added to the mean square. Default: 1e-5.
        norm_before_gate: which of the two forms. Default: True.
        groups: number of groups of features, each with its own root mean square. Default: 1.
        cast: when a half type is rounded: ``"after weight"`` once at the end, ``"before weight"`` (transformers) also after
            normalizing and after the weight. In float32 and float64 both are the same. Default: "after weight".

    Shape: input (*, D) and gate of the same shape; the output has this shape too.

    Raises:
        ShapeError: the input does not end in ``features``, or the gate has another shape.
        OptionError: the features do not split into the groups, or an unknown ``cast``.

    Reference: Dao and Gu, "Transformers are SSMs" (2024), https://arxiv.org/abs/2405.21060.

    >>> norm = GatedRMSNorm(2)
    >>> norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])).detach()
    tensor([[0.6203, 0.0000]])
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        *,
        norm_before_gate: bool = True,
        groups: int = 1,
        cast: Cast = "after weight",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if groups < 1 or features % groups:
            raise OptionError(
                f"GatedRMSNorm: {features} features do not split into groups={groups}; wanted one of {divisors(features)}"
            )
        check_options("GatedRMSNorm", cast=(cast, Cast))
        self.features, self.eps, self.groups, self.norm_before_gate = features, eps, groups, norm_before_gate
        self.cast: Cast = cast
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.fill(weight=1)

    def forward(self, input: Tensor, gate: Tensor | None = None) -> Tensor:
        options = {"norm_before_gate": self.norm_before_gate, "groups": self.groups}
        return gated_rms_norm(input, gate, self.weight, self.eps, cast=self.cast, **options)

    def extra_repr(self) -> str:
        shown = f"{self.features}, eps={self.eps}, norm_before_gate={self.norm_before_gate}, groups={self.groups}"
        return shown + f", cast={self.cast!r}" * (self.cast != "after weight")


def gated_rms_norm(
    input: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    norm_before_gate: bool = True,
    groups: int = 1,
    cast: Cast = "after weight",
    backend: Backend = "auto",
) -> Tensor:
    """Gated RMS normalization over the last axis as a function; see GatedRMSNorm.

    >>> gated_rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), norm_before_gate=False)
    tensor([[1.4142, 0.0000]])
    """
    if gate is not None and gate.shape != input.shape:
        raise ShapeError(f"gated_rms_norm: got a gate of {show(gate.shape)}, wanted the input's {show(input.shape)}")
    if input.dim() < 1:
        raise ShapeError("gated_rms_norm: got an input without axes; wanted (*, D)")
    check_shape("gated_rms_norm", "weight", weight, input.shape[-1])
    check_options("gated_rms_norm", cast=(cast, Cast))
    rule = gated_rms_norm_rule(eps, groups)
    if gate is None and cast == "after weight":
        return run(rule, input, weight, backend=backend)
    # Both products are taken in at least float32, and rounded once unless asked otherwise, as the authors' kernels do.
    wide = accumulation_dtype(input.dtype)
    x = input.to(wide) if gate is None or norm_before_gate else gated(input, gate, wide)
    if cast == "after weight":
        y = run(rule, x, weight, backend=backend)
    else:
        y = run(rule, x, backend=backend).to(input.dtype)
        y = y if weight is None else weight * y
    return gated(y, gate, input.dtype) if gate is not None and norm_before_gate else y.to(input.dtype)


CARD = Card(
    title="Gated root mean square normalization",
    wordless="it takes a second input, the gate, which a norm's place does not have",
    normalized_over="each sample or token, over its features or groups of them, without centring",
    formula="y = weight * x / sqrt(E[x^2] + eps) * silu(gate)",
    paper=paper("dao2024transformers"),
    use_cases="the end of a state space or linear attention block: Mamba-2, Qwen3-Next",
    strengths="norm and gate in one layer; groups let it be split over devices",
    weaknesses="needs a gate of the input's size",
    module=GatedRMSNorm,
    functional=gated_rms_norm,
    # The same gate for every sample, so that a sample's output depends on no other.
    extra=lambda x: (torch.linspace(-2, 2, x.shape[1:].numel(), dtype=x.dtype).reshape(x.shape[1:]).expand(x.shape),),
    rule=gated_rms_norm_rule(),
    layout="* d",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)
