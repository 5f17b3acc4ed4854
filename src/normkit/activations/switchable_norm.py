"""Switchable normalization: learned mixtures of the moments of instance, layer and batch normalization."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normkit.core.card import Card, Paper
from normkit.core.compensation import Affine
from normkit.core.errors import check_options
from normkit.core.memory import Running, RunningStatistics
from normkit.core.module import Module
from normkit.core.moments import Moments, accumulation_dtype, moments
from normkit.core.support import Support, check_shape
from normkit.engine.layer import check_channels, check_several, given_statistics
from normkit.engine.pooling import pool

_INSTANCE = Support("n c *", over="*")
_BATCH = Support("n c *", over="n *")


class SwitchableNorm(Module):
    """Normalize by a learned mixture of the instance's, the layer's and the batch's mean, and another of their variances.

    y = weight * (x - m) / sqrt(v + eps) + bias, m = sum_k softmax(mean_weight)_k m_k, v = sum_k softmax(var_weight)_k v_k, k over
    instance, layer and batch in this order. The layer's and the batch's moments are pooled from the instance's, so x is read
    once. In evaluation running averages replace the batch's moments.

    If one logit is far above the others it is that normalizer, including running averages: these are kept as in batch
    normalization, starting at 0 and 1, with the unbiased variance.

    Args:
        num_features: channels C.
        eps: added to the variance. Default: 1e-5.
        momentum: weight of the new value in the running averages. Default: 0.1 (0.9 in the authors' notation).
        correction: 1 divides the instance's variance, from which the others follow, by the number of positions minus 1, as
            the authors' code does; 0 by their number. Default: 0.

    Shape:
        (N, C, *); the output has the same shape.

    Raises:
        ShapeError: a number of channels other than ``num_features``, or a single position.
        OptionError: an unknown correction.

    Reference:
        Luo, Ren, Peng, Zhang, Li, "Differentiable Learning-to-Normalize via Switchable Normalization" (2018),
        https://arxiv.org/abs/1806.10779.

    >>> SwitchableNorm(1)(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]])).detach().view(-1)
    tensor([-1.0911,  0.2182, -0.2182,  1.0911])
    """

    shown = "{0.num_features}, eps={0.eps}, momentum={0.momentum}"
    unusual: ClassVar = {"correction": 0}
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        correction: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_options("SwitchableNorm", correction=(correction, (0, 1)))
        self.num_features, self.eps, self.momentum, self.correction = num_features, eps, momentum, correction
        factory = {"device": device, "dtype": dtype}
        self.register_affine((num_features,), **factory)
        self.mean_weight = nn.Parameter(torch.empty(3, **factory))
        self.var_weight = nn.Parameter(torch.empty(3, **factory))
        self.register_running((num_features,), "running_mean", "running_var", counted=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.fill(mean_weight=1, var_weight=1)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        check_channels("SwitchableNorm", input, self.num_features, "num_features", "n c *")
        running = RunningStatistics(self.running_mean, self.running_var)
        logits, affine = (self.mean_weight, self.var_weight), (self.weight, self.bias)
        return _normalize(
            input, logits, running, affine, self.training, Running(self.momentum), self.eps, self.correction, mask
        )


def switchable_norm(
    input: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    correction: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Switchable normalization as a function, of logits (3,) for instance, layer and batch; see SwitchableNorm.

    Without running statistics the batch's own moments are always used. Elements where the mask (boolean, broadcasts over
    the input) is False enter no statistic and become zero.

    >>> switchable_norm(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]]), torch.ones(3), torch.ones(3)).view(-1)
    tensor([-1.0911,  0.2182, -0.2182,  1.0911])
    """
    running = given_statistics("switchable_norm", running_mean, running_var)
    logits, affine = (mean_weight, var_weight), (weight, bias)
    return _normalize(input, logits, running, affine, training, Running(momentum), eps, correction, mask)


def _normalize(
    x: Tensor,
    logits: tuple[Tensor, Tensor],
    running: RunningStatistics | None,
    affine: tuple[Tensor | None, Tensor | None],
    training: bool,
    memory: Running,
    eps: float,
    correction: int,
    mask: Tensor | None,
) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    check_several("switchable_norm", x, _INSTANCE)
    for name, parameter in zip(("mean_weight", "var_weight"), logits, strict=True):
        check_shape("switchable_norm", name, parameter, 3)
    for name, statistic in zip(("running_mean", "running_var"), running or (), strict=False):
        check_shape("switchable_norm", name, statistic, x.shape[1])
    split = _BATCH.split(x.shape)
    if mask is not None:
        wide = torch.where(mask, wide, 0.0)
    instance = moments(wide, tuple(range(2, x.dim())), mask)
    if correction:
        # The variance of a single position, as a mask may leave, stays 0: an undefined one would spread to the whole batch.
        n = torch.as_tensor(instance.n, dtype=wide.dtype, device=wide.device)
        instance = instance._replace(var=instance.var * (n / (n - 1).clamp_min(1)))
    if training or running is None:
        batch = pool(instance, (0,))
    else:
        shape = [1, -1] + [1] * (x.dim() - 2)
        batch = Moments(running.mean.to(wide.dtype).view(shape), running.var.to(wide.dtype).view(shape), 0)
    if training and running is not None:
        memory.update(running, batch, split)
    three = (instance, pool(instance, (1,)), batch)
    if 0 in x.shape:  # moments of an empty batch are NaN, and would reach the logits' gradients
        three = tuple(Moments(torch.zeros_like(found.mean), torch.zeros_like(found.var), 0) for found in three)
    mean = _mixed([found.mean for found in three], logits[0])
    var = _mixed([found.var for found in three], logits[1])
    y = (wide - mean) * (var + eps).rsqrt()
    y = Affine("c").apply(y, split, *affine)
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype)


def _mixed(parts: list[Tensor], logits: Tensor) -> Tensor:
    share = logits.to(parts[0].dtype).softmax(0)
    return share[0] * parts[0] + share[1] * parts[1] + share[2] * parts[2]


CARD = Card(
    title="Switchable normalization",
    word="switch",
    normalized_over="a learned mixture of: each sample and channel, each sample, each channel",
    formula="y = weight * (x - m) / sqrt(v + eps) + bias,  m = sum_k a_k m_k,  v = sum_k b_k v_k,  k in {IN, LN, BN}",
    paper=Paper(
        "Luo, Ping and Ren, Jiamin and Peng, Zhanglin and Zhang, Ruimao and Li, Jingyu",
        "Differentiable Learning-to-Normalize via Switchable Normalization",
        2018,
        "https://arxiv.org/abs/1806.10779",
    ),
    use_cases="when the best normalizer of each layer is not known: detection, segmentation, style transfer",
    strengths="learns the normalizer of each layer; relies less on the batch where batches are small",
    weaknesses="depends on the batch unless it learns not to; can't be folded; more passes",
    module=SwitchableNorm,
    functional=switchable_norm,
    build=lambda at: SwitchableNorm(at.channels, at.eps, at.momentum_or(0.1), **at.factory),
    over="n c *",
    running_state=True,
    invariances=frozenset({"weight scale", "data scale"}),
)
