"""A text picture of a support set, drawn from the support only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normkit.core.errors import OptionError
from normkit.core.support import Support, parse_axes, word

# Sizes that make a small picture: three samples, six channels, and so on. A star is two axes where it leads (samples and
# tokens) and one where it follows (positions).
_SIZES = {"n": 3, "c": 6, "d": 6, "o": 4, "i": 5, "g": 1, "b": 1}
_OTHER = 4


def members(support: Support, shape: Sequence[int], element: Sequence[int] | None = None) -> Tensor:
    """Which elements of a tensor share the statistic of one, by default the first: a boolean tensor.

    >>> members(Support("n c", over="c"), (2, 3), (1, 0)).int()
    tensor([[0, 0, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    split = support.split(shape)
    one = torch.zeros(tuple(shape), dtype=torch.bool)
    one[tuple(element) if element is not None else (0,) * one.dim()] = True
    reached = one.view(split.shape)
    for dim in split.dims:
        reached = reached.any(dim, keepdim=True).expand(split.shape)
    return reached.reshape(tuple(shape))


def draw_text(support: Support) -> str:
    """Draw a support set for a terminal: one block per sample, ``■`` shares the statistic of ``◆``.

    >>> print(draw_text(Support("o *", over="*")))
    ◆ ■ ■ ■ ■ ■
    · · · · · ·
    · · · · · ·
    · · · · · ·
    rows: output units; columns: weights of the unit
    """
    shape, labels = small_shape(support)
    if len(shape) < 2:
        raise OptionError(f"a picture shows two axes or more, and {support} has one")
    reached = members(support, shape)
    blocks = reached.view(-1, *reached.shape[-2:])
    lines = []
    for row in range(blocks.shape[1]):
        texts = []
        for number, block in enumerate(blocks):
            cells = ["■" if cell else "·" for cell in block[row].tolist()]
            if number == row == 0:
                cells[0] = "◆"
            texts.append(" ".join(cells))
        lines.append("   ".join(texts))
    blocks_label = f"blocks: {labels[-3]}; " if len(labels) > 2 else ""
    lines.append(f"{blocks_label}rows: {labels[-2]}; columns: {labels[-1]}")
    return "\n".join(lines)


def small_shape(support: Support) -> tuple[list[int], list[str]]:
    """Choose a shape of two or three axes to draw, and label its axes."""
    groups = parse_axes(support.axes)
    given = dict(support.sizes)
    shape, labels = [], []
    for position, group in enumerate(groups):
        if group == ("*",):
            leading = position == 0 and len(groups) == 2
            shape += [2, _OTHER] if leading else [6 if len(groups) == 2 else _OTHER]
            labels += ["samples", "tokens"] if leading else [_star(groups)]
            continue
        size = 1
        for name in group:
            size *= given.get(name, 3 if len(group) > 1 else _SIZES.get(name, _OTHER))
        shape.append(size)
        labels.append(word(list(group)[-1]))
    return shape, labels


def _star(groups: Sequence[tuple[str, ...]]) -> str:
    """Label a star that is not the first axis, according to its neighbours."""
    if len(groups) == 2:
        return {"o": "weights of the unit", "n": "features"}.get(groups[0][0], word("*"))
    return "tokens" if groups[-1] == ("d",) else word("*")
