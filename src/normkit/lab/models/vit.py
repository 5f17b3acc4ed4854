"""Transformers: ViT-B/16 and smaller ones for images, a diffusion transformer, and an encoder whose norms stand in any place."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.activations.adaptive_layer_norm import AdaLayerNormOutput, AdaLayerNormZeroBlock
from normkit.activations.layer_norm import LayerNorm
from normkit.activations.rms_norm import RMSNorm
from normkit.activations.scale_norm import FixNorm, ScaleNorm
from normkit.core.errors import OptionError, ShapeError
from normkit.residual import Residual, Scheme, places


class Attention(nn.Module):
    """Multi-head self-attention, its queries, keys and values one matrix, each head's of them with a `norm`, if there is one."""

    def __init__(
        self, features: int, heads: int, causal: bool = False, norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        if features % heads:
            raise OptionError(f"heads is {heads}, which does not divide {features} features; wanted a divisor")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)
        self.norms = nn.ModuleList(norm(features // heads) for _ in range(3) if norm is not None)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.norms:
            query, key, value = (one(part) for one, part in zip(self.norms, (query, key, value), strict=True))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """Two linear maps with GELU between them."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, features)


class Block(nn.Module):
    """x + attn(LN(x)), then x + mlp(LN(x)), of tokens ``(n, l, D)``."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, eps=1e-6)
        self.attn = Attention(features, heads)
        self.norm2 = nn.LayerNorm(features, eps=1e-6)
        self.mlp = Mlp(features, 4 * features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Cuts an image into square patches and maps each to a token."""

    def __init__(self, size: int, patch: int, features: int, channels: int = 3) -> None:
        super().__init__()
        if size % patch:
            raise OptionError(f"patch is {patch}, which does not divide the image size {size}; wanted a divisor")
        self.size, self.side = size, size // patch
        self.proj = nn.Conv2d(channels, features, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.size, self.size):
            raise ShapeError(f"Patches: got images {tuple(x.shape)}; wanted (n, c, {self.size}, {self.size})")
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, Pre-LN blocks, LN, and a linear classifier of the class token.

    The names of parameters are those of timm, so that its weights load (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929;
    weights start as in Steiner et al. 2021, https://arxiv.org/abs/2106.10270).
    """

    def __init__(self, size: int, patch: int, features: int, depth: int, heads: int, classes: int = 10) -> None:
        super().__init__()
        # Registered first, so that the first layer of the model is the one that reads the image.
        self.patch_embed = Patches(size, patch, features)
        self.cls_token = nn.Parameter(torch.empty(1, 1, features))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.side**2 + 1, features))
        self.blocks = nn.Sequential(*(Block(features, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.head = nn.Linear(features, classes)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def vit_tiny(classes: int = 10) -> nn.Module:
    """Makes a ViT for 32x32 images: patches of 4, 192 features, 6 blocks, 3 heads; 2.7 million parameters."""
    return VisionTransformer(size=32, patch=4, features=192, depth=6, heads=3, classes=classes)


def vit_s(classes: int = 10) -> nn.Module:
    """Makes ViT-S for 32x32 images: patches of 4, 384 features, 12 blocks, 6 heads; 21 million parameters."""
    return VisionTransformer(size=32, patch=4, features=384, depth=12, heads=6, classes=classes)


def vit_b16(classes: int = 1000) -> nn.Module:
    """Makes ViT-B/16 for 224x224 images: 768 features, 12 blocks, 12 heads; 86.6 million parameters."""
    return VisionTransformer(size=224, patch=16, features=768, depth=12, heads=12, classes=classes)


def dit_block(features: int, heads: int) -> AdaLayerNormZeroBlock:
    """Makes a DiT block: attention and MLP, each after layer normalization modulated by a condition, gated from zero."""
    return AdaLayerNormZeroBlock(features, features, Attention(features, heads), Mlp(features, 4 * features))


class TimeEmbedding(nn.Module):
    """MLP(cos(t w), sin(t w)) of times ``(n,)``, with frequencies w from 1 down to 1/10000, to ``(n, features)``."""

    def __init__(self, features: int, waves: int = 128) -> None:
        super().__init__()
        self.waves = waves
        self.mlp = nn.Sequential(nn.Linear(2 * waves, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, t: Tensor) -> Tensor:
        exponent = torch.arange(self.waves, device=t.device, dtype=torch.float32) / self.waves
        angle = t.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)
        first: nn.Module = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(first.weight.dtype))


class DiT(nn.Module):
    """Patches, fixed positions, DiT blocks conditioned by time and class, a linear map back to pixels: arXiv:2212.09748."""

    def __init__(
        self,
        size: int = 32,
        patch: int = 4,
        features: int = 192,
        depth: int = 6,
        heads: int = 3,
        classes: int = 10,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.patch_embed = Patches(size, patch, features, channels)
        self.side = self.patch_embed.side
        self.register_buffer("positions", grid_positions(self.side, features), persistent=False)
        self.time = TimeEmbedding(features)
        self.label = nn.Embedding(classes + 1, features)
        self.blocks = nn.ModuleList(dit_block(features, heads) for _ in range(depth))
        self.output = AdaLayerNormOutput(features, features, patch * patch * channels)
        nn.init.normal_(self.label.weight, std=0.02)
        for layer in (self.time.mlp[0], self.time.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and "adaLN" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.patch_embed(x) + self.positions
        condition = self.time(t) + self.label(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        pixels = self.output(tokens, condition).unflatten(1, (self.side, self.side))
        pixels = pixels.unflatten(-1, (self.patch, self.patch, self.channels))
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def grid_positions(side: int, features: int) -> Tensor:
    """Gives each place of a grid cosines and sines of its row and column: a quarter of `features`, a multiple of 4, of each."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(features // 4) / (features // 4))
    waves = torch.arange(side)[:, None] * frequency
    line = torch.cat([waves.sin(), waves.cos()], dim=-1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=-1)


def dit_small(classes: int = 10) -> nn.Module:
    """Makes a small DiT for 32x32 images: patches of 4, 192 features, 6 blocks, 3 heads."""
    return DiT(classes=classes)


NORMS = {"ln": LayerNorm, "rms": RMSNorm, "scale": ScaleNorm}


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between; ``self[2]`` is the second, whose gradient theory speaks of."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__(_start(nn.Linear(features, hidden)), nn.ReLU(), _start(nn.Linear(hidden, features)))


class Encoder(nn.Module):
    """Embedding and positions, layers of attention and feed-forward, and logits (N, L, vocabulary) for tokens (N, L).

    Where the last branch ends with a norm, as in ``"post"`` and ``"deep"``, that is the last; else one more norm stands before
    the head. Weights are Xavier-uniform, with DeepNorm's factor where it is placed so, and biases 0; tokens and places are
    embedded with unit variance, and their sum is divided by sqrt(2), so that what enters the first layer has unit variance too.
    `placement` is one of :func:`~normkit.residual.places`, `norm` ``"ln"``, ``"rms"`` or ``"scale"``; `fix` makes FixNorm both
    the embedding and the head, tied; `causal` lets a place see itself and those before it alone
    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Xiong et al. 2020, https://arxiv.org/abs/2002.04745).
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
