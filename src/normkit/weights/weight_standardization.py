"""Weight standardization: each output unit's weights have mean 0 and variance 1."""

from typing import TypedDict

from torch import Tensor

from normkit.core.card import Card, Paper
from normkit.core.rule import Rule
from normkit.core.statistic import Guard, Statistic
from normkit.core.support import Support
from normkit.engine.dispatch import run
from normkit.weights import kernels
from normkit.weights.attachment import ModuleT, attach
from normkit.weights.layout import WeightLayout, layout_of_several
from normkit.weights.parametrization import Parametrization


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

    Shape:
        Any; the output has the same shape.

    Raises:
        OptionError: an argument outside its range.

    Reference:
        Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization"
        (2019), https://arxiv.org/abs/1903.10520.

    >>> import torch
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

    Args:
        layer: the layer that holds the weight.
        name: name of the weight. Default: "weight".
        eps: keeps the divisor above zero. Default: 1e-5.
        correction: 1 for the unbiased variance. Default: 0.
        guard: eps ``"inside"`` the root, ``"outside"`` it, or as its ``"floor"``. Default: "inside".

    Returns:
        The layer.

    Raises:
        OptionError: no such weight, an argument outside its range, or one weight per output unit, which would become zero.

    Reference:
        Qiao, Wang, Liu, Shen, Yuille (2019), https://arxiv.org/abs/1903.10520.

    >>> import torch
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

    >>> import torch
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
    paper=Paper(
        "Qiao, Siyuan and Wang, Huiyu and Liu, Chenxi and Shen, Wei and Yuille, Alan",
        "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        2019,
        "https://arxiv.org/abs/1903.10520",
    ),
    use_cases="convolutions before GroupNorm where few samples fit a batch: detection, segmentation, transfer",
    strengths="brings GroupNorm at batch 1 to BatchNorm's accuracy; smooths the loss; free once folded",
    weaknesses="needs a normalization after the layer; can't be used where an output unit has one weight",
    module=WeightStandardization,
    functional=standardize,
    make=weight_standardization,
    rule=weight_standardization_rule(),
    invariances=frozenset({"row scale", "weight scale"}),
)
