"""Runs a model on an example and sees which modules are called, who reads what, and which layer feeds a norm alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.core.errors import SurgeryError


class Sight(TorchDispatchMode):
    """Sees which modules a run calls, on inputs of which shape, and who reads their parameters."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._modules = {id(module): module for module in modules}
        self._scope: list[nn.Module] = []
        self._readers: dict[int, set[int]] = {}
        self.shapes: dict[int, torch.Size] = {}
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
