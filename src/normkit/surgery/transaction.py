"""One verb, one transaction: it fails and leaves the model as it was, or it succeeds and can be undone."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normkit.core.errors import SurgeryError
from normkit.engine.layer import MADE
from normkit.surgery.changes import Change, Changes, PassedOver, label

_ABSENT = object()
_Picture = tuple[type, dict[str, Any], dict[str, Any]]  # class, attributes, contents of those that are containers


class Transaction:
    """A model, and an optimizer if there is one, as they were before a verb.

    Tensors are kept by reference: a verb must make new ones in place of writing into those that it found, or name in ``written``
    those that it writes into. Containers stay the same objects, as handles of hooks point at them.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, written: Iterable[Tensor] = ()
    ) -> None:
        self._model = model
        self._names = {name: parameter for name, parameter in model.named_parameters()}
        self._state = None if optimizer is None else OptimizerState(optimizer, self._names)
        self._values = [(tensor, tensor.detach().clone()) for tensor in written]
        self._trained = [(parameter, parameter.requires_grad) for parameter in self._names.values()]
        self._data = [(parameter, parameter.data, _memory(parameter)) for parameter in self._names.values()]
        self._modules = {name: module for name, module in model.named_modules()}
        self._before = [_picture(module) for module in self._modules.values()]
        self._after: list[_Picture] = []

    def restore(self) -> None:
        """Put everything back, whatever happened since."""
        for module, (kind, attributes, contents) in zip(self._modules.values(), self._before, strict=True):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                _fill(attributes[name], content)
        self._data = self._moved()
        self._put_back()

    def close(self, root: nn.Module, rows: Iterable[Change], passed_over: Iterable[PassedOver] = ()) -> Changes:
        """What the verb did, with the way back; the optimizer follows."""
        self._after = [_picture(module) for module in self._modules.values()]
        self._data = [kept for kept in self._moved() if not torch.equal(kept[0].data, kept[1])]
        self._trained = [kept for kept in self._trained if kept[0].requires_grad != kept[1]]
        known = {id(parameter) for parameter in self._names.values()}
        now = dict(root.named_parameters())
        self._check_wrapped(now)
        if self._state is not None:
            self._state.follow(now)
        new = {name: parameter for name, parameter in now.items() if id(parameter) not in known}
        return Changes(root, tuple(rows), tuple(passed_over), new, self._undo)

    def _check_wrapped(self, now: Mapping[str, nn.Parameter]) -> None:
        """Put back and refuse other parameters in a wrapper that holds those it found; what a parametrization gave passes."""
        if not any(isinstance(module, DistributedDataParallel) for module in self._modules.values()):
            return
        given = {key: _parametrized(key) for key in self._names if key not in now}
        same = all(now[key] is old for key, old in self._names.items() if key in now)
        if same and all(name in now for name in given.values()) and now.keys() <= {*self._names, *given.values()}:
            if not self._trained:
                return
            what = "others would be trained"
        else:
            what = "parameters would be others"
        self.restore()
        raise SurgeryError(
            f"{what}: change model.module before it is wrapped in DistributedDataParallel, whose hooks sit on the parameters "
            "that were there; wrap it again"
        )

    def _undo(self) -> nn.Module:
        """Take back what the verb changed, and nothing else: what was set since on other things stays."""
        if not self._after:
            raise SurgeryError("undo: these changes are undone already")
        plan = []
        for (name, module), old, new in zip(self._modules.items(), self._before, self._after, strict=True):
            now = _picture(module)
            merged = {}
            for key, content in old[2].items():
                if old[1][key] is new[1].get(key) is now[1].get(key):
                    merged[key] = _merged(content, new[2][key], now[2][key], name)
            kind = old[0] if old[0] is not new[0] else now[0]
            plan.append((module, kind, _merged(old[1], new[1], now[1], name), merged))
        for module, kind, attributes, contents in plan:
            module.__class__ = kind
            if attributes is not None:
                _fill(vars(module), attributes)
            for key, content in contents.items():
                if content is not None:
                    _fill(vars(module)[key], content)
        self._put_back()
        self._after = []
        return self._model

    def _moved(self) -> list[tuple[Tensor, Tensor, object]]:
        """Parameters that lie elsewhere in memory now: a parametrization or its removal gave them another value."""
        return [kept for kept in self._data if _memory(kept[0]) != kept[2]]

    def _put_back(self) -> None:
        for parameter, data, _ in self._data:
            parameter.data = data
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)
        if self._state is not None:
            self._state.restore()


@contextmanager
def transaction(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, written: Iterable[Tensor] = ()
) -> Iterator[Transaction]:
    """Put back every module's class, attributes, parameters, buffers, children and hooks if the block raises."""
    opened = Transaction(model, optimizer, written)
    try:
        yield opened
    except BaseException:
        opened.restore()
        raise


def _parametrized(name: str) -> str:
    """The name of what a parametrization of this name gives; empty for other parameters."""
    layer, found, rest = name.rpartition("parametrizations.")
    return layer + rest.partition(".")[0] if found else ""


