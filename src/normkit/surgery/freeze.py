"""Batch normalizations that stay as they are through ``train()``."""

from typing import Any

from torch import Tensor, nn

from normkit.core.errors import OptionError, SurgeryError
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.norms import describe
from normkit.surgery.select import Where, choose
from normkit.surgery.transaction import transaction


def freeze(model: nn.Module, where: Where = "all", *, statistics: bool = True, affine: bool = True) -> Changes:
    """Let batch normalizations stay as they are through ``model.train()``, in place, until ``unfreeze``.

    ``requires_grad_(False)`` leaves the running statistics moving, and ``eval()`` of a layer is undone by the next ``train()`` of
    the model. Here a hook on the layer puts it into evaluation each time that it runs; parameters, keys and class stay.

    Args:
        model: any module.
        where: which normalizations with running statistics, as in ``select``, by their names. Default: "all".
        statistics: whether running statistics stay, and are what the layer normalizes by. Default: True.
        affine: whether weight and bias stay. Default: True.

    Returns the model, a row per layer, and the way back, which restores each ``requires_grad`` as it was; ``unfreeze``
    sets all of them to True.

    Raises:
        NotationError: ``where`` can't be read.
        OptionError: neither is to stay.
        SurgeryError: no layer keeps running statistics, or none is chosen.

    >>> model = nn.Sequential(nn.BatchNorm1d(2))
    >>> print(freeze(model))
    layer  before          after           note
    0      BatchNorm1d(2)  BatchNorm1d(2)  statistics, weight and bias stay
    """
    if not statistics and not affine:
        raise OptionError("freeze: statistics=False and affine=False leave nothing to freeze; choose one at least")
    chosen = _normalizations(model, where)
    said = ", ".join(["statistics"] * statistics + ["weight and bias"] * affine)
    rows = []
    with transaction(model) as opened:
        for name, norm in chosen.items():
            if statistics and not is_frozen(norm):
                norm.register_forward_pre_hook(_stay)
                norm.training = False
            for parameter in norm.parameters(recurse=False):
                parameter.requires_grad_(parameter.requires_grad and not affine)
            rows.append(Change(label(name), describe(norm), describe(norm), f"{said} stay"))
        return opened.close(model, rows)


def unfreeze(model: nn.Module, where: Where = "all") -> Changes:
    """Let normalizations go on that ``freeze`` holds, in place: weight and bias are trained, and the mode is the model's.

    ``where`` and errors are those of ``freeze``.

    >>> model = nn.Sequential(nn.BatchNorm1d(2))
    >>> print(*unfreeze(freeze(model).model), model[0].training)
    0: BatchNorm1d(2) -> BatchNorm1d(2) (goes on) True
    """
    rows = []
    with transaction(model) as opened:
        for name, norm in _normalizations(model, where).items():
            for key, hook in list(norm._forward_pre_hooks.items()):
                if hook is _stay:
                    del norm._forward_pre_hooks[key]
            norm.training = model.training if norm is not model else True
            norm.requires_grad_(True)
            rows.append(Change(label(name), describe(norm), describe(norm), "goes on"))
        return opened.close(model, rows)


def is_frozen(norm: nn.Module) -> bool:
    """Whether ``freeze`` holds a layer's statistics."""
    return any(hook is _stay for hook in norm._forward_pre_hooks.values())


def _stay(norm: nn.Module, args: Any) -> None:
    norm.training = False


def _normalizations(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    # What updates statistics has a momentum; a frozen class has none, and stays by itself.
    kept = {name: module for name, module in model.named_modules() if hasattr(module, "momentum")}
    found = {name: module for name, module in kept.items() if isinstance(module._buffers.get("running_mean"), Tensor)}
    if not found:
        raise SurgeryError("no layer of the model keeps running statistics that move")
    return choose(found, where, "normalizations with running statistics")
