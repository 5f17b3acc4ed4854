"""Vision transformers: ViT-B/16 for images of 224x224, and smaller ones for 32x32."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.core.errors import OptionError, ShapeError


class Attention(nn.Module):
    """Multi-head self-attention, its queries, keys and values one matrix; `causal`: a token sees no later one.

    softmax(Q K^T / sqrt(d)) V for each head of size d = D / heads, then a linear map. `norm` makes a norm of a head's features,
    which queries, keys and values each get.

    Shape: ``(n, l, D)`` to the same.

    Reference: Vaswani et al. 2017, Attention Is All You Need, https://arxiv.org/abs/1706.03762

    >>> Attention(8, 2)(torch.zeros(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

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
    """Cuts an image into square patches and maps each to a token.

    Shape: ``(n, channels, size, size)`` to ``(n, (size / patch)^2, features)``.
    """

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

    The names of parameters are those of timm, so that its weights load.

    Shape: ``(n, 3, size, size)`` to ``(n, classes)``.

    Raises:
        OptionError: `patch` does not divide `size`, or `heads` does not divide `features`.
        ShapeError: the images have another size.

    Reference:
        Dosovitskiy et al. 2021, An image is worth 16x16 words, https://arxiv.org/abs/2010.11929; Steiner et al. 2021, How
        to train your ViT?, https://arxiv.org/abs/2106.10270
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
