"""The loop nest of a rule: the few loops to which support, shape, strides and compensation reduce.

On a dense tensor, adjacent axes of the same kind (kept or reduced, and alike for the parameters) merge. At most five loops
remain, in the order of memory ``outer x far x kept x mid x inner``: statistics differ along outer and kept, and are computed over
far, mid and inner. Three kinds cover every method and both memory formats: *row* (only the innermost reduced), *column* (the
innermost kept) and *block* (reduced on both sides of a kept axis).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from normkit.core.compensation import Affine
from normkit.core.support import Split, parse_axes


class Loop(NamedTuple):
    """Adjacent axes merged: their size, and the step in a parameter along them (0 where it does not vary)."""

    size: int
    step: int


_ONE = Loop(1, 0)


@dataclass(frozen=True)
class Nest:
    """The five loops, outermost first, and where the parameters of an element are.

    ``outer_place`` is (div, mod, step): along outer the place of a parameter is ``o // div % mod * step``.
    ``statistic_strides`` lay out the statistics, which come in the order of memory, as the split's axes.
    """

    outer: int
    far: Loop
    kept: Loop
    mid: Loop
    inner: Loop
    outer_place: tuple[int, int, int]
    parameters: int
    statistic_strides: tuple[int, ...]

    @property
    def kind(self) -> str:
        """``"row"``, ``"column"`` or ``"block"``."""
        return "row" if self.far.size == 1 else "column" if self.mid.size * self.inner.size == 1 else "block"

    @property
    def statistics(self) -> int:
        """Number of statistics."""
        return self.outer * self.kept.size


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a block of memory without gaps or overlap, with the axes in any order.

    >>> is_dense((2, 3), (1, 2)), is_dense((2, 3), (6, 2))
    (True, False)
    """
    expected = 1
    for stride, size in sorted(pair for pair in zip(strides, shape, strict=True) if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def plan(split: Split, strides: Sequence[int], compensation: Affine | None) -> Nest | str:
    """Find the loop nest of a rule on a tensor.

    >>> split = Split((6, 2, 4, 35), ("n", "g", "c", "*"), (2, 3))
    >>> nest = plan(split, (280, 140, 35, 1), Affine("(g c)"))
    >>> nest.kind, nest.outer, nest.mid, nest.inner, nest.outer_place
    ('row', 12, Loop(size=4, step=1), Loop(size=35, step=0), (1, 2, 4))
    >>> plan(split, (280, 4, 1, 8), Affine("(g c)")).kind
    'block'
    """
    steps, parameters = _steps(split, compensation)
    # Axes of size 1 have no place in memory, whatever their stride says.
    order = sorted((d for d, size in enumerate(split.shape) if size != 1), key=lambda d: -strides[d])
    if not order:
        return "there is one element only"
    levels: list[tuple[bool, list[Loop]]] = []
    for reduced, dims in groupby(order, key=lambda d: d in split.dims):
        runs: list[Loop] = []
        for d in dims:
            size, step = split.shape[d], steps[d]
            # Two axes are one loop if the parameter, too, steps through both as through one.
            if runs and runs[-1].step == size * step:
                runs[-1] = Loop(runs[-1].size * size, step)
            else:
                runs.append(Loop(size, step))
        levels.append((reduced, runs))

    # From the innermost outwards; a level of the wrong kind is left for the next loop, so that each loop may be missing.
    near = _take(levels, reduced=True)
    kept = _take(levels, reduced=False)
    far = _take(levels, reduced=True)
    outer = _take(levels, reduced=False)
    if levels:
        return "kept and reduced axes alternate too often in memory"
    if not far:  # nothing is reduced outside the kept axes: they are the outer loop, and each row stands alone
        kept, outer = [], kept
    if len(near) > 2 or len(far) > 1 or len(kept) > 1 or sum(run.step != 0 for run in outer) > 1:
        return "its parameters vary along axes that are not adjacent in memory"
    mid, inner = [_ONE, _ONE, *near][-2:]
    (one_far,), (one_kept,) = far or [_ONE], kept or [_ONE]
    if inner.step > 1 or mid.step > (inner.step == 0):
        return "its parameters are ordered differently from the input's memory"
    if far and not near and one_kept.step > 1:
        return "its parameters are ordered differently from the input's memory"
    return Nest(
        math.prod(run.size for run in outer),
        one_far,
        one_kept,
        mid,
        inner,
        _outer_place(outer),
        parameters,
        _statistic_strides(split, order),
    )


def _steps(split: Split, compensation: Affine | None) -> tuple[list[int], int]:
    """The step in a contiguous parameter along each axis of the split, and its number of elements."""
    steps, elements = [0] * len(split.shape), 1
    if compensation is not None:
        names = {name for group in parse_axes(compensation.per) for name in group}
        for d in reversed(range(len(split.shape))):
            if split.names[d] in names:
                steps[d] = elements
                elements *= split.shape[d]
    return steps, elements


def _take(levels: list[tuple[bool, list[Loop]]], reduced: bool) -> list[Loop]:
    """Pop the loops of the innermost remaining level, if it is of this kind."""
    return levels.pop()[1] if levels and levels[-1][0] == reduced else []


def _outer_place(outer: list[Loop]) -> tuple[int, int, int]:
    div = 1
    for run in reversed(outer):
        if run.step:
            return div, run.size, run.step
        div *= run.size
    return 1, 1, 0


def _statistic_strides(split: Split, order: list[int]) -> tuple[int, ...]:
    strides, elements = [1] * len(split.shape), 1
    for d in reversed(order):
        if d not in split.dims:
            strides[d] = elements
            elements *= split.shape[d]
    return tuple(strides)
