"""Layer normalization of each sample or token over its features, and of each position with moments for a later layer."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.module import trailing_sizes
from normkit.core.moments import moments
from normkit.core.place import one_of
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support
from normkit.engine.call import Save
from normkit.engine.dispatch import Activation, Backend, run
from normkit.engine.layer import Layer, check_features, check_several, features_support

_POSITIONS = Support("n c *", over="c")


@remembered
def layer_norm_rule(rank: int = 1, eps: float = 1e-5, over: str | None = None, per: str | None = None) -> Rule:
    """Layer normalization over the last ``rank`` axes, or over ``"c"`` or ``"c *"`` of a channels-first input, as data."""
    support, default = features_support("LayerNorm", rank, over)
    return Rule(support, Statistic("mean", "std", eps), Affine(default if per is None else per))


class LayerNorm(Layer, nn.LayerNorm):
    """Normalize each sample, token or position separately, over its features.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias, the same in training and evaluation and whatever else is in the batch.

    Without ``over`` it is ``torch.nn.LayerNorm``: over the trailing axes ``normalized_shape``, a weight per element. With
    ``over`` the input is channels first, and ``normalized_shape`` is its number of channels: the four forms that convolutional
    networks use are

    ================================  ===========================  ==================  =====================
    made by                           statistics                   weight and bias     known as
    ================================  ===========================  ==================  =====================
    ``LayerNorm(C, over="c")``        C, for each position         per channel         LayerNorm2d, ConvNeXt
    ``LayerNorm(C, over="c *")``      C and positions              per channel         GroupNorm(1, C)
    ``LayerNorm(C, over="c *", per="")``  C and positions          one scalar          the paper's formula
    ``LayerNorm((C, H, W))``          C and positions              per element         torch on images
    ================================  ===========================  ==================  =====================

    Args:
        normalized_shape: sizes of the trailing axes; with ``over``, the channels C.
        eps: added to the variance. Default: 1e-5 (ConvNeXt and ViT use 1e-6).
        elementwise_affine: whether there are a weight (starts at 1) and a bias (at 0). Default: True.
        bias: False omits the bias. Default: True.
        over: ``"c"`` or ``"c *"`` of an input ``"n c *"``; ``"d"`` for the last trailing axis alone, with a weight per element of
            all, as for queries whose heads have gains of their own; None for the trailing axes. Default: None.
        per: with ``over``, ``""`` for one scalar weight and bias; None for one per channel. Default: None.
        activation: fused activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or None.
            Default: None.
        save: what is kept for the backward pass: ``"input"``, or the ``"output"``, which a convolution or linear layer behind it
            keeps anyway: the normalized input is then computed again from it, and nothing may change the output in place. Where
            no kernel does so the input is kept, as ``explain`` says. Default: "input".
        dropout: probability with which an element of the output becomes zero in training, where the others are divided by
            1 - dropout. No mask is stored: the backward pass draws again. With it ``save="output"`` saves nothing, as the layer
            behind keeps another tensor. Code that looks for ``nn.Dropout`` modules does not see it. Default: 0.

    Shape: (*, *normalized_shape), or (N, C, *) with ``over``; the output has the same shape.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or has another number of channels.
        OptionError: an unknown ``over`` or ``per``.
        OptionError: with ``save="output"``, an activation without an inverse or, where gradients are recorded, a gain too small.

    Reference: Ba, Kiros, Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450.

    >>> LayerNorm(2, elementwise_affine=False)(torch.tensor([[1.0, 3.0], [10.0, 30.0]]))
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    """

    unusual: ClassVar = {"over": None, "per": None, "activation": None, "save": "input", "dropout": 0.0}

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        over: str | None = None,
        per: str | None = None,
        activation: Activation | None = None,
        save: Save = "input",
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        shape = trailing_sizes("LayerNorm", normalized_shape)
        super().__init__(shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        self.activation, self.save, self.dropout = activation, save, dropout
        self.over, self.per = over, per
        check_features("LayerNorm", shape, over, per)
        self.complete()
        if per == "" and elementwise_affine:
            for name in ("weight", "bias"):
                if getattr(self, name) is not None:
                    setattr(self, name, nn.Parameter(getattr(self, name).detach()[0].clone()))

    def make_rule(self) -> Rule:
        return layer_norm_rule(len(self.normalized_shape), self.eps, self.over, self.per)

    def check(self, input: Tensor) -> None:
        check_features("LayerNorm", self.normalized_shape, self.over, self.per, input)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    over: str | None = None,
    per: str | None = None,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Layer normalization as a function, with the arguments of ``torch.nn.functional.layer_norm``; see LayerNorm.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,))
    tensor([[-1.0000,  1.0000]])
    """
    shape = trailing_sizes("layer_norm", normalized_shape)
    check_features("layer_norm", shape, over, per, input)
    return run(layer_norm_rule(len(shape), eps, over, per), input, weight, bias, mask=mask, backend=backend)


