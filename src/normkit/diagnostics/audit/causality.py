"""Whether a norm lets tokens of a causal model see later ones: seen by changing later tokens, not guessed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.diagnostics.audit.finding import Row, check
from normkit.diagnostics.audit.observe import Observed, Seen, as_it_was, set_training
from normkit.surgery.watch import forked, run_on, tensors_in

# Outputs that don't see a change are equal but for the order of sums, which threads may choose.
_ROUNDING = 1e-4


@check("error", "normalize each token separately: convert(model, 'ln') or 'rms'")
def acausal_statistic(seen: Observed) -> Iterator[Row]:
    """Norms that let the tokens of a causal model see later ones, as changing those shows."""
    suspects = [norm for norm in seen.norms if norm.calls and (norm.norm is None or not norm.norm.alone)]
    given = [tensor for tensor in tensors_in(seen.example) if tensor.dim() > 1]
    if not suspects or not given or given[0].dim() > 3:  # images have no order
        return
    found: list[Seen] = []
    trials = [_Trial(seen, suspects, axis) for axis in range(1, given[0].dim()) if given[0].shape[axis] > 3]
    with as_it_was(seen.model), torch.no_grad():
        try:
            found = next((guilty for trial in trials if (guilty := trial.run(given[0]))), [])
        except Exception as error:  # a model may refuse other tokens than the batch's
            seen.notes.append(f"not seen whether tokens see later ones: {type(error).__name__}: {error}")
    for norm in found:
        moved = next(trial.moved[id(norm)] for trial in trials if id(norm) in trial.moved)
        yield norm.label, {"moved_by_later_tokens": moved}, None


class _Trial:
    """Three runs, with time on one axis of the batch.

    Later tokens are replaced. Norms whose output moves for earlier ones, although their input there does not, are suspects, and
    give what they gave before. If nothing of the model's output moves for earlier tokens then, while a change of those moves it
    for later ones, the model is causal but for these norms.
    """

    def __init__(self, seen: Observed, suspects: list[Seen], axis: int) -> None:
        self.seen, self.suspects, self.axis, self.length = seen, suspects, axis, 0
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.moved: dict[int, float] = {}

    def run(self, given: Tensor) -> list[Seen]:
        """The guilty."""
        self.length = given.shape[self.axis]
        early, late = slice(0, self.length // 2), slice(self.length // 2, None)
        clean = self._output(self.seen.example, self._keep)
        output = None if clean is None else self._output(self._changed(late), partial(self._hold, early))
        guilty = [norm for norm in self.suspects if self.moved.get(id(norm), 0.0) > _ROUNDING]
        if clean is None or output is None or not guilty or _move(output[:, early], clean[:, early]) > _ROUNDING:
            return []
        output = self._output(self._changed(early), partial(self._hold, late))
        return guilty if output is not None and _move(output[:, late], clean[:, late]) > _ROUNDING else []

    def _output(self, batch: Any, hook: Callable[..., Any]) -> Tensor | None:
        """The first output that has the batch's time, which is put on axis 1."""
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
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].shape == output.shape:
            if self._in_time(norm, args[0]) is not None:
                self.kept.setdefault(id(norm), (args[0].clone(), output.clone()))

    def _hold(self, which: slice, norm: Seen, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What the norm gave before, for those positions whose input is what it was; for others, what it gives."""
        kept = self.kept.get(id(norm))
        if kept is None or output.shape != kept[1].shape:
            return None
        held = output.clone()
        parts = [self._in_time(norm, value) for value in (*kept, args[0], held)]
        before, was, now, part = (value[:, which] for value in parts if value is not None)
        same = torch.isclose(now, before, rtol=_ROUNDING, atol=_ROUNDING * float(before.abs().max()))
        if which.start == 0:  # later tokens were changed
            self.moved.setdefault(id(norm), _move(part, was) if same.all() else 0.0)
        part[same] = was[same]
        return held

    def _changed(self, which: slice) -> Any:
        """The batch with other tokens, or numbers, at some positions."""

        def change(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: change(part) for key, part in value.items()}
            if isinstance(value, list | tuple):
                return [change(part) for part in value]
            fits = isinstance(value, Tensor) and value.dim() > self.axis and value.shape[self.axis] == self.length
            if not fits or (not value.is_floating_point() and {*map(int, value.aminmax())} <= {0, 1}):  # a mask
                return value
            other, early = value.clone(), which.start == 0
            part = other.movedim(self.axis, 0)[which]
            # One token of the other half everywhere: another order of the same tokens would leave statistics as they are.
            token = value.movedim(self.axis, 0)[-1 if early else 0]
            part.copy_(1 - 2 * part if value.is_floating_point() else token.expand_as(part))
            return other

        return change(self.seen.example)

    def _in_time(self, norm: Seen, x: Tensor) -> Tensor | None:
        """A view with time on axis 1; None where there is none. Rows of a matrix may be samples and positions together."""
        axis = 1 if norm.channel == -1 else 2
        if x.dim() > axis and x.shape[axis] == self.length:
            return x.movedim(axis, 1)
        return x.unflatten(0, (-1, self.length)) if x.dim() == 2 and len(x) % self.length == 0 < len(x) else None


def _move(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) if y.numel() else 0.0
