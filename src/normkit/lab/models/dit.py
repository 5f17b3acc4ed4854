"""A small diffusion transformer, conditioned by adaLN-Zero."""

import math

import torch
from torch import Tensor, nn

from normkit.activations.adaptive_layer_norm import AdaLayerNormOutput, AdaLayerNormZeroBlock
from normkit.lab.models.vit import Attention, Mlp, Patches


def dit_block(features: int, heads: int) -> AdaLayerNormZeroBlock:
    """Makes a DiT block: attention and MLP, each after layer normalization modulated by a condition, gated from zero.

    Shape: tokens ``(n, l, features)`` and condition ``(n, features)`` to ``(n, l, features)``.
    """
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
    """Patches, fixed positions, DiT blocks conditioned by time and class, and a linear map back to pixels.

    Shape: ``x (n, channels, size, size)``, ``t (n,)`` and ``y (n,)`` class indices, of which one more than `classes` stands for
    none, to x's shape.

    Raises:
        OptionError: `patch` does not divide `size`, or `heads` does not divide `features`.
        ShapeError: the images have another size.

    Reference: Peebles and Xie 2023, Scalable diffusion models with transformers, https://arxiv.org/abs/2212.09748
    """

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
