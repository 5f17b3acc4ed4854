"""A picture of a support set for a paper or a slide: a cube of elements with the set in colour.

It is drawn from the support alone, or, for the five pictures of a lecture (``"slides"``), found by differentiating the layer: an
output depends on the elements that share its statistic and on no others, so the non-zeros of its gradient by the input are the
support set. LayerNorm stands among them twice: in a ConvNet it normalizes a sample, in a transformer a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from torch import Tensor, nn

from normkit.activations.batch_norm import BatchNorm
from normkit.activations.group_norm import GroupNorm
from normkit.activations.instance_norm import InstanceNorm
from normkit.activations.layer_norm import LayerNorm
from normkit.catalogue.diagram import members, small_shape
from normkit.catalogue.methods import METHODS, method
from normkit.core.card import Card
from normkit.core.errors import OptionError
from normkit.core.support import Support

_SET, _REST, _EDGE, _MARKED = "#3b6fb6", "#f2f2ef", "#55554f", "#e69f00"
# One step along the depth axis in the picture, in steps along the other two.
_DEPTH = (0.42, 0.34)
_WIDTH, _HEIGHT, _ACROSS = 3.2, 2.7, 4  # size of a picture in inches, and pictures per row


class Cube(NamedTuple):
    """What a picture shows, of two or three axes: depth, rows, columns. The element in question ends the first row."""

    name: str
    title: str
    reached: Tensor
    labels: Sequence[str]


def draw(support: Support, path: Path | str, title: str | None = None) -> Path:
    """Draw which elements share the statistic of one, as a cube (three axes) or a grid (two), to .svg, .png or .pdf.

    The last axis runs to the right, the one before it down, the one before that into depth; for images and weights, positions
    run down and channels to the right. The element in orange shares its statistic with those in blue.
    """
    return _draw(_of_support("", title or f"{support.axes}   over   {support.over}", support), path)


def draw_together(cubes: Sequence[Cube], path: Path | str, across: int = _ACROSS) -> Path:
    """Draw pictures side by side, four per row, to .svg, .png or .pdf."""
    return _save(together(cubes, across), path)


def together(cubes: Sequence[Cube], across: int = _ACROSS, width: float = _WIDTH) -> Figure:
    """Make the figure of pictures side by side, each `width` inches wide."""
    across = min(len(cubes), across)
    down = -(-len(cubes) // across)
    figure = Figure(figsize=(across * width, down * width * _HEIGHT / _WIDTH))
    for place, cube in enumerate(cubes):
        row, column = divmod(place, across)
        left, bottom = (column + 0.04) / across, 1 - (row + 0.96) / down
        axes = figure.add_axes((left, bottom, 0.92 / across, 0.84 / down))
        _cube(axes, cube)
        axes.set_title(cube.title, fontsize=10)
    return figure


def slides() -> list[Cube]:
    """Find the five pictures of the lecture by differentiating layers."""
    return [
        Cube(name, slide.title, reached(slide).permute(slide.order), [slide.labels[axis] for axis in slide.order])
        for name, slide in SLIDES.items()
    ]


def draw_methods(names: Sequence[str], folder: Path, ending: str = "svg", *, together: bool = False) -> Iterator[Path]:
    """Draw the support sets of methods to a folder, one file each or all in one; yield the paths as they are written.

    ``names`` may be ``"slides"`` for the five pictures of a lecture, or empty for all that have a support set.
    """
    if ending not in ("svg", "png", "pdf"):
        raise OptionError(f"pictures are svg, png or pdf, not {ending!r}")
    cubes = [cube for name in names for cube in (slides() if name == "slides" else [_of_card(method(name))])]
    cubes = cubes or [_of_card(card) for card in METHODS if card.rule is not None]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if together:
            yield draw_together(cubes, folder / f"support-sets.{ending}")
            return
        for cube in cubes:
            yield _draw(cube, folder / f"{cube.name}.{ending}")
    except OSError as error:
        raise OptionError(f"can't write to {folder}: {error.strerror}; choose another folder") from None


def _of_card(card: Card) -> Cube:
    if card.rule is None:
        raise OptionError(f"{card.name} has no single support set to draw; normkit show {card.name} says what it does")
    return _of_support(card.name, card.title, card.rule.support)


def _of_support(name: str, title: str, support: Support) -> Cube:
    shape, labels = small_shape(support)
    if len(shape) not in (2, 3):
        raise OptionError(f"a picture shows two or three axes, and {support} has {len(shape)}; write * for some")
    if len(shape) == 3:  # channels to the right and positions down, as such cubes are drawn
        order = (0, 2, 1) if labels[-1] in ("positions", "weights of the unit") else (0, 1, 2)
    else:
        order = (0, 1)
    element = [0] * len(shape)
    element[order[-1]] = shape[order[-1]] - 1  # where all three visible faces meet
    return Cube(name, title, members(support, shape, element).permute(order), [labels[axis] for axis in order])


def _draw(cube: Cube, path: Path | str) -> Path:
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    _cube(figure.add_axes((0.04, 0.04, 0.92, 0.84)), cube)
    figure.suptitle(cube.title, fontsize=10)
    return _save(figure, path)


def _cube(axes: Axes, cube: Cube) -> None:
    deep, names = cube.reached.dim() == 3, cube.labels
    reached = cube.reached if deep else cube.reached[None]
    depth, rows, columns = reached.shape
    marked = (0, 0, columns - 1)

    axes.set_aspect("equal")
    axes.axis("off")

    def corner(d: float, r: float, c: float) -> tuple[float, float]:
        return c + d * _DEPTH[0], -r + d * _DEPTH[1]

    def face(where: tuple[int, int, int], corners: list[tuple[float, float, float]], shade: float) -> None:
        colour = _MARKED if where == marked else _SET if bool(reached[where]) else _REST
        outline = [corner(*point) for point in corners]
        axes.add_patch(Polygon(outline, facecolor=colour, edgecolor=_EDGE, linewidth=0.6))
        if shade:
            axes.add_patch(Polygon(outline, facecolor="black", alpha=shade, linewidth=0))

    for r in range(rows):
        for c in range(columns):
            face((0, r, c), [(0, r, c), (0, r, c + 1), (0, r + 1, c + 1), (0, r + 1, c)], 0.0)
    if deep:
        for d in range(depth):
            for c in range(columns):
                face((d, 0, c), [(d, 0, c), (d, 0, c + 1), (d + 1, 0, c + 1), (d + 1, 0, c)], 0.06)
            for r in range(rows):
                last = columns - 1
                edge = [(d, r, columns), (d + 1, r, columns), (d + 1, r + 1, columns), (d, r + 1, columns)]
                face((d, r, last), [(float(a), float(b), float(e)) for a, b, e in edge], 0.14)
        axes.text(*corner(depth / 2, -0.35, 0), names[0], ha="right", va="bottom", fontsize=8)
    axes.text(columns / 2, -rows - 0.25, names[-1], ha="center", va="top", fontsize=8)
    axes.text(-0.25, -rows / 2, names[-2], ha="right", va="center", rotation=90, fontsize=8)
    axes.set_xlim(-1.2, columns + depth * _DEPTH[0] + 0.2)
    axes.set_ylim(-rows - 1.1, depth * _DEPTH[1] + 0.9)


def _save(figure: Figure, path: Path | str) -> Path:
    # Text stays text, which can be searched, copied and read aloud; and the same picture gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "normkit"}):
        figure.savefig(path, dpi=300, metadata={"Date": None} if str(path).endswith(".svg") else None)
    return Path(path)


_IMAGES, _TOKENS = ("samples", "channels", "positions"), ("samples", "tokens", "features")


@dataclass(frozen=True)
class Slide:
    """A layer in training mode, and the axes of its input in the picture."""

    title: str
    layer: nn.Module
    labels: tuple[str, str, str] = _IMAGES
    order: tuple[int, int, int] = (0, 2, 1)


SLIDES = {
    "slide_batch_norm": Slide("BatchNorm", BatchNorm(6)),
    "slide_layer_norm_convnet": Slide("LayerNorm in a ConvNet", LayerNorm(6, over="c *")),
    "slide_layer_norm_transformer": Slide("LayerNorm in a transformer", LayerNorm(6), _TOKENS, (0, 1, 2)),
    "slide_instance_norm": Slide("InstanceNorm", InstanceNorm(6)),
    "slide_group_norm": Slide("GroupNorm", GroupNorm(2, 6)),
}


def reached(slide: Slide) -> Tensor:
    """Which elements of three samples, six channels and four positions change the first place of the last channel.

    >>> reached(SLIDES["slide_instance_norm"]).sum(2).tolist()
    [[0, 0, 0, 0, 0, 4], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    """
    images = slide.labels == _IMAGES
    x = torch.rand((3, 6, 4) if images else (3, 4, 6), generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = slide.layer(x)[(0, 5, 0) if images else (0, 0, 5)]
    (gradient,) = torch.autograd.grad(output, x)
    return gradient != 0
