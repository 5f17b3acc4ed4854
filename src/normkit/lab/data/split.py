"""What a model is given and judged on: batches of samples of any make, splits of inputs and targets, and how to hold some out."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from normkit.core.errors import OptionError, ProtocolError

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
IGNORED = -100
TARGETS = ("labels", "label", "targets", "target", "label_ids", "y")


def kind(value: Any) -> str:
    """Names what a factory or a model gave, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def each(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Applies a function to every tensor of inputs."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    return tuple(map(function, inputs))


def take(inputs: Inputs, index: Tensor) -> Inputs:
    """Gives the samples `index` of inputs."""
    return each(inputs, lambda value: value[index])


def named(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """Names the tensors of inputs, in the order of their names."""
    if isinstance(inputs, Tensor):
        return [("inputs", inputs)]
    pairs = sorted(inputs.items()) if isinstance(inputs, dict) else enumerate(inputs)
    return [(f"inputs[{name!r}]", value) for name, value in pairs]


def as_tensor(name: str, value: Any) -> Tensor:
    """Makes a tensor on the CPU; double precision becomes single, which models have."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
    elif hasattr(value, "getbands"):
        raise ProtocolError(
            f"{name} are pictures ({type(value).__name__}); make tensors (channels, height, width) of floats of them, "
            "such as torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255"
        )
    else:
        try:
            array = np.asarray(value)
            if array.dtype.kind in "USO" and any(isinstance(item, str) for item in array.flat[:1]):
                raise ProtocolError(f"{name} are text, such as {str(array.flat[0])[:40]!r}; {_cure(name)}")
            # torch has no numbers in another machine's byte order, as files of IDX and FITS hold them, and warns of a read-only
            # array, such as a column of pandas.
            native = np.require(array, array.dtype.newbyteorder("="), ("C", "W"))
            tensor = torch.from_numpy(native).reshape(array.shape)
        except (TypeError, ValueError) as error:
            if isinstance(error, ProtocolError):
                raise
            raise ProtocolError(f"{name} are {kind(value)}, which makes no tensor ({error})") from None
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _cure(name: str) -> str:
    if "target" in name:
        return "wanted class indices, such as numpy.unique(labels, return_inverse=True)[1]"
    return "turn it into numbers first, such as by a tokenizer"


def as_inputs(name: str, value: Any) -> Inputs:
    """Makes inputs of a tensor or array, a tuple of tensors, or a mapping, of which text and None are left out."""
    if isinstance(value, Mapping):
        held = {str(key): item for key, item in value.items() if not _mute(item)}
        if not held:
            what = f"hold nothing but text or None under {', '.join(map(str, value))}" if value else "are an empty dict"
            raise ProtocolError(f"{name} {what}; wanted the model's keyword arguments, as tensors")
        return {key: as_tensor(f"{name}[{key!r}]", item) for key, item in held.items()}
    if isinstance(value, tuple) and value and all(isinstance(part, Tensor | np.ndarray) for part in value):
        return tuple(as_tensor(f"{name}[{place}]", part) for place, part in enumerate(value))
    return as_tensor(name, value)


def _mute(value: Any) -> bool:
    while isinstance(value, list | tuple | np.ndarray) and len(value):
        value = value.flat[0] if isinstance(value, np.ndarray) else value[0]
    return value is None or isinstance(value, str | Mapping)


def as_targets(value: Any) -> Tensor:
    """Makes targets int64 when they are integers, or one boolean per sample; leaves floats, and booleans of several labels."""
    targets = torch.as_tensor(value)
    several = targets.dtype == torch.bool and targets.ndim > 1
    return targets if targets.is_floating_point() or several else targets.long()


def parted(name: str, sample: Any) -> tuple[Inputs, Tensor]:
    """Parts a sample or a batch: a mapping with one of :data:`TARGETS`, or a sequence that ends with the target."""
    if isinstance(sample, Mapping):
        key = target_key(sample)
        if key is None:
            raise ProtocolError(
                f"{name} has no target among {', '.join(map(str, sample)) or 'nothing'}; wanted one called "
                f"{', '.join(TARGETS)} (of a causal language model: labels equal to input_ids)"
            )
        inputs: Any = {name: value for name, value in sample.items() if name != key}
        target = sample[key]
    elif isinstance(sample, tuple | list) and len(sample) >= 2:
        *inputs, target = sample
        inputs = (
            inputs[0] if len(inputs) == 1 else tuple(np.asarray(x) if not isinstance(x, Tensor) else x for x in inputs)
        )
    else:
        raise ProtocolError(
            f"{name} is {kind(sample)}; wanted a pair (inputs, target), or a dict with a target called {', '.join(TARGETS)}"
        )
    return as_inputs(f"{name} inputs", inputs), as_tensor(f"{name} target", target)


def target_key(sample: Mapping[Any, Any]) -> str | None:
    """Finds under which name a sample, a batch or a table of columns holds its targets."""
    return next((key for key in TARGETS if key in sample), None)


@dataclass(frozen=True)
class Collate:
    """Makes a batch of samples."""

    function: Callable[[list[Any]], Any] | None = None  # of a data loader; what it gives is parted like a sample
    names: tuple[str, ...] | None = None  # of inputs in a dict, those that are kept
    alone: bool = False  # the one that is kept is given to the model by itself, not by its name
    shifted: bool = False  # the target of each token is the next one
    yes_or_no: bool = False  # floats 0 and 1 become booleans

    def __call__(self, samples: list[Any]) -> tuple[Inputs, Tensor]:
        if self.function is not None:
            inputs, targets = parted("a batch of the collate function", self.function(samples))
        else:
            parts = [parted("a sample", sample) for sample in samples]
            inputs, targets = default_collate([part[0] for part in parts]), torch.stack([part[1] for part in parts])
            inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        if self.names is not None:
            inputs = kept(inputs, self.names, self.alone)
        if self.shifted:
            targets = shifted(targets)
        return inputs, targets.bool() if self.yes_or_no else as_targets(targets)


STACKED = Collate()


def kept(inputs: Inputs, names: Sequence[str], alone: bool) -> Inputs:
    """Keeps some of the inputs in a dict; one alone as a tensor if asked to."""
    assert isinstance(inputs, dict)
    return inputs[names[0]] if alone else {name: inputs[name] for name in names}


def shifted(targets: Tensor) -> Tensor:
    """Makes each token's target the next token, as causal language models are trained; the last one has none."""
    return torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], 1)


