"""How any weight method is put on chosen layers, and what stands on a weight."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.errors import NormkitError, SurgeryError
from normkit.core.support import show
from normkit.surgery.bake import value_of
from normkit.surgery.changes import Change, Refusals, label
from normkit.surgery.running_statistics import Statistics
from normkit.surgery.select import weight_names
from normkit.surgery.substitute import refuse
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import try_on
from normkit.weights.layout import hooked_weight

Attach = Callable[[nn.Module, str], object]


def attach_all(
    model: nn.Module, layers: Mapping[str, nn.Module], put: Attach, what: str, example: Any, refusals: Refusals
) -> list[Change]:
    """Put a weight method on every weight of some layers, and carry running statistics along; a row each. In a transaction."""
    ties, statistics = tied_parameters(model), Statistics(model, example)
    sight = None if example is None else try_on(model, example, layers.values(), "model")
    rows = []
    for name, layer in layers.items():
        for weight in weight_names(layer):
            full = label(name) if weight == "weight" else f"{label(name)}.{weight}".removeprefix("(model).")
            hooked = hooked_weight(layer, weight)
            if hooked is not None:
                refusals.leave(full, f"its weight is made by {hooked[0]}; remove that first")
                continue
            try:
                if sight is not None:
                    refuse(full, sight.why_unread(layer, weight))
                with transaction(layer):
                    rows.append(_attach_one(layer, full, weight, put, what, ties, statistics))
            except SurgeryError as error:
                refusals.take(full, error)
    return rows


def _attach_one(
    layer: nn.Module,
    full: str,
    weight: str,
    put: Attach,
    what: str,
    ties: Mapping[int, list[str]],
    statistics: Statistics,
) -> Change:
    raw = raw_weight(layer, weight)
    before = f"{type(layer).__name__} {show(getattr(layer, weight).shape)}"
    present, value = parametrizations(layer, weight), value_of(layer, weight) if statistics else None
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            put(layer, weight)
    except (NormkitError, ValueError, RuntimeError) as error:
        raise SurgeryError(f"{full}: {what} can't be put on it: {error}") from error
    added = parametrizations(layer, weight)[-1]
    if any(type(other) is type(added) for other in present):
        raise SurgeryError(f"{full}: {what} is on it already; name it once, or bake it in with fold(model) first")
    own = full if weight != "weight" else f"{full}.{weight}".removeprefix("(model).")
    others = [tie for tie in ties.get(id(raw), []) if tie != own]
    if others and all(raw is not parameter for parameter in layer.parameters()):
        raise SurgeryError(
            f"{full}: its weight is tied to {', '.join(others)}, and {what} puts other parameters in its place, which "
            "would untie them; choose other layers with @re:PATTERN"
        )
    stack = [type(other).__name__ for other in present]
    notes = [f"over {' and '.join(stack)}"] if stack else []
    notes += [f"raw weight stays tied to {', '.join(others)}"] if others else []
    if value is not None:
        notes += filter(None, [statistics.carry(layer, weight, value, value_of(layer, weight))])
    for warning in said:
        notes.append(str(warning.message))
        warnings.warn(f"{full}: {warning.message}", warning.category, stacklevel=5)
    return Change(full, before.removeprefix("Parametrized"), what, "; ".join(notes))


def parametrizations(layer: nn.Module, name: str) -> list[nn.Module]:
    """The parametrizations of a layer's weight, innermost first."""
    return list(layer.parametrizations[name]) if parametrize.is_parametrized(layer, name) else []  # pyright: ignore


def raw_weight(layer: nn.Module, name: str) -> Tensor | None:
    """The parameter that holds a weight, under its parametrizations; None where they keep several."""
    if parametrize.is_parametrized(layer, name):
        return getattr(layer.parametrizations[name], "original", None)  # pyright: ignore
    return layer._parameters.get(name)


def tied_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter that several modules hold is found, by the parameter's id."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shown = f"{prefix.replace('_orig_mod.', '')}.{name}".lstrip(".")
                if ".parametrizations." in f".{shown}":
                    shown = f".{shown}".replace(".parametrizations.", ".").removesuffix(".original").lstrip(".")
                names.setdefault(id(parameter), []).append(shown)
    return {key: found for key, found in names.items() if len(found) > 1}
