"""The recipes that a comparison tries on a model where none are named: those that suit what the model has."""

from collections import Counter
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from normkit.core.errors import SurgeryError
from normkit.lab.say import counted
from normkit.surgery.norms import is_norm, read_norm
from normkit.surgery.recipe import why_not

# Each kind of norm that stands in for another of the same reach: over features alone.
OTHERS = {"layer_norm": "rms", "rms_norm": "ln"}
WORDS = {"batch_norm": "batch norm", "layer_norm": "layer norm", "rms_norm": "RMS norm", "group_norm": "group norm"}


def default_recipes(model: nn.Module, example: Any = None) -> tuple[tuple[str, ...], str]:
    """Chooses recipes by what a model has.

    The first, the baseline, is the model as it is: ``bn`` where all its norms are batch norms, else ``keep``. Next come
    RMS norm where it has layer norms, or the reverse; weight standardization where it has convolutions; weight norm; and
    weight conditioning of its first and last layer. Each is tried on the model; one that it can't have is left out. Gives
    the recipes, and in a sentence why these.

    >>> default_recipes(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    (('keep', 'rms', 'keep+wn', 'keep+e'), 'the model has 1 layer norm and 2 linear layers')
    >>> default_recipes(nn.LSTM(4, 8))[0]
    ('keep', 'keep+wn', 'keep+e')
    """
    kinds = Counter(_kind(name, module) for name, module in model.named_modules() if is_norm(module))
    convolutions = sum(isinstance(module, _ConvNd) for module in model.modules())
    base = "bn" if list(kinds) == ["batch_norm"] else "keep"
    most = kinds.most_common(1)[0][0] if kinds else ""
    swap = [OTHERS[most]] if most in OTHERS else []
    # A patch embedding is a convolution too, which no norm follows.
    standardized = [f"{base}+ws"] if convolutions > 1 and not swap else []
    reasons = {text: why_not(model, text, example) for text in (*swap, *standardized, f"{base}+wn", f"{base}+e")}
    left = "; ".join(reason for reason in reasons.values() if reason)
    has = [counted(count, WORDS.get(kind, kind.replace("_", " "))) for kind, count in kinds.items()] or ["no norm"]
    for of, what in (((_ConvNd,), "convolution"), ((nn.RNNBase,), "recurrent layer"), ((nn.Linear,), "linear layer")):
        if count := sum(isinstance(module, of) for module in model.modules()):
            has.append(counted(count, what))
    listed = has[0] if len(has) == 1 else f"{', '.join(has[:-1])} and {has[-1]}"
    reason = f"the model has {listed}" + (f"; left out, as they don't apply: {left}" if left else "")
    return (base, *(text for text, why in reasons.items() if not why)), reason


def _kind(name: str, module: nn.Module) -> str:
    try:
        return read_norm(name, module).kind
    except SurgeryError:
        return "norm of its own"
