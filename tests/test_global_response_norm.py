"""Global response normalization: identity at the start, layouts, masks, foreign checkpoints."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from normkit.activations.global_response_norm import GlobalResponseNorm


def _random(**options: object) -> GlobalResponseNorm:
    norm = GlobalResponseNorm(6, **options).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("layout", ["n * c", "n c *"])
def test_starts_as_the_identity(layout: str) -> None:
    x = torch.randn(2, 6, 5, 6)
    assert torch.equal(GlobalResponseNorm(6, layout=layout)(x), x)


@pytest.mark.parametrize("keys", [("weight", "bias"), ("gamma", "beta")])
@pytest.mark.parametrize("shape", [(6,), (1, 1, 1, 6), (1, 6, 1, 1)])
def test_foreign_checkpoints_load(keys: tuple[str, str], shape: tuple[int, ...]) -> None:
    wanted = _random().state_dict()
    block = nn.Sequential(GlobalResponseNorm(6)).double()
    foreign = {f"0.{key}": value.view(shape) for key, value in zip(keys, wanted.values(), strict=True)}
    kept = dict(foreign)
    block.load_state_dict(foreign)
    assert_close(block[0].state_dict(), wanted)
    assert foreign == kept  # the caller's dictionary is as it was
    with pytest.raises(RuntimeError, match="size mismatch"):
        block.load_state_dict({"0.weight": torch.ones(1, 1, 1, 5), "0.bias": torch.ones(6)})


def test_over_the_batch_is_the_energy_of_all_visible_positions() -> None:
    x, norm = torch.randn(3, 5, 6, dtype=torch.float64), _random(over="n *")
    visible = torch.rand(3, 5, 1) > 0.4
    one = GlobalResponseNorm(6).double()
    one.load_state_dict(norm.state_dict())
    wanted = one(x[visible.squeeze(-1)].unsqueeze(0))  # the visible tokens as one sample, as a sparse tensor holds them
    assert_close(norm(x, mask=visible)[visible.squeeze(-1)], wanted[0])


def test_an_image_of_zeros_is_left_alone() -> None:
    x = torch.zeros(1, 3, 3, 6, dtype=torch.float64, requires_grad=True)
    norm = _random()
    assert_close(norm(x), norm.bias.expand_as(x))
    assert torch.autograd.grad(norm(x).sum(), x)[0].isfinite().all()
