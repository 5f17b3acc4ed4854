"""A transformer encoder for token sequences whose norms stand in any of the published places."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.activations.scale_norm import FixNorm, ScaleNorm
from normkit.core.errors import OptionError
from normkit.lab.models.vit import Attention
from normkit.residual import Residual, Scheme, places

NORMS = {"ln": LayerNorm, "rms": RMSNorm, "scale": ScaleNorm}


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between; ``self[2]`` is the second, whose gradient theory speaks of."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__(_start(nn.Linear(features, hidden)), nn.ReLU(), _start(nn.Linear(hidden, features)))


class Encoder(nn.Module):
    """Embedding and positions, layers of attention and feed-forward, and logits for each place.

    Where the last branch ends with a norm, as in ``"post"`` and ``"deep"``, that is the last; else one more norm stands before
    the head. Weights are Xavier-uniform, with DeepNorm's factor where it is placed so, and biases 0; tokens and places are
    embedded with unit variance, and their sum is divided by sqrt(2), so that what enters the first layer has unit variance too.

    Args:
        vocabulary: tokens that come in and that logits are given for.
        length: longest sequence.
        features: width. Default: 128.
        depth: layers. Default: 12.
        heads: of the attention. Default: 4.
        hidden: width between the linear layers; None for four times the features. Default: None.
        placement: of the norms, as in :func:`~normkit.residual.places`. Default: "post".
        norm: ``"ln"``, ``"rms"`` or ``"scale"``. Default: "ln".
        fix: FixNorm is both the embedding and the head, tied. Default: False.
        causal: a place sees itself and those before it. Default: False.

    Shape:
        tokens (N, L) to logits (N, L, vocabulary).

    Raises:
        OptionError: another norm or placement, or heads that do not divide the features.
        ShapeError: a sequence longer than ``length``.

    Reference:
        Vaswani et al. 2017, Attention Is All You Need, https://arxiv.org/abs/1706.03762; both placements, Xiong et al. 2020,
        On Layer Normalization in the Transformer Architecture, https://arxiv.org/abs/2002.04745
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        features: int = 128,
        depth: int = 12,
        heads: int = 4,
        hidden: int | None = None,
        *,
        placement: Scheme = "post",
        norm: str = "ln",
        fix: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise OptionError(f"Encoder: norm={norm!r}; wanted one of {', '.join(NORMS)}")
        kind, qkv = NORMS[norm], NORMS[norm] if placement == "hybrid" else None
        make = partial(kind, features)
        self.words = FixNorm(features, vocabulary) if fix else nn.Embedding(vocabulary, features)
        self.places = nn.Parameter(torch.randn(length, features))
        self.layers = nn.Sequential()
        last = ""
        for layer in range(1, depth + 1):
            looks = attention(features, heads, causal, qkv)
            feed_forward = FeedForward(features, hidden or 4 * features)
            started = (looks.qkv.weight[2 * features :], looks.proj.weight)
            started += (feed_forward[0].get_parameter("weight"), feed_forward[2].get_parameter("weight"))
            pair = places(placement, layer, depth)
            for weight in started:
                weight.data.mul_(pair[0].start)
            self.layers.extend(
                Residual(branch, make, place) for branch, place in zip((looks, feed_forward), pair, strict=True)
            )
            last = pair[1].formula
        self.norm = nn.Identity() if last == "post" else make()
        self.head = None if fix else _start(nn.Linear(features, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words.embed(tokens) if isinstance(self.words, FixNorm) else self.words(tokens)
        x = (x + self.places[: tokens.shape[1]]) * math.sqrt(0.5)
        x = self.norm(self.layers(x))
        return self.words(x) if self.head is None else self.head(x)

    def feed_forwards(self) -> list[FeedForward]:
        """The feed-forward branches, the first layer's first."""
        return [module for module in self.modules() if isinstance(module, FeedForward)]


def attention(
    features: int, heads: int, causal: bool = False, norm: Callable[[int], nn.Module] | None = None
) -> Attention:
    """Makes self-attention whose queries, keys and values are each Xavier-uniform by themselves; biases start at 0."""
    made = Attention(features, heads, causal, norm)
    for block in made.qkv.weight.data.chunk(3):
        nn.init.xavier_uniform_(block)
    _start(made.proj)
    nn.init.zeros_(made.qkv.bias)
    return made


def _start(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
