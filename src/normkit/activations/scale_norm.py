"""ScaleNorm, FixNorm and HoloNorm: a token's direction, and another length."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.support import check_shape, show
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_last, tokens_rule

_HOLO_RULE = tokens_rule("norm", 1.0, "outside")


class ScaleNorm(Layer):
    """Divide each token by its Euclidean norm and multiply it by one learned scalar.

    y = weight * x / max(|x|, eps), the same in training and evaluation. With the initial weight sqrt(D) it is RMS
    normalization with one gain for all features. The published code gives each place in the network its own scalar; pass
    another layer's ``weight`` to share it, as in the paper's text.

    Args:
        features: features D.
        eps: floor of the norm. Default: 1e-5.
        weight: the scalar parameter of another ScaleNorm, to share; None for its own, which starts at sqrt(D). Default: None.

    Shape: (*, D); the output has the same shape.

    Raises:
        ShapeError: the input does not end in ``features``.
        OptionError: the weight to share is not a scalar.

    Reference: Nguyen and Salazar, "Transformers without Tears" (2019), https://arxiv.org/abs/1910.05895.

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
            raise OptionError(f"ScaleNorm: weight= of shape {show(weight.shape)}; wanted a scalar parameter")
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
    paper=paper("nguyen2019transformers"),
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


