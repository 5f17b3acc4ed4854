"""Keeps torch's fused transformer encoder from computing another function than its modules say."""

from __future__ import annotations

from torch import nn


def leave_fast_path(model: nn.Module) -> None:
    """Make encoder layers whose norms are no longer layer norms run their modules.

    In evaluation without gradients ``nn.TransformerEncoderLayer`` hands the weight, bias and eps of norm1 and norm2 to a fused
    kernel that computes layer normalization whatever modules stand there. It does so only for an activation that the kernel
    knows, by an attribute that nothing else reads; ``nn.TransformerEncoder`` makes nested tensors for it only if told.
    """
    left = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not (
            _is_layer_norm(module.norm1) and _is_layer_norm(module.norm2)
        ):
            module.activation_relu_or_gelu = 0
            left.add(id(module))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(id(layer) in left for layer in module.layers):
            module.use_nested_tensor = False


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and getattr(module, "over", None) is None
