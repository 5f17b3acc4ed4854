"""The base of data normalizations: statistics of the training data, streamed or all at once, kept as buffers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from normkit.core.errors import OptionError, ProtocolError, ShapeError
from normkit.core.module import Module
from normkit.core.moments import Moments, accumulation_dtype, moments
from normkit.core.support import Split, Support, per_shape, place, show

PER_FEATURE = Support("n *", over="n")

# Larger batches are measured in pieces of this many elements, as a float64 copy of the whole may not fit into memory.
_PIECE = 2**24

_MEMBER = {"*": "column", "d": "feature", "c": "channel"}


class Fitted(Module):
    """Base of every normalization that measures data before it transforms any: ``fit``, ``partial_fit``, ``transform``.

    A subclass names its ``statistics`` and defines ``forward`` and ``inverse_transform``. Statistics are buffers: they move,
    copy, save and load with the model that contains the module, and an unfitted module takes its shapes from the state_dict
    that it loads. They are float64 unless ``dtype`` says otherwise, as one value per feature costs nothing and long streams do
    not drift.

    Args:
        support: which elements share a statistic; the axes it keeps have the same size in every batch.
        dtype: floating dtype of the statistics.

    Raises:
        OptionError: each sample would have its own statistics, or the dtype is not floating.
    """

    shown = "support={0.support}"
    statistics: ClassVar[tuple[str, ...]] = ()
    count: Tensor

    def __init__(self, support: Support | None = None, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.support = PER_FEATURE if support is None else support
        if "n" in self.support.kept:
            raise OptionError(
                f"{self._who}: {self.support} keeps the samples apart, so that the statistics of one do not apply to another; "
                f'reduce n too, e.g. {PER_FEATURE} per feature or Support("n c *", over="n *") per channel'
            )
        if dtype is not None:
            accumulation_dtype(dtype)
        for name in self.statistics:
            self.register_buffer(name, torch.empty(0, device=device, dtype=dtype or torch.float64))
        self.register_buffer("count", torch.empty(0, device=device, dtype=torch.int64))

    @property
    def _who(self) -> str:
        return type(self).__name__

    @property
    def fitted(self) -> bool:
        """Whether there are statistics, measured or loaded."""
        return self.count.numel() > 0

    def fit(self, data: Tensor | Iterable[Any]) -> Self:
        """Measure the training data, and forget earlier measurements.

        Args:
            data: a tensor, an (x, y) pair of which x is used, or any iterable of these, such as a DataLoader; batches may have
                any size.

        Returns:
            The module itself.

        Raises:
            OptionError: there is no sample, or there is a NaN or infinity, whose columns are named; the statistics stay
                unchanged.
            ShapeError: batches do not fit the support or one another.
            ProtocolError: something in the data is not a tensor.
        """
        if not self._learn(None, data):
            raise OptionError(f"{self._who}.fit: the data has no sample; give a tensor or an iterable with some")
        return self

    def partial_fit(self, batch: Tensor | tuple[Any, ...] | list[Any]) -> Self:
        """Measure one more batch of the training data, weighted by its size.

        Args:
            batch: a tensor, or an (x, y) pair of which x is used; it may be empty.

        Returns:
            The module itself.

        Raises:
            OptionError, ShapeError, ProtocolError: as for ``fit``.
        """
        held = {name: wide(getattr(self, name)) for name in self.statistics} if self.fitted else None
        self._learn((int(self.count), held) if held is not None else None, [batch])
        return self

    def transform(self, x: Tensor) -> Tensor:
        """Normalize by the fitted statistics: the same as calling the module.

        Args:
            x: a tensor of the support's axes. NaN stays NaN.

        Returns:
            A tensor of the input's dtype.

        Raises:
            ProtocolError: nothing was fitted or loaded.
            ShapeError: x has another number of features.
            OptionError: x is not floating.
        """
        return self(x)

    def inverse_transform(self, y: Tensor) -> Tensor:
        """Undo ``transform``.

        Args:
            y: an output of ``transform``.

        Returns:
            A tensor of the input's dtype.

        Raises:
            ProtocolError, ShapeError, OptionError: as for ``transform``.
        """
        raise NotImplementedError

    def measure(self, x: Tensor, split: Split) -> dict[str, Tensor]:
        """Measure the statistics of a batch that is viewed as ``split.shape``."""
        kept = per_shape(" ".join(self.support.kept), split)
        found = {}
        if {"mean", "var"} & set(self.statistics):
            own = moments(wide(x), split.dims)
            found |= {"mean": own.mean.reshape(kept), "var": own.var.reshape(kept)}
        if "minimum" in self.statistics:
            found["minimum"] = wide(x.amin(split.dims).reshape(kept))
        if "maximum" in self.statistics:
            found["maximum"] = wide(x.amax(split.dims).reshape(kept))
        return {name: found[name] for name in self.statistics}

    def merge(self, n: int, old: dict[str, Tensor], more: int, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Merge the statistics of ``n`` elements and of ``more`` others."""
        merged = {}
        if "mean" in old:
            zero = torch.zeros_like(old["mean"])
            a, b = (Moments(s["mean"], s.get("var", zero), k) for s, k in ((old, n), (new, more)))
            merged |= a.merge(b)._asdict()
        if "minimum" in old:
            merged["minimum"] = torch.minimum(old["minimum"], new["minimum"])
        if "maximum" in old:
            merged["maximum"] = torch.maximum(old["maximum"], new["maximum"])
        return {name: merged[name] for name in self.statistics}

    def prepare(self, x: Tensor) -> Tensor:
        """Return the input if it is floating; else raise OptionError."""
        accumulation_dtype(x.dtype)
        return x

    @torch.no_grad()
    def _learn(self, known: tuple[int, dict[str, Tensor]] | None, data: Tensor | Iterable[Any]) -> bool:
        for batch in batches(data, self._who):
            for x in self._pieces(self.prepare(batch)):
                split = self.support.split(x.shape)
                if 0 in split.shape:
                    continue
                refuse_unknown(x.reshape(split.shape), split, f"{self._who}.fit")
                new = {k: v.to(self.count.device) for k, v in self.measure(x.reshape(split.shape), split).items()}
                if known is None:
                    known = split.count, new
                    continue
                self._check_same(known[1], new)
                known = known[0] + split.count, self.merge(*known, split.count, new)
        if known is not None:
            self._store(*known)
        return known is not None

    def _pieces(self, x: Tensor) -> Iterable[Tensor]:
        first = self.support.groups[0][0]
        if x.numel() <= _PIECE or first not in self.support.reduced or not x.shape[0]:
            return [x]
        return x.split(max(1, _PIECE * x.shape[0] // x.numel()))

    def _check_same(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        for name, value in new.items():
            if value.shape != old[name].shape:
                raise ShapeError(
                    f"{self._who}.fit: a batch has statistics of shape {show(value.shape)}, before it {show(old[name].shape)}; "
                    f"every batch needs the same {' and '.join(_MEMBER.get(k, k) for k in self.support.kept)}s ({self.support})"
                )

    def _store(self, count: int, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            setattr(self, name, value.to(getattr(self, name)))
        self.count = torch.tensor(count, device=self.count.device)

    def _ready(self, x: Tensor, shape: torch.Size) -> Split:
        """Return the split of the input, or raise an error; ``shape`` is that of the statistics."""
        if not self.fitted:
            raise ProtocolError(
                f"{self._who}: transforming before fitting; call fit(data) or partial_fit(batch) on training data first, "
                "or load a state_dict with its statistics"
            )
        split = self.support.split(x.shape)
        wanted = per_shape(" ".join(self.support.kept), split)
        if wanted != tuple(shape):
            raise ShapeError(
                f"{self._who}: an input of {show(x.shape)} needs statistics of {show(wanted)}, those fitted have {show(shape)} "
                f"({self.support}); transform data of the kind that was fitted"
            )
        return split

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        if not self.fitted:
            for name, buffer in list(self.named_buffers(recurse=False)):
                given = state_dict.get(prefix + name)
                if isinstance(given, Tensor):
                    setattr(self, name, buffer.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore[reportArgumentType]


class Scaling(Fitted):
    """A Fitted whose transform is (x - centre) / scale * gain + offset, element by element."""

    gain: float = 1.0
    offset: float = 0.0

    def center(self) -> Tensor:
        """The values to subtract."""
        raise NotImplementedError

    def scale(self) -> Tensor:
        """The values to divide by, never zero."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.prepare(x)
        center, scale, split = self._placed(x)
        y = (x.reshape(split.shape).to(center.dtype) - center) / scale
        if (self.gain, self.offset) != (1.0, 0.0):
            y = y * self.gain + self.offset
        return y.reshape(x.shape).to(x.dtype)

    def inverse_transform(self, y: Tensor) -> Tensor:
        accumulation_dtype(y.dtype)
        center, scale, split = self._placed(y)
        x = (y.reshape(split.shape).to(center.dtype) - self.offset) / self.gain * scale + center
        return x.reshape(y.shape).to(y.dtype)

    def _placed(self, x: Tensor) -> tuple[Tensor, Tensor, Split]:
        if not self.fitted:
            self._ready(x, torch.Size())
        center, scale = self.center(), self.scale()
        split, per = self._ready(x, scale.shape), " ".join(self.support.kept)
        dtype = torch.promote_types(accumulation_dtype(x.dtype), center.dtype)
        return place(center, per, split).to(dtype), place(scale, per, split).to(dtype), split


def wide(x: Tensor) -> Tensor:
    """Convert to float64, or to float32 on devices without float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def like(x: Tensor) -> dict[str, Any]:
    """Device and dtype for statistics that normalize this tensor only."""
    return {"device": x.device, "dtype": torch.float32 if x.device.type == "mps" else torch.float64}


def constant_as_one(scale: Tensor) -> Tensor:
    """Replace scales that are zero up to rounding by 1, as scikit-learn does: a constant feature is then only shifted."""
    return torch.where(scale < 10 * torch.finfo(torch.float64).eps, torch.ones_like(scale), scale)


def deviation(mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
    """Compute sqrt(var), with 1 where the variance is within the rounding error of that of a constant."""
    wide_mean, wide_var = wide(mean), wide(var)
    eps = torch.finfo(torch.float64).eps
    bound = count * eps * wide_var + (count * eps * wide_mean).square()
    return torch.where(wide_var <= bound, 1.0, wide_var.sqrt()).to(var.dtype)


def refuse_unknown(x: Tensor, split: Split, who: str) -> None:
    """Raise OptionError if a split tensor has a NaN or an infinity, and name the columns."""
    finite = x.isfinite()
    if finite.all():
        return
    kept = [d for d in range(x.dim()) if d not in split.dims]
    whole = finite.all(dim=split.dims) if split.dims else finite
    if not kept:
        raise OptionError(f"{who}: NaN or infinity in the data; drop or fill those samples first")
    spots = (~whole).nonzero().tolist()
    named = ", ".join(str(spot[0] if len(spot) == 1 else tuple(spot)) for spot in spots[:10])
    more = f" and {len(spots) - 10} more" if len(spots) > 10 else ""
    member = _MEMBER.get(split.names[kept[-1]], "index")
    raise OptionError(f"{who}: NaN or infinity in {member} {named}{more}; drop or fill those samples first")


def batches(data: Tensor | Iterable[Any], who: str) -> Iterator[Tensor]:
    """Yield the tensors in an argument of ``fit``: a tensor, an (x, y) pair, or an iterable of these."""
    wanted = "a tensor, an (x, y) tuple, or an iterable of those such as a DataLoader"
    if isinstance(data, Dataset):
        raise ProtocolError(f"{who}.fit: a Dataset yields samples without a batch axis; wrap it in a DataLoader")
    if isinstance(data, Tensor | tuple):
        data = [data]
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise ProtocolError(f"{who}.fit: got {type(data).__name__}; wanted {wanted}")
    for number, item in enumerate(data):
        first = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(first, Tensor):
            raise ProtocolError(
                f"{who}.fit: batch {number} is {type(first).__name__}, not a tensor; wanted {wanted} "
                "(torch.from_numpy makes a tensor of an array)"
            )
        yield first
