"""The support set: which elements of a tensor share one statistic, written once in named axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from normkit.core.errors import NotationError, OptionError, ShapeError
from normkit.core.module import whole

# What an axis name means in words, by the literature's letters.
_WORDS = {"n": "samples", "b": "sub-batches", "c": "channels", "g": "groups", "d": "features", "*": "positions"}
_WORDS |= {"o": "output units", "i": "input units", "t": "time steps"}


@dataclass(frozen=True)
class Split:
    """A shape as a support set reads it: composite axes split, reduced axes marked."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    dims: tuple[int, ...]

    count: int = field(init=False, compare=False)
    """Number of elements that share one statistic."""

    statistics_shape: tuple[int, ...] = field(init=False, compare=False)
    """Shape of the statistics, with reduced axes of size 1."""

    def __post_init__(self) -> None:
        # Computed once, as a split is kept for its shape and read at every call.
        sizes = self.shape
        object.__setattr__(self, "count", math.prod([sizes[d] for d in self.dims]))
        object.__setattr__(self, "statistics_shape", tuple(1 if d in self.dims else n for d, n in enumerate(sizes)))


class Support:
    """The set of elements over which a statistic is computed, in einops-like axes.

    ``axes`` names the axes of the tensor in order. ``(g c)`` reads one axis as two, of which the right one varies fastest;
    ``*`` stands for any number of axes, including none. ``over`` names the axes to reduce: elements that differ only there share
    one statistic. A size is needed only where the shape does not determine it.

    Args:
        axes: the axes of the tensor, e.g. ``"n (g c) *"``.
        over: the axes to reduce, e.g. ``"c *"``.
        **sizes: sizes of axes inside parentheses, e.g. ``g=32``.

    Raises:
        NotationError: the text cannot be read, or ``over`` or a size names an unknown axis.

    Reference: The notation follows Rogozhnikov, "Einops" (2022), https://openreview.net/forum?id=oapKSVM2bcj; support
    sets follow Wu and He, "Group Normalization" (2018), https://arxiv.org/abs/1803.08494, section 3.

    >>> groups = Support("n (g c) *", over="c *", g=2)
    >>> groups.split((6, 8, 5, 7)).shape, groups.split((6, 8, 5, 7)).dims
    ((6, 2, 4, 5, 7), (2, 3, 4))
    >>> print(groups.explain((6, 8, 5, 7)))
    n (g c) * over c *: one statistic for each of 6 samples x 2 groups = 12, over 4 channels x 35 positions = 140 elements
    """

    def __init__(self, axes: str, *, over: str, **sizes: int) -> None:
        self.sizes = tuple(sorted((name, whole(size)) for name, size in sizes.items()))
        self.groups = parse_axes(axes)
        self.names = tuple(name for group in self.groups for name in group)
        reduced = parse_axes(over)
        self.reduced = frozenset(name for group in reduced for name in group)
        self.axes, self.over = (" ".join(_text(group) for group in groups) for groups in (self.groups, reduced))
        self._check()
        self._splits: dict[tuple[int, ...], Split] = {}

    def _check(self) -> None:
        known = ", ".join(self.names) or "none"
        for name in self.names:
            if self.names.count(name) > 1:
                raise NotationError(f"{self}: axis {name!r} is named twice; give each axis another name")
        if not self.reduced:
            raise NotationError(f"{self}: over= names no axis to reduce; axes that exist: {known}")
        for name in sorted(self.reduced):
            if name not in self.names:
                raise NotationError(f"{self}: over= names axis {name!r}, which is not there; axes that exist: {known}")
        for name, size in self.sizes:
            if name not in self.names or name == "*":
                raise NotationError(f"{self}: a size is given for axis {name!r}, not there; axes that exist: {known}")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise NotationError(f"{self}: axis {name!r} got size {size!r}; a size is a whole number from 1")

    def __str__(self) -> str:
        sizes = "".join(f", {name}={size}" for name, size in self.sizes)
        return f'Support("{self.axes}", over="{self.over}"{sizes})'

    __repr__ = __str__

    def _key(self) -> tuple[object, ...]:
        return self.groups, self.reduced, self.sizes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Support) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def kept(self) -> tuple[str, ...]:
        """The axes along which statistics differ."""
        return tuple(name for name in self.names if name not in self.reduced)

    def split(self, shape: Sequence[int]) -> Split:
        """Split a shape's composite axes, and find which of the resulting axes are reduced.

        Args:
            shape: the shape of a tensor.

        Returns the shape with composite axes split, the name of each axis, and the positions of the reduced ones.

        Raises:
            ShapeError: the shape has the wrong number of axes, or an axis does not split; the message names the axis.
        """
        key = tuple(shape)
        if torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in key):
            return self._split(key)  # symbolic sizes cannot be keys
        found = self._splits.get(key)
        if found is None:
            found = self._split(key)
            if len(self._splits) >= 256:  # many shapes, as from ragged batches, must not fill memory
                self._splits.clear()
            self._splits[key] = found
        return found

    def _split(self, shape: tuple[int, ...]) -> Split:
        star = len(shape) - sum(group != ("*",) for group in self.groups)
        if star < 0 or (star > 0 and "*" not in self.names):
            wanted = len(self.groups) - ("*" in self.names)
            atleast = "at least " if "*" in self.names else ""
            raise ShapeError(f"{self}: got {len(shape)} axes ({show(shape)}), wanted {atleast}{wanted}: {self.axes}")
        sizes, names, position = [], [], 0
        for group in self.groups:
            if group == ("*",):
                sizes += shape[position : position + star]
                names += ["*"] * star
                position += star
                continue
            sizes += self._factor(group, shape, position)
            names += group
            position += 1
        dims = tuple(d for d, name in enumerate(names) if name in self.reduced)
        return Split(tuple(sizes), tuple(names), dims)

    def _factor(self, group: tuple[str, ...], shape: tuple[int, ...], position: int) -> list[int]:
        given = dict(self.sizes)
        size = shape[position]
        unknown = [name for name in group if name not in given]
        product = math.prod([given[name] for name in group if name in given])
        if len(unknown) > 1:
            raise ShapeError(
                f"{self}: {_axis(group, shape, position)} of size {size} leaves {' and '.join(unknown)} open; "
                "give a size for all but one"
            )
        if not unknown and product != size:
            raise ShapeError(
                f"{self}: {_axis(group, shape, position)} has size {size}, wanted {product} by the sizes given"
            )
        if unknown and size % product:
            said = ", ".join(f"{name}={given[name]}" for name in group if name in given)
            raise ShapeError(
                f"{self}: {_axis(group, shape, position)} of size {size} does not split with {said}; "
                f"the product must divide {size}: {divisors(size)}"
            )
        return [given.get(name, size // product) for name in group]

    def explain(self, shape: Sequence[int] | None = None) -> str:
        """Say in words which elements share a statistic, with numbers where a shape is given.

        Args:
            shape: the shape of a tensor; None omits the numbers.
        """
        if shape is None:
            each = " and ".join(word(name) for name in self.kept) or "the whole tensor"
            over = " and ".join(word(name) for name in self.names if name in self.reduced)
            return f"{self.axes} over {self.over}: one statistic for each of the {each}, over the {over}"
        split = self.split(shape)

        def part(reduced: bool) -> str:
            sizes: dict[str, int] = {}
            for d, name in enumerate(split.names):
                if (name in self.reduced) == reduced:
                    sizes[name] = sizes.get(name, 1) * split.shape[d]
            text = " x ".join(f"{size} {word(name)}" for name, size in sizes.items()) or "1"
            total = math.prod(sizes.values())
            return f"{text} = {total}" if len(sizes) > 1 else text

        elements = " elements" if " = " in part(True) else ""
        return f"{self.axes} over {self.over}: one statistic for each of {part(False)}, over {part(True)}{elements}"


def parse_axes(text: str) -> tuple[tuple[str, ...], ...]:
    """Read axis names, parentheses and at most one star; NotationError points at what is out of place.

    >>> parse_axes("n (g c) *")
    (('n',), ('g', 'c'), ('*',))
    """
    if torch.compiler.is_compiling():
        return _parse(text)
    if text not in _PARSED:
        if len(_PARSED) >= 1024:  # texts are few; a program that generates them must not fill memory
            _PARSED.clear()
        _PARSED[text] = _parse(text)
    return _PARSED[text]


# Texts read before, as a layer reads the same few at every call.
_PARSED: dict[str, tuple[tuple[str, ...], ...]] = {}


def _parse(text: str) -> tuple[tuple[str, ...], ...]:
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for mark in "()*":
        text = text.replace(mark, f" {mark} ")
    for token in text.split():
        if token == "(" and inside is None:
            inside = []
        elif token == ")" and inside:
            groups.append(tuple(inside))
            inside = None
        elif token == "*" and inside is None and ("*",) not in groups:
            groups.append(("*",))
        elif token.isidentifier() and inside is None:
            groups.append((token,))
        elif token.isidentifier() and inside is not None:
            inside.append(token)
        else:
            said = " ".join(text.split())
            raise NotationError(
                f"cannot read {token!r} in {said!r}; wanted axis names, parentheses around names, and at most one * outside them"
            )
    if inside is not None:
        raise NotationError(f"a ( is not closed in {' '.join(text.split())!r}; close it with )")
    return tuple(groups)


def _axis(group: tuple[str, ...], shape: tuple[int, ...], position: int) -> str:
    return f"axis {_text(group)} (number {position} of {show(shape)})"


def _text(group: tuple[str, ...]) -> str:
    return f"({' '.join(group)})" if len(group) > 1 else "".join(group)


def place(parameter: torch.Tensor, per: str, split: Split) -> torch.Tensor:
    """View a parameter with one value per element of the axes ``per`` so that it broadcasts over a split tensor."""
    wanted = per_shape(per, split)
    if tuple(parameter.shape) != wanted:
        raise ShapeError(
            f"a parameter per {per or 'tensor'!r} has shape {show(parameter.shape)}, wanted {show(wanted)} "
            f"to meet an input that splits as {show(split.shape)}"
        )
    names = {name for group in parse_axes(per) for name in group}
    # Axes come in the order of the support, which Rule ensures: so sizes of 1 between them suffice, without a permutation.
    axes = zip(split.names, split.shape, strict=True)
    return parameter.reshape([size if name in names else 1 for name, size in axes])


def per_shape(per: str, split: Split) -> tuple[int, ...]:
    """The shape of a parameter with one value per element of the axes ``per``, where a composite axis is one axis."""
    shape: list[int] = []
    for group in parse_axes(per):
        if group == ("*",):
            shape += [size for name, size in zip(split.names, split.shape, strict=True) if name == "*"]
        else:
            shape.append(math.prod([split.shape[split.names.index(name)] for name in group]))
    return tuple(shape)


def check_shape(who: str, name: str, parameter: torch.Tensor | None, *wanted: int) -> None:
    """Refuse a parameter or statistic of another shape, by ShapeError; None passes."""
    if parameter is not None and tuple(parameter.shape) != wanted:
        raise ShapeError(
            f"{who}: {name} has shape {show(parameter.shape)}, wanted {show(wanted)}; give a tensor of that shape, or make the "
            "layer for other sizes"
        )


def show(shape: Sequence[int]) -> str:
    """Write a shape for a message: 6x8x5x7."""
    return "x".join(str(size) for size in shape) or "scalar"


def divisors(number: int) -> str:
    """List the divisors of a number, for the cure in an error: 1, 2, 4, 8."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0) or "none"


def check_groups(who: str, channels: int, groups: int, where: str = "") -> None:
    """Refuse groups that do not divide the channels: an argument of a layer is wrong, of a call (``where``) the input's shape."""
    if groups < 1 or channels % groups:
        raise (ShapeError if where else OptionError)(
            f"{who}: {channels} channels do not split into num_groups={groups}{where}; "
            f"num_groups must divide {channels}: {divisors(channels)}"
        )


def word(name: str) -> str:
    """Say what an axis holds, in words where its letter is one that the literature uses."""
    return _WORDS.get(name, name)
