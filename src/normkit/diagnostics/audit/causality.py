"""Whether a norm lets tokens of a causal model see later ones: seen by changing later tokens, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.diagnostics.audit.observe import Observed, Seen, as_it_was, set_training
from normkit.diagnostics.audit.statistics import Row
from normkit.surgery.changes import label
from normkit.surgery.watch import forked, run_on, tensors_in

# Outputs that don't see a change are equal but for the order of sums, which threads may choose.
_ROUNDING = 1e-4


def leaks(seen: Observed) -> dict[str, float]:
    """How far later tokens move what norms give for earlier ones, in a model that is causal but for them.

    The second half of the tokens is replaced. Norms whose output moves for the first half, although their input there does not,
    are suspects. They are then held at what they gave before: if now nothing of the model's output moves for the first half,
    while a change of the first half does move the second, the model is causal but for these norms.

    Args:
        seen: a model and its batch. The model is left changed: call this within ``as_it_was``.

    Returns:
        The largest move of each guilty norm's output, relative to its largest value, by name.
    """
    suspects = [norm for norm in seen.norms if norm.calls and _may_reach(norm)]
    if not suspects or seen.example is None:
        return {}
    for axis, length in _positions(seen.example):
        found = _Trial(seen, suspects, axis, length).run()
        if found:
            return found
    return {}


def acausal(seen: Observed) -> Iterator[Row]:
    """Norms that let the tokens of a causal model see later ones, as changing those shows."""
    with as_it_was(seen.model):
        try:
            found = leaks(seen)
        except Exception as error:  # a model may refuse other tokens than the batch's
            seen.notes.append(f"not seen whether tokens see later ones: {type(error).__name__}: {error}")
            return
    for name, moved in found.items():
        yield label(name), {"moved_by_later_tokens": moved}, None


class _Trial:
    def __init__(self, seen: Observed, suspects: list[Seen], axis: int, length: int) -> None:
        self.seen, self.suspects, self.axis, self.length = seen, suspects, axis, length
        self.half = length // 2
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.moved: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        with torch.no_grad():
            clean = self._output(self.seen.example, self._keep)
            if clean is None:
                return {}
            later = self._changed(slice(self.half, None))
            output = self._output(later, self._compare)
            guilty = {name: move for name, move in self.moved.items() if move > _ROUNDING}
            if not guilty or output is None:
                return {}
            early, late = slice(None, self.half), slice(self.half, None)
            if self._move(output, clean, early) > _ROUNDING:
                return {}  # something else than norms lets tokens see later ones: the model is not causal
            held = self._output(self._changed(early), partial(self._hold, late))
            return guilty if held is not None and self._move(held, clean, late) > _ROUNDING else {}

    def _output(self, batch: Any, hook: Callable[..., Any]) -> Tensor | None:
        with ExitStack() as stack, forked() as seed:
            for norm in self.suspects:
                stack.callback(norm.module.register_forward_hook(partial(hook, norm)).remove)
            seed()
            set_training(self.seen.model)
            for y in tensors_in(run_on(self.seen.model, batch)):
                axes = [axis for axis in range(1, y.dim()) if y.shape[axis] == self.length]
                if axes and y.is_floating_point():
                    return y.movedim(self.axis if self.axis in axes else axes[0], 1)
            return None

    def _keep(self, norm: Seen, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and norm.name not in self.kept:
            if self._at(norm, args[0]) is not None and args[0].shape == output.shape:
                self.kept[norm.name] = args[0].clone(), output.clone()

    def _compare(self, norm: Seen, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if norm.name not in self.kept or norm.name in self.moved or output.shape != self.kept[norm.name][1].shape:
            return None
        x, y = self.kept[norm.name]
        early = slice(None, self.half)
        axis = self._at(norm, x)
        assert axis is not None
        still = _relative(_part(args[0], axis, early, self.length), _part(x, axis, early, self.length)) <= _ROUNDING
        move = _relative(_part(output, axis, early, self.length), _part(y, axis, early, self.length))
        self.moved[norm.name] = move if still else 0.0
        return self._hold(early, norm, module, args, output) if still else None

    def _hold(self, which: slice, norm: Seen, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What the norm gave before, for some positions; for the others, what it gives with those in its statistics.

        When earlier tokens change, later positions are held by their statistics alone: what comes through their own input counts.
        """
        if norm.name not in self.kept or output.shape != self.kept[norm.name][1].shape:
            return None
        x, y = self.kept[norm.name]
        axis = self._at(norm, x)
        assert axis is not None
        before, now = _part(x, axis, which, self.length), _part(args[0], axis, which, self.length)
        held = output.clone()
        part = _part(held, axis, which, self.length)
        same = torch.isclose(now, before, rtol=_ROUNDING, atol=_ROUNDING * float(before.abs().max()))
        part[same] = _part(y, axis, which, self.length)[same]
        return held

    def _move(self, output: Tensor, clean: Tensor, which: slice) -> float:
        return _relative(output[:, which], clean[:, which])

    def _changed(self, which: slice) -> Any:
        """The batch with other tokens, or numbers, at some positions."""

        def change(tensor: Tensor) -> Tensor:
            if not _has(tensor, self.axis, self.length) or tensor.dtype == torch.bool or _is_mask(tensor):
                return tensor
            other = tensor.clone()
            part = _part(other, self.axis, which, self.length)
            # One token of the other half everywhere: another order of the same tokens would leave statistics as they are.
            token = tensor.narrow(self.axis, 0 if which.start else self.length - 1, 1)
            part.copy_(1 - 2 * part if tensor.is_floating_point() else token.expand_as(part))
            return other

        return _mapped(self.seen.example, change)

    def _at(self, norm: Seen, x: Tensor) -> int | None:
        """The axis of positions of a norm's input; -1 stands for rows that hold samples and positions together."""
        axis = 1 if norm.channel == -1 else 2
        if x.dim() > axis and x.shape[axis] == self.length:
            return axis
        return -1 if x.dim() == 2 and len(x) % self.length == 0 and len(x) > self.length else None


def _part(x: Tensor, axis: int, which: slice, length: int) -> Tensor:
    x = x.unflatten(0, (-1, length)) if axis == -1 else x
    axis = 1 if axis == -1 else axis
    return x[(slice(None),) * axis + (which,)]


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) if y.numel() else 0.0


def _may_reach(norm: Seen) -> bool:
    """Whether statistics may reach over positions: all but those that normalize each position by itself."""
    return norm.norm is None or not norm.norm.alone


def _positions(example: Any) -> Iterator[tuple[int, int]]:
    """The axes on which a batch may have time, with their lengths; none for images."""
    given = [tensor for tensor in tensors_in(example) if tensor.dim() > 1]
    if not given or given[0].dim() > 3:
        return
    for axis in range(1, given[0].dim()):
        if given[0].shape[axis] > 3:
            yield axis, given[0].shape[axis]


def _has(tensor: Tensor, axis: int, length: int) -> bool:
    return tensor.dim() > axis and tensor.shape[axis] == length


def _is_mask(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and int(tensor.min()) >= 0 and int(tensor.max()) <= 1


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(part, function) for part in value]
    return value
