"""Watches a model run on an example: which layer's output is a norm's input and is read by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class _Call:
    layer: nn.Module
    output: Tensor  # kept alive: another tensor must not take its id


class Watch(TorchDispatchMode):
    """Records every read of the tensors that layers give out and of the layers' weights, by the module that reads.

    Args:
        layers: whose outputs are watched.
        norms: whose inputs are.
    """

    def __init__(self, layers: Iterable[nn.Module], norms: Iterable[nn.Module]) -> None:
        super().__init__()
        self._layers, self._norms = list(layers), list(norms)
        self._scope: list[nn.Module] = []
        self._calls: dict[int, _Call] = {}
        self._readers: dict[int, set[int]] = {}
        self._inputs: dict[int, list[Any]] = {id(norm): [] for norm in self._norms}  # kept alive, like outputs
        self._ranks: dict[int, set[int]] = {id(layer): set() for layer in self._layers}
        for layer in self._layers:
            for parameter in layer.parameters(recurse=False):
                self._readers[id(parameter)] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reader = id(self._scope[-1]) if self._scope else 0
        for tensor in tensors_in((args, kwargs or {})):
            if id(tensor) in self._readers:
                self._readers[id(tensor)].add(reader)
        return func(*args, **(kwargs or {}))

    def run(self, forward: Callable[[], Any]) -> Any:
        """Run something under watch; return what it returns."""
        handles = []
        for module in {id(module): module for module in (*self._layers, *self._norms)}.values():
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with torch.no_grad(), self:
                result = forward()
        finally:
            for handle in handles:
                handle.remove()
        for tensor in tensors_in(result):
            if id(tensor) in self._readers:
                self._readers[id(tensor)].add(0)
        return result

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._scope.append(module)
        if id(module) in self._inputs:
            self._inputs[id(module)].append(args[0] if args else None)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._scope.pop()
        if id(module) in self._ranks and isinstance(output, Tensor):
            self._calls[id(output)] = _Call(module, output)
            self._readers[id(output)] = set()
            self._ranks[id(module)].add(output.dim())

    def layer_before(self, norm: nn.Module) -> tuple[nn.Module, int] | str:
        """The layer that feeds a norm and nothing else, with the rank of its output; or the reason why there is none."""
        inputs = [id(value) for value in self._inputs[id(norm)]]
        if not inputs:
            return "the example does not reach it"
        if any(key not in self._calls for key in inputs):
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


def input_shapes(modules: Iterable[nn.Module], forward: Callable[[], Any]) -> dict[int, torch.Size]:
    """Run something; return the shape of each module's first input, by the module's id, for those that were called."""
    shapes: dict[int, torch.Size] = {}

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            shapes.setdefault(id(module), args[0].shape)

    handles = [module.register_forward_pre_hook(see) for module in modules]
    fused = torch.backends.mha.get_fastpath_enabled()  # torch's fused encoder calls no norm
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            forward()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    return shapes


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
