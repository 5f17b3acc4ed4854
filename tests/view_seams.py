"""Seams of memory: views, formats, empty and nested inputs, and tensors whose memory is gone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from laws import sub_batch
from normkit.engine.library import library
from seam import has_parameters, is_first, near, refused, seam
from subjects import Subject, Values, definition, directions, gradients, output


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
    made(parts[0])  # warm
    for layout in (torch.strided, torch.jagged):
        leaves = [part.clone().requires_grad_() for part in parts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
            nested = torch.nested.as_nested_tensor(leaves, layout=layout)
            found = made(nested).unbind()
            assert made(torch.nested.nested_tensor([], dtype=torch.float64)).dtype == torch.float64
        assert made.explain(nested).backend == "nested"
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
