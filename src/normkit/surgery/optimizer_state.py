"""An optimizer that follows its model: its state and groups go over to parameters that replaced others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normkit.core.errors import SurgeryError

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
