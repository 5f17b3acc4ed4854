"""Every verb of surgery is undone bit for bit, and an optimizer follows it there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import normkit as nk
from normkit.surgery.changes import Changes
from normkit.weights.weight_norm import weight_norm


def _cnn() -> nn.Module:
    shared = nn.BatchNorm2d(8)
    body = nn.ModuleDict({"a": nn.Conv2d(8, 8, 1), "b": shared})
    return nn.Sequential(nn.Conv2d(3, 8, 3), shared, nn.ReLU(), *body.values(), nn.Flatten(), nn.Linear(128, 4))


def _tokens() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)


CNN, TOKENS = (_cnn, (2, 3, 6, 6)), (_tokens, (2, 5, 8))
VERBS: dict[str, tuple[Any, Callable[..., Changes]]] = {
    "convert": (CNN, lambda model, x, **more: nk.convert(model, "gn:4", example=x, **more)),
    "convert to rms": (TOKENS, lambda model, x, **more: nk.convert(model, "rms", example=x, **more)),
    "convert to none": (CNN, lambda model, x, **more: nk.convert(model, "none", **more)),
    "accelerate": (CNN, lambda model, x, **more: nk.accelerate(model, example=x, **more)),
    "accelerate tokens": (TOKENS, lambda model, x, **more: nk.accelerate(model, **more)),
    "condition": (CNN, lambda model, x, **more: nk.condition(model, where="all", example=x, **more)),
    "condition attention": (TOKENS, lambda model, x, **more: nk.condition(model, where="all", **more)),
    "recipe": (CNN, lambda model, x, **more: nk.apply_recipe(model, "gn:4+wn+sn", x, **more)),
    "drop_redundant_bias": (
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 6, 6)),
        lambda model, x, **more: nk.surgery.drop_redundant_bias(model, x, **more),
    ),
    "fold": ((lambda: nk.condition(_cnn()).model.eval(), (2, 3, 6, 6)), lambda model, x: nk.fold(model, x)),
    "recalibrate": (CNN, lambda model, x: nk.recalibrate(model, [x])),
    "weigh_examples": (CNN, lambda model, x: nk.surgery.weigh_examples(model, 0.1)),
    "data_dependent_init": (
        (lambda: nn.Sequential(weight_norm(nn.Linear(8, 4)), nn.ReLU()), (5, 8)),
        lambda model, x: nk.surgery.data_dependent_init(model, x),
    ),
}
FOLLOWS = [
    verb for verb in VERBS if verb.partition(" ")[0] in ("convert", "condition", "recipe", "drop_redundant_bias")
]


def _all_of(model: nn.Module) -> str:
    """Everything that a module is, but values."""
    return "\n".join(
        f"{name} {type(module)} {key} {value}"
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers")
    )


def _trained(model: nn.Module, x: Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() < 2]},
        ]
    )
    model(x).square().mean().backward()
    optimizer.step()
    return optimizer


def _ids(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_verb_is_undone_bit_for_bit(verb: str, dtype: torch.dtype) -> None:
    (make, shape), act = VERBS[verb]
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    model(x)
    held = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    before, state = _all_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    changes = act(model, x)
    assert changes.rows
    assert changes.undo() is model
    with pytest.raises(nk.errors.SurgeryError, match="undone already"):
        changes.undo()
    assert _all_of(model) == before
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == held
    assert list(model.state_dict()) == list(state)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("verb", FOLLOWS)
def test_an_optimizer_follows_there_and_back(verb: str) -> None:
    (make, shape), act = VERBS[verb]
    model, x = make(), torch.randn(shape)
    optimizer = _trained(model, x)
    groups, state = _ids(optimizer), {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    changes = act(model, x, optimizer=optimizer)
    held = [number for group in _ids(optimizer) for number in group]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in optimizer.state} <= set(held)
    assert set(changes.new_parameters) <= {name for name, _ in model.named_parameters()}
    model(x).square().mean().backward()
    optimizer.step()
    changes.undo()
    assert _ids(optimizer) == groups
    assert {id(p) for p in optimizer.state} == set(state)
    replaced = set(state) - set(held)
    for parameter, kept in optimizer.state.items():
        if id(parameter) in replaced:
            assert_close(dict(kept), state[id(parameter)], rtol=0, atol=0)
    with pytest.raises(nk.errors.SurgeryError, match="holds none of the model's parameters"):
        act(model, x, optimizer=torch.optim.SGD([torch.ones(1)], 0.1))


def test_one_parameter_in_the_place_of_one_keeps_its_state() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nk.LayerNorm(4, over="c *", per=""), nn.Linear(4, 2))
    norm = model[1]
    optimizer = _trained(model, torch.randn(3, 4, 1).squeeze(-1))
    old = optimizer.state[norm.weight]["step"].clone()
    model[0].weight.requires_grad_(False)
    changes = nk.convert(model, "bn", optimizer=optimizer)
    assert set(changes.new_parameters) == {"1.weight", "1.bias"}  # spread over channels: another shape
    assert model[1].weight not in optimizer.state
    assert any(p is model[1].weight for p in optimizer.param_groups[1]["params"])
    assert old == 1


def test_undo_takes_back_what_the_verb_did_and_nothing_else() -> None:
    model, x = _cnn(), torch.randn(2, 3, 6, 6)
    changes = nk.convert(model, "gn:4")
    handle = model[0].register_forward_hook(lambda layer, args, y: y * 2)
    model.eval()
    changes.undo()
    assert isinstance(model[1], nn.BatchNorm2d)
    assert not model[0].training
    assert len(model[0]._forward_hooks) == 1
    handle.remove()
    changes = nk.condition(model, where="first_last")
    nk.fold(model.eval(), x)
    with pytest.raises(nk.errors.SurgeryError, match=r"undo: .* was changed by something else since"):
        changes.undo()


def test_changes_are_not_the_model() -> None:
    changes = nk.accelerate(_cnn())
    with pytest.raises(TypeError, match=r"Changes is not the model: use changes\.model"):
        changes(torch.randn(2, 3, 6, 6))
    assert changes.model(torch.randn(2, 3, 6, 6)).shape[0] == 2


def test_changes_in_a_list_are_short() -> None:
    changes = nk.convert(_cnn(), "gn:4")
    said = str([changes])
    assert (
        said
        == f"[Changes(Sequential: {len(changes)} changed, 0 passed over, {len(changes.new_parameters)} new parameters)]"
    )
    assert "GroupNorm" in str(changes)


def test_models_on_meta_and_compiled_ones() -> None:
    with torch.device("meta"):
        model, tokens = _cnn(), _tokens()
    for verb in ("convert", "accelerate", "condition", "recipe"):
        (_, shape), act = VERBS[verb]
        changes = act(model, torch.empty(shape, device="meta"))
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        changes.undo()
    nk.accelerate(tokens)
    nk.convert(tokens, "rms")
    x = torch.randn(2, 5, 8)
    plain = _tokens().eval()
    compiled = torch.compile(plain, backend="eager")
    before = compiled(x)
    changes = nk.convert(compiled, "rms", example=x)
    assert [row.layer for row in changes] == ["norm1", "norm2"]
    assert_close(compiled(x), plain(x))
    assert (compiled(x) - before).abs().max() > 1e-3
    assert changes.undo() is compiled
    assert_close(compiled(x), before)
