"""Residual branches: each placement's formula, of one branch and of a stack, and torch's layers in both of their orders."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.activations.layer_norm import LayerNorm
from normkit.residual import Residual, place
from normkit.surgery.place_norms import place_norms


def test_each_placement_is_its_formula() -> None:
    x, f = torch.randn(4, 6, dtype=torch.float64), nn.Linear(6, 6, dtype=torch.float64)
    norm = partial(LayerNorm, 6, dtype=torch.float64)
    n = norm()
    wanted = {"pre": x + f(n(x)), "post": n(x + f(x)), "sandwich": x + n(f(n(x))), "branch": x + n(f(x))}
    for placement, value in wanted.items():
        block = Residual(f, norm, placement)
        assert_close(block(x), value, rtol=1e-12, atol=1e-12)
        assert len([m for m in block.modules() if isinstance(m, LayerNorm)]) == (2 if placement == "sandwich" else 1)
    assert "norm_after" in repr(Residual(f, norm, "sandwich"))
    two = Residual(nn.Bilinear(6, 6, 6, dtype=torch.float64), norm, "pre")
    assert_close(two(x, x), x + two.sublayer(n(x), x), rtol=1e-12, atol=1e-12)  # what follows goes to the sublayer


def test_dropout_is_on_the_branch_in_training_alone() -> None:
    block = Residual(nn.Identity(), nn.Identity, dropout=0.5)
    x = torch.ones(1000)
    y = block(x)
    assert set(y.tolist()) == {1.0, 3.0}
    assert torch.equal(block.eval()(x), 2 * x)


SCHEMES = ("post", "pre", "sandwich", "branch", "deep", "mix", "scaled", "hybrid")


def stack(kind: str, **options: Any) -> Any:
    """Four layers of torch's, with weights that are not all alike."""
    torch.manual_seed(0)
    layer, whole = (
        (nn.TransformerEncoderLayer, partial(nn.TransformerEncoder, enable_nested_tensor=False))
        if kind == "encoder"
        else (nn.TransformerDecoderLayer, nn.TransformerDecoder)
    )
    made = whole(layer(8, 2, 16, dropout=0.0, **{"batch_first": True, **options}), 4).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def _by_hand(made: Any, scheme: str, k: int, x: Tensor, heads: int = 2) -> Tensor:
    """One layer of an encoder, from its parameters and the papers' formulas."""
    layer = made.layers[k]

    def norm(x: Tensor, of: Any) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * of.weight + of.bias

    def attend(x: Tensor) -> Tensor:
        packed = (x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed)
        if scheme == "hybrid":
            own = layer.self_attn
            q, k, v = norm(q, own.q_norm), norm(k, own.k_norm), norm(v, own.v_norm)
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        out = layer.self_attn.out_proj
        return mixed.transpose(1, 2).flatten(2) @ out.weight.T + out.bias

    def feed(x: Tensor) -> Tensor:
        hidden = torch.relu(x @ layer.linear1.weight.T + layer.linear1.bias)
        return hidden @ layer.linear2.weight.T + layer.linear2.bias

    if scheme == "hybrid":
        x = norm(x + attend(x), layer.norm1)
        return x + feed(x)
    for f, own, after in ((attend, layer.norm1, layer.norm1_after), (feed, layer.norm2, layer.norm2_after)):
        if scheme in ("post", "deep") or (scheme == "mix" and k < 1):
            x = norm((8**0.25 if scheme == "deep" else 1) * x + f(x), own)
        elif scheme == "branch":
            x = x + norm(f(x), own)
        elif scheme == "sandwich":
            x = x + norm(f(norm(x, own)), after)
        else:
            x = x + f(norm(x, own) / ((k + 1) ** 0.5 if scheme == "scaled" else 1))
    return x


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_encoder_computes_the_formula_and_goes_back(scheme: str) -> None:
    made, x = stack("encoder"), torch.randn(3, 5, 8, dtype=torch.float64)
    before, first, keys = made(x), made.layers[0], list(made.state_dict())
    optimizer = torch.optim.SGD(made.parameters(), 0.1)
    changes = place_norms(made, scheme, optimizer=optimizer)
    assert len(changes) == 4 + (scheme not in ("post", "deep"))
    assert len(optimizer.param_groups[0]["params"]) == len([*made.parameters()])
    for parameter in changes.new_parameters.values():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    if scheme in ("post", "deep"):
        assert list(made.state_dict()) == keys
    wanted = x
    for k in range(4):
        wanted = _by_hand(made, scheme, k, wanted)
    wanted = wanted if made.norm is None else made.norm(wanted)
    assert_close(made(x), wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert_close(made.eval()(x), wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        made.train()
    changes.undo()
    assert made.layers[0] is first
    assert_close(made(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_pre_and_post_are_torchs_with_masks(kind: str, norm_first: bool, batch_first: bool) -> None:
    made, theirs = (stack(kind, norm_first=first, batch_first=batch_first) for first in (not norm_first, norm_first))
    theirs.norm = LayerNorm(8, dtype=torch.float64) if norm_first else None
    place_norms(made, "pre" if norm_first else "post")
    theirs.load_state_dict(made.state_dict())
    x = torch.randn((3, 5, 8) if batch_first else (5, 3, 8), dtype=torch.float64)
    mask, padding = torch.ones(5, 5, dtype=torch.bool).triu(1), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    if kind == "encoder":
        found, wanted = (one(x, mask=mask, src_key_padding_mask=padding) for one in (made, theirs))
    else:
        memory, floats = torch.randn(x.shape, dtype=torch.float64), padding.double() * -1e9
        masks = {"tgt_mask": mask.double() * -1e9, "tgt_key_padding_mask": floats}
        found, wanted = (one(x, memory, **masks) for one in (made, theirs))
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_hybrid_attention_takes_the_masks_of_torch() -> None:
    made, x = stack("encoder"), torch.randn(3, 5, 8, dtype=torch.float64)
    place_norms(made, "hybrid")
    mask, padding = torch.ones(5, 5, dtype=torch.bool).triu(1), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    y = made(x, mask=mask, src_key_padding_mask=padding)
    for n, length in enumerate((5, 3, 4)):
        for last in range(1, length + 1):  # each place sees itself and those before it, and no padding
            causal = made(x[n : n + 1, :last], mask=mask[:last, :last])
            assert_close(y[n, last - 1], causal[0, -1], rtol=1e-12, atol=1e-12)
    one = made.layers[0]
    assert_close(one(x[0]), one(x)[0], rtol=1e-12, atol=1e-12)
    many = torch.zeros(6, 5, 5, dtype=torch.float64).masked_fill(mask, -torch.inf)
    assert_close(one(x, src_mask=many), one(x, src_mask=mask), rtol=1e-12, atol=1e-12)


def twice() -> Any:
    """Its first layer stands at the third place again."""
    made = stack("encoder")
    made.layers[2] = made.layers[0]
    return made


def test_a_layer_that_standstwice_is_placed_once() -> None:
    made, before = twice(), {key: value.clone() for key, value in twice().state_dict().items()}
    made.load_state_dict(before)
    changes = place_norms(made, "deep")
    assert made.layers[0] is made.layers[2]
    assert [row.layer for row in changes] == ["layers.0", "layers.1", "layers.3"]
    start = place("deep", depth=4).start
    for k in range(4):
        key = f"layers.{k}.linear1.weight"
        assert_close(made.state_dict()[key], before[key] * start)
    changes.undo()
    assert_close(made.state_dict(), before, rtol=0, atol=0)


def test_deep_norms_constants_and_initial_weights() -> None:
    pair = nn.Transformer(8, 2, 3, 2, 16, batch_first=True)
    before = {key: value.clone() for key, value in pair.state_dict().items()}
    changes = place_norms(pair, "deep")
    root = (3**4 * 2) ** (1 / 16)
    for stack, skip, start in ((pair.encoder, 0.81 * root, 0.87 / root), (pair.decoder, 6**0.25, 24**-0.25)):
        places: Any = stack.layers[0].places
        assert [p.skip for p in places] == pytest.approx([skip] * len(places))
        name = "encoder" if stack is pair.encoder else "decoder"
        for key, value in stack.layers[1].state_dict().items():
            old = before[f"{name}.layers.1.{key}"]
            if key.endswith("in_proj_weight"):
                assert_close(value[:16], old[:16], rtol=0, atol=0)
                value, old, key = value[16:], old[16:], "out_proj.weight"
            scaled = key.endswith("weight") and "norm" not in key
            assert_close(value, old * start if scaled else old)
    assert place("deep", depth=6).start == pytest.approx(48**-0.25)
    changes.undo()
    assert_close(pair.state_dict(), before, rtol=0, atol=0)
