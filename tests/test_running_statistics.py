"""Statistics that a layer keeps: wide whatever the model is cast to, and never poisoned, in every layer and on every back end."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normkit as nk
from laws import ACTIVATIONS, call, layer, name, runs, sample_input
from normkit import METHODS, Layer, Moments, Rule, Running, Statistic, Support
from normkit.core.card import Card
from normkit.core.errors import BackendError, OptionError, SurgeryError
from normkit.core.memory import RunningMean
from normkit.core.support import Split
from normkit.functional import RunningMoments, run

HALVES = (torch.float16, torch.bfloat16)
KEPT = [card for card in ACTIVATIONS if card.running_state]
each_kept = pytest.mark.parametrize("card", KEPT, ids=name)
each_half = pytest.mark.parametrize("half", HALVES, ids=str)


def class_of(one: object) -> str:
    return type(one).__name__


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.named_buffers() if value.is_floating_point()}


@each_kept
@each_half
def test_a_cast_to_a_half_type_leaves_statistics_wide(card: Card, half: torch.dtype) -> None:
    made, x = card.make(4), sample_input(card, dtype=torch.float32)
    call(card, made, x)
    before = copy.deepcopy(statistics(made))
    for cast in (made.to(half), nn.Sequential(made).to(device="cpu", dtype=half)[0], made.half()):
        assert_close(statistics(cast), before, rtol=0, atol=0)
    assert all(parameter.dtype in HALVES for parameter in made.parameters())
    assert all(value.dtype == torch.float64 for value in statistics(made.double()).values())
    assert all(value.dtype == torch.float32 for value in statistics(made.float()).values())
    # The meta device and back: a deliberate change of memory still takes place.
    assert all(value.is_meta for value in statistics(copy.deepcopy(made).to("meta", half)).values())
    empty = copy.deepcopy(made).to("meta").half().to_empty(device="cpu")
    empty.load_state_dict({key: v.to(half) if v.is_floating_point() else v for key, v in made.state_dict().items()})
    assert_close(statistics(empty), {key: value.to(half).float() for key, value in statistics(made).items()})


@each_kept
@each_half
def test_a_half_layer_remembers_what_a_wide_one_does(card: Card, half: torch.dtype) -> None:
    wide, made = card.make(4), card.make(4).to(half)
    for step in range(4):
        # A standard deviation of 1000 has a variance that float16 can't hold.
        x = (sample_input(card, dtype=torch.float32) * (1000 if half == torch.float16 else 1) + step).to(half)
        call(card, wide, x.float())
        call(card, made, x)
    # The normalizers before a mixture or a second step are rounded to the half type nowhere: only sums in another order differ.
    assert_close(statistics(made), statistics(wide), rtol=1e-5, atol=1e-5)


@each_kept
@each_half
def test_a_half_layer_evaluates_on_every_back_end(card: Card, half: torch.dtype) -> None:
    made, x = layer(card, dtype=torch.float32), sample_input(card, dtype=torch.float32).to(half)
    call(card, made, x.float())
    exact = call(card, copy.deepcopy(made).double().eval(), x.double())
    for _, y in runs(card, made.to(half).eval(), x):
        assert y.dtype == half
        # The parameters and the output are each rounded, some through two steps.
        eps = 16 * torch.finfo(half).eps
        assert_close(y.double(), exact, rtol=eps, atol=eps * exact.abs().max().item())


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    ours = nk.BatchNorm(1, momentum=0.001, dtype=torch.bfloat16)
    for _ in range(2000):
        ours(torch.tensor([[3.0], [5.0]], dtype=torch.bfloat16))
    share = 0.999**2000
    assert_close(ours.running_mean, torch.tensor([4.0 * (1 - share)]), rtol=1e-4, atol=0)
    assert_close(ours.running_var, torch.tensor([share + 2.0 * (1 - share)]), rtol=1e-4, atol=0)


@each_half
def test_checkpoints_of_half_models_load_both_ways(half: torch.dtype) -> None:
    ours, theirs = nk.BatchNorm(3).to(half), nn.BatchNorm1d(3).to(half)
    x = torch.randn(8, 3).to(half)
    theirs(x)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.running_var, theirs.running_var.float(), rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer))
    assert theirs.running_var.dtype == half
    assert_close(theirs.eval()(x), ours.eval()(x), rtol=2 * torch.finfo(half).eps, atol=2 * torch.finfo(half).eps)


@pytest.mark.parametrize("reentrant", [True, False])
@each_kept
def test_passes_that_are_checkpointed_together_are_as_without(card: Card, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        made = layer(card)
        inputs = [(sample_input(card) + k).requires_grad_() for k in range(3)]
        extra = card.extra(inputs[0]) if card.extra else ()
        ys = [checkpoint(made, x, *extra, use_reentrant=reentrant) if checkpointed else made(x, *extra) for x in inputs]
        ys = [y[0] if isinstance(y, tuple) else y for y in ys]
        loss = sum((y * torch.linspace(0, 5, y.numel()).sin().view(y.shape)).sum() for y in ys)
        leaves = [*inputs, *made.parameters()]
        loss.backward()
        found.append((dict(made.state_dict()), [leaf.grad for leaf in leaves]))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_accumulated_passes_count_as_one_batch(momentum: float | None, masked: bool) -> None:
    norm, like = (nk.BatchNorm(3, momentum=momentum, accumulate=k, activation="relu").double() for k in (4, 1))
    for _ in range(2):
        x = torch.randn(9, 3, 5).double() * torch.randn(9, 1, 1) + 7
        mask = torch.rand(x.shape) > 0.3 if masked else None
        sizes = [4, 1, 0, 4]
        parts = zip(x.split(sizes), [None] * 4 if mask is None else mask.split(sizes), strict=True)
        for number, (part, there) in enumerate(parts):
            before = norm.running_mean.clone()
            alone = nk.functional.batch_norm(part, training=True, mask=there).relu()
            own = part.requires_grad_() if number == 3 else part
            y = checkpoint(norm, own, there, use_reentrant=False)
            assert_close(y, alone)
            if number < 3:
                assert torch.equal(norm.running_mean, before)
            else:
                y.sum().backward()  # recomputes
        like(x.detach(), mask)
    assert_close(dict(norm.state_dict()), dict(like.state_dict()))
    assert list(copy.deepcopy(norm).state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    with pytest.raises(OptionError, match="accumulate=0"):
        nk.BatchNorm(3, accumulate=0)
    with pytest.raises(SurgeryError, match="would lose accumulate=4"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nk.BatchNorm(3, accumulate=4))
    norm(torch.randn(9, 3, 5).double())
    norm.reset_running_stats()
    assert norm._waiting == (0, None)
    assert "accumulate=4" in repr(norm)


@pytest.mark.parametrize("memory", [Running(0.1), RunningMoments(0.1), RunningMean(0.1)], ids=class_of)
def test_a_channel_whose_result_does_not_fit_keeps_both(memory: Running) -> None:
    running = nk.functional.RunningStatistics(torch.zeros(3).half(), torch.ones(3).half())
    memory.blend(
        running, torch.tensor([1.0, 2.0, 1e6]), torch.tensor([1e5, 1e6, 1.0])
    )  # 1e5 alone fits, times the momentum
    assert_close(running.mean[0], torch.tensor(0.1).half())
    assert running.mean[2] == 0
    if not isinstance(memory, RunningMean):
        assert_close(running.var[0], torch.tensor(1e4 + 0.9).half(), rtol=1e-3, atol=0)
        assert running.mean[1] == 0
        assert (running.var[1:] == 1).all()


@pytest.mark.parametrize("broken", [[0], [0, 1]], ids=["one channel", "all channels"])
@pytest.mark.parametrize("memory", [Running(None), RunningMoments(None), RunningMean(None)], ids=class_of)
def test_the_cumulative_average_counts_no_skipped_batch(memory: Running, broken: list[int]) -> None:
    running = nk.functional.RunningStatistics(torch.zeros(2), torch.ones(2), torch.tensor(0))
    split = Split((4, 2), ("n", "c"), (0,))
    spoilt = torch.tensor([[5.0, 6.0]])
    spoilt[0, broken] = float("nan")
    for mean in (spoilt, torch.tensor([[1.0, 2.0]]), spoilt, torch.tensor([[3.0, 4.0]])):
        memory.update(running, Moments(mean, torch.ones(1, 2), 4), split)
        memory.update(running, Moments(mean[:0], torch.ones(0, 2), 0), Split((0, 2), ("n", "c"), (0,)))
    assert running.batches is not None
    assert running.batches == 2
    assert_close(running.mean, torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("start", [1e8, 1e25])  # the square of the second is beyond float32
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize("memory", [Running, RunningMoments, RunningMean], ids=lambda memory: memory.__name__)
def test_back_ends_blend_alike_and_exactly(memory: type[Running], momentum: float | None, start: float) -> None:
    centred = memory is RunningMean
    statistic = Statistic("mean", None if centred else "std")
    rule = Rule(Support("n c *", over="n *"), statistic, memory=memory(momentum))
    found = {}
    for backend in ("native", "reference"):
        var = torch.empty(0) if centred else torch.tensor([start])
        found[backend] = nk.functional.RunningStatistics(torch.tensor([start]), var, torch.tensor(0))
        run(rule, torch.tensor([[0.0], [2.0]]), running=found[backend], backend=backend)
    # Each blend rounds three times.
    assert_close(found["native"], found["reference"], rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    if momentum == 0.0:
        assert found["reference"].mean == start
    if momentum in (1.0, None):
        assert found["reference"].mean == 1
        assert centred or found["reference"].var == (1 if memory is RunningMoments else 2)


@pytest.mark.parametrize("card", [card for card in METHODS if card.kind in ("activation", "input")], ids=name)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is:DeprecationWarning")  # torch's, of the call itself
def test_torchscript_is_refused_with_a_way_out(card: Card) -> None:
    with pytest.raises(BackendError, match=r"TorchScript can't compile \w+.*torch.export"):
        torch.jit.script(nn.Sequential(nn.Linear(4, 4), card.make(4)))


MODELESS = [card for card in ACTIVATIONS if card.train_equals_eval and not card.running_state]


@pytest.mark.parametrize("card", MODELESS, ids=name)
def test_layers_alike_in_both_modes_need_no_mode(card: Card) -> None:
    made, x = layer(card), sample_input(card)
    wanted = call(card, made, x)
    for module in made.modules():
        del module.training
    assert_close(call(card, made, x), wanted)
    if isinstance(made, Layer) and card.extra is None:
        assert made.explain(x).backend


@pytest.mark.parametrize(
    "make",
    [
        lambda: nk.BatchNorm(4),
        lambda: nk.BatchNorm(4, momentum=None),
        lambda: nk.GhostBatchNorm(4, 2),
        lambda: nk.BatchRenorm(4),
        lambda: nk.InstanceNorm(4, track_running_stats=True),
    ],
)
def test_vmap_over_tracked_statistics_says_what_to_do(make) -> None:
    norm, x = make(), torch.randn(3, 8, 4, 5)
    with pytest.raises(BackendError, match=r"running statistics.*track_running_stats=False.*eval\(\).*replace_all"):
        torch.vmap(norm)(x)
    with pytest.raises(BackendError, match="running statistics"):
        torch.vmap(torch.func.grad(lambda x: norm(x).square().sum()))(x)
    # Buffers that are mapped too take each their own.
    state = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    many = {key: torch.stack([value, value, value]) for key, value in state.items()}
    torch.vmap(lambda state, x: torch.func.functional_call(norm, state, (x,)))(many, x)
    torch.vmap(norm.eval())(x)