CARD = Card(
    title="Layer normalization",
    word="ln",
    normalized_over="each sample or token, over its features",
    paper=paper("ba2016layer"),
    use_cases="transformers, recurrent networks, ConvNeXt; any batch size, sequences one step at a time",
    strengths="independent of the batch; the same in training and at inference",
    weaknesses="in convolutional networks usually behind batch and group normalization; can't be folded",
    module=LayerNorm,
    functional=layer_norm,
    build=lambda at: LayerNorm(at.shape, at.eps, at.affine, at.bias, over=at.over, **at.factory),
    option=one_of("AXES", "c", "c *", of=lambda norm: getattr(norm, "over", None) or ""),
    axes=("n c *", "n * c", "trailing"),
    rule=layer_norm_rule(),
    layout="* d",
    invariances=frozenset({"weight scale", "weight shift", "data scale", "sample scale"}),
)


class PositionalMoments(NamedTuple):
    """What positional normalization removes: mean and deviation of each position, with one channel."""

    mean: Tensor
    deviation: Tensor


@remembered
def positional_norm_rule(eps: float = 1e-5, correction: int = 1) -> Rule:
    """Positional normalization as data."""
    return Rule(_POSITIONS, Statistic("mean", "std", eps, correction=correction))


class PositionalNorm(Layer):
    """Normalize each position of each sample over its channels, without learned parameters.

    y = (x - E[x]) / sqrt(Var[x] + eps), with the unbiased variance, as the authors have it. The mean and deviation of each
    position carry the input's structure; ``moments(x)`` returns them, and ``moment_shortcut`` injects them into a later layer,
    such as a decoder's. With ``correction=0`` it is layer normalization over the channels, without weight and bias.

    Args:
        eps: added to the variance. Default: 1e-5.
        correction: 1 divides the variance by C - 1, 0 by C. Default: 1.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        ShapeError: an input of one channel.

    Reference: Li, Wu, Weinberger, Belongie, "Positional Normalization" (2019), https://arxiv.org/abs/1907.04312.

    >>> PositionalNorm()(torch.tensor([[[1.0], [2.0], [3.0]]])).view(3)
    tensor([-1.0000,  0.0000,  1.0000])
    """

    shown = "eps={0.eps}, correction={0.correction}"

    def __init__(self, eps: float = 1e-5, correction: int = 1) -> None:
        super().__init__()
        self.eps, self.correction = eps, correction
        self.register_affine((), False, False)
        self.complete()

    def make_rule(self) -> Rule:
        return positional_norm_rule(self.eps, self.correction)

    def check(self, input: Tensor) -> None:
        check_several("PositionalNorm", input, _POSITIONS)

    def moments(self, input: Tensor) -> PositionalMoments:
        """Measure the mean and deviation of each position, (N, 1, *), differentiable, for ``moment_shortcut``."""
        return positional_moments(input, self.eps, self.correction)


def positional_norm(
    input: Tensor, eps: float = 1e-5, correction: int = 1, *, mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Positional normalization as a function; see PositionalNorm.

    >>> positional_norm(torch.tensor([[[1.0], [2.0], [3.0]]])).view(3)
    tensor([-1.0000,  0.0000,  1.0000])
    """
    check_several("positional_norm", input, _POSITIONS)
    return run(positional_norm_rule(eps, correction), input, mask=mask, backend=backend)


def positional_moments(input: Tensor, eps: float = 1e-5, correction: int = 1) -> PositionalMoments:
    """Measure the mean and deviation sqrt(Var + eps) of each position over the channels.

    >>> positional_moments(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0)
    PositionalMoments(mean=tensor([[2.]]), deviation=tensor([[1.]]))
    """
    check_several("positional_moments", input, _POSITIONS)
    found = moments(input, (1,))
    var = found.unbiased() if correction else found.var
    return PositionalMoments(found.mean, (var + eps).sqrt())


def moment_shortcut(input: Tensor, moments: PositionalMoments) -> Tensor:
    """Inject moments of an earlier layer into a later one: deviation * x + mean.

    >>> moment_shortcut(torch.tensor([[-1.0, 1.0]]), PositionalMoments(torch.tensor([[2.0]]), torch.tensor([[3.0]])))
    tensor([[-1.,  5.]])
    """
    return torch.addcmul(moments.mean, input.to(moments.mean.dtype), moments.deviation).to(input.dtype)


CARD_POSITIONAL = Card(
    title="Positional normalization",
    word="pono",
    normalized_over="each sample and position, over its channels",
    paper=paper("li2019positional"),
    use_cases="generative networks with an encoder and a decoder: the moments carry structure across",
    strengths="independent of the batch and of other positions; its moments are used, not discarded",
    weaknesses="removes the strength of features at each position from the main path",
    module=PositionalNorm,
    functional=positional_norm,
    make=lambda channels: PositionalNorm(),
    build=lambda at: PositionalNorm(at.eps),
    takes=(),
    rule=positional_norm_rule(),
    invariances=frozenset({"weight scale", "weight shift", "data scale", "sample scale"}),
)
