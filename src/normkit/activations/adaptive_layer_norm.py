"""A scale and a shift computed from a condition: after layer normalization, as in diffusion transformers, or alone (FiLM)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine, align, modulation, per_sample
from normkit.core.errors import ShapeError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, show
from normkit.engine.dispatch import Backend, Explanation, explain, run
from normkit.engine.layer import Layer, check_channels, check_layout

_SUPPORTS = {layout: Support(layout, over="*") for layout in ("n c *", "n * c")}


class FiLM(Module):
    """Scale and shift each channel by a linear function of a condition.

    y = (1 + scale) * x + shift, with (scale, shift) = Linear(condition), one of each per sample and channel. It computes no
    statistic: it is the affine part of a normalization, computed from another input, and usually follows a batch normalization
    without its own (``affine=False``).

    Args:
        channels: channels C.
        condition: size of the condition.
        zero: initialize the linear layer to zero, so that y = x; else as ``torch.nn.Linear`` does. Default: False.
        layout: ``"n c *"`` for channels first, ``"n * c"`` for channels last. Default: ``"n c *"``.

    Shape: input (N, C, *), or (N, *, C) with channels last, and condition (N, condition); the output has the shape and
    dtype of the input.

    Raises:
        ShapeError: the input has another number of channels, or the condition another size.
        OptionError: an unknown layout, or the input is not floating.

    Reference: Perez, Strub, de Vries, Dumoulin, Courville, "FiLM" (2018), https://arxiv.org/abs/1709.07871.

    >>> FiLM(2, condition=3, zero=True)(torch.tensor([[1.0, 3.0]]), torch.ones(1, 3)).detach()
    tensor([[1., 3.]])
    """

    shown = "{0.channels}, condition={0.condition}"
    unusual: ClassVar = {"layout": "n c *"}

    def __init__(
        self,
        channels: int,
        condition: int,
        *,
        zero: bool = False,
        layout: str = "n c *",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_layout("FiLM", layout)
        self.channels, self.condition, self.zero, self.layout = channels, condition, zero, layout
        self.linear = nn.Linear(condition, 2 * channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()
        if self.zero:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        """Modulate by the condition (N, condition), or one for all samples: (condition,) or (1, condition)."""
        check_channels("FiLM", input, self.channels, "channels", self.layout)
        given, condition = condition, per_sample(condition)
        if condition.shape[1:] != (self.condition,) or condition.shape[0] not in (1, input.shape[0]):
            raise ShapeError(
                f"FiLM: got a condition of {show(given.shape)} for an input of {show(input.shape)}; "
                f"wanted {show((input.shape[0], self.condition))}"
            )
        scale, shift = self.linear(condition.to(self.linear.weight.dtype)).chunk(2, -1)
        return film(input, scale, shift, layout=self.layout)


def film(input: Tensor, scale: Tensor, shift: Tensor, *, layout: str = "n c *") -> Tensor:
    """Feature-wise linear modulation as a function of a scale and a shift; see FiLM.

    Each is (N, C) or (C,), or has as many axes as the input and broadcasts over it, as (N, C, 1, 1).

    >>> film(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[2., 4.]])
    """
    check_layout("film", layout)
    wide = torch.promote_types(accumulation_dtype(input.dtype), scale.dtype)
    split = _SUPPORTS[layout].split(input.shape)
    per, (scale, shift) = modulation(layout, input.shape, scale, shift)
    return Affine(per, offset=1.0).apply(input.to(wide), split, scale, shift).to(input.dtype)


CARD_FILM = Card(
    title="Feature-wise linear modulation (FiLM)",
    wordless="it takes a condition as well as its input",
    normalized_over="nothing; each sample's channels are scaled and shifted by a function of a condition",
    formula="y = (1 + scale(condition)) * x + shift(condition)",
    paper=paper("perez2018film"),
    use_cases="convolutional networks steered by a question, class or style; after a norm without weight and bias",
    strengths="two numbers per channel steer a whole network; works after any norm",
    weaknesses="normalizes nothing itself; the same for all positions",
    module=FiLM,
    functional=film,
    make=lambda channels: FiLM(channels, channels),
    extra=lambda x: (x.double().flatten(2).mean(2).to(x.dtype),),
)


@remembered
def adaptive_layer_norm_rule(eps: float = 1e-6, per: str = "n d") -> Rule:
    """Adaptive layer normalization as data; ``per="n * d"`` where each token has its own condition."""
    return Rule(Support("n * d", over="d"), Statistic("mean", "std", eps), Affine(per, offset=1.0))


def modulate(input: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute (1 + scale) * x + shift, with one scale and shift per sample, or per token.

    Args:
        input: (N, *, D).
        shift: (N, D), (D,), or a shape of as many axes as the input that broadcasts over it, such as (N, 1, D) or (1, T, D).
        scale: as shift.

    Raises:
        ShapeError: shift or scale does not broadcast.

    Reference: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), https://arxiv.org/abs/2212.09748.

    >>> modulate(torch.ones(1, 3, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[[2., 2.],
             [2., 2.],
             [2., 2.]]])
    """
    per, (scale, shift) = modulation("n * d", input.shape, scale, shift)
    split = Support("n * d", over="d").split(input.shape)
    wide = torch.promote_types(input.dtype, scale.dtype)
    return Affine(per, offset=1.0).apply(input.to(wide), split, scale, shift).to(input.dtype)


