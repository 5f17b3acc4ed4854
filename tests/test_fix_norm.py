"""FixNorm: words of one length, logits that are cosines, and each of the two readings alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from normkit.activations.fix_norm import FixNorm, fix_norm
from normkit.core.errors import ShapeError


@pytest.mark.parametrize("fix_embeddings", [True, False])
@pytest.mark.parametrize("fix_output", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_fix_norm_in_all_its_readings(fix_embeddings: bool, fix_output: bool, bias: bool) -> None:
    words = FixNorm(6, 11, fix_embeddings=fix_embeddings, fix_output=fix_output, bias=bias).double()
    assert (words.gain is None) == (not fix_output)
    with torch.no_grad():
        words.weight.copy_(torch.randn(11, 6))
        if fix_output:
            words.gain.fill_(3.0)
        if bias:
            words.bias.copy_(torch.randn(11))
    h, tokens = torch.randn(2, 5, 6, dtype=torch.float64), torch.randint(11, (2, 5))
    e = F.normalize(words.weight, dim=-1) if fix_embeddings else words.weight
    wanted = (3 * F.normalize(h, dim=-1) if fix_output else h) @ e.T + (words.bias if bias else 0)
    assert_close(words(h), wanted, rtol=1e-12, atol=1e-12)
    assert_close(words.embed(tokens), e[tokens] * 6**0.5, rtol=1e-12, atol=1e-12)


def test_fix_norm_starts_as_published() -> None:
    words = FixNorm(64, 500)
    assert words.weight.abs().max() <= 0.01
    assert words.gain.item() == 8
    assert_close(words.embed(torch.arange(500)).norm(dim=-1), torch.full((500,), 8.0))
    assert words(torch.randn(3, 64)).abs().max() <= 8 + 1e-5
    plain = FixNorm(64, 500, fix_embeddings=False)
    assert_close(plain.weight.std().item(), 1 / 8, rtol=0.05, atol=0)  # of 32,000 draws
    with pytest.raises(ShapeError, match="features=64"):
        words(torch.randn(3, 63))


def test_a_word_of_zeros_and_a_token_of_zeros_are_harmless() -> None:
    weight = torch.zeros(2, 4, requires_grad=True)
    x = torch.zeros(1, 4, requires_grad=True)
    y = fix_norm(x, weight, gain=torch.tensor(2.0))
    assert torch.equal(y, torch.zeros(1, 2))
    y.sum().backward()
    assert weight.grad.isfinite().all()
    assert x.grad.isfinite().all()
