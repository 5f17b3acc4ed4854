"""What experiments measure, what is true of conditioning and of descent, and the counterexamples to what is not."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from rich.console import Console
from torch import Tensor, nn
from torch.testing import assert_close

from normkit.catalogue.diagram import members
from normkit.catalogue.drawing import SLIDES, Slide, draw_methods, reached
from normkit.catalogue.methods import method
from normkit.core.errors import OptionError
from normkit.diagnostics.conditioning import chi, condition_number
from normkit.diagnostics.curvature import smoothness
from normkit.lab import folder
from normkit.lab.experiment import Bench, Drawing
from normkit.lab.experiments import disparity, gan, why_bn
from normkit.lab.experiments.demonstrations import depth, input_normalization, learning_rate, three_operations
from normkit.lab.experiments.linear_part import linear_share
from normkit.lab.experiments.theory import hessian, quadratic, van_der_sluis
from normkit.lab.jobs import adversarial, encoders
from normkit.lab.jobs.adversarial import PointDiscriminator, PointGenerator, centres
from normkit.lab.models import small_cnn
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.report import drawing
from normkit.lab.report.drawing import COLOURS, Motion, save
from normkit.lab.train import images
from normkit.surgery.recipe import apply_recipe
from normkit.weights.spectral_norm import power_iteration
from normkit.weights.weight_conditioning import equilibrate


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
    counts = (
        adversarial.needed(matrix, u, v),
        adversarial.needed(matrix, u, v, done=1),
        adversarial.needed(torch.eye(3)),
    )
    assert counts == (1, 1, 1)
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


def bench(output: Path) -> Bench:
    return Bench("tiny", output, seeds=(0,), console=Console(quiet=True))


@st.composite
def matrices(draw: st.DrawFn, fewest: int = 1, most: int = 6) -> tuple[Tensor, Tensor]:
    m, n = draw(st.integers(fewest, most)), draw(st.integers(2, 6))
    made = torch.Generator().manual_seed(draw(st.integers(0, 99999)))
    a = torch.randn(m, n, generator=made, dtype=torch.float64)
    return a, (2 * torch.randn(m, 1, generator=made, dtype=torch.float64)).exp()


@settings(max_examples=100)
@given(matrices())
def test_unit_rows_minimize_chi_and_are_within_the_root_of_m_of_any_scaling(drawn) -> None:
    a, d = drawn
    # Singular values are good to 1e-16 of the largest, and kappa stays below 1e8.
    assert chi(equilibrate(a)) <= min(chi(a), chi(d * a)) * (1 + 1e-6)
    assert condition_number(equilibrate(a)) <= math.sqrt(len(a)) * condition_number(d * a) * (1 + 1e-6)


@settings(max_examples=100)
@given(matrices(2, 2))
def test_unit_rows_are_the_best_scaling_of_two(drawn) -> None:
    a, d = drawn
    found = condition_number(equilibrate(a))
    c = torch.cosine_similarity(a[0], a[1], dim=0).abs().item()
    assert math.isclose(found, math.sqrt((1 + c) / (1 - c)), rel_tol=1e-6)
    assert found <= condition_number(d * a) * (1 + 1e-6)


def test_the_counterexample_has_the_printed_digits(tmp_path: Path) -> None:
    example = van_der_sluis.run(bench(tmp_path))["example"]
    assert [f"{example[name][0]:.3f}" for name in ("A", "EA")] == ["5.458", "6.136"]
    assert example["DA"][0] < example["A"][0]


@settings(max_examples=10, deadline=None)
@given(matrices(2, 3))
def test_the_best_scaling_beats_every_other(drawn) -> None:
    a, d = drawn
    least, found = van_der_sluis.best_scaling(a)
    assert math.isclose(least, condition_number(found[:, None] * a), rel_tol=1e-9)
    # L-BFGS stops where log kappa has a kink; what it starts from it never leaves for worse.
    assert least <= min(condition_number(a), condition_number(equilibrate(a))) * (1 + 1e-9)
    assert least <= condition_number(d * a) * (1 + 1e-2)


def test_a_linear_layer_is_the_exact_opposite_of_the_theorem() -> None:
    found = hessian.readings(*hessian.example())
    assert f"{found['before']:.2f}" == "1.84"
    assert f"{found['before'] * found['constant']:.1f}" == "105.6"
    assert_close(found["constant"], 746 / 13)


@pytest.mark.parametrize("name", ["none", "E, unit rows", "Jacobi", "general", "inverse"])
def test_preconditioned_descent_has_the_rate_of_the_eigenvalues(name: str) -> None:
    a, b = quadratic.problem(1)
    p = quadratic.preconditioners(a, 1)[name]
    low, high = (value.item() for value in quadratic.eigenvalues(a, p)[[0, -1]])
    assert_close(torch.linalg.eigvals(p @ a).real.sort().values, quadratic.eigenvalues(a, p))
    rate = (high - low) / (high + low)
    # Not to the end, where rounding of the solution counts; the slowest of "none" is all that counts from the start.
    found = quadratic.contraction(a, b, p, 2 / (high + low), 20_000)
    assert_close(found, rate, atol=1e-4, rtol=0)


def test_descent_converges_below_two_over_lambda(tmp_path: Path) -> None:
    rows = learning_rate.run(bench(tmp_path))["rows"]
    stable = {row["rate"]: row["converges"] for row in rows if tuple(row["curvatures"]) == (1.0, 25.0)}
    assert stable == {0.02: True, 0.075: True, 0.079: True, 0.081: False}
    assert max(row["error"] for row in rows) < 1e-9  # of 400 products


def test_the_largest_stable_rate_of_every_stage(tmp_path: Path) -> None:
    rows = input_normalization.run(bench(tmp_path))["stages"]
    assert [row["stage"] for row in rows] == list(input_normalization.STAGES)
    for row in rows:
        assert_close(row["stable"], row["predicted"], rtol=0.01, atol=0)
    assert_close(rows[-1]["condition"], 1.0)
    assert rows[-1]["steps"] == 1 < rows[0]["steps"]


@pytest.mark.parametrize("norm", depth.NORMS)
def test_scale_through_depth(norm: str) -> None:
    for scale in (0.5, 2.0):
        torch.manual_seed(0)
        x = torch.randn(256, 256)
        found = depth.slope(depth.scales(depth.network(norm, "ReLU", scale, x, 30), x)["activations"])
        if norm in ("none", "input alone"):
            assert abs(found / math.log(scale) - 1) < 0.05
        else:
            assert abs(found) < 0.02


def test_statistics_held_constant_let_parameters_drift() -> None:
    through, detached = (torch.tensor(depth.drift(held), dtype=torch.float64) for held in (False, True))
    assert_close(through[:, :2], through[:1, :2].expand(len(through), -1))
    assert (detached[:, :2].diff(dim=0) > 0).all()
    assert_close(detached[:, 2], torch.ones(len(detached), dtype=torch.float64))


def test_compensation_restores_the_input(tmp_path: Path) -> None:
    found = three_operations.run(bench(tmp_path))
    assert found["error"] < 1e-12
    plain = torch.tensor(found["stages"][2])
    assert_close(plain.mean((0, 2)), torch.zeros(2), atol=1e-6, rtol=0)


CARDS = ("batch_norm", "layer_norm", "layer_norm", "instance_norm", "group_norm")


@pytest.mark.parametrize(("slide", "card"), list(zip(SLIDES.values(), CARDS, strict=True)), ids=SLIDES)
def test_differentiation_finds_the_support_set(slide: Slide, card: str) -> None:
    found = reached(slide)
    rule = slide.layer.rule
    images = slide.labels[1] == "channels"
    assert_close(found, members(rule.support, found.shape, (0, 5, 0) if images else (0, 0, 5)))
    assert method(card).title.split()[0] in slide.title


def test_slides_are_drawn_by_name(tmp_path: Path) -> None:
    assert [path.stem for path in draw_methods(["slides"], tmp_path)] == list(SLIDES)
    assert list(draw_methods(["slides"], tmp_path, together=True)) == [tmp_path / "support-sets.svg"]


def test_what_moves_is_written_as_gif_and_known_as_ours(tmp_path: Path) -> None:
    def make() -> Motion:
        figure = Figure()
        axis = figure.subplots()
        line = axis.plot([0, 1], [0, 1])[0]
        for place, colour in enumerate(COLOURS[:4]):  # few pixels each, beside many greys of text and axes
            axis.plot(place / 4, 0.9, "s", color=colour)
        return Motion(figure, 3, lambda number: line.set_ydata([0, number]))

    written = save([Drawing("line", make, "A line.", moves=True)], tmp_path / "figures", 40)
    assert sorted(path.name for path in written) == ["line.gif", "line.png", "line.svg"]
    with Image.open(tmp_path / "figures" / "line.gif") as image:
        assert image.n_frames == 3
        painted = image.convert("RGB").getcolors(1 << 20) or []
    for wanted in map(ImageColor.getrgb, COLOURS[:4]):
        assert min(math.dist(wanted, colour) for _, colour in painted) < 10  # of 441 between black and white
    folder.empty(tmp_path)
    assert not (tmp_path / "figures").exists()


def test_a_norm_leaves_a_linear_function_linear() -> None:
    x = torch.randn(64, 5)
    y = torch.nn.functional.batch_norm(x @ torch.randn(5, 3), None, None, training=True)
    assert_close(linear_share(x, y), 1.0, atol=1e-6, rtol=0)
    assert linear_share(x, x.square()) < 0.9
