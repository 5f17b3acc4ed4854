"""Keeps torch's fused transformer encoder from computing another function than its modules say."""

from __future__ import annotations

from torch import nn

from normkit.core.errors import SurgeryError
from normkit.surgery.changes import label


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


def refuse_time_first(model: nn.Module, norms: dict[str, nn.Module], to: str) -> None:
    """Refuse norms that would take time steps for samples: in torch's transformers made without ``batch_first``."""
    chosen = {id(norm): name for name, norm in norms.items()}
    for module in model.modules():
        layer: object = module
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            layer = next(iter(module.layers), None)
        if (
            not isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
            or layer.self_attn.batch_first
        ):
            continue
        for child in module.children():
            if id(child) in chosen:
                raise SurgeryError(
                    f"{label(chosen[id(child)])}: {to} normalizes each sample, and reads axis 0 as samples; this "
                    "transformer was made with batch_first=False, so axis 0 is time; make it with batch_first=True"
                )
