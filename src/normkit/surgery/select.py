"""Which layers: a word, a pattern or a predicate, read against a model."""

import re
from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normkit.core.errors import NotationError, SurgeryError, closest
from normkit.surgery.changes import label
from normkit.weights.layout import hooked_weight

Where = str | Callable[[str, nn.Module], bool]

PLACES = ("first_last", "all", "hidden", "convolutions", "attention", "re:PATTERN")
_BY_CHANNEL = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
_NORMS = (*_BY_CHANNEL, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# As peft and torchtune name the matrices of low-rank adapters.
_ADAPTER = re.compile(r"(^|\.)lora_", re.IGNORECASE)
# As torch, transformers and timm name the query's, key's and value's layers, apart or packed in this order.
_ATTENTION = re.compile(r"(^|\.)(to_)?([qkv]|query|key|value|[qkv]_proj|[qkv]_lin|qkv|c_attn)$")


def select(model: nn.Module, where: Where = "all") -> dict[str, nn.Module]:
    """Choose the layers of a model whose weight is a matrix or a convolution kernel.

    The words count Linear, Conv, ConvTranspose, MultiheadAttention (its input projection; its output projection is a Linear),
    LSTM, GRU, RNN and their cells (all their matrices) and the Conv1D of Hugging Face's GPT-2, in the order in which they were
    registered. Embeddings and other modules with a weight of two or more axes are not counted, nor are the matrices of low-rank
    adapters (``lora_A``, ``lora_B``), of which one starts at zero: only a pattern or a predicate reaches them.

    ================  ======================================================================================
    ``first_last``    the first and the last
    ``all``           every one
    ``hidden``        all but the first and the last
    ``convolutions``  every Conv and ConvTranspose
    ``attention``     MultiheadAttention, and layers named as queries, keys and values are: ``q_proj``, ``query``, ``qkv``, ...
    ``re:PATTERN``    those in whose name the regular expression is found (``re.search``; ``^`` and ``$`` anchor it)
    a predicate       those for which ``predicate(name, module)`` is true
    ================  ======================================================================================

    Args:
        model: any module.
        where: a word, a pattern or a predicate. Default: ``"all"``.

    Returns names and layers, each module once, under its first name.

    Raises:
        NotationError: there is no such word, the pattern can't be read, or it is neither text nor a function.
        SurgeryError: no layer is chosen, or one without its weight yet.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> list(select(model, "first_last")), list(select(model, "hidden")), list(select(model, "re:^0"))
    (['1', '3'], ['2'], ['0'])
    """
    found = {name: module for name, module in model.named_modules() if "parametrizations" not in name.split(".")}
    named = isinstance(where, str) and not where.startswith("re:")
    if named:
        own = {name: module for name, module in found.items() if isinstance(module, _LAYERS) or is_gpt2_linear(module)}
        layers = {name: module for name, module in own.items() if not _ADAPTER.search(name)}
    else:
        layers = {name: module for name, module in found.items() if weight_names(module)}
    chosen = choose(layers, where, "layers with a weight")
    for name, layer in chosen.items():
        for weight in weight_names(layer):
            raw = layer._parameters.get(weight)
            if raw is not None and is_lazy(raw):
                raise SurgeryError(
                    f"{label(name)}: its {weight} has no size yet; run the model once on an example first"
                )
    return chosen


def choose(candidates: Mapping[str, nn.Module], where: Where, what: str) -> dict[str, nn.Module]:
    """Choose among candidates by a word, a pattern or a predicate; an empty choice is refused."""
    names = list(candidates)
    if not isinstance(where, str):
        if not callable(where):
            raise NotationError(f"where is a {type(where).__name__}; wanted a word, 're:PATTERN' or a function")
        chosen = [name for name in names if where(name, candidates[name])]
    else:
        check_place(where)
        if where.startswith("re:"):
            chosen = [name for name in names if re.search(where[3:], name)]
        elif where == "convolutions":
            chosen = [name for name in names if isinstance(candidates[name], _ConvNd)]
        elif where == "attention":
            chosen = [n for n in names if _ATTENTION.search(n) or isinstance(candidates[n], nn.MultiheadAttention)]
        else:
            chosen = {"first_last": [*names[:1], *names[1:][-1:]], "all": names, "hidden": names[1:-1]}[where]
    if not chosen:
        said = where if isinstance(where, str) else getattr(where, "__name__", "the predicate")
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        known = ", ".join(label(name) for name in names[:20]) + more
        raise SurgeryError(f"{said!r} chooses nothing; {what} that exist: {known or 'none'}")
    return {name: candidates[name] for name in chosen}


def check_place(where: str) -> None:
    """Refuse a word that is no place, and a pattern that can't be read."""
    if where.startswith("re:"):
        try:
            re.compile(where[3:])
        except re.error as error:
            raise NotationError(f"place {where!r}: the pattern can't be read: {error}") from None
    elif where not in PLACES[:-1]:
        raise NotationError(
            f"place {where!r} is not known{closest(where, PLACES)}; places that exist: {', '.join(PLACES)}; layers by name: "
            f"{'re:' + where!r}"
        )


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's weights of two or more axes; none for norms and for modules without."""
    if isinstance(layer, nn.MultiheadAttention):
        parts = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        names = parts if layer.in_proj_weight is None else ("in_proj_weight",)
        return names
    if isinstance(layer, nn.RNNBase):
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight"))
    if isinstance(layer, nn.RNNCellBase):
        return "weight_ih", "weight_hh"
    if isinstance(layer, _NORMS):
        return ()
    raw = layer._parameters.get("weight")
    hooked = hooked_weight(layer, "weight")
    held = [raw] if raw is not None else [] if hooked is None else [hooked[1]]
    if parametrize.is_parametrized(layer, "weight"):
        held = list(layer.parametrizations["weight"].parameters(recurse=False))  # pyright: ignore
    return ("weight",) if any(is_lazy(tensor) or tensor.dim() >= 2 for tensor in held) else ()


def is_gpt2_linear(module: nn.Module) -> bool:
    """Whether it is the linear layer of Hugging Face's GPT-2, whose weight is (in, out)."""
    return type(module).__name__.removeprefix("Parametrized") == "Conv1D" and hasattr(module, "nf")
