"""Seams of values: what ran before, derivatives, transforms of functions, precision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

import subjects
from laws import channels_first
from seam import HALVES, cast, has_parameters, is_exact, is_input_of_networks, is_layer, near, same, seam, still
from subjects import Subject, Values, definition, derivatives, directions, gradients, output


def large(subject: Subject) -> Tensor:
    """Past every number of elements at which a back end may give way to another."""
    torch.manual_seed(4)
    return torch.randn(64, 8, 250) if channels_first(subject.card) else torch.randn(4000, 4, 8)


def inference(subject: Subject, made: nn.Module, inputs: Values) -> None:
    with torch.inference_mode():
        output(made, *inputs)


def no_grad(subject: Subject, made: nn.Module, inputs: Values) -> None:
    with torch.no_grad():
        output(made, *inputs)


def other_mode(subject: Subject, made: nn.Module, inputs: Values) -> None:
    was = made.training
    output(made.train(not was), *inputs)
    made.train(was)


def other_shape(subject: Subject, made: nn.Module, inputs: Values) -> None:
    output(made, *subject.inputs(torch.cat([inputs[0], inputs[0]])))


def other_parameters(subject: Subject, made: nn.Module, inputs: Values) -> None:
    functional_call(made, {key: value.detach().bfloat16() for key, value in made.named_parameters()}, inputs)


def with_autocast(subject: Subject, made: nn.Module, inputs: Values) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        gradients(made, inputs)


PRIORS: dict[str, Callable[[Subject, Any, Values], object]] = {
    "a pass with gradients": lambda subject, made, inputs: gradients(made, inputs),
    "a pass without gradients": no_grad,
    "a pass in inference mode": inference,
    "the other mode": other_mode,
    "an input of half precision": lambda subject, made, inputs: gradients(made, cast(inputs, torch.bfloat16)),
    "an input of another shape": other_shape,
    "parameters of another dtype": other_parameters,
    "autocast": with_autocast,
    "a call that fails": lambda subject, made, inputs: made(torch.zeros(1, dtype=torch.int64)),
}


def after(prior: Callable[[Subject, Any, Values], object]) -> Callable[[Subject], None]:
    """Bit for bit what a module gives that ran nothing before."""

    def run(subject: Subject) -> None:
        cases = [(subject.fresh(), subject.inputs())]
        if subject.is_rule:
            torch.manual_seed(1)
            wide = subject.card.make(8)
            cases.append((wide, cast((large(subject),), torch.bfloat16)))
        for cold, inputs in cases:
            warm = copy.deepcopy(cold)
            start = {key: value.clone() for key, value in warm.state_dict().items()}
            with contextlib.suppress(Exception):
                prior(subject, warm, inputs)
            warm.load_state_dict(start)
            same(gradients(warm, inputs), gradients(copy.deepcopy(cold), inputs))
            warm.load_state_dict(start)
            with torch.no_grad():
                same(output(warm, *inputs), output(copy.deepcopy(cold), *inputs))

    return run


for _name, _prior in PRIORS.items():
    seam(f"after {_name}")(after(_prior))


@seam("parameters cast in place after a pass", lambda subject: subject.is_rule and has_parameters(subject))
def _(subject: Subject) -> None:
    cold, inputs = subject.fresh().float(), cast(subject.inputs(), torch.bfloat16)
    warm = copy.deepcopy(cold)
    gradients(warm, inputs)
    warm.load_state_dict(cold.state_dict())
    for made in (cold, warm):
        for parameter in made.parameters():
            parameter.data = parameter.data.bfloat16()
    same(gradients(warm, inputs), gradients(cold, inputs))


@cache
def known(name: str, directions: tuple[float, ...], order: int) -> Tensor:
    """Derivatives of plain code's values along a line, or along a sum of lines."""
    (subject,) = (one for one in subjects.SUBJECTS if one.name == name)
    value = subjects.moved(subject.fresh(), subject.inputs(), len(directions))
    # Closer for fewer, as rectifiers have kinks.
    radius = 0.02 if order > 2 else 0.002
    return derivatives(lambda t: value(*(a * t for a in directions), run=subject.plain), order, radius)


def orders(subject: Subject) -> tuple[Callable[..., Tensor], Tensor]:
    return subjects.moved(subject.fresh(), subject.inputs()), known(subject.name, (1.0,), 4)


def near_derivatives(found: Tensor, wanted: Tensor) -> None:
    # The polynomial knows the fourth derivative to some 1e-4 of the largest; a term left out shows in the first digits.
    assert_close(found.detach(), wanted, rtol=1e-3, atol=1e-3 * max(1.0, wanted.abs().max().item()))


_WHOLE = "what holds a statistic constant on purpose has no derivative to compare with"


@seam("reverse mode to order four", is_exact, _WHOLE)
def _(subject: Subject) -> None:
    value, wanted = orders(subject)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found = [value(t)]
    for _ in range(4):
        y = found[-1]
        found.append(torch.autograd.grad(y, t, create_graph=True)[0] if y.requires_grad else torch.zeros_like(y))
    near_derivatives(torch.stack(found), wanted)