class FixNorm(Module):
    """Tied word embeddings of fixed length, so that a word's frequency does not affect its logit.

    ``embed(tokens)`` returns sqrt(D) * e / |e|, and the layer itself logits = g * h / |h| . e / |e| + bias: a learned scalar
    times the cosine. Each of the two normalizations can be turned off; the scalar belongs to that of h.

    Args:
        features: features D.
        vocabulary: number of words V.
        fix_embeddings: divide each word's embedding by its norm; they are initialized uniformly in +-0.01, else normally
            with deviation 1 / sqrt(D). Default: True.
        fix_output: divide h by its norm, and multiply it by a learned scalar that starts at sqrt(D). Default: True.
        bias: whether there is a bias per word (starts at 0). Default: True.
        eps: floor of the norms. Default: 1e-5.

    Shape: (*, D) to logits (*, V), in the input's dtype; ``embed`` takes word numbers (*) to (*, D).

    Raises:
        ShapeError: h has other features.

    Reference: Nguyen and Chiang, "Improving Lexical Choice in Neural Machine Translation" (2018),
    https://arxiv.org/abs/1710.01329; with the scalar, Nguyen and Salazar, "Transformers without Tears" (2019),
    https://arxiv.org/abs/1910.05895.

    >>> words = FixNorm(2, 3, bias=False)
    >>> with torch.no_grad():
    ...     _ = words.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 4.0]]))
    >>> words.embed(torch.tensor([1])).detach(), words(torch.tensor([[7.0, 0.0]])).detach()
    (tensor([[0.0000, 1.4142]]), tensor([[1.4142, 0.0000, 0.8485]]))
    """

    bias: nn.Parameter | None
    gain: nn.Parameter | None

    def __init__(
        self,
        features: int,
        vocabulary: int,
        *,
        fix_embeddings: bool = True,
        fix_output: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.features, self.vocabulary, self.fix_embeddings, self.eps = features, vocabulary, fix_embeddings, eps
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(vocabulary, features, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(vocabulary, **factory)) if bias else None)
        self.register_parameter("gain", nn.Parameter(torch.empty((), **factory)) if fix_output else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.fix_embeddings:
            nn.init.uniform_(self.weight, -0.01, 0.01)
        else:
            nn.init.normal_(self.weight, std=self.features**-0.5)
        self.fill(bias=0, gain=self.features**0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the embeddings of words, scaled by sqrt(D), in the dtype of the weight."""
        found = F.embedding(tokens, self.weight)
        return (_unit(found, self.eps) if self.fix_embeddings else found) * self.features**0.5

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logits of all words."""
        check_last("FixNorm", input, self.features)
        check_shape("FixNorm", "weight", self.weight, self.vocabulary, self.features)
        return fix_norm(input, self.weight, self.bias, self.gain, self.eps, fix_embeddings=self.fix_embeddings)

    def extra_repr(self) -> str:
        text = f"{self.features}, {self.vocabulary}, eps={self.eps}"
        text += "" if self.fix_embeddings else ", fix_embeddings=False"
        return text + ("" if self.gain is not None else ", fix_output=False")


def fix_norm(
    input: Tensor,
    embeddings: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    *,
    fix_embeddings: bool = True,
) -> Tensor:
    """Compute logits from embeddings (V, D); the input is divided by its norm if there is a gain; see FixNorm.

    >>> fix_norm(torch.tensor([[7.0, 0.0]]), torch.tensor([[3.0, 4.0]]), gain=torch.tensor(10.0))
    tensor([[6.]])
    """
    accumulation_dtype(input.dtype)  # refuses integers
    check_shape("fix_norm", "embeddings", embeddings, len(embeddings) if embeddings.dim() else 0, input.shape[-1])
    check_shape("fix_norm", "bias", bias, len(embeddings))
    check_shape("fix_norm", "gain", gain)
    y = input if gain is None else _unit(input, eps)
    rows = _unit(embeddings, eps) if fix_embeddings else embeddings
    wide = torch.promote_types(y.dtype, rows.dtype)
    logits = F.linear(y.to(wide), rows.to(wide))
    if gain is not None:
        logits = logits * gain
    return (logits if bias is None else logits + bias).to(input.dtype)


def _unit(x: Tensor, eps: float) -> Tensor:
    return run(tokens_rule("norm", eps, "floor"), x)


CARD_FIX = Card(
    title="FixNorm",
    wordless="it is a network's embeddings and last layer, not a norm between layers",
    normalized_over="each word's embedding, and each token before the logits, over its features",
    formula="logit = g * (h / |h|) . (e / |e|) + bias",
    paper=paper("nguyen2018improving"),
    use_cases="embeddings and logits of translation models, especially with little data",
    strengths="short embeddings do not hold back rare words; the gain bounds the logits",
    weaknesses="the gain must be learned or set; replaces the output layer, not a norm inside the network",
    module=FixNorm,
    functional=fix_norm,
    make=lambda features: FixNorm(features, features),
    layout="* d",
    invariances=frozenset({"weight scale", "data scale", "sample scale"}),
)


class HoloNorm(Layer):
    """Divide each token by 1 plus its Euclidean norm.

    y = x / (1 + |x|), without parameters, the same in training and evaluation. The result lies inside the unit ball and has the
    token's direction; the token can be recovered as y / (1 - |y|). The paper also allows norms other than the Euclidean one.

    ``features``, the shape and its error are those of ScaleNorm.

    Reference: Yongueng and Tembine, "Holonorm" (2025), https://arxiv.org/abs/2511.10504.

    >>> HoloNorm(2)(torch.tensor([[3.0, 4.0]]))
    tensor([[0.5000, 0.6667]])
    """

    shown = "{0.features}"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.register_affine((), False, False)
        self.complete()

    def make_rule(self) -> Rule:
        return _HOLO_RULE

    def check(self, input: Tensor) -> None:
        check_last("HoloNorm", input, self.features)


def holo_norm(input: Tensor, *, mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """HoloNorm over the last axis as a function; see HoloNorm.

    >>> holo_norm(torch.tensor([[3.0, 4.0]]))
    tensor([[0.5000, 0.6667]])
    """
    return run(_HOLO_RULE, input, mask=mask, backend=backend)


CARD_HOLO = Card(
    title="HoloNorm",
    word="holo",
    normalized_over="each sample or token, over its features, to a length below 1",
    formula="y = x / (1 + |x|)",
    paper=paper("yongueng2025holonorm"),
    use_cases="transformers, instead of dynamic tanh or layer normalization",
    strengths="invertible and without parameters; bounded; keeps directions",
    weaknesses="all long tokens end near length 1; no gain",
    module=HoloNorm,
    functional=holo_norm,
    build=lambda at: HoloNorm(at.channels),
    takes=(),
    rule=_HOLO_RULE,
    layout="* d",
)
