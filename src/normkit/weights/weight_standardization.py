"""Weight standardization: each output unit's weights have mean 0, and variance 1 or one that preserves that of a signal."""

import math
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.rule import Rule
from normkit.core.statistic import Guard, Statistic
from normkit.core.support import Support
from normkit.engine.dispatch import run
from normkit.weights import kernels
from normkit.weights.attachment import ModuleT, attach
from normkit.weights.layout import WeightLayout, layout_of_several
from normkit.weights.parametrization import Parametrization, laid_out


class Published(TypedDict):
    """The arguments of a published form."""

    eps: float
    correction: int
    guard: Guard


PUBLISHED: dict[str, Published] = {
    "paper": {"eps": 1e-5, "correction": 0, "guard": "inside"},
    "authors": {"eps": 1e-5, "correction": 1, "guard": "outside"},
    "batch_channel": {"eps": 1e-5, "correction": 1, "guard": "inside"},
    "timm": {"eps": 1e-6, "correction": 0, "guard": "inside"},
}


def weight_standardization_rule(
    support: Support | None = None, eps: float = 1e-5, correction: int = 0, guard: Guard = "inside"
) -> Rule:
    """Weight standardization, by default of weights whose axis 0 indexes output units, as data."""
    return Rule(support or Support("o *", over="*"), Statistic("mean", "std", eps, guard, correction))


class WeightStandardization(Parametrization):
    """The parametrization w = (v - E[v]) / sqrt(Var[v] + eps), E and Var over each output unit's weights.

    For layers before a normalization; without one, outputs grow with the root of the fan-in. The gradient has mean zero
    in each row and is orthogonal to it except for eps. The published forms are in ``PUBLISHED``, by name:
    ``weight_standardization(layer, **PUBLISHED["timm"])``.

    =================  =============================================  =====================================
    name               arguments                                      known from
    =================  =============================================  =====================================
    ``paper``          eps=1e-5, correction=0, guard="inside"         the paper's second version; defaults
    ``authors``        eps=1e-5, correction=1, guard="outside"        the authors' code
    ``batch_channel``  eps=1e-5, correction=1, guard="inside"         their batch-channel normalization
    ``timm``           eps=1e-6, correction=0, guard="inside"         timm's StdConv2d
    =================  =============================================  =====================================

    Args:
        layout: layout of the weight. Default: axis 0 indexes output units.
        eps: keeps the divisor above zero. Default: 1e-5.
        correction: 1 for the unbiased variance. Default: 0.
        guard: eps ``"inside"`` the root, ``"outside"`` it, or as its ``"floor"``. Default: "inside".

    Shape: Any; the output has the same shape.

    Raises:
        OptionError: an argument outside its range.

    Reference: Qiao, Wang, Liu, Shen, Yuille (2019), https://arxiv.org/abs/1903.10520.

    >>> WeightStandardization()(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.0000,  1.0000],
            [ 0.0000,  0.0000]])
    """

    shown = "eps={0.rule.statistic.eps:g}, correction={0.rule.statistic.correction}, guard={0.rule.statistic.guard!r}"

    def __init__(
        self, layout: WeightLayout | None = None, eps: float = 1e-5, correction: int = 0, guard: Guard = "inside"
    ) -> None:
        super().__init__()
        layout = layout or WeightLayout()
        self.rule = weight_standardization_rule(layout.rows, eps, correction, guard)
        self.by_rows = layout.output_axis == 0

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        return kernels.plan_over(self.rule.support.split(weight.shape), weight.dtype, self.rule.statistic)

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        return run(self.rule, weight)


def weight_standardization(
    layer: ModuleT, name: str = "weight", eps: float = 1e-5, *, correction: int = 0, guard: Guard = "inside"
) -> ModuleT:
    """Apply weight standardization to a layer, in place; the raw weight stays the trained parameter.

    ``name`` is the weight's; ``eps``, ``correction`` and ``guard`` are those of WeightStandardization.

    Raises:
        OptionError: no such weight, an argument outside its range, or one weight per output unit, which would become zero.

    >>> layer = weight_standardization(nn.Conv2d(2, 1, 1))
    >>> layer.weight = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    >>> layer.weight.detach().flatten()
    tensor([-1.0000,  1.0000])
    """
    layout = layout_of_several(layer, name, "weight_standardization")
    return attach(layer, name, WeightStandardization(layout, eps, correction, guard))


def standardize(
    weight: Tensor,
    eps: float = 1e-5,
    *,
    correction: int = 0,
    guard: Guard = "inside",
    layout: WeightLayout | None = None,
) -> Tensor:
    """Weight standardization as a function; see WeightStandardization.

    >>> standardize(torch.tensor([[1.0, 3.0]]), eps=0.0, correction=1)
    tensor([[-0.7071,  0.7071]])
    """
    return run(weight_standardization_rule((layout or WeightLayout()).rows, eps, correction, guard), weight)


CARD = Card(
    name="weight_standardization",
    title="Weight standardization",
    kind="weight",
    word="ws",
    normalized_over="each output unit's weights",
    formula=weight_standardization_rule().formula().replace("y =", "w =").replace("x", "v"),
    paper=paper("qiao2019microbatch"),
    use_cases="convolutions before GroupNorm where few samples fit a batch: detection, segmentation, transfer",
    strengths="brings GroupNorm at batch 1 to BatchNorm's accuracy; smooths the loss; free once folded",
    weaknesses="needs a normalization after the layer; can't be used where an output unit has one weight",
    module=WeightStandardization,
    functional=standardize,
    make=weight_standardization,
    rule=weight_standardization_rule(),
    invariances=frozenset({"row scale", "weight scale"}),
)


RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def scaled_weight_standardization_rule(support: Support | None = None, eps: float = 1e-6) -> Rule:
    """Scaled weight standardization, by default of weights whose axis 0 indexes output units, as data."""
    support = support or Support("o *", over="*")
    return Rule(support, Statistic("mean", "std", eps), Affine(" ".join(support.kept)))


def nonlinearity_gain(activation: Callable[[Tensor], Tensor]) -> float:
    """Compute the factor that gives an activation of a standard normal variable the variance 1.

    gamma = 1 / sqrt(Var[activation(z)]), z normal; for ReLU it is RELU_GAIN, sqrt(2 / (1 - 1 / pi)).

    By quadrature in float64; OptionError where the activation, an elementwise function, is constant.

    Reference: Brock, De, Smith (2021), https://arxiv.org/abs/2101.08692, section 4.

    >>> round(nonlinearity_gain(torch.relu), 4), round(RELU_GAIN, 4)
    (1.7129, 1.7129)
    """
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square())
    density = density / density.sum()
    y = activation(z)
    var = float((density * (y - (density * y).sum()).square()).sum())
    if not var > 0:
        raise OptionError("nonlinearity_gain: the activation is constant, or not finite; no factor gives it variance 1")
    return var**-0.5


class ScaledWeightStandardization(Parametrization):
    """The parametrization w = gain * gamma * (v - E[v]) / sqrt((Var[v] + eps) fan_in), E and Var over a unit's weights.

    After an activation whose factor is gamma, inputs of variance 1 give outputs of variance gain^2, so that networks without
    activation norms stay in range. The mean stays zero too, which a scaled initialization does not ensure during training.

    Args:
        layout: layout of the weight. Default: axis 0 indexes output units.
        gamma: the activation's factor. Default: ReLU's, 1.7129; some public code uses 1.7139588594436646 instead.
        eps: added to the variance. Default: 1e-6.

    Shape: gain (out,) and v (the weight's shape); the output has the weight's shape.

    Reference: Brock, De, Smith (2021), https://arxiv.org/abs/2101.08692.

    >>> ScaledWeightStandardization(gamma=1.0)(torch.tensor([2.0]), torch.tensor([[1.0, 3.0, 1.0, 3.0]]))
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """

    shown = "gamma={0.gamma:.6g}, eps={0.rule.statistic.eps:g}"

    def __init__(self, layout: WeightLayout | None = None, gamma: float = RELU_GAIN, eps: float = 1e-6) -> None:
        super().__init__()
        if not (math.isfinite(gamma) and gamma > 0):
            raise OptionError(f"ScaledWeightStandardization: gamma={gamma}; wanted a number above 0")
        self.gamma = gamma
        layout = layout or WeightLayout()
        self.rule = scaled_weight_standardization_rule(layout.rows, eps)
        self.by_rows = layout.output_axis == 0

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        split = self.rule.support.split(weight.shape)
        return kernels.plan_over(split, weight.dtype, self.rule.statistic, self.gamma / split.count**0.5)

    def options(self) -> tuple[object, ...]:
        return (self.gamma,)

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        g = laid_out(gain[0], self.rule, weight, "ScaledWeightStandardization")
        factor = self.gamma / self.rule.support.split(weight.shape).count ** 0.5
        return run(self.rule, weight, g.to(torch.promote_types(g.dtype, torch.float32)) * factor)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gains of 1, and the weight itself as the raw one."""
        split = self.rule.support.split(weight.shape)
        return weight.new_ones(weight.numel() // split.count), weight


def scaled_weight_standardization(
    layer: ModuleT, name: str = "weight", gamma: float = RELU_GAIN, eps: float = 1e-6
) -> ModuleT:
    """Apply scaled weight standardization to a layer, in place.

    Two parameters replace the weight: ``parametrizations.weight.original0``, one gain per output unit, initially 1, and
    ``original1``, the raw weight. ``name`` is the weight's; ``gamma`` and ``eps`` are those of
    ScaledWeightStandardization.

    Raises:
        OptionError: no such weight, one that is already parametrized, or one weight per output unit, which would become zero.

    >>> layer = scaled_weight_standardization(nn.Linear(400, 1, bias=False), eps=0.0)
    >>> round(layer.weight.norm().item(), 4)
    1.7129
    """
    layout = layout_of_several(layer, name, "scaled_weight_standardization")
    return attach(layer, name, ScaledWeightStandardization(layout, gamma, eps), splits=True)


def standardize_scaled(
    weight: Tensor,
    gain: Tensor | None = None,
    gamma: float = RELU_GAIN,
    eps: float = 1e-6,
    *,
    layout: WeightLayout | None = None,
) -> Tensor:
    """Scaled weight standardization as a function; see ScaledWeightStandardization.

    >>> standardize_scaled(torch.tensor([[1.0, 3.0]]), gamma=2.0**0.5, eps=0.0)
    tensor([[-1.,  1.]])
    """
    part = ScaledWeightStandardization(layout, gamma, eps)
    return part(part.right_inverse(weight)[0] if gain is None else gain, weight)


CARD_SCALED_WEIGHT_STANDARDIZATION = Card(
    name="scaled_weight_standardization",
    title="Scaled weight standardization",
    kind="weight",
    normalized_over="each output unit's weights",
    formula="w = gain * gamma * (v - E[v]) / sqrt((Var[v] + eps) * fan_in)",
    paper=paper("brock2021characterizing"),
    use_cases="residual networks without activation norms",
    strengths="keeps the signal's mean and variance at no cost per activation; free once folded",
    weaknesses="needs scaled residual branches and gradient clipping to train at large batches",
    module=ScaledWeightStandardization,
    functional=standardize_scaled,
    make=scaled_weight_standardization,
    rule=scaled_weight_standardization_rule(),
    invariances=frozenset({"row scale", "weight scale"}),
)
