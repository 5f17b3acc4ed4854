"""Convert the activation norms of a model to another kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.fast_path import leave_fast_path, refuse_time_first
from normkit.surgery.norms import describe, is_norm, read_norm
from normkit.surgery.select import Where, choose
from normkit.surgery.target import Target, any_tensor
from normkit.surgery.transaction import all_or_nothing

# Shared with the old layer, not copied: handles that remove a hook point at these very dictionaries.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def convert(
    model: nn.Module, to: str, *, source: str | None = None, where: Where | None = None, example: Any = None
) -> Changes:
    """Convert every activation norm of a model to another kind, in place.

    Known are the norms of torch.nn and of normkit, and classes without children whose name contains "norm" and whose output
    on random inputs is that of layer or RMS normalization with gain ``weight`` or ``1 + weight``: LayerNorm2d, T5LayerNorm and
    the RMSNorms of Hugging Face. What is kept: gain and bias (the very parameters), eps, momentum, dtype, device, training flag,
    ``requires_grad``, hooks, and that one module stands in several places. What has no place in the new norm is dropped and
    what it has more is created; the row says so, and where a norm of each position by itself becomes one over positions, through
    which tokens of a causal model see later ones. A norm that is of the kind already is left as it is, whoever made it.

    A norm on channels first, ``(N, C, *)``, becomes ``LayerNorm(C, over="c *")`` by ``ln`` and ``RMSNorm(C, over="c *")`` by
    ``rms``, over channels and positions, so that the two differ in centring alone; ``ln:c`` and ``rms:c`` normalize each
    position. A norm over the last axis, ``(N, *, C)``, becomes ``BatchNorm(C, layout="n * c")`` and the like. Make the
    optimizer afterwards: it does not see parameters that are created.

    Args:
        model: any module.
        to: ``bn``, ``gn:32``, ``ln``, ``in``, ``rms``, ``none``, or the method's name, e.g. ``group_norm:32``.
        source: only norms of this kind, e.g. ``"batch_norm"``. Default: every kind.
        where: which of them, as in ``select``, by the names of the norms. Default: all.
        example: an input (a tensor, a tuple of arguments, or a dict of them) on which the changed model is run once, without
            effect on it, so that a norm that can't take its input is found now. Default: None.

    Returns:
        The model (a new one only where the model itself is a norm) and a row a norm.

    Raises:
        NotationError: ``to`` or ``where`` can't be read.
        SurgeryError: a norm can't be read or replaced, or there is none; the model is left as it was.

    Reference:
        The forms of layer normalization in convolutional networks follow Wu and He, "Group Normalization" (2018),
        https://arxiv.org/abs/1803.08494, where layer normalization is group normalization with one group.

    >>> print(convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "gn:4"))
    layer  before          after            note
    1      BatchNorm2d(8)  GroupNorm(4, 8)  running statistics dropped
    """
    target = Target.parse(to)
    kind = None if source is None else Target.parse(source).name
    found = {
        name: module
        for name, module in model.named_modules()
        if "parametrizations" not in name.split(".") and is_norm(module)
    }
    if not found and target.name == "none":
        return Changes(model, ())
    if not found:
        raise SurgeryError(
            f"the model has no activation norm to convert to {target}; begin the recipe with keep or none"
        )
    chosen = found if where is None else choose(found, where, "norms")
    new, rows, replaced = {}, [], {}
    like = any_tensor(model)
    for name, module in chosen.items():
        norm = read_norm(name, module)
        if target.is_kept(norm) or kind not in (None, norm.kind):
            continue
        made, note = target.build(name, norm, like)
        new[id(module)], replaced[name] = inherit(made, module), module
        rows.append(Change(label(name), describe(module), describe(made), note))
    if target.name in ("group_norm", "instance_norm"):
        refuse_time_first(model, replaced, str(target))
    return Changes(put(model, new, example), tuple(rows))


def put(model: nn.Module, new: Mapping[int, nn.Module], example: Any) -> nn.Module:
    """``replace_modules``, undone where the changed model does not run on the example."""
    with all_or_nothing(model):
        root = replace_modules(model, new)
        if new:
            leave_fast_path(root)
        if example is not None:
            try_on(root, example)
    return root


def inherit(made: nn.Module, module: nn.Module) -> nn.Module:
    """Give a module that is to stand in another's place its training flag and hooks."""
    made.train(module.training)
    for hooks in _HOOKS:
        if hasattr(module, hooks):
            setattr(made, hooks, getattr(module, hooks))
    return made


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put new modules wherever the old ones stand; return the root."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)


def run_on(model: nn.Module, example: Any) -> Any:
    """The model's output for an example: a tensor, a tuple or list of arguments, or a dict of them by name."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, Sequence) and not isinstance(example, str) else model(example)


def try_on(model: nn.Module, example: Any) -> None:
    """Run a changed model once on an example, in evaluation and without gradients; raise SurgeryError if it can't."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            run_on(model.eval(), example)
    except Exception as error:
        raise SurgeryError(f"the changed model does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        for module, training in flags:
            module.training = training
