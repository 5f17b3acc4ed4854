"""The arithmetic of folding: a scale and a shift per channel, taken into the layer before or behind them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normkit.surgery.norms import Norm
from normkit.surgery.select import is_gpt2_linear


def scale_and_shift(module: nn.Module, norm: Norm) -> tuple[Tensor, Tensor]:
    """What a norm applies last, per channel, in float64: its gain and bias, and its running statistics if it has such."""
    count = norm.shape[0]
    given = [part for part in (norm.weight, norm.bias, module._buffers.get("running_mean")) if part is not None]
    scale = torch.ones(count, dtype=torch.float64, device=given[0].device)
    shift = torch.zeros_like(scale)
    if norm.weight is not None:
        scale = norm.offset + norm.weight.detach().double()
    if norm.tracks:
        var, deviation = (module._buffers.get(name) for name in ("running_var", "running_std"))
        if var is not None:
            deviation = (var.double() + norm.guard(torch.float32)).sqrt()
        scale = scale if deviation is None else scale / deviation.double()
        shift = -module.get_buffer("running_mean").double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def absorb_behind(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Let a Linear, Conv or ConvTranspose, in groups or not, compute scale * layer(x) + shift, with new parameters."""
    kernel, bias = _kernel(layer), layer._parameters.get("bias")
    if isinstance(
        layer, _ConvTransposeNd
    ):  # (in, out / groups, *): groups lie in the first axis, output channels in the second
        apart = kernel.unflatten(0, (layer.groups, -1))
        kernel = (apart * scale.view(layer.groups, 1, -1, *[1] * (kernel.dim() - 2))).flatten(0, 1)
    else:
        kernel = kernel * scale.view(-1, *[1] * (kernel.dim() - 1))
    _set(layer, kernel, shift if bias is None else bias.detach().double() * scale + shift)


def absorb_before(layer: nn.Module, scale: Tensor, shift: Tensor) -> str:
    """Let a Linear or Conv compute layer(scale * x + shift), with new parameters; or give the reason why it can't."""
    kernel, bias, moved = _kernel(layer), layer._parameters.get("bias"), bool(shift.any())
    if isinstance(layer, _ConvTransposeNd):
        return "a transposed convolution behind it can't take it in"
    if isinstance(layer, _ConvNd) and moved and layer.padding_mode == "zeros" and _pads(layer):
        return "the convolution behind it pads with zeros, which the norm's shift would not reach"
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    view = (groups, 1, -1, *[1] * (kernel.dim() - 2))
    apart = kernel.unflatten(0, (groups, -1))
    added = (apart * shift.view(view)).flatten(0, 1).flatten(1).sum(1)
    old = None if bias is None else bias.detach().double()
    _set(layer, (apart * scale.view(view)).flatten(0, 1), old if not moved else added if old is None else old + added)
    return ""


def _pads(layer: _ConvNd) -> bool:
    padding = layer.padding
    return any(size > 1 for size in layer.kernel_size) if padding == "same" else padding != "valid" and any(padding)


def _kernel(layer: nn.Module) -> Tensor:
    """The weight in float64, output units first but for a transposed convolution."""
    kernel = layer.get_parameter("weight").detach().double()
    return kernel.t() if is_gpt2_linear(layer) else kernel


def _set(layer: nn.Module, kernel: Tensor, bias: Tensor | None) -> None:
    old, before = layer.get_parameter("weight"), layer._parameters.get("bias")
    weight = (kernel.t() if is_gpt2_linear(layer) else kernel).to(old.dtype).contiguous()
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=old.requires_grad))
    if bias is not None:
        trained = old.requires_grad if before is None else before.requires_grad
        layer.register_parameter("bias", nn.Parameter(bias.to(old.dtype), requires_grad=trained))


def centred(tensor: Tensor, axis: int) -> Tensor:
    """A tensor less its mean along an axis; a parameter where it was one."""
    wide = tensor.detach().double()
    value = (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
