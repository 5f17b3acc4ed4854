"""Give a model's norms to normkit's own layers of the same kind: the same function, on faster kernels."""

from __future__ import annotations

from typing import Any

from torch import nn

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.norms import describe, read_norm
from normkit.surgery.select import Where, choose
from normkit.surgery.substitute import inherit, put
from normkit.surgery.target import Target, any_tensor
from normkit.surgery.transaction import transaction
from normkit.surgery.watch import try_on

# torch's own classes, each with its word; a class of someone else may compute something else.
_WORDS: dict[type[nn.Module], str] = {
    nn.BatchNorm1d: "bn",
    nn.BatchNorm2d: "bn",
    nn.BatchNorm3d: "bn",
    nn.GroupNorm: "gn",
    nn.InstanceNorm1d: "in",
    nn.InstanceNorm2d: "in",
    nn.InstanceNorm3d: "in",
    nn.LayerNorm: "ln",
    nn.RMSNorm: "rms",
}


def accelerate(model: nn.Module, *, where: Where | None = None, example: Any = None) -> Changes:
    """Put normkit's layer in the place of every norm of torch.nn, in place; the model computes what it did.

    Parameters and buffers are the very same objects (but for running statistics of a half type, which become float32), so an
    optimizer goes on, and the state_dict has the same keys. What is kept too: dtype, device, training flag, hooks, public
    attributes that the user set (``qconfig``), and that one module stands in several places. Instance norms with running
    statistics and batch norms without are left as they are.

    Code that looks for torch's classes, as to freeze batch norms, still finds ``nn.LayerNorm``, ``nn.GroupNorm``, ``nn.RMSNorm``;
    but not ``nn.BatchNorm2d``, ``nn.InstanceNorm2d`` and their like, whose place one class for every rank takes, and the row says
    so. Look for ``nn.modules.batchnorm._BatchNorm`` or ``nn.modules.instancenorm._InstanceNorm`` instead.

    Args:
        model: any module.
        where: which norms, as in ``select``, by their names. Default: all.
        example: an input on which the changed model is run once, without effect on it. Default: None.

    Returns:
        The model (a new one only where the model itself is a norm) and a row per norm.

    Raises:
        NotationError: ``where`` can't be read.
        SurgeryError: the changed model does not run on the example; the model is left as it was.

    >>> print(accelerate(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))))
    layer  before        after         note
    1      LayerNorm(8)  LayerNorm(8)
    """
    found = {name: module for name, module in model.named_modules() if _is_ours_to_take(name, module)}
    chosen = found if where is None else choose(found, where, "norms")
    like, new, rows = any_tensor(model), {}, []
    for name, module in chosen.items():
        norm = read_norm(name, module)
        word = _WORDS[type(module)]
        made, note = Target(word, norm.kind, norm.option).build(name, norm, like)
        if note:
            raise SurgeryError(
                f"{label(name)}: {describe(module)} can't be taken over as it is: {note}; leave it out with where="
            )
        new[id(module)] = inherit(made, module)
        note = "" if isinstance(made, type(module)) else f"isinstance(_, nn.{type(module).__name__}) no longer holds"
        rows.append(Change(label(name), describe(module), describe(made), note))
    with transaction(model) as opened:
        root = put(model, new)
        if example is not None:
            try_on(root, example)
        return opened.close(root, rows)


def _is_ours_to_take(name: str, module: nn.Module) -> bool:
    if type(module) not in _WORDS or "parametrizations" in name.split("."):
        return False
    usual = {"bn": True, "in": False}.get(_WORDS[type(module)])
    return usual is None or bool(module.track_running_stats) == usual
