"""Norms and layers as other libraries write them, with random parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def random_(module: Any, scale: float = 1.0, *, mean: float = 0.0, keep: bool = False) -> Any:
    """Gives a module normal parameters, or adds them to those that it has."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(keep * parameter + mean + scale * torch.randn_like(parameter))
    return module


def wired(way: Callable[..., Any], **parts: Any) -> Any:
    """A module of parts by name, whose forward is given: what a network of one's own does with them."""
    module = type("Wired", (nn.Module,), {"forward": way})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def lived_in(model: nn.Module) -> nn.Module:
    """In float64 and evaluation, with parameters and statistics that are not those of the start."""
    model = model.double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            far = name.endswith(("var", "std"))
            tensor.data.copy_(torch.rand_like(tensor) + 0.5 if far else torch.randn_like(tensor))
    return model


class LateNorm(nn.Module):
    """Root mean square normalization as language models write it: with statistics in float32."""

    def __init__(self, size: int, offset: float = 0.0, early: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(size)), eps
        self.offset, self.early = offset, early

    def normalized(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        y, gain = self.normalized(hidden_states), self.offset + self.weight
        return gain * y.to(hidden_states.dtype) if self.early else (y * gain.float()).to(hidden_states.dtype)


class LlamaRMSNorm(LateNorm):
    """Rounds before the weight."""


class GemmaRMSNorm(LateNorm):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, offset=1.0, early=False, eps=eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return (self.normalized(hidden_states) * (1.0 + self.weight.float())).type_as(hidden_states)


class CenteredNorm(LateNorm):
    """Layer normalization without a bias, in float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x - x.mean(-1, keepdim=True)
        return (self.weight.float() * self.normalized(x)).to(hidden_states.dtype)


class BareNorm(nn.Module):
    """Layer normalization without parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.normalized_shape = (size,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        return nn.functional.layer_norm(x, self.normalized_shape, None, None, eps=1e-5).to(hidden_states.dtype)


class ChannelsNorm(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, input: Tensor) -> Tensor:
        x = nn.functional.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class BatchNormAct(nn.BatchNorm2d):
    """Norm, dropout and activation in one layer."""

    def __init__(self, size: int, act: nn.Module, p: float = 0.0) -> None:
        super().__init__(size)
        self.drop, self.act = nn.Dropout(p) if p else nn.Identity(), act

    def forward(self, input: Tensor) -> Tensor:
        kept = self.running_mean, self.running_var, self.weight, self.bias
        y = nn.functional.batch_norm(input, *kept, self.training, self.momentum, self.eps)
        if self.training:
            self.num_batches_tracked.add_(1)
        return self.act(self.drop(y))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, size: int) -> None:
        super().__init__(2, size)
        self.act = nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(nn.functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps))


class HeadsNorm(CenteredNorm):
    """Over the features of each head, with a gain for each."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(8)
        self.weight = nn.Parameter(torch.randn(size))


class GatedNorm(LateNorm):
    """With a gate, before or after normalizing, over groups."""

    def __init__(self, size: int, before: bool, groups: int = 1) -> None:
        super().__init__(size)
        self.before, self.groups = before, groups

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, opened = hidden_states.float(), nn.functional.silu(gate.float())
        x = x if self.before else x * opened
        x = self.normalized(x.unflatten(-1, (self.groups, -1))).flatten(-2)
        y = self.weight * x.to(hidden_states.dtype)
        return (y * opened).to(hidden_states.dtype) if self.before else y


class OptionalGateNorm(GatedNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return self.weight * self.normalized(hidden_states).to(hidden_states.dtype)
        return super().forward(hidden_states, gate)


class SigmoidGateNorm(GatedNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return self.weight * self.normalized(hidden_states) * gate.sigmoid()


class Standardizing(nn.Conv2d):
    """Standardizes its weight in forward."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class ScaledStandardizing(nn.Conv2d):
    """Standardizes it by a function, and has a gain for each output."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.randn(self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.flatten(1)[None]
        weight = nn.functional.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0, eps=1e-6)
        return nn.functional.conv2d(input, weight.view_as(self.weight), self.bias)


class DetectorsFrozenBatchNorm2d(nn.Module):
    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.5), ("bias", 0.3), ("running_mean", 0.2), ("running_var", 0.7)):
            self.register_buffer(name, torch.full((size,), value) + 0.1 * torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Conv1D(nn.Module):
    """The linear layer of Hugging Face's GPT-2, whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)