class AdaLayerNorm(Layer):
    """Layer normalization whose scale and shift are a linear function of a condition.

    y = (1 + scale) * (x - E[x]) / sqrt(Var[x] + eps) + shift, with (shift, scale) = Linear(SiLU(condition)), per sample or,
    where the condition has an axis of tokens, per token. Training and evaluation compute the same.

    Args:
        features: D, over which x is normalized.
        condition: size of the condition.
        eps: added to the variance. Default: 1e-6.
        zero: initialize the linear layer to zero, so that y is plain layer normalization; else as ``torch.nn.Linear`` does.
            Default: True.

    Shape: input (N, *, D) and condition (N, condition) or (N, *, condition), any axis but the last may be 1; the output
    has the shape and dtype of the input.

    Raises:
        ShapeError: the size of the input or of the condition does not fit.

    Reference: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), https://arxiv.org/abs/2212.09748.

    >>> norm = AdaLayerNorm(2, condition=3)
    >>> norm(torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 3)).detach()
    tensor([[[-1.0000,  1.0000]]])
    """

    shown = "{0.features}, condition={0.condition}, eps={0.eps}"
    unusual: ClassVar = {"zero": True}

    def __init__(
        self,
        features: int,
        condition: int,
        eps: float = 1e-6,
        *,
        zero: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.features, self.condition, self.eps, self.zero = features, condition, eps, zero
        self.adaLN_modulation = _modulation(condition, 2 * features, device, dtype)
        self.reset_parameters()
        self.complete()

    def reset_parameters(self) -> None:
        linear: Any = self.adaLN_modulation[1]
        linear.reset_parameters()
        if self.zero:
            _fill_zero(linear)

    def make_rule(self) -> Rule:
        return adaptive_layer_norm_rule(self.eps)

    def forward(self, input: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalize, and modulate by the condition; elements where the mask is False enter no statistic and become zero."""
        shift, scale = self._shift_and_scale(input, condition)
        return adaptive_layer_norm(input, shift, scale, self.eps, mask=mask, backend=self.backend)

    def explain(self, input: Tensor, condition: Tensor) -> Explanation:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Say which back end would normalize this input under this condition, and why."""
        shift, scale = self._shift_and_scale(input, condition)
        per, (scale, shift) = modulation("n * d", input.shape, scale, shift)
        return explain(adaptive_layer_norm_rule(self.eps, per), input, scale, shift, backend=self.backend)

    def _shift_and_scale(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        condition = _checked("AdaLayerNorm", x, condition, self.features, self.condition)
        return _predict(self.adaLN_modulation, condition).chunk(2, -1)


class AdaLayerNormZeroBlock(Module):
    """A transformer block with adaLN-Zero: each branch is modulated before and gated after, and gates start at zero.

    (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = Linear(SiLU(condition)), which starts at zero;
    x <- x + gate_a * attn(modulate(LN(x), shift_a, scale_a)); x <- x + gate_m * mlp(modulate(LN(x), shift_m, scale_m)).
    At the start the block is the identity. With timm's ``Attention`` and ``Mlp`` as branches its keys are those of DiT's block.

    ``features``, ``condition`` and ``eps``, shapes and errors are those of AdaLayerNorm.

    Args:
        attn: the first branch, which keeps the shape (N, L, D).
        mlp: the second branch, likewise.

    Reference: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), https://arxiv.org/abs/2212.09748.

    >>> block = AdaLayerNormZeroBlock(2, 3, attn=nn.Linear(2, 2), mlp=nn.Linear(2, 2))
    >>> block(torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 3)).detach()
    tensor([[[1., 3.]]])
    """

    shown = "{0.features}, condition={0.condition}, eps={0.eps}"

    def __init__(
        self,
        features: int,
        condition: int,
        attn: nn.Module,
        mlp: nn.Module,
        eps: float = 1e-6,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.features, self.condition, self.eps = features, condition, eps
        self.attn, self.mlp = attn, mlp
        self.adaLN_modulation = _modulation(condition, 6 * features, device, dtype)
        _fill_zero(self.adaLN_modulation[1])

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        """Run both branches, each normalized, modulated and gated."""
        condition = _checked("AdaLayerNormZeroBlock", input, condition, self.features, self.condition)
        six = _predict(self.adaLN_modulation, condition).chunk(6, -1)
        for branch, (shift, scale, gate) in ((self.attn, six[:3]), (self.mlp, six[3:])):
            change = branch(adaptive_layer_norm(input, shift, scale, self.eps))
            input = (input + align("n * d", input.shape, gate) * change).to(input.dtype)
        return input


class AdaLayerNormOutput(Module):
    """The last layer of a diffusion transformer: adaptive layer normalization and a linear map, both initialized to zero.

    y = W modulate(LN(x), shift, scale) + b, with (shift, scale) = Linear(SiLU(condition)); at the start y = 0.

    ``features``, ``condition`` and ``eps``, inputs and errors are those of AdaLayerNorm; the output is (N, *, outputs).

    Reference: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), https://arxiv.org/abs/2212.09748.

    >>> AdaLayerNormOutput(2, 3, 4)(torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 3)).detach()
    tensor([[[0., 0., 0., 0.]]])
    """

    shown = "{0.features}, condition={0.condition}, eps={0.eps}"

    def __init__(
        self, features: int, condition: int, outputs: int, eps: float = 1e-6, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.features, self.condition, self.eps = features, condition, eps
        self.linear = nn.Linear(features, outputs, device=device, dtype=dtype)
        self.adaLN_modulation = _modulation(condition, 2 * features, device, dtype)
        _fill_zero(self.linear)
        _fill_zero(self.adaLN_modulation[1])

    def forward(self, input: Tensor, condition: Tensor) -> Tensor:
        """Normalize, modulate, map."""
        condition = _checked("AdaLayerNormOutput", input, condition, self.features, self.condition)
        shift, scale = _predict(self.adaLN_modulation, condition).chunk(2, -1)
        return self.linear(adaptive_layer_norm(input, shift, scale, self.eps))


def adaptive_layer_norm(
    input: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Adaptive layer normalization as a function of the shift and scale that ``modulate`` takes; see AdaLayerNorm.

    >>> adaptive_layer_norm(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[[-2.0000,  2.0000]]])
    """
    per, (scale, shift) = modulation("n * d", input.shape, scale, shift)
    return run(adaptive_layer_norm_rule(eps, per), input, scale, shift, mask=mask, backend=backend)


def _modulation(condition: int, outputs: int, device: Any, dtype: Any) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(condition, outputs, device=device, dtype=dtype))


def _fill_zero(linear: Any) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def _predict(modulation: nn.Sequential, condition: Tensor) -> Tensor:
    linear: Any = modulation[1]
    return modulation(condition.to(linear.weight.dtype))


def _checked(who: str, x: Tensor, condition: Tensor, features: int, size: int) -> Tensor:
    """Check a condition; return it with one row per sample or for all, or with as many axes as x."""
    if x.dim() < 2 or x.shape[-1] != features:
        raise ShapeError(f"{who}: got an input of {show(x.shape)}, wanted (N, *, {features}) as features={features}")
    given, condition = condition, condition if condition.dim() == x.dim() else per_sample(condition)
    axes = condition.dim() - 1
    fits = all(condition.shape[d] in (1, x.shape[d]) for d in range(min(axes, x.dim())))
    if condition.dim() not in (2, x.dim()) or condition.shape[-1] != size or not fits:
        raise ShapeError(
            f"{who}: got a condition of {show(given.shape)} for an input of {show(x.shape)}; "
            f"wanted {show((x.shape[0], size))}, or one per token: {show((*x.shape[:-1], size))}; any axis but the last may be 1"
        )
    return condition


def _example_condition(x: Tensor) -> tuple[Tensor]:
    """Make a condition that is invariant to whatever layer normalization is invariant to."""
    wide = x.double()
    return (F.layer_norm(wide, wide.shape[-1:], eps=1e-12).flatten(1, -2).mean(1).to(x.dtype),)


CARD = Card(
    title="Adaptive layer normalization (adaLN)",
    wordless="it takes a condition as well as its input",
    normalized_over="each sample or token, over its features; scaled and shifted by a function of a condition",
    formula="y = (1 + scale(condition)) * (x - E[x]) / sqrt(Var[x] + eps) + shift(condition)",
    paper=paper("peebles2023scalable"),
    use_cases="diffusion transformers, and other networks steered by a time step, class or text",
    strengths="conditions every layer at little cost, without more tokens; starts as plain layer normalization",
    weaknesses="the linear maps hold a third of a diffusion transformer's parameters; one condition for all tokens",
    module=AdaLayerNorm,
    functional=adaptive_layer_norm,
    make=lambda features: AdaLayerNorm(features, features),
    rule=adaptive_layer_norm_rule(),
    layout="* d",
    extra=_example_condition,
    invariances=frozenset({"weight scale", "weight shift", "data scale", "sample scale"}),
)

CARD_ZERO = Card(
    name="adaptive_layer_norm_zero",
    title="Adaptive layer normalization with zero-initialized gates (adaLN-Zero)",
    wordless="it takes a condition as well as its input, and the branches of a block",
    normalized_over="each token, over its features, before each branch of a residual block; the branch is gated",
    formula="x + gate(condition) * branch((1 + scale(condition)) * LN(x) + shift(condition))",
    paper=paper("peebles2023scalable"),
    use_cases="blocks of diffusion transformers",
    strengths="each block starts as the identity, which trains deep diffusion transformers best of the designs compared",
    weaknesses="three vectors per branch from the condition: a third of the model's parameters",
    module=AdaLayerNormZeroBlock,
    functional=modulate,
    make=lambda features: AdaLayerNormZeroBlock(features, features, attn=nn.Tanh(), mlp=nn.Tanh()),
    layout="* d",
    extra=_example_condition,
)
