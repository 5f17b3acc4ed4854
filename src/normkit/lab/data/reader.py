"""Reads splits from what people have: arrays, tables of columns, datasets of pairs or dicts, data loaders, iterables."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as loading

from normkit.core.errors import ProtocolError
from normkit.lab.data.split import (
    IGNORED,
    Collate,
    Data,
    Split,
    as_inputs,
    as_targets,
    as_tensor,
    kind,
    named,
    parted,
    shifted,
    target_key,
)

NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
# What orders the samples of a whole dataset, or parts them among processes, which the comparison does by itself.
WHOLE = (loading.SequentialSampler, loading.RandomSampler, loading.DistributedSampler)
CHUNK = 64
WANTED = (
    'wanted a dict with "train" and, if there are, "val" and "test"; each a pair (inputs, targets), a dataset of pairs or dicts, '
    "a DataLoader, or a dict of columns"
)


def read_splits(name: str, made: Any, notes: list[str]) -> dict[str, Split]:
    """Reads the splits that are there."""
    if isinstance(made, Data):
        notes += made.notes
        splits = made.splits
    else:
        parts = _parts(name, made)
        alone = parts.get("train") is made
        splits = {key: _read(name if alone else f"{name}: {key}", part, notes) for key, part in parts.items()}
    for key, split in splits.items():
        check_split(f"{name}: {key}", split)
    return splits


def _parts(name: str, made: Any) -> dict[str, Any]:
    if isinstance(made, Mapping) and target_key(made) is None:
        found: dict[str, Any] = {}
        for key, part in made.items():
            known = next((split for split, words in NAMES.items() if key in words), None)
            if known is None or known in found:
                raise ProtocolError(f"{name} is a dict with {', '.join(map(str, made))}; {WANTED}; leave {key!r} out")
            found[known] = part
        if "train" not in found:
            raise ProtocolError(f"{name} is a dict with {', '.join(map(str, made)) or 'nothing'}; {WANTED}")
        return found
    if isinstance(made, tuple) and 2 <= len(made) <= 3 and all(map(_whole, made)):
        return dict(zip(("train", "test") if len(made) == 2 else ("train", "val", "test"), made, strict=True))
    return {"train": made}


def _whole(part: Any) -> bool:
    """Whether a part of a tuple is a split by itself, not one of inputs and targets."""
    if isinstance(part, tuple):
        return len(part) > 1
    if isinstance(part, list):
        return bool(part) and isinstance(part[0], tuple | Mapping)
    if isinstance(part, Mapping):
        return target_key(part) is not None
    return not isinstance(part, Tensor | str) and not hasattr(part, "__array__") and hasattr(part, "__len__")


def _read(name: str, value: Any, notes: list[str]) -> Split:
    if isinstance(value, Split):
        return value
    collate, rows = Collate(), None
    if isinstance(value, loading.DataLoader):
        collate, rows = _unloaded(name, value, notes)
        value = value.dataset
    if isinstance(value, Mapping):
        key = target_key(value)
        if key is None:
            raise ProtocolError(f"{name} is a dict with {', '.join(map(str, value)) or 'nothing'}; {WANTED}")
        # A bunch of scikit-learn holds its inputs under one name, next to all sorts of descriptions.
        inputs = value["data"] if "data" in value else {name: column for name, column in value.items() if name != key}
        value = inputs, value[key]
    if isinstance(value, tuple | list) and _arrays(value):
        *parts, targets = value
        inputs = tuple(parts) if len(parts) > 1 else parts[0]
        _say_doubles(inputs, targets, notes)
        return Split(as_targets(as_tensor(f"{name} targets", targets)), as_inputs(f"{name} inputs", inputs))
    if not hasattr(value, "__len__") or isinstance(value, str | Tensor | np.ndarray):
        cure = (
            "; an iterable needs a length: give __len__, or a list of its samples"
            if isinstance(value, Iterable)
            else ""
        )
        raise ProtocolError(f"{name} is {kind(value)}; {WANTED}{cure}")
    # torch's iterable datasets inherit a __getitem__ that only raises.
    if not hasattr(value, "__getitem__") or isinstance(value, loading.IterableDataset):
        value, rows = _held(name, value, notes), None
    return _samples(name, value, torch.arange(len(value)) if rows is None else rows, collate, notes)


def _arrays(value: Any) -> bool:
    """Whether a sequence is arrays of inputs and targets, not a dataset of samples."""
    if isinstance(value, list):
        return len(value) == 2 and not isinstance(value[0], tuple | Mapping)
    return len(value) == 2 or (len(value) > 2 and all(hasattr(part, "__array__") for part in value))


def _unloaded(name: str, loader: loading.DataLoader[Any], notes: list[str]) -> tuple[Collate, Tensor | None]:
    """How a loader makes batches, and of which rows; None for all."""
    if loader.batch_sampler is None:
        raise ProtocolError(
            f"{name} is a DataLoader with batch_size=None, whose dataset makes batches by itself; give one of single samples"
        )
    said = "of each DataLoader its dataset and collate function are used; batch size and order are those of the comparison, "
    if not any(note.startswith(said) for note in notes):
        notes.append(f"{said}not its own{f' ({loader.batch_size})' if loader.batch_size else ''}")
    collate = Collate(
        None if loader.collate_fn in (loading.default_collate, loading.default_convert) else loader.collate_fn
    )
    if isinstance(loader.dataset, loading.IterableDataset):
        return collate, None
    own = loader.batch_size is None
    sampler = loader.batch_sampler if own else loader.sampler
    drawn: list[int] = []
    if not (uneven := isinstance(sampler, loading.WeightedRandomSampler) or getattr(sampler, "replacement", False)):
        if isinstance(sampler, WHOLE):
            return collate, None
        drawn = [int(row) for row in (chain.from_iterable(loader.batch_sampler) if own else loader.sampler)]
    if uneven or len(set(drawn)) < len(drawn):
        notes.append(
            f"{name}: {type(sampler).__name__} draws by weight or repeats samples, which is not done here; each is used once per "
            "epoch"
        )
        return collate, None
    return collate, torch.tensor(sorted(drawn), dtype=torch.long)


def _held(name: str, source: Any, notes: list[str]) -> list[Any]:
    """The samples of an iterable, in memory; up to half of what is free."""
    free, used, samples = _free_bytes() // 2, 0, []
    for sample in islice(source, len(source)):
        inputs, target = parted(f"{name}[{len(samples)}]", sample)
        samples.append((inputs, target))
        used += sum(tensor.nbytes for _, tensor in named(inputs)) + target.nbytes
        if used > free:
            raise ProtocolError(
                f"{name} is iterated, and its first {len(samples)} of {len(source)} samples fill half of the free memory "
                f"({used / 1e6:.0f} MB); give a map-style dataset, which is read when it is needed"
            )
    notes.append(f"{name} is iterated once and held in memory: {len(samples)} samples, {used / 1e6:.1f} MB")
    return samples


def _free_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 32


def _samples(name: str, source: Any, rows: Tensor, collate: Collate, notes: list[str]) -> Split:
    """A split of a dataset, of which every sample is read once for its target and looked at."""
    found: list[Tensor] = []
    split = Split(rows, source=source, rows=rows, collate=collate)
    shapes: set[Any] = set()
    for index in torch.arange(len(rows)).split(CHUNK) if len(rows) else ():
        samples = split.samples(index)
        if not int(index[0]):
            _say_left_out(samples[0], notes)
        if collate.function is None:
            for row, sample in zip(index.tolist(), samples, strict=True):
                inputs, target = parted(f"{name}[{row}]", sample)
                for part, tensor in named(inputs):
                    check_finite(f"{name}[{row}] {part}", tensor)
                shapes.add(tuple((part, *tensor.shape) for part, tensor in named(inputs)))
                found.append(target[None])
        else:
            inputs, targets = collate(samples)
            for part, tensor in [*named(inputs), ("targets", targets)]:
                if tensor.ndim == 0 or len(tensor) != len(samples):
                    raise ProtocolError(
                        f"{name}: of {len(samples)} samples the collate function makes {part} {tuple(tensor.shape)}; "
                        "wanted the samples on the first axis"
                    )
                check_finite(f"{name} {part}", tensor)
            found.append(targets)
    if len(shapes) > 1:
        one, other = [", ".join(f"{part} {tuple(shape)}" for part, *shape in shape) for shape in islice(shapes, 2)]
        raise ProtocolError(
            f"{name} has inputs of unequal shapes or names, which make no batch: {one} and {other}; pad them, or give a "
            "DataLoader with a collate_fn that pads, such as transformers.DataCollatorWithPadding(tokenizer)"
        )
    return replace(split, targets=as_targets(_joined(name, found, collate)))


def _joined(name: str, found: list[Tensor], collate: Collate) -> Tensor:
    if not found:
        return torch.empty(0, dtype=torch.long)
    ranks, shapes = {targets.ndim for targets in found}, {targets.shape[1:] for targets in found}
    if len(shapes) > 1 and collate.function is not None and ranks == {2} and not found[0].is_floating_point():
        # A collate function pads to the longest of its batch.
        longest = max(targets.shape[1] for targets in found)
        found = [torch.nn.functional.pad(targets, (0, longest - targets.shape[1]), value=IGNORED) for targets in found]
    elif len(shapes) > 1:
        raise ProtocolError(
            f"{name} has targets of unequal shapes; pad them (with -100 where a token is to be ignored), or give a DataLoader "
            "with a collate_fn that does"
        )
    return torch.cat(found)


def _say_left_out(sample: Any, notes: list[str]) -> None:
    if isinstance(sample, Mapping):
        inputs, _ = parted("a sample", sample)
        assert isinstance(inputs, dict)
        left = [str(key) for key in sample if key != target_key(sample) and str(key) not in inputs]
        if left:
            notes.append(f"text and empty columns are left out: {', '.join(left)}")


def _say_doubles(inputs: Any, targets: Any, notes: list[str]) -> None:
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else [inputs]
    if any(getattr(part, "dtype", None) == torch.float64 for part in [*parts, targets]):
        notes.append("float64 tensors become float32")


def interpret(name: str, splits: Mapping[str, Split], notes: list[str]) -> dict[str, Split]:
    """Finds targets that mean more than their type says: yes or no, the next token, one-hot."""
    train = splits["train"].targets
    wide = train.ndim == 2 and train.shape[1] > 1 and all(split.targets.ndim == 2 for split in splits.values())
    bits = train.dtype == torch.bool or all(((t := s.targets) == 0).logical_or(t == 1).all() for s in splits.values())
    single = bits and wide and all(bool((split.targets.sum(1) == 1).all()) for split in splits.values())
    if single and not _per_token(splits["train"]):
        raise ProtocolError(
            f"{name}: targets {tuple(train.shape)} of train have a single 1 per row (one-hot); "
            "give class indices, targets.argmax(1)"
        )
    if bits and train.is_floating_point():
        notes.append("targets are 0.0 and 1.0: the loss is the binary cross-entropy, the score accuracy over labels")
        return {key: _changed(split, split.targets.bool(), yes_or_no=True) for key, split in splits.items()}
    if wide and not train.is_floating_point() and all(map(_repeats, splits.values())):
        notes.append("targets repeat the input tokens: each token's target is the next one (a causal language model)")
        return {key: _changed(split, shifted(split.targets), shifted=True) for key, split in splits.items()}
    return dict(splits)


def _changed(split: Split, targets: Tensor, **how: bool) -> Split:
    return replace(split, targets=targets, collate=replace(split.collate, **how))


def _repeats(split: Split) -> bool:
    inputs, targets = split.batch(torch.arange(min(CHUNK, len(split))), torch.device("cpu"))
    tokens = inputs.get("input_ids") if isinstance(inputs, dict) else inputs
    if not isinstance(tokens, Tensor) or tokens.shape != targets.shape or tokens.is_floating_point():
        return False
    return bool((tokens == targets)[targets != IGNORED].all())


def _per_token(split: Split) -> bool:
    inputs, targets = split.batch(torch.arange(1), torch.device("cpu"))
    return any(
        tensor.shape[:2] == targets.shape and (tensor.ndim > 2 or not tensor.is_floating_point())
        for _, tensor in named(inputs)
    )


def check_split(name: str, split: Split) -> None:
    """Checks the lengths and values of a split."""
    if not len(split):
        raise ProtocolError(f"{name} is empty")
    for part, tensor in split.tensors():
        if tensor.ndim == 0 or len(tensor) != len(split):
            raise ProtocolError(f"{name} {part} {tuple(tensor.shape)} do not match {len(split)} targets in length")
        check_finite(f"{name} {part}", tensor)
    targets = split.targets
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return
    if targets.ndim > 2:
        raise ProtocolError(f"{name} targets are integers {tuple(targets.shape)}; wanted classes (n,) or (n, tokens)")
    wrong = (targets < 0) & (targets != IGNORED) if targets.ndim == 2 else targets < 0
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        also = " (or -100 where a token is ignored)" if targets.ndim == 2 else ""
        hidden = "; all are negative: published without labels? leave this split out" if (targets < 0).all() else ""
        raise ProtocolError(
            f"{name} targets hold {int(targets[where])} at {_place(where)}; wanted class indices from 0{also}{hidden}"
        )
    if not (targets != IGNORED).any():
        raise ProtocolError(f"{name} targets are all -100 (ignored); nothing is left to learn or judge")


def check_agreement(name: str, splits: Mapping[str, Split], notes: list[str]) -> None:
    """Checks that all splits pose one task, at which something can be learned."""
    train = splits["train"].targets
    for key, split in splits.items():
        targets = split.targets
        if _sort(targets) != _sort(train) or targets.ndim != train.ndim:
            raise ProtocolError(
                f"{name}: targets of {key} are {targets.dtype} {tuple(targets.shape)}, those of train {train.dtype} "
                f"{tuple(train.shape)}; wanted the same kind"
            )
        if targets.is_floating_point() and not (targets != targets[:1]).any():
            raise ProtocolError(
                f"{name}: targets of {key} are all equal, so R² is not defined; give a split that varies"
            )
    known = train[train != IGNORED].unique()
    if len(known) < 2:
        raise ProtocolError(
            f"{name}: all targets of train are {known[0].item()}, a single class, which leaves nothing to learn; "
            "give samples of two or more classes"
        )
    if train.is_floating_point() or train.dtype == torch.bool or train.ndim > 1:
        return
    for key, split in splits.items():
        strange = ~torch.isin(split.targets, known)
        if strange.any():
            classes = ", ".join(map(str, split.targets[strange].unique()[:5].tolist()))
            notes.append(
                f"{int(strange.sum())} of {len(split)} samples of {key} are of classes that train lacks: {classes}"
            )


def _sort(targets: Tensor) -> tuple[bool, bool]:
    return targets.is_floating_point(), targets.dtype == torch.bool


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity, and says where they are."""
    if tensor.is_floating_point() and not (good := torch.isfinite(tensor)).all():
        bad = (~good).nonzero()
        where = tuple(bad[0].tolist())
        value = "NaN" if torch.isnan(tensor[where]) else "infinity"
        raise ProtocolError(
            f"{name} hold {value} at {_place(where)} ({len(bad)} of {tensor.numel()} values); clean the data"
        )


def _place(where: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, where))}]"
