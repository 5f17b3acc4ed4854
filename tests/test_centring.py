"""Layer normalizations become RMS normalizations where what they read can lose its mean in the layers that write it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk

TOKENS = torch.arange(12).view(2, 6)


class Transformer(nn.Module):
    """Embeddings, positions and a class token, two blocks that normalize first, and a head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(12, 8), nn.Parameter(torch.randn(1, 7, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("waves", torch.randn(9, 8), persistent=False)
        blocks = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(8, bias=bias)
        self.head = nn.Linear(8, 4)

    def embed(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(tokens.shape[0], -1, -1), 3 * self.words(tokens)], 1)
        return x + self.positions + self.waves[: x.shape[1]]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Images(nn.Module):
    """Patches by a convolution, moved to the last axis, and summed up in place."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(4, 8, 2, 2, groups=groups), nn.LayerNorm(8)
        self.mix, self.last, self.head = nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x += self.mix(self.norm(x))
        return self.head(self.last(x / 2))


class Scaled(Transformer):
    """A gain per feature between a layer and the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) * self.scale


class Squashed(Transformer):
    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens).tanh()


class Shown(Transformer):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.embed(tokens)
        return x, super().forward(tokens)


class Peeking(Transformer):
    """Another layer reads the stream."""

    def embed(self, tokens: Tensor) -> Tensor:
        x = super().embed(tokens)
        return torch.cat([x[:, :1] + self.head(x[:, 1:2]).mean(-1, keepdim=True), x[:, 1:]], 1)


class TiedHead(Transformer):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight


class PostNorm(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(8, 2, 16, 0.0, batch_first=True)


IMAGES = torch.randn(2, 4, 6, 6)
# What reads it, which norms become RMS normalizations, and why the others don't.
CASES = {
    "transformer": (Transformer, TOKENS, 5, ""),
    "a bias that stays": (lambda: Transformer(bias=True), TOKENS, 5, ""),
    "images": (Images, IMAGES, 2, ""),
    "grouped": (lambda: Images(2), IMAGES, 0, "written by another operation (convolution)"),
    "a gain": (Scaled, TOKENS, 0, "written by another operation (mul)"),
    "a function": (Squashed, TOKENS, 0, "written by another operation (tanh)"),
    "an output": (Shown, TOKENS, 0, "is an output of the model"),
    "another reader": (Peeking, TOKENS, 0, "another operation"),
    "a tied head": (TiedHead, TOKENS, 0, "read by another operation (mm)"),
    "a norm": (PostNorm, torch.randn(2, 3, 8), 0, "a writer that is no linear layer"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_layer_norms_become_rms_norms_where_their_stream_can_be_centred(case: str, dtype: torch.dtype) -> None:
    make, x, count, reason = CASES[case]
    model = make().to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = x.to(dtype) if x.is_floating_point() else x
    wanted, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    changes = nk.fold(model, x, centring=True)
    made = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    assert len(made) == count == sum("centring" in row.note for row in changes)
    if reason:
        assert any(reason in left.reason for left in changes.passed_over)
    # The promise of every fold; float64 rounds 1e9 times finer.
    assert all((row.error or 0.0) < (1e-5 if dtype == torch.float32 else 1e-13) for row in changes)
    other = x.roll(1, 1) if x.dim() == 2 else x.flip(0)
    given = model(other)
    changes.undo()
    assert_close(model(other), given, rtol=1e-4, atol=1e-4)  # float32 through two blocks, not on the example
    assert_close(model(x), wanted, rtol=0, atol=0)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_centring_needs_an_example() -> None:
    with pytest.raises(nk.errors.OptionError, match=r"centring=True.*give example="):
        nk.fold(Transformer().eval(), centring=True)
