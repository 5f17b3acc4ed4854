"""What stands at the seams: every layer, every weight parametrization on every kind of layer, every fitted preprocessing.

``plain`` is its float64 value in plain tensor code, by none of the code that it judges: the oracles of the laws for layers, the
papers' formulas below for weights. What a method on inputs fits, its laws hold; here its own values in float64, one sample at a
time, are the definition. Derivatives come from values of ``plain`` alone, see ``derivatives``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laws import ACTIVATIONS, INPUTS, RULES, WEIGHTS, layer, roundings, sample_input
from normkit.core.card import Card
from normkit.engine.layer import Layer
from oracles import ORACLES, normalized
from variants import WEIGHT_FORMS

Values = tuple[Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """A module in float64, what goes in, and what must come out in training."""

    name: str
    kind: str
    card: Card
    make: Callable[[], Any]
    sample: Callable[[], Tensor]
    plain: Callable[..., Tensor]

    def fresh(self) -> Any:
        """The module, each time the same."""
        torch.manual_seed(1)
        return self.make()

    def inputs(self, x: Tensor | None = None) -> Values:
        """A small input, each time the same, with whatever else the module takes."""
        torch.manual_seed(2)
        x = self.sample() if x is None else x
        return x, *(self.card.extra(x) if self.card.extra else ())

    @property
    def is_rule(self) -> bool:
        """Whether it is a layer of one rule, and takes one input: what runs on the kernels."""
        return self.kind == "layer" and self.card in RULES

    @property
    def roundings(self) -> int:
        """How many roundings of the input's size there are from input to output."""
        return roundings(self.card) if self.kind == "layer" else 16


def output(made: nn.Module, *inputs: Tensor) -> Tensor:
    """What the module returns first."""
    y = made(*inputs)
    return y[0] if isinstance(y, tuple) else y


