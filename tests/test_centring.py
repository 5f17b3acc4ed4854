"""Layer normalizations become RMS normalizations where what they read can lose its mean in the layers that write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk


class Transformer(nn.Module):
    """Words, positions and a class token, changed by something, then blocks that normalize first, and a head."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor] = lambda model, x: x, bias: bool = False) -> None:
        super().__init__()
        self.change, self.words, self.token = change, nn.Embedding(12, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.positions, self.scale = nn.Parameter(torch.randn(1, 7, 8)), nn.Parameter(torch.randn(8))
        self.register_buffer("waves", torch.randn(9, 8), persistent=False)
        blocks = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(8, bias=bias), nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.token.expand(tokens.shape[0], -1, -1), 3 * self.words(tokens)], 1)
        x = first = self.change(self, x + self.positions + self.waves[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0]), first if self.change is shown else x.new_zeros(1)


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


def shown(model: Any, x: Tensor) -> Tensor:
    return x * 1.0


def tied() -> nn.Module:
    model = Transformer()
    model.head.weight = model.words.weight
    return model


def hooked() -> nn.Module:
    model = Transformer()
    model.blocks[0].linear2.register_forward_hook(lambda layer, args, y: None)
    return model


TOKENS, IMAGES = torch.arange(12).view(2, 6), torch.randn(2, 4, 6, 6)
# What is folded, what it reads, how many norms become RMS normalizations, and why the others don't.
CASES = {
    "transformer": (Transformer, TOKENS, 5, ""),
    "a bias that stays": (lambda: Transformer(bias=True), TOKENS, 5, ""),
    "images": (Images, IMAGES, 2, ""),
    "grouped": (lambda: Images(2), IMAGES, 0, "written by another operation (convolution)"),
    "a gain": (lambda: Transformer(lambda model, x: x * model.scale), TOKENS, 0, "written by another operation (mul)"),
    "a function": (lambda: Transformer(lambda model, x: x.tanh()), TOKENS, 0, "written by another operation (tanh)"),
    "a reader": (lambda: Transformer(lambda model, x: x + model.head(x).mean()), TOKENS, 0, "another operation"),
    "an output": (lambda: Transformer(shown), TOKENS, 0, "is an output of the model"),
    "a tied head": (tied, TOKENS, 0, "read by another operation (addmm)"),
    "a hook": (hooked, TOKENS, 0, "has hooks"),
    "a norm": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        torch.randn(2, 3, 8),
        0,
        "no linear layer",
    ),
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
    other = x.roll(1, 1)
    given = model(other)
    changes.undo()
    assert_close(model(other), given, rtol=1e-4, atol=1e-4)  # float32 through two blocks, not on the example
    assert_close(model(x), wanted, rtol=0, atol=0)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_centring_needs_an_example() -> None:
    with pytest.raises(nk.errors.OptionError, match=r"centring=True.*give example="):
        nk.fold(Transformer().eval(), centring=True)
