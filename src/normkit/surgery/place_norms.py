"""Other placements of the norms in torch's transformers."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.errors import SurgeryError
from normkit.residual import Place, Scheme, places
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.substitute import inherit, replace_modules
from normkit.surgery.transaction import transaction

_Layer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
_Stack = nn.TransformerEncoder | nn.TransformerDecoder


class PlacedLayer(nn.Module):
    """What a layer of torch's transformers becomes: the same children under the same names, the norms elsewhere."""

    def __init__(self, layer: nn.Module, places: Sequence[Place]) -> None:
        super().__init__()
        self.activation: Any = layer.activation
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.places = tuple(places)
        for k, place in enumerate(self.places, 1):
            norm = layer.get_submodule(f"norm{k}")
            self.add_module(f"norm{k}_after", another(norm) if place.formula == "sandwich" else None)
            if place.formula == "none":
                self.add_module(f"norm{k}", None)

    def join(self, k: int, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the k-th branch, from 1."""
        norm, after, dropout = (getattr(self, name) for name in (f"norm{k}", f"norm{k}_after", f"dropout{k}"))
        return self.places[k - 1].join(x, branch, norm, after, dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The last branch."""
        hidden = self.get_submodule("dropout")(self.activation(self.get_submodule("linear1")(x)))
        return self.get_submodule("linear2")(hidden)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}: {place}" for k, place in enumerate(self.places, 1))


class PlacedEncoderLayer(PlacedLayer):
    """A layer of an encoder; called as torch's."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As ``torch.nn.TransformerEncoderLayer``."""
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        attend = self.get_submodule("self_attn")
        x = self.join(1, src, lambda x: attend(x, x, x, need_weights=False, **masks)[0])
        return self.join(2, x, self.feed_forward)


class PlacedDecoderLayer(PlacedLayer):
    """A layer of a decoder; called as torch's."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As ``torch.nn.TransformerDecoderLayer``."""
        own = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        other = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask, "is_causal": memory_is_causal}
        attend, cross = self.get_submodule("self_attn"), self.get_submodule("multihead_attn")
        x = self.join(1, tgt, lambda x: attend(x, x, x, need_weights=False, **own)[0])
        x = self.join(2, x, lambda x: cross(x, memory, memory, need_weights=False, **other)[0])
        return self.join(3, x, self.feed_forward)


