"""Convert the activation norms of a model to another kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normkit.core.errors import OptionError, SurgeryError
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.fast_path import leave_fast_path
from normkit.surgery.norms import describe, is_norm, reach, read_norm
from normkit.surgery.select import Where, choose
from normkit.surgery.sequence import may_be_causal, time_first
from normkit.surgery.target import Target, any_tensor
from normkit.surgery.transaction import all_or_nothing
from normkit.surgery.watch import input_shapes

# As where a model hands its norm's weight to a function, or keeps norms in a plain list too and calls those.
_NOT_CALLED = "not called on the example: perhaps without effect"
Refusal = Literal["raise", "leave"]

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
    model: nn.Module,
    to: str,
    *,
    source: str | None = None,
    where: Where | None = None,
    example: Any = None,
    on_refusal: Refusal = "raise",
) -> Changes:
    """Convert every activation norm of a model to another kind, in place.

    Known are the norms of torch.nn and of normkit, and classes without children whose name contains "norm" and whose output
    on random inputs is that of layer or RMS normalization with gain ``weight`` or ``1 + weight`` or without parameters:
    LayerNorm2d, T5LayerNorm, the RMSNorms of Hugging Face, OLMo's LayerNorm. What is kept: gain and bias (the very parameters),
    eps, momentum, dtype, device, training flag, ``requires_grad``, hooks, public attributes that its user set (``qconfig``), and
    that one module stands in several places. What has no place in the new norm is dropped and what it has more is created; the
    row says so. Where a norm of each position by itself becomes one over positions, through which tokens of a causal model see
    later ones, the row says so too, unless the model can't be causal. A norm that is of the kind already is left as it is,
    whoever made it.

    A norm on channels first, ``(N, C, *)``, becomes ``LayerNorm(C, over="c")`` by ``ln`` where it normalized each position by
    itself, as in ConvNeXt, and else ``LayerNorm(C, over="c *")``; ``rms`` likewise, so that the two differ in centring alone.
    ``ln:c`` and ``ln:c *`` ask for one of them. A norm over the last axis, ``(N, *, C)``, becomes
    ``BatchNorm(C, layout="n * c")`` and the like. Make the optimizer afterwards: it does not see parameters that are created.

    Args:
        model: any module.
        to: a word such as ``bn``, ``gn:32``, ``ln``, ``ghost:16`` or ``none``, or the method's name, e.g. ``group_norm:32``. With
            ``gcd`` in front, ``gn:gcd32``, each layer gets as many groups as divide both 32 and its channels.
        source: only norms of this kind, e.g. ``"batch_norm"``. Default: every kind.
        where: which of them, as in ``select``, by the names of the norms. Default: all.
        example: an input (a tensor, a tuple of arguments, or a dict of them) on which the model is run before and after, without
            effect on it: a norm that can't take its input is found now, one that is not called is told, and what a norm alone
            does not tell (the number of its features, whether its input has positions) is seen. Default: None.
        on_refusal: ``"raise"``, or ``"leave"`` to leave a norm that can't be read or replaced as it is. Default: ``"raise"``.

    Returns:
        The model (a new one only where the model itself is a norm) and a row per norm; where one was left because it was refused,
        ``before`` equals ``after`` and the note has the reason.

    Raises:
        NotationError: ``to`` or ``where`` can't be read.
        OptionError: another ``on_refusal``.
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
    if on_refusal not in ("raise", "leave"):
        raise OptionError(f"convert: on_refusal={on_refusal!r}; wanted 'raise' or 'leave'")
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
    lazy = any(is_lazy(tensor) for tensor in model.parameters())  # a run would give them their size
    seen = {} if example is None or lazy else try_on(model, example, chosen.values(), "model")
    like, causal, by_time = any_tensor(model), may_be_causal(model, example), time_first(model)
    new, rows = {}, []
    for name, module in chosen.items():
        try:
            norm = read_norm(name, module, seen.get(id(module)))
            if kind not in (None, norm.kind) or (not norm.shape and norm.kind == target.name):
                continue
            made, note = target.build(name, norm, like, causal=causal)
            if target.is_kept(norm, made):
                continue
            if id(module) in by_time:
                _check_time_first(name, target, made)
        except SurgeryError as error:
            if on_refusal == "raise":
                raise
            reason = str(error).removeprefix(f"{label(name)}: ")
            rows.append(Change(label(name), describe(module), describe(module), f"left: {reason}"))
            continue
        new[id(module)] = inherit(made, module)
        rows.append(Change(label(name), describe(module), describe(made), note))
    with all_or_nothing(model):
        root = put(model, new, None)
        called = {} if example is None else try_on(root, example, new.values())
    if example is not None:
        uncalled = {id(module) for module in new.values()} - called.keys()
        names = {label(name) for name, module in root.named_modules() if id(module) in uncalled}
        rows = [row.with_note(_NOT_CALLED) if row.name in names else row for row in rows]
    return Changes(root, tuple(rows))


def _check_time_first(name: str, target: Target, made: nn.Module) -> None:
    """Refuse a norm that would take time steps for samples."""
    axes, card = frozenset() if target.card is None else reach(target.card, made), target.card
    if card is not None and (("*" in axes and "n" not in axes) or card.order_dependent):
        raise SurgeryError(
            f"{label(name)}: {target} normalizes each sample, and reads axis 0 as samples; this transformer was made with "
            "batch_first=False, so axis 0 is time; make it with batch_first=True"
        )


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
    """Give a module that is to stand in another's place its training flag, hooks and what its user set on it."""
    made.train(module.training)
    for hooks in _HOOKS:
        if hasattr(module, hooks):
            setattr(made, hooks, getattr(module, hooks))
    own = _own_names(type(module))
    for name, value in vars(module).items():
        # Private ones are what a class or a wrapper keeps of this very module; a method bound to it would call it.
        if name.startswith("_") or name in own or hasattr(made, name) or getattr(value, "__self__", None) is module:
            continue
        setattr(made, name, value)
    return made


def _own_names(cls: type) -> set[str]:
    """Every name that a class's code speaks of: an attribute that is not among them is its user's."""
    functions = (value for base in cls.__mro__ for value in vars(base).values() if isinstance(value, FunctionType))
    return {name for function in functions for name in function.__code__.co_names}


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


def try_on(
    model: nn.Module, example: Any, norms: Iterable[nn.Module] = (), what: str = "changed model"
) -> dict[int, torch.Size]:
    """Run a model once on an example, in evaluation and without gradients.

    Args:
        model: left in the mode it was in.
        example: its input.
        norms: modules to watch.
        what: the model, in messages.

    Returns:
        The shape of the first input of each watched module that was called, by its id.

    Raises:
        SurgeryError: it does not run.
    """
    flags = [(module, module.training) for module in model.modules()]
    watched = list(norms)
    try:
        with torch.no_grad():
            model.eval()
            if watched:
                return input_shapes(watched, lambda: run_on(model, example))
            run_on(model, example)
            return {}
    except Exception as error:
        raise SurgeryError(f"the {what} does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        for module, training in flags:
            module.training = training
