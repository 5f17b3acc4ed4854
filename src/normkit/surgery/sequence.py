"""What a model reads as a sequence: whether its tokens may have an order, and which axis is time."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from normkit.surgery.watch import tensors_in

_TOKENS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.TransformerDecoderLayer,
)
_IMAGES = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MIXES_TOKENS = re.compile("atten|attn|transformer|causal|mamba|recurrent", re.IGNORECASE)


def may_be_causal(model: nn.Module, example: Any = None) -> bool:
    """Whether a position of a model's input may be forbidden to see later ones.

    With an example: unless that is images alone. Without: where the model embeds tokens, is recurrent or convolves along one
    axis, or has attention and takes no images. A model of linear layers on features has no positions.

    >>> may_be_causal(nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8))), may_be_causal(nn.TransformerEncoderLayer(8, 2))
    (False, True)
    """
    given = list(tensors_in(example))
    if given:
        return not all(tensor.dim() == 4 and tensor.is_floating_point() for tensor in given)
    kinds = {type(module) for module in model.modules()}
    if any(issubclass(kind, _TOKENS) for kind in kinds):
        return True
    mixes = any(_MIXES_TOKENS.search(kind.__name__) for kind in kinds)
    return mixes and not any(issubclass(kind, _IMAGES) for kind in kinds)


def time_first(model: nn.Module) -> set[int]:
    """The ids of modules whose input has time on axis 0: those in torch's transformers made without ``batch_first``."""
    found: set[int] = set()
    for module in model.modules():
        layer = module
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            layer = next(iter(module.layers), module)  # pyright: ignore[reportArgumentType]
        known = isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        if known and not layer.self_attn.batch_first:  # pyright: ignore[reportAttributeAccessIssue]
            found |= {id(child) for child in module.children()}
    return found
