"""Runs a model on an example and sees which modules are called, who reads what, and what a norm's input is summed up from."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import label

_PERIOD = 251  # of coordinates, so that a half type holds them


class Sight(TorchDispatchMode):
    """Sees which modules a run calls, on inputs of which shape, and who reads their parameters."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._modules = {id(module): module for module in modules}
        self._scope: list[nn.Module] = []
        self._readers: dict[int, set[int]] = {}
        self.shapes: dict[int, torch.Size] = {}
        self.changed: set[int] = set()  # the modules whose output something behind them wrote to
        self._given: list[tuple[int, Tensor, int]] = []
        for module in self._modules.values():
            for parameter in module.parameters(recurse=False):
                self._readers[id(parameter)] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reader = id(self._scope[-1]) if self._scope else 0
        for tensor in tensors_in((args, kwargs or {})):
            if id(tensor) in self._readers:
                self._readers[id(tensor)].add(reader)
        return func(*args, **(kwargs or {}))

    def run(self, forward: Callable[[], Any]) -> Any:
        """Run something under watch, without gradients; return what it returns."""
        handles = []
        for module in self._modules.values():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        fused = torch.backends.mha.get_fastpath_enabled()  # torch's fused encoder calls no norm
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.no_grad(), self:
                result = forward()
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for handle in handles:
                handle.remove()
        self.changed |= {key for key, output, version in self._given if output._version != version}
        self._given.clear()
        for tensor in tensors_in(result):
            if id(tensor) in self._readers:
                self._readers[id(tensor)].add(0)
        return result

    def why_without_effect(self, module: nn.Module) -> str:
        """Why another module in the place of this one would not be heard, or only in part; empty where it would."""
        if id(module) not in self.shapes:
            return "it is not called on the example, so that the change would have no effect there"
        if any(self._readers.get(id(p), set()) - self._modules.keys() for p in module.parameters(recurse=False)):
            return "its parameters are read from outside it too, where the change would have no effect"
        return ""

    def why_unread(self, layer: nn.Module, name: str) -> str:
        """Why a change of a layer's weight would have no effect; empty where it would, or where that is not known."""
        raw = layer._parameters.get(name)
        unread = raw is not None and not self._readers.get(id(raw), {0})
        return f"its {name} is not read on the example, so that the change would have no effect there" if unread else ""

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._scope.append(module)
        x = next(iter([*args, *kwargs.values()]), None)
        if isinstance(x, Tensor):
            self.shapes.setdefault(id(module), x.shape)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._scope.pop()
        if isinstance(output, Tensor) and not output.is_inference():  # whose versions are not counted
            self._given.append((id(module), output, output._version))


@dataclass
class _Call:
    layer: nn.Module
    output: Tensor  # kept alive: another tensor must not take its id