@seam("forward mode to order four", is_exact, _WHOLE)
def _(subject: Subject) -> None:
    value, wanted = orders(subject)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    nested: Callable[..., Any] = value
    for _ in range(4):
        nested = partial(lambda f, t: jvp(f, (t,), (one,)), nested)  # of a pair the pair of pairs, and so on
    every, found = nested(zero), []
    for order in range(5):
        part = every
        for level in range(4):
            part = part[level >= 4 - order]
        found.append(part)
    near_derivatives(torch.stack(found), wanted)


def hessian(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[[Subject], None]:
    def run(subject: Subject) -> None:
        value = subjects.moved(subject.fresh(), subject.inputs(), 2)

        first, last, both = (known(subject.name, line, 2)[2] for line in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
        mixed = (both - first - last) / 2
        found = outer(inner(lambda t: value(t[0], t[1])))(torch.zeros(2, dtype=torch.float64))
        near_derivatives(found, torch.stack([first, mixed, mixed, last]).view(2, 2))

    return run


for _outer in (jacfwd, jacrev):
    for _inner in (jacfwd, jacrev):
        seam(f"Hessian by {_outer.__name__}({_inner.__name__})", is_exact, _WHOLE)(hessian(_outer, _inner))


@seam("second derivatives of a layer that runs twice", lambda subject: subject.is_rule)
def _(subject: Subject) -> None:
    def penalty(backend: str) -> list[Tensor]:
        made = subject.fresh()
        made.backend = backend
        (x,), leaves = subjects.leaves_of(made, subject.inputs())
        y = made(made(x))
        slopes = torch.autograd.grad((y.square() * directions(y.detach())).sum(), leaves, create_graph=True)
        return subjects.pulled(torch.stack([slope.square().sum() for slope in slopes]), leaves)

    near(penalty("auto"), penalty("reference"))


# Transforms of functions


def batched(subject: Subject) -> tuple[Any, Tensor, Values]:
    made, (x, *extra) = still(subject), subject.inputs()
    return made, torch.stack([x, 2 * x, x.flip(0)]), tuple(extra)


@seam("vmap over inputs")
def _(subject: Subject) -> None:
    made, xs, extra = batched(subject)
    with torch.no_grad():
        near(vmap(lambda x: output(made, x, *extra))(xs), torch.stack([output(made, x, *extra) for x in xs]))


@seam("vmap of grad")
def _(subject: Subject) -> None:
    made, xs, extra = batched(subject)

    def loss(x: Tensor) -> Tensor:
        return output(made, x, *extra).pow(3).sum()

    leaves = [x.clone().requires_grad_() for x in xs]
    wanted = [torch.autograd.grad(loss(x), x)[0] for x in leaves]
    near(vmap(grad(loss))(xs), torch.stack(wanted))


@seam("vmap over parameters", has_parameters)
def _(subject: Subject) -> None:
    made, inputs = still(subject), subject.inputs()
    state = {key: value.detach() for key, value in made.named_parameters()}
    many = {key: torch.stack([value, 1.5 * value]) for key, value in state.items()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        y = functional_call(made, parameters, inputs)
        return y[0] if isinstance(y, tuple) else y

    wanted = [run({key: value[k] for key, value in many.items()}) for k in range(2)]
    near(vmap(run)(many), torch.stack(wanted))
    slopes = vmap(grad(lambda parameters: run(parameters).square().sum()))(many)
    for k in range(2):
        leaves = {key: value[k].requires_grad_() for key, value in many.items()}
        found = torch.autograd.grad(run(leaves).square().sum(), list(leaves.values()))
        near([slopes[key][k] for key in leaves], found)


@seam("functional_call, parameters of another dtype", lambda subject: subject.is_rule and has_parameters(subject))
def _(subject: Subject) -> None:
    made, inputs = subject.fresh().float(), cast(subject.inputs(), torch.float32)
    for dtype in HALVES:
        state = {key: value.detach().to(dtype).requires_grad_() for key, value in made.named_parameters()}
        y = functional_call(copy.deepcopy(made), state, inputs)
        like = copy.deepcopy(made).to(dtype)
        wanted, parts = definition(like, inputs)
        near((y, subjects.pulled(y, list(state.values()))), (wanted, parts[1:]), dtype)
        assert y.dtype == torch.float32


@seam("autocast", is_input_of_networks, "what is fitted in float32 has laws of its own")
def _(subject: Subject) -> None:
    made, inputs = subject.fresh().float(), cast(subject.inputs(), torch.float32)
    wanted = definition(made, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(made, inputs)
    # The matrix products of a layer are what autocast is meant for; each rounds to bfloat16, as do the layers behind it.
    near(found, wanted, torch.bfloat16, 4 * subject.roundings)
    assert all(part.dtype == torch.float32 for part in found[1])


def half(parameters: bool) -> Callable[[Subject], None]:
    def run(subject: Subject) -> None:
        for dtype in HALVES:
            made, inputs = subject.fresh().to(dtype if parameters else torch.float32), cast(subject.inputs(), dtype)
            wanted = definition(made, inputs)
            found = gradients(made, inputs)
            near(found, wanted, dtype, 2 * subject.roundings)
            assert found[0].dtype == dtype

    return run


seam("a module of half precision", is_input_of_networks, "statistics of data keep float32")(half(True))
seam("inputs of half precision, parameters of float32", is_layer)(half(False))
