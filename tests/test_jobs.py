"""What experiments measure, against closed forms: batches and their fit, ranges, gradients, discriminators, covariate shift."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.diagnostics.curvature import smoothness
from normkit.lab.experiments import disparity, gan, why_bn
from normkit.lab.jobs import adversarial, encoders
from normkit.lab.jobs.adversarial import PointDiscriminator, PointGenerator, centres
from normkit.lab.models import small_cnn
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.report import drawing
from normkit.lab.train import images
from normkit.surgery.recipe import apply_recipe
from normkit.weights.power_iteration import power_iteration


def test_a_stream_gives_every_image_once_an_epoch() -> None:
    data = torch.arange(10.0), torch.arange(10)
    stream = images.Stream(data, 5, seed=3)
    seen = [torch.cat([stream(2 * epoch + k)[1] for k in (1, 2)]) for epoch in range(2)]
    assert [order.sort().values.tolist() for order in seen] == [list(range(10))] * 2
    assert seen[0].tolist() != seen[1].tolist()
    assert images.Stream(data, 5, seed=3)(4)[1].tolist() == seen[1][5:].tolist()


def test_fit_is_sgd(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.randn(8, 3), torch.randint(2, (8,))
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    stream = images.Stream(data, 4, seed=0)
    walked = images.fit(ours, stream, 2, 0.5, 0, tmp_path)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.5, momentum=0.9)
    losses = []
    for number in range(1, 5):
        optimizer.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * (number - 1) / 4))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(theirs(stream(number)[0]), stream(number)[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_close(ours.weight, theirs.weight)
    # The tally is in double precision of single-precision losses.
    assert_close([row["loss"] for row in walked.rows], [sum(losses[:2]) / 2, sum(losses[2:]) / 2], atol=1e-6, rtol=0)


def test_what_diverges_says_so_and_other_data_are_refused(tmp_path: Path) -> None:
    data = torch.full((4, 3), 1e20), torch.tensor([0, 1, 0, 1])
    assert images.fit(nn.Linear(3, 2), images.Stream(data, 2, 0), 2, 1e30, 0, tmp_path).status == images.DIVERGED
    size: dict[str, Any] = {"depth": 1, "features": 8, "length": 6, "steps": 6}
    job = encoders.Training("sort", "post", "scale+fix", "sgd 1e30", False, 0, **size)
    assert encoders.train(job, tmp_path / "encoder")["status"] == images.DIVERGED
    with pytest.raises(OptionError, match="mnist"):
        images.load("mnist")


@pytest.mark.parametrize("count", [2, 5, 64])
def test_normalized_values_reach_the_root_of_n_less_one_and_never_pass_it(count: int) -> None:
    alone = torch.zeros(1, count, dtype=torch.float64)
    alone[0, 0] = -3.0
    assert_close(disparity.normalized(alone).abs().max().item(), math.sqrt(count - 1))
    many = torch.randn(500, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) ** 3
    # Rounding alone may pass the bound.
    assert disparity.normalized(many).abs().max() <= math.sqrt(count - 1) * (1 + 1e-12)


def test_ranges_keep_the_bound_in_training_and_break_it_in_evaluation() -> None:
    torch.manual_seed(0)
    model = SmallCNN(nn.BatchNorm2d, channels=1, width=4)
    layers = disparity.ranges(model, torch.randn(16, 1, 8, 8), 4)
    for layer in layers:
        assert max(layer["train"], layer["train strong"]) <= layer["bound"] * (1 + 1e-5)
        assert layer["eval strong"] > layer["eval"]
    assert layers[-1]["bound"] == math.sqrt(4 * 2 * 2 - 1)


def test_responses_are_bounded_by_batches_and_linear_by_running_statistics() -> None:
    found = disparity.responses()
    assert found["input"][-1] > 100
    assert_close(found["running"], [value / math.sqrt(1 + 1e-5) for value in found["input"]])
    assert_close(found["batch"][-1], math.sqrt(7), atol=1e-3, rtol=0)
    # A share alpha of x itself in mean and mean square: (1 - a) x / sqrt(a (1 - a) x^2), the rest being small.
    assert_close(found["weighed"][-1], math.sqrt(0.9 / 0.1), atol=1e-2, rtol=0)
    # r <= 3 and d <= 5.
    assert_close(found["renorm"][-1], 3 * math.sqrt(7) + 5, atol=1e-2, rtol=0)


def test_gradient_norms_of_a_known_network() -> None:
    first, second = torch.eye(2).requires_grad_(), torch.tensor([[3.0, 4.0]], requires_grad=True)
    x = torch.tensor([1.0, 2.0])
    # d/dsecond = first x = (1, 2); d/dfirst = second^T x^T, whose norm is 5 sqrt(5).
    norms = encoders.gradient_norms((second @ (first @ x)).sum(), [first, second])
    assert_close(norms, [5 * math.sqrt(5), math.sqrt(5)])


def test_constraints_do_what_they_say() -> None:
    torch.manual_seed(0)
    critic = PointDiscriminator(8)
    adversarial.constrain(critic, "hard")
    largest = [spectrum[0] for spectrum in adversarial.spectra(adversarial.weights(critic))]
    # Rounding of a division in single precision.
    assert_close(largest, [1.0, 1.0, 1.0], atol=1e-6, rtol=0)
    adversarial.constrain(critic, "clip")
    assert max(parameter.abs().max() for parameter in critic.parameters()) <= adversarial.CLIP
    before = [parameter.clone() for parameter in critic.parameters()]
    adversarial.constrain(critic, "none")
    assert_close(list(critic.parameters()), before, atol=0, rtol=0)


@pytest.mark.parametrize("kind", gan.KINDS)
def test_no_gradient_is_steeper_than_the_product_of_sigmas(kind: str) -> None:
    torch.manual_seed(1)
    critic = PointDiscriminator(16)
    if kind in ("sn", "wn"):
        apply_recipe(critic, f"keep+{kind}")
    adversarial.constrain(critic, kind)
    seen = adversarial.look(PointGenerator(), critic)
    assert 0 < seen["steepest"] <= seen["bound"] * (1 + 1e-5)


def test_iterations_are_counted_from_where_the_vectors_are() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 9)
    u, v = power_iteration(matrix, iterations=500)
    assert (
        adversarial.needed(matrix, u, v)
        == adversarial.needed(matrix, u, v, done=1)
        == adversarial.needed(torch.eye(3))
        == 1
    )
    # Two equal halves of the spectrum, from a vector of the lesser: never.
    stuck = torch.diag(torch.tensor([2.0, 1.0]))
    assert adversarial.needed(stuck, v=torch.tensor([0.0, 1.0]), limit=7) == 7
    assert_close(adversarial.error(stuck, *power_iteration(stuck, v=torch.tensor([0.0, 1.0]))), 0.5)


def test_memory_follows_and_is_restored() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(6, 4), torch.randn(5, 6)]
    memory, other = adversarial.Memory(matrices), adversarial.Memory([torch.randn(6, 4), torch.randn(5, 6)])
    memory.follow(matrices)
    other.load_state_dict(memory.state_dict())
    assert_close(list(memory.vectors), list(other.vectors), atol=0, rtol=0)
    assert all(look["error"] < 0.05 for look in memory.look(matrices)["kept"])


def test_modes_are_counted() -> None:
    points = centres().repeat_interleave(torch.tensor([40, 40, 40, 40, 1, 0, 0, 0]), 0)
    points = torch.cat([points, torch.zeros(39, 2)])
    assert adversarial.coverage(points) == (4, pytest.approx(161 / 200))


def test_noise_is_of_the_samples_and_channels_and_of_training_alone() -> None:
    torch.manual_seed(0)
    noisy = small_cnn.NoisyBatchNorm(3)
    x = torch.randn(400, 3, 2, 2)
    clean = torch.nn.functional.batch_norm(x, None, None, training=True)
    y = noisy(x)
    # Two places of a sample and channel: y = s x + m for both.
    s = (y[..., 0, 0] - y[..., 1, 1]) / (clean[..., 0, 0] - clean[..., 1, 1])
    m = (y - s[..., None, None] * clean).mean(dim=(2, 3))
    assert 1 - 0.02 < s.mean(0).min() <= s.mean(0).max() < small_cnn.DEVIATION + 0.02
    assert m.abs().max() < small_cnn.MEAN + small_cnn.JITTER + 1e-3
    noisy.eval()
    assert_close(noisy(x), noisy.norm(x))


def test_a_layer_without_others_before_it_that_move_does_not_turn() -> None:
    torch.manual_seed(0)
    model = SmallCNN(small_cnn.Shift, channels=1, width=4)
    batch = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    still = why_bn.turns(model, batch, 0.0)
    assert_close(still["turn"], 1.0, atol=1e-5, rtol=0)
    assert still["change"] < 1e-5
    assert why_bn.turns(model, batch, 1.0)["turn"] < 1 - 1e-4


def test_looking_changes_nothing() -> None:
    torch.manual_seed(0)
    model, critic = SmallCNN(small_cnn.MAKERS["noisy"], channels=1, width=4), PointDiscriminator(8)
    apply_recipe(critic, "keep+sn")
    states = [{name: value.clone() for name, value in part.state_dict().items()} for part in (model, critic)]
    batch = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    why_bn.turns(model, batch, 0.1)
    smoothness(model, nn.functional.cross_entropy, [batch], 0.1)
    why_bn.moments(model, batch[0])
    adversarial.look(PointGenerator(), critic)
    adversarial.raw_weights(critic)
    assert_close([dict(part.state_dict()) for part in (model, critic)], states, atol=0, rtol=0)
    assert critic.training


def test_moments_that_move_are_counted_in_deviations() -> None:
    one = [(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))]
    other = [(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]))]
    assert why_bn.moved(one, other) == {"mean": 0.25, "deviation": 1.0}


def test_names_at_ends_of_lines_do_not_overlap() -> None:
    axis = Figure(figsize=(3, 3)).subplots()
    axis.plot([0, 1], [0, 1])
    ends = [(0.99, "a", "red"), (1.0, "b", "blue"), (0.98, "c", "green"), (-9.0, "d", "grey")]
    drawing.name_ends(axis, ends, gap=0.1)
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert list(heights) == ["d", "c", "a", "b"]
    assert all(high - low >= 0.1 - 1e-9 for low, high in pairwise(heights.values()))
    assert all(0 <= place <= 1 for place in heights.values())
