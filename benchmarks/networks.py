"""Networks that the field knows, small enough for a CPU, with a batch each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.lab.models.convolutional import densenet, resnet18


class Network(NamedTuple):
    """A network and its batch; the name says what is small about it."""

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    last: bool = False


class Hidden(nn.Module):
    """A network of transformers, reduced to its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


class Residual(nn.Module):
    """GroupNorm, SiLU and a convolution, twice, as in the U-Nets of diffusion models."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        parts = [(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, outputs, 3, padding=1)) for a in (inputs, outputs)]
        self.parts = nn.Sequential(*(part for group in parts for part in group))
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.parts(x)


class UNet(nn.Module):
    """Three resolutions down and up, with skips."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        c = channels
        self.first, self.out = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 3, 3, padding=1)
        self.down = nn.ModuleList([Residual(c, c), Residual(c, 2 * c)])
        self.middle = Residual(2 * c, 2 * c)
        self.up = nn.ModuleList([Residual(4 * c, c), Residual(2 * c, c)])

    def forward(self, x: Tensor) -> Tensor:
        h, skips = self.first(x), []
        for block in self.down:
            skips.append(block(h))
            h = nn.functional.avg_pool2d(skips[-1], 2)
        h = self.middle(h)
        for block in self.up:
            h = nn.functional.interpolate(h, scale_factor=2.0)
            h = block(torch.cat([h, skips.pop()], 1))
        return self.out(h)


class LayerNormLSTM(nn.Module):
    """The loop over a cell with layer normalization of both products and of the cell state (Ba et al. 2016)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(inputs, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        self.norm_x, self.norm_h, self.norm_c = nn.LayerNorm(4 * hidden), nn.LayerNorm(4 * hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.h.in_features)
        for token in x.unbind(1):
            i, f, g, o = (self.norm_x(self.x(token)) + self.norm_h(self.h(h))).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm_c(c).tanh()
        return h


class Naive(nn.Module):
    """Row equilibration as one writes it first: autograd through the definition."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1))


class Field(nn.Sequential):
    """The trunk of a NeRF, 8 layers of 256; ``condition`` changes each of them, by default as one writes it first."""

    def __init__(self, condition: Callable[[nn.Linear], object] | None = None) -> None:
        widths = [60, *[256] * 8]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        super().__init__(*(part for layer in layers for part in (layer, nn.ReLU())))
        for layer in layers:
            condition(layer) if condition else parametrize.register_parametrization(layer, "weight", Naive())


def _transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        return Hidden(getattr(transformers, f"{kind}Model")(config))

    return make


_SMALL = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
_TOKENS = {**_SMALL, "vocab_size": 512, "use_cache": False}


def _tokens() -> Tensor:
    return torch.randint(512, (4, 128))


NETWORKS = {
    "resnet": Network("ResNet-18, width 0.5, 16 images 32x32", lambda: resnet18(width=0.5), lambda: _images(16, 32)),
    "resnet_last": Network("the same, channels last", lambda: resnet18(width=0.5), lambda: _images(16, 32), last=True),
    "convnext": Network(
        "ConvNeXt, 2 + 2 blocks of 64 and 128, 8 images 64x64",
        _transformers("ConvNext", hidden_sizes=[64, 128], depths=[2, 2], num_stages=2),
        lambda: _images(8, 64),
    ),
    "vit": Network(
        "ViT, 3 x 256, 8 images 64x64",
        _transformers("ViT", **_SMALL, intermediate_size=1024, image_size=64, patch_size=8),
        lambda: _images(8, 64),
    ),
    "llama": Network(
        "Llama, 3 x 256, 4 x 128 tokens", _transformers("Llama", **_TOKENS, intermediate_size=688), _tokens
    ),
    "bert": Network("BERT, 3 x 256, 4 x 128 tokens", _transformers("Bert", **_TOKENS, intermediate_size=1024), _tokens),
    "unet": Network("U-Net, GroupNorm and SiLU, 4 images 32x32", UNet, lambda: _images(4, 32)),
    "lstm": Network(
        "LSTM with LayerNorm, 256, 32 x 12 tokens", lambda: LayerNormLSTM(256, 256), lambda: torch.randn(32, 12, 256)
    ),
    "nerf": Network("NeRF, conditioned weights, 1024 points", Field, lambda: torch.randn(1024, 60)),
    "densenet": Network("DenseNet, width 0.5, 32 images 32x32", lambda: densenet(width=0.5), lambda: _images(32, 32)),
}


def _images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The network and its batch."""
    torch.manual_seed(0)
    _, make, batch, last = NETWORKS[name]
    form = torch.channels_last if last else torch.preserve_format
    return make().to(memory_format=form), batch().to(memory_format=form)  # pyright: ignore[reportCallIssue]
