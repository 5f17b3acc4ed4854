"""The notation: what it reads, how it splits, what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit.core.errors import NotationError, ShapeError
from normkit.core.support import Support, parse_axes, per_shape, place


@pytest.mark.parametrize(
    ("axes", "over", "sizes", "word"),
    [
        ("n c *", "d", {}, "'d'"), ("n c *", "", {}, "no axis to reduce"), ("n n *", "n", {}, "twice"),
        ("n (g c", "c", {}, "not closed"), ("n ) c", "c", {}, r"'\)'"), ("n ((g c)) *", "c", {}, r"'\('"),
        ("n * c *", "c", {}, r"'\*'"), ("n (g *)", "g", {}, r"'\*'"), ("n ()", "n", {}, r"'\)'"),
        ("n c-d", "n", {}, "'c-d'"), ("n c *", "c", {"g": 2}, "'g'"), ("n (g c) *", "c", {"g": 0}, "0"),
        ("n (g c) *", "c", {"g": 2.0}, "2.0"), ("n (g c) *", "c", {"g": True}, "True"),
    ],
)  # fmt: skip
def test_unreadable_notation_is_refused_by_name(axes: str, over: str, sizes: dict[str, int], word: str) -> None:
    with pytest.raises(NotationError, match=word):
        Support(axes, over=over, **sizes)


@pytest.mark.parametrize(
    ("support", "shape", "word"),
    [
        (Support("n c *", over="c"), (3,), "1 axes"),
        (Support("n c", over="c"), (3, 4, 5), "3 axes"),
        (Support("n (g c) *", over="c *", g=3), (6, 8, 5, 7), r"axis \(g c\) .* 6x8x5x7.*g=3.*1, 2, 4, 8"),
        (Support("n (g c) *", over="c *"), (6, 8), "leaves g and c open"),
        (Support("n (g c) *", over="c *", g=2, c=3), (6, 8), "has size 8, wanted 6"),
        (Support("n c *", over="c", c=4), (6, 8), "has size 8, wanted 4"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_axis(support: Support, shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(ShapeError, match=word):
        support.split(shape)


FEW, STARS = st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3)


@given(groups=FEW, size=FEW, batch=st.integers(0, 3), stars=STARS)
def test_split_keeps_elements_and_order(groups: int, size: int, batch: int, stars: list[int]) -> None:
    shape = (batch, groups * size, *stars)
    split = Support("n (g c) *", over="c *", g=groups).split(shape)
    assert (split.shape, split.names) == ((batch, groups, size, *stars), ("n", "g", "c", *["*"] * len(stars)))
    assert split.dims == (2, *range(3, 3 + len(stars)))
    assert split.statistics_shape == (batch, groups, 1, *[1] * len(stars))
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    assert torch.equal(x.view(split.shape).reshape(shape), x)


def test_many_shapes_do_not_fill_memory() -> None:
    support = Support("n c", over="c")
    for n in range(1000):
        support.split((n, 2))
    assert len(support._splits) <= 256


def test_notation_is_compared_and_explained() -> None:
    assert Support("n  c *", over="* n") == Support("n c *", over="n *")
    assert len({Support("n c", over="c"), Support("n c", over="c"), Support("n c", over="n")}) == 2
    assert parse_axes("batch (heads width)") == (("batch",), ("heads", "width"))  # names may be words
    text = Support("batch (heads width)", over="width", heads=2).explain((3, 8))
    assert text.endswith("one statistic for each of 3 batch x 2 heads = 6, over 4 width")
    assert "for each of the channels, over the samples and positions" in Support("n c *", over="n *").explain()
    assert "the whole tensor" in Support("n c", over="n c").explain()


def test_parameters_are_placed_by_name() -> None:
    split = Support("n (g c) *", over="c *", g=2).split((3, 6, 4))
    assert per_shape("(g c)", split) == (6,)
    assert per_shape("", split) == ()
    assert per_shape("n (g c) *", split) == (3, 6, 4)
    assert place(torch.zeros(6), "(g c)", split).shape == (1, 2, 3, 1)
    assert place(torch.zeros(()), "", split).shape == (1, 1, 1, 1)
    with pytest.raises(ShapeError, match=r"per '\(g c\)' has shape 5, wanted 6"):
        place(torch.zeros(5), "(g c)", split)