@dataclass(frozen=True)
class Split:
    """Samples of one split, held as tensors or read from a map-style dataset when they are asked for."""

    # (n,) class indices, (n, l) a class index per token with -100 ignored, floats, or booleans of any shape
    targets: Tensor
    # a tensor (n, ...), or a tuple or dict of such tensors; None when `source` is given
    inputs: Inputs | None = None
    source: Any = None  # a map-style dataset of samples; None when `inputs` is given
    rows: Tensor | None = None  # the rows of `source` that belong to this split; None when `inputs` is given
    collate: Collate = STACKED  # makes inputs and targets of a list of samples of `source`
    # applied to the inputs of a batch on their device, such as what makes floats of pixels held as bytes
    prepare: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Inputs, Tensor]:
        """Gives the inputs and targets of the samples `index`, on `device`."""
        if self.inputs is None:
            inputs, targets = self.collate(self.samples(index))
        else:
            inputs, targets = take(self.inputs, index), self.targets[index]
        inputs = each(inputs, lambda value: value.to(device))
        return inputs if self.prepare is None else self.prepare(inputs), targets.to(device)

    def samples(self, index: Tensor) -> list[Any]:
        """Reads the samples `index` of the dataset."""
        assert self.rows is not None
        rows = self.rows[index].tolist()
        # As torch's own loader does: a dataset may know a faster way to read many.
        several = getattr(self.source, "__getitems__", None)
        return [self.source[row] for row in rows] if several is None else several(rows)

    def take(self, index: Tensor) -> "Split":
        """Gives the split of the samples `index`."""
        if self.inputs is None:
            assert self.rows is not None
            return replace(self, targets=self.targets[index], rows=self.rows[index])
        return replace(self, targets=self.targets[index], inputs=take(self.inputs, index))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names the tensors that this split holds in memory."""
        if self.inputs is not None:
            yield from named(self.inputs)
        yield "targets", self.targets


@dataclass(frozen=True)
class Data:
    """Three splits and the kind of task they pose."""

    train: Split  # samples to learn from
    val: Split  # samples that choose learning rates
    test: Split  # samples that judge; touched once, at the end of a run
    # changes the inputs of a training batch, given them and a generator on their device
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    notes: tuple[str, ...] = ()  # what was decided on reading, a sentence each

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def kind(self) -> str:
        targets = self.train.targets
        if targets.dtype == torch.bool:
            return "binary" if targets[0].numel() == 1 else "multi-label"
        return "regression" if targets.is_floating_point() else "classification"

    @property
    def score(self) -> str:
        return "r2" if self.kind == "regression" else "accuracy"

    @property
    def classes(self) -> int | None:
        """The number of classes, or None where targets are no class indices."""
        if self.kind != "classification":
            return None
        return 1 + max(int(split.targets.max()) for split in self.splits.values())

    def sha256(self) -> str:
        """Hashes everything held in memory (of datasets read when asked for: the targets alone), and what is done to it."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for part, tensor in split.tensors():
                digest.update(f"{name}.{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
            if split.prepare is not None:
                digest.update(f"{name}.prepare {_identity(split.prepare)}".encode())
        if self.augment is not None:
            digest.update(f"augment {_identity(self.augment)}".encode())
        return digest.hexdigest()


def hold_out(split: Split, fraction: float, seed: int = 0) -> tuple[Split, Split]:
    """Parts a split in two, the same way each time, with each class in proportion where there are classes."""
    order = np.random.default_rng(seed).permutation(len(split))
    held = np.zeros(len(split), dtype=bool)
    targets = split.targets.numpy()
    if targets.ndim == 1 and not split.targets.is_floating_point():
        # Rounding the running total, not each class, keeps the whole within one sample of the fraction.
        wanted = 0.0
        for label in np.unique(targets):
            members = order[targets[order] == label]
            before = round(wanted)
            wanted += fraction * len(members)
            held[members[: round(wanted) - before]] = True
    else:
        held[order[: round(fraction * len(split))]] = True
    return split.take(torch.from_numpy(np.flatnonzero(~held))), split.take(torch.from_numpy(np.flatnonzero(held)))


def subset(split: Split, count: int) -> Split:
    """Draws `count` samples, the same each time, with each class in proportion where there are classes."""
    if not 1 <= count <= len(split):
        raise OptionError(f"a subset of {count} is wanted of {len(split)} samples; wanted from 1 to {len(split)}")
    order = np.random.default_rng(0).permutation(len(split))
    targets = split.targets.numpy()
    if targets.ndim == 1 and not split.targets.is_floating_point():
        # Each class is spread evenly over the line from 0 to 1, so that every beginning of the line is in proportion.
        place = np.empty(len(split))
        for label in np.unique(targets):
            members = order[targets[order] == label]
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(place[order], kind="stable")]
    return split.take(torch.from_numpy(np.sort(order[:count])))


def _identity(function: Callable[..., Any]) -> str:
    # A function's own repr holds an address, which differs from process to process.
    if is_dataclass(function):
        return repr(function)
    found = function if hasattr(function, "__qualname__") else type(function)
    return f"{found.__module__}.{found.__qualname__}"