def _per_unit(layer: nn.Module, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row for each output unit, their means, their variances."""
    axis, groups = (1, layer.groups) if isinstance(layer, nn.ConvTranspose2d) else (0, 1)
    parts = value.chunk(groups)
    rows = torch.cat([part.movedim(axis, 0).flatten(1) for part in parts])
    mean = rows.mean(1, keepdim=True)
    return rows, mean, (rows - mean).square().mean(1, keepdim=True)


def _from_units(layer: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
    if not isinstance(layer, nn.ConvTranspose2d):
        return rows.view(like.shape)
    parts = like.chunk(layer.groups)
    pairs = zip(rows.chunk(layer.groups), parts, strict=True)
    return torch.cat([part.view(one.movedim(1, 0).shape).movedim(0, 1) for part, one in pairs])


def _weight_norm(layer: Any, part: Any, g: Tensor, v: Tensor) -> Tensor:
    over = [axis for axis in range(v.dim()) if not g.dim() or g.shape[axis] == 1]
    return g * v / v.square().sum(over, keepdim=True).sqrt()


def _spectral_norm(layer: Any, part: Any, v: Tensor) -> Tensor:
    matrix = v.movedim(part.dim, 0).flatten(1)
    return v / (part._u @ matrix @ part._v)


def _weight_standardization(layer: Any, part: Any, v: Tensor) -> Tensor:
    rows, mean, var = _per_unit(layer, v)
    return _from_units(layer, (rows - mean) / (var + part.rule.statistic.eps).sqrt(), v)


def _scaled_weight_standardization(layer: Any, part: Any, gain: Tensor, v: Tensor) -> Tensor:
    rows, mean, var = _per_unit(layer, v)
    scale = gain[:, None] * part.gamma / ((var + part.rule.statistic.eps) * rows.shape[1]).sqrt()
    return _from_units(layer, (rows - mean) * scale, v)


def _weight_conditioning(layer: Any, part: Any, v: Tensor) -> Tensor:
    rows, _, _ = _per_unit(layer, v)
    return _from_units(layer, rows / rows.square().sum(1, keepdim=True).sqrt(), v)


def _spectral_conditioning(layer: Any, part: Any, v: Tensor) -> Tensor:
    rows, _, _ = _per_unit(layer, v)
    groups = getattr(layer, "groups", 1)
    shift = torch.zeros_like(rows)
    for k in range(len(rows)):
        if k % (len(rows) // groups) < rows.shape[1]:
            shift[k, k % (len(rows) // groups)] = part.shift
    return _from_units(layer, rows + shift, v)


def _preconditioning(layer: Any, part: Any, v: Tensor) -> Tensor:
    rows, _, _ = _per_unit(layer, v)
    return _from_units(layer, rows / rows.square().sum(1, keepdim=True) ** 0.25, v)


PLAIN_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "weight_norm": _weight_norm,
    "weight_norm_one_length": _weight_norm,
    "weight_norm_inputs": _weight_norm,
    "spectral_norm": _spectral_norm,
    "weight_standardization": _weight_standardization,
    "scaled_weight_standardization": _scaled_weight_standardization,
    "weight_conditioning": _weight_conditioning,
    "preconditioning": _preconditioning,
    "spectral_conditioning": _spectral_conditioning,
}
_ON: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 2)),
}


def _parametrized(card: Card, on: str) -> Subject:
    make_layer, shape = _ON[on]
    names = [name for name, _ in make_layer().named_parameters() if name != "weight"]

    def make() -> nn.Module:
        made = card.make(make_layer().double()).eval()  # power iteration moves in training
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.rand_like(parameter) / 4)
        return made

    def plain(made: Any, x: Tensor) -> Tensor:
        (part,) = made.parametrizations.weight
        raw = made.parametrizations.weight
        values = [raw.original] if hasattr(raw, "original") else [raw.original0, raw.original1]
        formula = PLAIN_WEIGHTS.get(card.name)
        weight = part(*values) if formula is None else formula(made, part, *values)
        return functional_call(make_layer(), {"weight": weight, **{name: getattr(made, name) for name in names}}, (x,))

    return Subject(f"{card.name}-{on}", "weight", card, make, lambda: torch.randn(shape, dtype=torch.float64), plain)


def _layer(card: Card) -> Subject:
    def plain(made: Any, *inputs: Tensor) -> Tensor:
        if card in RULES:
            return normalized(made.rule, inputs[0], made.weight, made.bias)
        return ORACLES[card.name](made, *inputs)

    return Subject(card.name, "layer", card, lambda: layer(card), lambda: sample_input(card), plain)


def _fitted(card: Card) -> Subject:
    def make() -> nn.Module:
        scale = torch.tensor([1.0, 4.0, 0.5, 10.0], dtype=torch.float64)
        return card.make(4).fit(torch.randn(30, 4, dtype=torch.float64) * scale + 3)

    def plain(made: Any, x: Tensor) -> Tensor:
        return torch.cat([made(row.clone()) for row in x.split(1)])

    return Subject(card.name, "input", card, make, lambda: torch.randn(3, 4, dtype=torch.float64) * 2 + 1, plain)


SUBJECTS = [
    *map(_layer, ACTIVATIONS),
    *(_parametrized(card, on) for card in WEIGHTS for on in _ON),
    *(_parametrized(card, "Linear") for card in WEIGHT_FORMS),
    *map(_fitted, INPUTS),
]


def moved(made: nn.Module, inputs: Values, lines: int = 1) -> Callable[..., Tensor]:
    """A number as a function of t, or several: the output along lines through parameters and inputs, summed with weights."""
    torch.manual_seed(3)
    state = {key: value.detach() for key, value in made.named_parameters()}
    start = [*state.values(), *(x for x in inputs if x.is_floating_point())]
    ways = [[torch.randn_like(value) for value in start] for _ in range(lines)]
    weights = torch.linspace(-1, 2, output(copy.deepcopy(made), *inputs).numel(), dtype=torch.float64).cos()

    def value(*t: Any, run: Callable[..., Tensor] | None = None) -> Tensor:
        there = list(start)
        for step, way in zip(t, ways, strict=True):
            there = [value + step * part for value, part in zip(there, way, strict=True)]
        parameters = dict(zip(state, there, strict=False))
        moving = iter(there[len(state) :])
        at = tuple(next(moving) if x.is_floating_point() else x for x in inputs)
        if run is None:
            buffers = {key: buffer.clone() for key, buffer in made.named_buffers()}
            y = functional_call(made, {**buffers, **parameters}, at)
            y = y[0] if isinstance(y, tuple) else y
        else:
            other = copy.deepcopy(made)
            with torch.no_grad():
                for key, parameter in other.named_parameters():
                    parameter.copy_(parameters[key])
                y = run(other, *at)
        return (y.reshape(-1) * weights).sum()

    return value


def derivatives(value: Callable[[float], Tensor], orders: int = 4, radius: float = 0.02) -> Tensor:
    """The derivatives at 0 up to an order, from values alone: of the polynomial through 11 points of a small interval."""
    at = torch.cos(torch.arange(11, dtype=torch.float64) * math.pi / 10)
    seen = torch.stack([value(radius * float(t)).detach() for t in at])
    terms = torch.linalg.solve(torch.linalg.vander(at), seen)
    return torch.stack([terms[k] * math.factorial(k) / radius**k for k in range(orders + 1)])


def leaves_of(made: nn.Module, inputs: Values) -> tuple[Values, list[Tensor]]:
    """The inputs as leaves, and all leaves: those and the parameters."""
    inputs = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)
    return inputs, [x for x in (*inputs, *made.parameters()) if x.requires_grad]


def gradients(made: nn.Module, inputs: Values) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of inputs and parameters, for one direction in the output."""
    inputs, leaves = leaves_of(made, inputs)
    y = output(made, *inputs)
    return y.detach(), pulled(y, leaves)


def directions(y: Tensor) -> Tensor:
    """Weights of an output's elements, laid out as it is."""
    return torch.empty_like(y).copy_(torch.linspace(0, 7, y.numel(), dtype=torch.float64).sin().reshape(y.shape))


def pulled(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients for one direction in the output, a fixed one."""
    return list(torch.autograd.grad(y, leaves, directions(y.detach()), allow_unused=True, materialize_grads=True))


def definition(made: nn.Module, inputs: Values) -> tuple[Tensor, list[Tensor]]:
    """The same by a copy in float64 on contiguous copies of the inputs, on the definition's back end where there is a choice."""
    made = copy.deepcopy(made).double()
    for module in made.modules():
        if isinstance(module, Layer):
            module.backend = "reference"
    return gradients(made, tuple(x.detach().double().contiguous() if x.is_floating_point() else x for x in inputs))