def _memory(parameter: Tensor) -> object:
    try:
        return parameter.data_ptr()
    except (RuntimeError, ValueError):  # of a tensor without memory of its own, as a fake one, or without a size yet
        return None


def _picture(module: nn.Module) -> _Picture:
    own = {key: value for key, value in vars(module).items() if key not in MADE}
    return (
        type(module),
        own,
        {name: value.copy() for name, value in own.items() if isinstance(value, dict | set | list)},
    )


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


def _merged(old: Any, new: Any, now: Any, name: str) -> Any:
    """What a container holds now, with the verb's changes taken back; None where there are none."""
    if not isinstance(old, Mapping):  # a list or a set: as a whole
        same = len(old) == len(new) and (old == new if isinstance(old, set) else all(map(_is, old, new)))
        return None if same else old
    changed = {key for key in {**old, **new} if old.get(key, _ABSENT) is not new.get(key, _ABSENT)}
    if not changed:
        return None
    for key in changed:
        if now.get(key, _ABSENT) is not new.get(key, _ABSENT):
            raise SurgeryError(f"undo: {label(name)} was changed by something else since ({key}); undo that first")
    kept = {key: value for key, value in now.items() if key not in changed}
    found = kept | {key: old[key] for key in changed if key in old}
    order = [*(key for key in old if key in found), *(key for key in found if key not in old)]
    return {key: found[key] for key in order}


def _is(a: object, b: object) -> bool:
    return a is b


_RAW = re.compile(r"\.original\d*$")


class OptimizerState:
    """An optimizer's groups and state as they were before a model was changed."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._names = optimizer, dict(names)
        self._groups = [
            (group, {key: list(group[key]) for key in ("params", "param_names") if key in group})
            for group in optimizer.param_groups
        ]
        self._state = dict(optimizer.state)
        held = {id(parameter) for _, lists in self._groups for parameter in lists["params"]}
        if names and not held & {id(parameter) for parameter in names.values()}:
            raise SurgeryError("optimizer= holds none of the model's parameters; pass the one made from this model")

    def follow(self, now: Mapping[str, nn.Parameter]) -> None:
        """Hand groups and state over to the parameters that the model has now.

        One that took the place of one other of its shape inherits its state. Of any other change, as where several replace
        one, the new ones start without state, in the group of what they replace, else of the parameter before them in their
        layer, else of the one before them in the model. Those that are gone are taken out.
        """
        before, after = ({id(p) for p in names.values()} for names in (self._names, now))
        gone = {name: p for name, p in self._names.items() if id(p) not in after}
        new = {name: p for name, p in now.items() if id(p) not in before}
        where = {id(p): k for k, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        heirs: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in new.items():
            heirs.setdefault(_place(name), []).append((name, parameter))
        placed = set()
        for name, old in gone.items():
            if id(old) not in where:
                placed |= {
                    id(parameter) for _, parameter in heirs.get(_place(name), [])
                }  # it was not trained, nor are they
                continue
            group, found = self._optimizer.param_groups[where[id(old)]], heirs.get(_place(name), [])
            at = next(k for k, parameter in enumerate(group["params"]) if parameter is old)
            group["params"][at : at + 1] = [parameter for _, parameter in found]
            if "param_names" in group:
                group["param_names"][at : at + 1] = [heir for heir, _ in found]
            state = self._optimizer.state.pop(old, None)
            if state and len(found) == 1 and found[0][1].shape == old.shape:
                self._optimizer.state[found[0][1]] = {key: _copy(value) for key, value in state.items()}
            where |= {id(parameter): where[id(old)] for _, parameter in found}
            placed |= {id(parameter) for _, parameter in found}
        names = list(now)
        for name, parameter in new.items():
            if id(parameter) in placed or not parameter.requires_grad:
                continue
            layer = name.rpartition(".")[0]
            before_it = [other for other in names[: names.index(name)] if id(now[other]) in where]
            mates = [other for other in names if other.rpartition(".")[0] == layer and id(now[other]) in where]
            k = where[id(now[(mates or before_it[-1:])[-1]])] if mates or before_it else 0
            group = self._optimizer.param_groups[k]
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(name)
            where[id(parameter)] = k

    def restore(self) -> None:
        """Give the optimizer the groups and the state that it had; what it learnt since about kept parameters stays."""
        known = {id(parameter) for _, lists in self._groups for parameter in lists["params"]}
        for parameter in [p for p in self._optimizer.state if id(p) not in known]:
            del self._optimizer.state[parameter]
        for parameter, state in self._state.items():
            self._optimizer.state.setdefault(parameter, state)
        for group, lists in self._groups:
            group.update(lists)


def _place(name: str) -> str:
    """Where a parameter acts: a parametrized weight's raw tensors where the weight does."""
    return _RAW.sub("", name.replace(".parametrizations.", ".").removeprefix("parametrizations."))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