class NormalizedAttention(nn.Module):
    """Self-attention that normalizes queries, keys and values over the features of each head."""

    def __init__(self, attention: nn.MultiheadAttention, norm: nn.Module) -> None:
        super().__init__()
        self.heads, self.batch_first, self.dropout = attention.num_heads, attention.batch_first, attention.dropout
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.q_norm, self.k_norm, self.v_norm = (another(norm, attention.head_dim) for _ in range(3))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As ``torch.nn.MultiheadAttention`` without attention weights; ``key`` and ``value`` are the query."""
        if is_causal and attn_mask is None:  # a hint on a mask, as torch has it, not a mask
            raise SurgeryError("is_causal=True says that a mask is causal, and there is none; give the mask too")
        x = query if self.batch_first or query.dim() == 2 else query.transpose(0, 1)
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.squeeze(-3).transpose(-2, -3) for part in packed.split(1, -3))
        mask = None if attn_mask is None else _added(attn_mask, x.dtype)
        if mask is not None and mask.dim() == 3 and x.dim() == 3:
            mask = mask.unflatten(0, (-1, self.heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, x.dtype)[..., None, None, :]
            mask = padding if mask is None else mask + padding
        q, k, v, dropout = self.q_norm(q), self.k_norm(k), self.v_norm(v), self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(mixed.transpose(-2, -3).flatten(-2))
        return y if self.batch_first or query.dim() == 2 else y.transpose(0, 1), None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of torch's transformers as what is added to logits; where a boolean one is true, nothing is seen."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill(mask, -torch.inf)


def another(norm: nn.Module, features: int | None = None) -> nn.Module:
    """Another norm of the same kind, with its initial parameters; of fewer features if said."""
    made = copy.deepcopy(norm)
    if features is not None:
        for name, parameter in [*made.named_parameters(recurse=False)]:
            made.register_parameter(name, nn.Parameter(parameter.detach()[:features].clone()))
        if isinstance(made, nn.LayerNorm | nn.RMSNorm):
            made.normalized_shape = (features,)
    reset = getattr(made, "reset_parameters", None)
    if reset is None:
        raise SurgeryError(f"{type(norm).__name__} has no reset_parameters, so no other one of its kind can be made")
    reset()
    return made


def place_norms(model: nn.Module, scheme: Scheme, *, optimizer: torch.optim.Optimizer | None = None) -> Changes:
    """Place the norms of ``torch.nn.TransformerEncoder`` and ``TransformerDecoder`` elsewhere, in place, before training.

    Layers keep their children and these their names, so that a checkpoint of the one placement loads into another as far as it
    has the same norms. A stack whose last layer does not end with a norm gets a final one if it has none. ``"deep"`` also divides
    initial weights as DeepNorm asks, with the constants for an encoder with a decoder where the model has both. ``"hybrid"`` is
    for encoders.

    Args:
        model: any module with such stacks.
        scheme: ``"pre"``, ``"post"``, ``"sandwich"``, ``"branch"``, ``"deep"``, ``"mix"``, ``"scaled"`` or ``"hybrid"``; formulas
            are with ``normkit.Residual``.
        optimizer: of the model's parameters, which follows where norms are created or dropped. Default: None.

    Raises:
        OptionError: an unknown scheme.
        SurgeryError: there is no such stack, a norm that can't be copied, or ``"hybrid"`` for attention that it does not fit;
            the model is left as it was.

    Reference: See ``normkit.Residual``.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> changes = place_norms(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "scaled")
    >>> for row in changes:
    ...     print(row)
    layers.0: post -> scaled (x + f(norm(x)))
    layers.1: post -> scaled (x + f(0.707 norm(x)))
    norm: none -> LayerNorm (final norm)
    """
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, _Stack)}
    places(scheme, 1, 1)  # an unknown scheme is told before all else
    found = {
        (name, k): layer
        for name, stack in stacks.items()
        for k, layer in enumerate(stack.layers)
        if isinstance(layer, _Layer)
    }
    if not found and any(isinstance(module, PlacedLayer) for module in model.modules()):
        raise SurgeryError("place_norms: the model's norms are placed already; call undo() of those changes first")
    if not found:
        raise SurgeryError(
            "place_norms: the model has no TransformerEncoder or TransformerDecoder of torch.nn with layers of torch's; build "
            "other transformers from normkit.Residual"
        )
    written = [part for layer in found.values() for part in _started(layer)] if scheme == "deep" else []
    rows: list[Change] = []
    with transaction(model, optimizer, written) as opened:
        new: dict[int, nn.Module] = {}
        for (name, k), layer in found.items():
            full = label(f"{name}.layers.{k}".lstrip("."))
            place = _places(scheme, k + 1, stacks[name], list(stacks.values()))
            if id(layer) in new:  # it stands here too
                if list(cast(PlacedLayer, new[id(layer)]).places) != place:
                    raise SurgeryError(
                        f"{full}: it is a layer from above once more, and {scheme} places the two differently"
                    )
                continue
            try:
                made = _placed(layer, place)
                if scheme == "hybrid":
                    made.add_module("self_attn", _normalized(layer))
            except SurgeryError as error:
                raise SurgeryError(f"{full}: {error}") from error
            for part in _started(layer) if scheme == "deep" else ():
                with torch.no_grad():
                    part.mul_(made.places[0].start)
            new[id(layer)] = inherit(made, layer)
            before = "pre" if layer.norm_first else "post"
            rows.append(Change(full, before, scheme, "; ".join(dict.fromkeys(map(str, made.places)))))
        replace_modules(model, new)
        for name, stack in stacks.items():
            last = stack.layers[-1]
            if isinstance(last, PlacedLayer) and last.places[-1].formula != "post" and stack.norm is None:
                stack.norm = another(last.get_submodule("norm1"))
                rows.append(Change(label(f"{name}.norm".lstrip(".")), "none", type(stack.norm).__name__, "final norm"))
        return opened.close(model, rows)


def _places(scheme: Scheme, layer: int, stack: _Stack, stacks: Sequence[_Stack]) -> list[Place]:
    """The places of a layer's branches; DeepNorm's constants for an encoder with a decoder where there are both."""
    attention, feed_forward = places(scheme, layer, len(stack.layers))
    depths = [next((len(s.layers) for s in stacks if isinstance(s, kind)), 0) for kind in _Stack.__args__]
    if scheme == "deep" and all(depths):
        n, m = depths
        root = (n**4 * m) ** (1 / 16)
        encoder = Place("post", 0.81 * root, start=0.87 / root)
        decoder = Place("post", (3 * m) ** 0.25, start=(12 * m) ** -0.25)
        attention = feed_forward = encoder if isinstance(stack, nn.TransformerEncoder) else decoder
    return [attention] * (1 if isinstance(stack, nn.TransformerEncoder) else 2) + [feed_forward]


def _placed(layer: _Layer, places: Sequence[Place]) -> PlacedLayer:
    kind = PlacedEncoderLayer if isinstance(layer, nn.TransformerEncoderLayer) else PlacedDecoderLayer
    return kind(layer, places)


def _normalized(layer: _Layer) -> NormalizedAttention:
    attention = layer.self_attn
    if isinstance(layer, nn.TransformerDecoderLayer):
        raise SurgeryError("hybrid was published for self-attention alone, and this is a decoder's layer with another")
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise SurgeryError("hybrid takes attention with one packed projection, without bias_kv and add_zero_attn")
    if parametrize.is_parametrized(attention):
        raise SurgeryError("hybrid takes attention without parametrizations; put these on afterwards")
    return NormalizedAttention(attention, layer.norm1)


def _started(layer: _Layer) -> list[Tensor]:
    """The weights that DeepNorm starts smaller: of values, of attention's output, and of the feed-forward."""
    if any(parametrize.is_parametrized(part) for part in layer.modules()):
        raise SurgeryError("deep starts weights smaller, and these have parametrizations; put those on afterwards")
    found = [layer.linear1.weight, layer.linear2.weight]
    for attention in (layer.self_attn, getattr(layer, "multihead_attn", None)):
        if attention is not None:
            packed = attention.in_proj_weight
            found += [attention.v_proj_weight if packed is None else packed.chunk(3)[2], attention.out_proj.weight]
    return [part.detach() for part in found]
