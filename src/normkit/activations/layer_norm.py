"""Layer normalization: normalize each sample or token over its features."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.module import trailing_sizes
from normkit.core.place import one_of
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.engine.call import Save
from normkit.engine.dispatch import Activation, Backend, run
from normkit.engine.layer import Layer, check_features, features_support


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
            keeps anyway: the normalized input is then computed again from it. Default: "input".
        dropout: probability with which an element of the output becomes zero in training, where the others are divided by
            1 - dropout. No mask is stored: the backward pass draws again. Default: 0.

    Shape: (*, *normalized_shape), or (N, C, *) with ``over``; the output has the same shape.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or has another number of channels.
        OptionError: an unknown ``over`` or ``per``.
        OptionError: with ``save="output"``, an activation that has no inverse or, in training, a gain too small to be undone.

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
