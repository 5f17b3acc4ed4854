"""Seams of values: what ran before, derivatives, transforms of functions, precision, memory."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from laws import channels_first, sub_batch
from normkit.engine.library import library
from seam import (
    HALVES,
    cast,
    has_parameters,
    is_exact,
    is_first,
    is_input_of_networks,
    is_layer,
    near,
    refused,
    same,
    seam,
    still,
)
from subjects import (
    SUBJECTS,
    Subject,
    Values,
    definition,
    derivatives,
    directions,
    gradients,
    leaves_of,
    moved,
    output,
    pulled,
)

# After another call


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


# Derivatives, against those of the polynomial through values of plain code


@cache
def known(name: str, directions: tuple[float, ...], order: int) -> Tensor:
    """Derivatives of plain code's values along a line, or along a sum of lines."""
    (subject,) = (one for one in SUBJECTS if one.name == name)
    value = moved(subject.fresh(), subject.inputs(), len(directions))
    # Closer for fewer, as rectifiers have kinks.
    radius = 0.02 if order > 2 else 0.002
    return derivatives(lambda t: value(*(a * t for a in directions), run=subject.plain), order, radius)


def orders(subject: Subject) -> tuple[Callable[..., Tensor], Tensor]:
    return moved(subject.fresh(), subject.inputs()), known(subject.name, (1.0,), 4)


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
        value = moved(subject.fresh(), subject.inputs(), 2)

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
        (x,), leaves = leaves_of(made, subject.inputs())
        y = made(made(x))
        slopes = torch.autograd.grad((y.square() * directions(y.detach())).sum(), leaves, create_graph=True)
        return pulled(torch.stack([slope.square().sum() for slope in slopes]), leaves)

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
        near((y, pulled(y, list(state.values()))), (wanted, parts[1:]), dtype)
        assert y.dtype == torch.float32


# Precision


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


# Memory


def in_views(change: Callable[[Tensor], Tensor]) -> Callable[[Subject], None]:
    def run(subject: Subject) -> None:
        made, (x, *extra) = subject.fresh(), subject.inputs()
        view = change(x)
        near(gradients(copy.deepcopy(made), (view, *extra)), definition(made, (view, *extra)))

    return run


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a transposed input": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "an input with the first two axes exchanged": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "an expanded input": lambda x: (
        x[..., :1].expand(x.shape) + x[:1].mul(0) if x.dim() == 2 else x[:, :1].expand(x.shape)
    ),
    "a sliced input": lambda x: torch.cat([x, x], -1).repeat_interleave(2, 0)[1::2, ..., x.shape[-1] // 2 :][
        ..., : x.shape[-1]
    ],
    "an input with steps of two": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "a negative-bit view": lambda x: torch._neg_view(x),  # pyright: ignore[reportPrivateImportUsage]
}
for _name, _change in VIEWS.items():
    seam(_name)(in_views(_change))


def images(subject: Subject, last: bool) -> tuple[Any, Values]:
    made = subject.fresh()
    x = torch.randn(2 * max(sub_batch(subject.card), 1), 4, 3, 5, dtype=torch.float64)
    return made, subject.inputs(x.to(memory_format=torch.channels_last) if last else x)


@seam("channels-last images", is_first, "what has its features last is contiguous then")
def _(subject: Subject) -> None:
    made, inputs = images(subject, last=True)
    y, (first, *rest) = gradients(copy.deepcopy(made), inputs)
    near((y, [first, *rest]), definition(made, inputs))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous(memory_format=torch.channels_last)


@seam("an empty batch")
def _(subject: Subject) -> None:
    made = subject.fresh()
    x = subject.sample()[:0]
    inputs = subject.inputs(x)
    y, parts = gradients(made, inputs)
    assert len(y) == 0
    assert all((part == 0).all() for part in parts)


def takes_nested(subject: Subject) -> bool:
    rule = subject.card.rule
    return subject.is_rule and rule.support.axes == "* d"


@seam("nested tensors, strided and jagged", takes_nested, "as in torch: norms of a token by itself take them")
def _(subject: Subject) -> None:
    made = subject.fresh()
    parts = [torch.randn(rows, 4, dtype=torch.float64) for rows in (2, 5)]
    wanted = [definition(made, (part,)) for part in parts]
    for layout in (torch.strided, torch.jagged):
        leaves = [part.clone().requires_grad_() for part in parts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
            found = made(torch.nested.as_nested_tensor(leaves, layout=layout)).unbind()
        near([one.detach() for one in found], [y for y, _ in wanted])
        flat = torch.cat([one.reshape(-1) for one in found])
        weights = torch.cat([directions(one).reshape(-1) for one in found])
        near(torch.autograd.grad(flat, leaves, weights), [dx for _, (dx, *_) in wanted])


_BY_TORCH = ("preconditioning", "spectral_conditioning")  # weights that no kernel makes


def own_kernels(subject: Subject) -> bool:
    weight = subject.kind == "weight" and subject.card.name not in _BY_TORCH
    return library() is not None and (subject.is_rule or weight) and has_parameters(subject)


def own_parameters(subject: Subject) -> list[str]:
    """All, but for the bias of a parametrized layer, which torch takes."""
    return [key for key, _ in subject.fresh().named_parameters() if subject.kind == "layer" or key != "bias"]


@seam("parameters of another size are refused", own_kernels)
def _(subject: Subject) -> None:
    for key in own_parameters(subject):
        made = subject.fresh()
        parameter = made.get_parameter(key)
        parameter.data = torch.cat([parameter.data.reshape(-1)] * 2)
        refused(lambda made=made: made(*subject.inputs()))


@seam("parameters without memory are refused", own_kernels)
def _(subject: Subject) -> None:
    for key in own_parameters(subject):
        made = subject.fresh()
        made.get_parameter(key).untyped_storage().resize_(0)
        refused(lambda made=made: made(*subject.inputs()))
        if subject.kind == "weight":
            continue  # a weight of the meta device goes on to torch's own product, which takes it without a word
        made = subject.fresh()
        *path, last = key.split(".")
        made.get_submodule(".".join(path))._parameters[last] = nn.Parameter(made.get_parameter(key).to("meta"))
        refused(lambda made=made: made(*subject.inputs()).tolist())


@seam(
    "a weight freed before the backward pass is refused",
    lambda subject: own_kernels(subject) and subject.is_rule and subject.fresh().weight is not None,
)
def _(subject: Subject) -> None:
    made, inputs = subject.fresh(), subject.inputs()
    y = output(made, *inputs)
    made.weight.untyped_storage().resize_(0)
    refused(lambda: y.backward(torch.ones_like(y)))


_ARRAYS = ("batch_norm", "sync_batch_norm", "recurrent_batch_norm")


@seam(
    "running statistics without memory are refused",
    lambda subject: subject.name in _ARRAYS and library() is not None,
    "other layers blend theirs by torch's operators, which end the process",
)
def _(subject: Subject) -> None:
    for training in (True, False):
        made, inputs = subject.fresh().train(training), subject.inputs()
        for key, buffer in made.named_buffers():
            if "running" in key:
                buffer.untyped_storage().resize_(0)
        refused(lambda made=made, inputs=inputs: made(*inputs))


@seam("an input without memory is refused", lambda subject: subject.is_rule and library() is not None)
def _(subject: Subject) -> None:
    made, (x, *extra) = subject.fresh(), subject.inputs()
    x.untyped_storage().resize_(0)
    refused(lambda: output(made, x, *extra))
