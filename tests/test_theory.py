"""What is true of conditioning and of descent, the counterexamples to what is not, and what the demonstrations must show."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from rich.console import Console
from torch import Tensor
from torch.testing import assert_close

from normkit.catalogue import slides
from normkit.catalogue.diagram import members
from normkit.catalogue.drawing import draw_methods
from normkit.catalogue.methods import method
from normkit.diagnostics.conditioning import chi, condition_number
from normkit.lab import folder
from normkit.lab.experiment import Bench, Drawing
from normkit.lab.experiments.demonstrations import depth, input_normalization, learning_rate, three_operations
from normkit.lab.experiments.linear_part import linear_share
from normkit.lab.experiments.theory import hessian, quadratic, van_der_sluis
from normkit.lab.report.drawing import COLOURS, Motion, save
from normkit.weights.weight_conditioning import equilibrate


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


@pytest.mark.parametrize(("slide", "card"), list(zip(slides.SLIDES.values(), CARDS, strict=True)), ids=slides.SLIDES)
def test_differentiation_finds_the_support_set(slide: slides.Slide, card: str) -> None:
    found = slides.reached(slide)
    rule = slide.layer.rule
    images = slide.labels[1] == "channels"
    assert_close(found, members(rule.support, found.shape, (0, 5, 0) if images else (0, 0, 5)))
    assert method(card).title.split()[0] in slide.title


def test_slides_are_drawn_by_name(tmp_path: Path) -> None:
    assert [path.stem for path in draw_methods(["slides"], tmp_path)] == list(slides.SLIDES)
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
