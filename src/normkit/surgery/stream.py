"""What the input of a layer normalization is summed up from: parameters, by way of steps that carry a missing mean on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.surgery.changes import label
from normkit.surgery.watch import Watch, tensors_in

_OPS = torch.ops.aten
_SUMS = {_OPS.add, _OPS.add_, _OPS.sub, _OPS.sub_}
_PRODUCTS = {_OPS.mul, _OPS.mul_, _OPS.div, _OPS.div_}
# They copy elements, each to its places.
_MOVES = {
    getattr(_OPS, name)
    for name in (
        "view _unsafe_view expand unsqueeze squeeze select slice t transpose permute clone _to_copy detach alias cat stack index "
        "index_select embedding split split_with_sizes unbind roll flip"
    ).split()
}
_SHAPED = {getattr(_OPS, f"{name}_like") for name in ("zeros", "ones", "full", "empty")}
_SHAPED |= {getattr(_OPS, f"new_{name}") for name in ("zeros", "ones", "full", "empty")}
_PERIOD = 251  # of coordinates, so that a half type holds them

Axis = tuple[Tensor, int]


@dataclass
class _Step:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read: list[Tensor]  # kept alive: another tensor must not take an id
    made: list[Tensor]


class Stream(Watch):
    """Sees every operation of a run but those inside some norms."""

    def __init__(self, norms: Mapping[str, nn.Module], held: Collection[int]) -> None:
        super().__init__([], norms.values())
        self._names, self._held = {id(module): name for name, module in norms.items()}, held
        self._steps: dict[int, list[_Step]] = {}
        self._shown: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not self._scope:
            step = _Step(func, args, kwargs or {}, [*tensors_in((args, kwargs or {}))], [*tensors_in(result)])
            for key in {id(tensor) for tensor in (*step.read, *step.made)}:
                self._steps.setdefault(key, []).append(step)
        return result

    def run(self, forward: Callable[[], Any]) -> Any:
        result = super().run(forward)
        self._shown = {id(tensor) for tensor in tensors_in(result)}
        return result

    def of(self, norm: nn.Module) -> tuple[list[Axis], list[str]] | str:
        """What is summed up in a norm's stream, and the norms that read such alone; or why its mean can't be taken off."""
        left, seen = list[Axis](), dict[int, int]()
        leaves, heard = list[Axis](), {id(norm)}
        left += [(x, x.dim() - 1) for x in self._inputs[id(norm)]]
        if not left:
            return "the example does not reach it"
        while left:
            value, axis = left.pop()
            if seen.get(id(value)) == axis:
                continue
            readers = {key for key, inputs in self._inputs.items() if any(x is value for x in inputs)}
            if seen.setdefault(id(value), axis) != axis or (readers and axis != value.dim() - 1):
                return "its stream is read along two axes"
            if id(value) in self._shown:
                return "its stream is an output of the model"
            left += [(x, x.dim() - 1) for key in readers - heard for x in self._inputs[key]]
            heard |= readers
            steps = self._steps.get(id(value), [])
            if all(value is not made for step in steps for made in step.made):
                if id(value) not in self._held:
                    call = self._calls.get(id(value))
                    writer = "the model's input" if call is None else label(self._names[id(call.layer)])
                    return f"its stream has a writer that is no linear layer: {writer}"
                leaves.append((value, axis))
            for step in steps:
                linked = _linked(step, value, axis)
                if linked is None:
                    does = "written" if any(value is made for made in step.made) else "read"
                    return f"its stream is {does} by another operation ({step.func.overloadpacket.__name__})"
                left += linked
        return leaves, [name for key, name in self._names.items() if key in heard]


def _linked(step: _Step, value: Tensor, axis: int) -> list[Axis] | None:
    """The values of a step that lose their mean with one of them, itself included; None where it does more than carry that on."""
    linked = list[Axis]()
    if any(value is made for made in step.made):
        return _parts(step, value, axis)
    if step.func.overloadpacket in _SHAPED:
        return linked  # it reads the shape alone
    for made in step.made:
        ways = ((a, _parts(step, made, a)) for a in range(made.dim()))
        way = next(((a, ps) for a, ps in ways if ps and any(p is value and b == axis for p, b in ps)), None)
        if way is None:
            return None
        linked += [(made, way[0]), *way[1]]
    return linked


def _parts(step: _Step, made: Tensor, a: int) -> list[Axis] | None:
    """What must have no mean so that a step gives a value without one along its axis ``a``."""
    func, args = step.func.overloadpacket, step.args

    def at(x: Any) -> int | None:
        """Where the axis is in a value that broadcasts; None where that is one element wide there."""
        b = a - made.dim() + x.dim() if isinstance(x, Tensor) else -1
        return b if b >= 0 and x.shape[b] == made.shape[a] else None

    ways: list[tuple[Any, int | None]] = []
    if func in _SUMS:
        ways = [(x, at(x)) for x in args[:2]]
    elif func in _PRODUCTS:
        x, y = args[:2] if at(args[0]) is not None else args[1::-1]
        ways = [(x, at(x))] if at(y) is None and (x is args[0] or func in (_OPS.mul, _OPS.mul_)) else []
    elif func in (_OPS.addmm, _OPS.mm, _OPS.bmm) and a == made.dim() - 1:
        ways = [(x, at(x)) for x in args[:-2]] + [(args[-1], a)]
    elif func == _OPS.convolution and a == 1 and not args[6] and args[8] == 1:
        ways = [(x, 0) for x in args[1:3] if x is not None]
    elif func in _MOVES:
        ways = _moved(step, next(k for k, other in enumerate(step.made) if other is made), a)
    return [(x, b) for x, b in ways if b is not None] if ways and all(b is not None for _, b in ways) else None


def _moved(step: _Step, which: int, a: int) -> list[tuple[Any, int | None]]:
    """The axis of what a step moves that becomes an axis of the result: coordinates are moved in their place."""
    moved, size = [x for x in step.read if x.is_floating_point()], step.made[which].shape[a]

    def coordinates(x: Any, axis: int) -> Any:
        if isinstance(x, list | tuple):
            return [coordinates(part, axis) for part in x]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        view = [-1 if d == axis % x.dim() else 1 for d in range(x.dim())]
        return (torch.arange(x.shape[axis], device=x.device) % _PERIOD).to(x.dtype).view(view).expand(x.shape).clone()

    for b in range(min((x.dim() for x in moved), default=0)):
        if all(x.shape[b] == size for x in moved):
            result = [*tensors_in(step.func(*coordinates(step.args, b), **step.kwargs))][which].movedim(a, -1)
            if bool((result == torch.arange(size, device=result.device) % _PERIOD).all()):
                return [(x, b) for x in moved]
    return []