class Watch(Sight):
    """Sees also which layer's output each norm reads, and who else reads it."""

    def __init__(self, layers: Iterable[nn.Module], norms: Iterable[nn.Module]) -> None:
        self._layers, self._norms = list(layers), list(norms)
        super().__init__([*self._layers, *self._norms])
        self._calls: dict[int, _Call] = {}
        # Kept alive, like outputs.
        self._inputs: dict[int, list[Any]] = {key: [] for key in self._modules}
        self._ranks: dict[int, set[int]] = {id(layer): set() for layer in self._layers}
        self._kernels: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        self._inside: list[nn.Module] = []
        self._others: dict[int, nn.Module] = {}  # the module that reads a tensor where no watched one does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and self._scope:
            self._kernels.setdefault(id(self._scope[-1]), []).append(args[:3])
        if self._inside and not self._scope:
            for tensor in tensors_in((args, kwargs or {})):
                if id(tensor) in self._readers:
                    self._others.setdefault(id(tensor), self._inside[-1])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def run(self, forward: Callable[[], Any]) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside.pop()  # not in a lambda: what a hook gives back replaces the output

        enter = register_module_forward_pre_hook(lambda module, args: self._inside.append(module))
        with enter, register_module_forward_hook(leave, always_call=True):
            return super().run(forward)

    def kernel(self, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The input, weight and bias with which a layer convolved, if it did so once."""
        seen = self._kernels.get(id(layer), [])
        return seen[0] if len(seen) == 1 else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._enter(module, args, kwargs)
        self._inputs[id(module)].append(next(iter([*args, *kwargs.values()]), None))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        super()._leave(module, args, output)
        if isinstance(output, Tensor):
            self._calls.setdefault(id(output), _Call(module, output))
            self._readers.setdefault(id(output), set())
            if id(module) in self._ranks:
                self._ranks[id(module)].add(output.dim())

    def layer_before(self, norm: nn.Module) -> tuple[nn.Module, int] | str:
        """The layer that feeds a norm and nothing else, with the rank of its output; or the reason why there is none."""
        inputs = [id(value) for value in self._inputs[id(norm)]]
        if not inputs:
            return "the example does not reach it"
        if any(key not in self._calls or id(self._calls[key].layer) not in self._ranks for key in inputs):
            return "its input is not the very output of a Conv, ConvTranspose or Linear"
        layer = self._calls[inputs[0]].layer
        if any(self._calls[key].layer is not layer for key in inputs):
            return "several layers feed it"
        outputs = [key for key, call in self._calls.items() if call.layer is layer]
        if set(outputs) != set(inputs) or any(self._readers[key] - {id(norm)} for key in inputs):
            return "the output of the layer before it is read elsewhere too"
        if any(self._readers[id(parameter)] - {id(layer)} for parameter in layer.parameters(recurse=False)):
            return "the weight of the layer before it is read elsewhere too"
        ranks = self._ranks[id(layer)]
        return (layer, min(ranks)) if len(ranks) == 1 else "the layer before it gives outputs of several ranks"

    def layers_behind(self, norm: nn.Module) -> tuple[list[nn.Module], int] | str:
        """The layers that read what a norm gives, if nothing else does and they read nothing else, with its rank; or why not."""
        outputs = {key for key, call in self._calls.items() if call.layer is norm}
        if not outputs:
            return "the example does not reach it"
        readers = set[int]().union(*(self._readers[key] for key in outputs))
        if not readers or not readers <= self._ranks.keys():
            others = {type(self._others[key]).__name__: 0 for key in outputs if key in self._others}
            others |= {type(self._modules[key]).__name__: 0 for key in readers - self._ranks.keys() if key}
            return f"its output is read by {' and '.join(others) or 'the caller'}, not by linear layers and convolutions alone"
        behind = [layer for layer in self._layers if id(layer) in readers]
        for layer in behind:
            if any(id(value) not in outputs for value in self._inputs[id(layer)]):
                return "a layer behind it reads something else too"
            if any(self._readers[id(parameter)] - {id(layer)} for parameter in layer.parameters(recurse=False)):
                return "the weight of a layer behind it is read elsewhere too"
        return behind, len(self.shapes[id(norm)])


def run_on(model: nn.Module, example: Any) -> Any:
    """The model's output for an example: a tensor, a tuple or list of arguments, or a dict of them by name."""
    with torch.compiler.set_stance("force_eager"):  # a compiled model is looked at, not compiled
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, Sequence) and not isinstance(example, str) else model(example)


def try_on(model: nn.Module, example: Any, norms: Iterable[nn.Module] = (), what: str = "changed model") -> Sight:
    """Run a model once on an example, in evaluation and without gradients."""
    watched = list(norms)
    sight = Sight(watched)
    try:
        with torch.no_grad(), modes_kept(model):
            model.eval()
            if watched:
                sight.run(lambda: run_on(model, example))
            else:
                run_on(model, example)
            return sight
    except Exception as error:
        raise SurgeryError(f"the {what} does not run on the example: {type(error).__name__}: {error}") from error


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's training flag back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def forked() -> Iterator[Callable[[], None]]:
    """Put torch's generators back afterwards, those of CUDA only where they have been used; gives what seeds them with 0.

    ``torch.manual_seed`` would leave a seed behind for a CUDA that starts later.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()

    def seed() -> None:
        for generator in (torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)):
            generator.manual_seed(0)

    with torch.random.fork_rng(devices):
        yield seed


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


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
