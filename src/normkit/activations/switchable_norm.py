"""Learned mixtures of instance, layer and batch normalization: one for all samples (switchable), or one each (exemplar)."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.memory import Running, RunningStatistics
from normkit.core.module import Module
from normkit.core.moments import Moments, accumulation_dtype, full_precision, moments
from normkit.core.support import Support, check_shape, show
from normkit.engine.layer import check_channels, check_several, given_statistics
from normkit.engine.pooling import pool

_INSTANCE = Support("n c *", over="*")
_BATCH = Support("n c *", over="n *")


class SwitchableNorm(Module):
    """Normalize by a learned mixture of the instance's, the layer's and the batch's mean, and another of their variances.

    y = weight * (x - m) / sqrt(v + eps) + bias, m = sum_k softmax(mean_weight)_k m_k, v = sum_k softmax(var_weight)_k v_k, k over
    instance, layer and batch in this order. The layer's and the batch's moments are pooled from the instance's, so x is read
    once. In evaluation running averages replace the batch's moments.

    If one logit is far above the others it is that normalizer, including running averages, as in batch normalization.

    Args:
        num_features: channels C.
        eps: added to the variance. Default: 1e-5.
        momentum: weight of the new value in the running averages. Default: 0.1 (0.9 in the authors' notation).
        correction: 1 divides the instance's variance, from which the others follow, by the number of positions minus 1, as
            the authors' code does; 0 by their number. Default: 0.

    Shape: (N, C, *); the output has the same shape.

    Raises:
        ShapeError: a number of channels other than ``num_features``, or a single position.
        OptionError: an unknown correction.

    Reference: Luo, Ren, Peng, Zhang, Li (2018), https://arxiv.org/abs/1806.10779.

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
        how = self.training, Running(self.momentum), self.eps, self.correction, mask
        return _normalize(input, logits, running, affine, *how)


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
    paper=paper("luo2018differentiable"),
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


class ExemplarNorm(Module):
    """Mix instance, layer and batch normalization, each with its own weight and bias, in shares that depend on the sample.

    y_n = sum_k s_nk (weight_k * (x_n - m_k) / sqrt(v_k + eps) + bias_k), k over instance, layer and batch in this order, the
    shares s_n positive with sum 1. A small network computes them: the sample's mean over positions is normalized by the moments
    of each k, reduced to d numbers, and the products between the three vectors go through a hidden layer with tanh to three
    logits. The last layer starts at 0, so all shares start at 1/3. In evaluation running averages replace the batch's moments.

    ``num_features``, ``eps`` and ``momentum``, the shape and its errors are those of SwitchableNorm.

    Args:
        reduction: d is C / reduction, at least 1. Default: 32.
        hidden: number of hidden units, from 1. Default: 6.

    Reference: Zhang, Peng, Yuan, Luo, "Exemplar Normalization for Learning Deep Representation" (2020),
    https://arxiv.org/abs/2003.08761. The sizes of the small network are our own choice.

    >>> ExemplarNorm(1)(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]])).detach().view(-1)
    tensor([-1.1139,  0.5176, -0.5176,  1.1139])
    """

    shown = "{0.num_features}, eps={0.eps}, momentum={0.momentum}"
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        reduction: int = 32,
        hidden: int = 6,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if reduction < 1 or hidden < 1:
            raise OptionError(f"ExemplarNorm: reduction={reduction}, hidden={hidden}; wanted whole numbers from 1")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        factory = {"device": device, "dtype": dtype}
        self.register_affine((3, num_features), **factory)
        self.reduce = nn.Linear(num_features, max(num_features // reduction, 1), **factory)
        self.hidden = nn.Linear(9, hidden, **factory)
        self.logits = nn.Linear(hidden, 3, **factory)
        self.register_running((num_features,), "running_mean", "running_var", counted=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reduce.reset_parameters()
        self.hidden.reset_parameters()
        super().reset_parameters()
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def moments(self, input: Tensor) -> list[Moments]:
        """The moments of instance, layer and batch; in training, update the running averages by the batch's."""
        check_channels("ExemplarNorm", input, self.num_features, "num_features", "n c *")
        wide = input.to(accumulation_dtype(input.dtype))
        check_several("ExemplarNorm", input, _INSTANCE)
        for name in ("running_mean", "running_var"):
            check_shape("ExemplarNorm", name, getattr(self, name), self.num_features)
        if input.numel():
            instance = moments(wide, tuple(range(2, input.dim())))
        else:  # an empty batch has no moments, and NaN would reach the gradients of the parameters
            empty = wide.new_zeros([*input.shape[:2], *[1] * (input.dim() - 2)])
            instance = Moments(empty, torch.ones_like(empty), 0)
        if self.training and input.numel():
            batch = pool(instance, (0,))
            running = RunningStatistics(self.running_mean, self.running_var)
            Running(self.momentum).update(running, batch, _BATCH.split(input.shape))
        else:
            shape = [1, -1] + [1] * (input.dim() - 2)
            mean, var = (kept.to(wide.dtype).view(shape) for kept in (self.running_mean, self.running_var))
            batch = Moments(mean, var, 0)
        return [instance, pool(instance, (1,)), batch]

    def shares(self, found: list[Moments]) -> Tensor:
        """The shares of instance, layer and batch for each sample: (N, 3), where each row sums to 1."""
        pooled = found[0].mean.flatten(1)
        seen = [(pooled - each.mean.flatten(1)) * (each.var.flatten(1) + self.eps).rsqrt() for each in found]
        with full_precision(pooled):
            z = _linear(self.reduce, torch.stack(seen, 1)).relu()
            products = (z @ z.transpose(1, 2)).flatten(1)
            return _linear(self.logits, _linear(self.hidden, products).tanh()).softmax(1)

    def forward(self, input: Tensor) -> Tensor:
        found = self.moments(input)
        return exemplar_norm(input, found, self.shares(found), self.weight, self.bias, self.eps)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def exemplar_norm(
    input: Tensor, found: list[Moments], shares: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Mix K normalizers: their moments, shares (N, K), weights and biases (K, C); see ExemplarNorm.

    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> exemplar_norm(x, [moments(x, (2,))], torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    tensor([[[-1.0000,  1.0000]]])
    """
    wide = input.to(accumulation_dtype(input.dtype))
    if shares.shape != (input.shape[0], len(found)):
        raise ShapeError(
            f"exemplar_norm: got shares of {show(shares.shape)}, wanted {len(found)} for each of {input.shape[0]} samples"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_shape("exemplar_norm", name, parameter, len(found), input.shape[1])
    ones = [1] * (input.dim() - 2)
    gain = shift = torch.zeros((), dtype=wide.dtype, device=input.device)
    center = found[0].mean  # x is centred once, by a mean from which the others differ little
    for k, each in enumerate(found):
        share = shares[:, k].to(wide.dtype).view([-1, 1, *ones])
        scale = weight[k].to(wide.dtype).view([-1, *ones]) * (each.var + eps).rsqrt()
        gain = gain + share * scale
        shift = shift + share * (scale * (center - each.mean) + bias[k].to(wide.dtype).view([-1, *ones]))
    return ((wide - center) * gain + shift).to(input.dtype)


CARD_EXEMPLAR = Card(
    title="Exemplar normalization",
    word="en",
    normalized_over="each sample's own mixture of: each sample and channel, each sample, each channel",
    formula="y_n = sum_k s_nk (weight_k * (x_n - m_k) / sqrt(v_k + eps) + bias_k),  k in {IN, LN, BN}",
    paper=paper("zhang2020exemplar"),
    use_cases="training data of several kinds in one batch: noisy labels, mixed domains",
    strengths="each sample chooses; can rely less on the batch where that helps",
    weaknesses="depends on the batch; a small network per layer; can't be folded",
    module=ExemplarNorm,
    functional=exemplar_norm,
    make=lambda channels: ExemplarNorm(channels, reduction=2, hidden=2),
    build=lambda at: ExemplarNorm(at.channels, eps=at.eps, momentum=at.momentum_or(0.1), **at.factory),
    takes=(),
    over="n c *",
    running_state=True,
    invariances=frozenset({"weight scale", "data scale"}),
)
