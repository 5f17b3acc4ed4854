"""Gated RMS normalization, multiplied by the SiLU of a second input, as in Mamba-2 and Qwen3-Next."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_shape, divisors, show
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Cast


@remembered
def gated_rms_norm_rule(eps: float = 1e-5, groups: int = 1) -> Rule:
    """The normalization inside, over groups of features, as data."""
    if groups == 1:
        return Rule(Support("* d", over="d"), Statistic(None, "rms", eps), Affine("d"))
    return Rule(Support("* (g d)", over="d", g=groups), Statistic(None, "rms", eps), Affine("(g d)"))


class GatedRMSNorm(Module):
    """RMS normalization of an input that is gated by the SiLU of another, before or after normalizing.

    ``norm_before_gate=True`` (Qwen3-Next): y = weight * x / sqrt(E[x^2] + eps) * silu(gate).
    ``norm_before_gate=False`` (Mamba-2's default in transformers): the same norm of x * silu(gate).
    Without a gate it is RMS normalization. Training and evaluation compute the same. Checkpoints of both load: the key is
    ``weight``.

    Args:
        features: features D.
        eps: added to the mean square. Default: 1e-5.
        norm_before_gate: which of the two forms. Default: True.
        groups: number of groups of features, each with its own root mean square. Default: 1.
        cast: when a half type is rounded: ``"after weight"`` once at the end, ``"before weight"`` (transformers) also after
            normalizing and after the weight. In float32 and float64 both are the same. Default: "after weight".

    Shape:
        input (*, D) and gate of the same shape; the output has this shape too.

    Raises:
        ShapeError: the input does not end in ``features``, or the gate has another shape.
        OptionError: the features do not split into the groups, or an unknown ``cast``.

    Reference:
        Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
        (2024), https://arxiv.org/abs/2405.21060.

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
    x, open_ = input.to(wide), None if gate is None else F.silu(gate.to(wide))
    x = x if open_ is None or norm_before_gate else x * open_
    if cast == "after weight":
        y = run(rule, x, weight, backend=backend)
    else:
        y = run(rule, x, backend=backend).to(input.dtype)
        y = y if weight is None else weight * y
    return (y if open_ is None or not norm_before_gate else y * open_).to(input.dtype)


CARD = Card(
    title="Gated root mean square normalization",
    wordless="it takes a second input, the gate, which a norm's place does not have",
    normalized_over="each sample or token, over its features or groups of them, without centring",
    formula="y = weight * x / sqrt(E[x^2] + eps) * silu(gate)",
    paper=Paper(
        "Dao, Tri and Gu, Albert",
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
        2024,
        "https://arxiv.org/abs/2405.21060",
    ),
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
