"""Surgery is undone bit for bit, an optimizer follows it; what would go wrong silently is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import normkit as nk
from normkit import NormkitError
from normkit.surgery import Changes, drop_redundant_bias, freeze, plain
from normkit.weights import weight_norm


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
FOLLOWS = [verb for verb in VERBS if verb.startswith(("convert", "condition", "recipe", "drop_redundant_bias"))]


def _all_of(model: nn.Module) -> str:
    """Everything that a module is, but values."""
    return "\n".join(
        f"{name} {type(module)} {key} {value}"
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers")
    )


def _trained(model: nn.Module, x: Tensor) -> torch.optim.Optimizer:
    split = [[p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in split])
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
    changes = nk.convert(_cnn(), "gn:4")
    numbers = f"{len(changes)} changed, 0 passed over, {len(changes.new_parameters)} new parameters"
    assert str([changes]) == f"[Changes(Sequential: {numbers})]"
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_waiting_moments_follow_a_move(dtype: torch.dtype) -> None:
    norm, x = nk.BatchNorm(2, accumulate=2, momentum=1.0), torch.randn(8, 2)
    norm(x[:4])
    norm.to(dtype)(x[4:].to(dtype))
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, x.mean(0).to(dtype))  # the first half was summed in float32
    norm(x[:4].to(dtype))
    norm.to("meta")(x[4:].to("meta", dtype))


@pytest.mark.parametrize("how", ["load", "accumulate"])
def test_waiting_moments_do_not_outlive_their_group(how: str) -> None:
    norm = nk.BatchNorm(2, accumulate=2, momentum=1.0)
    norm(torch.full((8, 2), 100.0) + torch.randn(8, 2))
    if how == "load":
        norm.load_state_dict(nk.BatchNorm(2).state_dict())
    else:
        norm.accumulate = 1
        norm(torch.randn(8, 2))
        norm.accumulate = 2
    norm(torch.randn(8, 2))
    norm(torch.randn(8, 2))
    assert norm.running_mean is not None
    assert norm.running_mean.abs().max() < 10


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def wrapped(tmp_path: Path) -> Iterator[nn.Module]:
    """A module that holds one wrapped for several processes, of which there is one."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.LayerNorm(5), nn.RMSNorm(5))
    with one_process(tmp_path):
        yield nn.Sequential(DistributedDataParallel(net))


CHANGE_PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "condition": lambda model: nk.condition(model, where="all"),
    "created": lambda model: nk.convert(model, "ln", source="rms"),
    "dropped": lambda model: nk.convert(model, "none", source="bn"),
    "recipe": lambda model: nk.apply_recipe(model, "keep+wn"),
    "freeze": freeze,
    "bias": lambda model: drop_redundant_bias(model, torch.randn(2, 3, 4, 5)),
}


@pytest.mark.parametrize("change", CHANGE_PARAMETERS.values(), ids=CHANGE_PARAMETERS)
def test_other_parameters_in_a_wrapper_for_processes_are_refused(wrapped: Any, change: Callable[[Any], Any]) -> None:
    state = {key: (id(value), value.requires_grad) for key, value in wrapped.named_parameters()}
    kept = list(wrapped.modules())
    for model in (wrapped, wrapped[0]):
        with pytest.raises(NormkitError, match="before it is wrapped in DistributedDataParallel"):
            change(model)
        assert {key: (id(value), value.requires_grad) for key, value in wrapped.named_parameters()} == state
        assert all(a is b for a, b in zip(wrapped.modules(), kept, strict=True))


def test_a_wrapped_model_may_be_plain_for_a_time(tmp_path: Path) -> None:
    with one_process(tmp_path):
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nk.condition(nn.Linear(4, 2)).model)
        model = nn.Sequential(DistributedDataParallel(net))
        kept = list(model.parameters())
        with plain(model):
            assert "0.module.0.weight" in model.state_dict()
        assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))


def test_the_same_parameters_in_a_wrapper_for_processes_pass(wrapped: Any) -> None:
    x = torch.randn(2, 3, 4, 5)
    assert len(nk.convert(wrapped[0], "sync_bn", source="bn")) == 1
    nk.accelerate(wrapped)
    nk.recalibrate(wrapped, [x])
    freeze(wrapped, affine=False)
    wrapped(x).sum().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())


@pytest.mark.parametrize("to", ["gn:gcd32", "in"])
def test_a_norm_of_one_value_is_refused(to: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))
    model.append(nn.BatchNorm2d(8))
    norm, x = model[4], torch.randn(2, 3, 5, 5)
    with pytest.raises(NormkitError, match=r"^4: .* has one value for each statistic .* constant"):
        nk.convert(model, to, source="bn", example=x)
    changes = nk.convert(model, to, source="bn", example=x, on_refusal="leave")
    assert [row.layer for row in changes] == ["1"]
    assert [left.layer for left in changes.passed_over] == ["4"]
    assert model[4] is norm
    assert len(nk.convert(model, "rms:c", source="bn", example=x)) == 1
    assert len(nk.convert(model, "bn", example=x[:1])) == 2  # in training there may be more
