"""Weight normalization: the length and the direction of each row are separate parameters."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic, length
from normkit.core.support import Support
from normkit.engine.dispatch import run
from normkit.weights import kernels
from normkit.weights.attachment import ModuleT, attach
from normkit.weights.layout import weight_layout, weight_of
from normkit.weights.parametrization import Parametrization, laid_out


def weight_norm_rule(ndim: int = 2, dim: int | None = 0, eps: float = 1e-12) -> Rule:
    """Weight normalization of a weight of ``ndim`` axes as data."""
    if dim is None or dim == -1:  # as in torch, -1 means one length
        return Rule(Support("*", over="*"), Statistic(None, "norm", eps, "floor"), Affine(""))
    if not -ndim <= dim < ndim:
        raise OptionError(f"WeightNorm: dim={dim} of a weight of {ndim} axes; wanted -{ndim} to {ndim - 1}, or None")
    before = " ".join(f"i{k}" for k in range(dim % ndim))
    return Rule(Support(f"{before} o *", over=f"{before} *"), Statistic(None, "norm", eps, "floor"), Affine("o"))


class WeightNorm(Parametrization):
    """The parametrization w = g v / max(|v|, eps), with one length g per index of an axis.

    The gradients are dg = <dw, v> / |v| and dv = g / |v| (dw - <dw, v> v / |v|^2): orthogonal to v, so |v| never falls under
    plain gradient descent. A zero row of v gives a zero row of w; its gradient is g dw / eps.

    Args:
        dim: the axis with one length per index; None or -1 for one length of the whole tensor. Default: 0.
        eps: floor of the norm. Default: 1e-12.

    Shape: g (1, ..., out, ..., 1) and v (the weight's shape); the output has the weight's shape.

    Raises:
        OptionError: the weight has no such axis.

    Reference: Salimans and Kingma, "Weight Normalization" (2016), https://arxiv.org/abs/1602.07868.

    >>> WeightNorm()(torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[1.2000, 1.6000]])
    """

    shown = "dim={0.dim}, eps={0.eps:g}"

    def __init__(self, dim: int | None = 0, eps: float = 1e-12) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.by_rows = dim == 0
        self._rules: dict[int, Rule] = {}

    def _rule(self, ndim: int) -> Rule:
        if ndim not in self._rules:
            self._rules[ndim] = weight_norm_rule(ndim, self.dim, self.eps)
        return self._rules[ndim]

    def plan(self, weight: Tensor) -> kernels.Plan | None:
        rule = self._rule(weight.dim())
        return kernels.plan_over(rule.support.split(weight.shape), weight.dtype, rule.statistic)

    def options(self) -> tuple[object, ...]:
        return self.dim, self.eps

    def definition(self, weight: Tensor, *gain: Tensor) -> Tensor:
        rule = self._rule(weight.dim())
        return run(rule, weight, laid_out(gain[0], rule, weight, "WeightNorm"))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths and directions of this weight: g its norms, v the weight itself."""
        dims = self._rule(weight.dim()).support.split(weight.shape).dims
        g = length(weight, dims)
        return (g if self.dim not in (None, -1) else g.reshape(())), weight


def weight_norm(layer: ModuleT, name: str = "weight", dim: int | None = 0, *, eps: float = 1e-12) -> ModuleT:
    """Apply weight normalization to a layer, in place, without changing what it computes.

    ``torch.nn.utils.parametrizations.weight_norm`` with the same arguments, parameters and state_dict keys
    (``parametrizations.weight.original0`` is g, ``original1`` is v), and no NaN from a zero row. Two new parameters replace
    the weight: pass them to the optimizer. Checkpoints with the older ``weight_g`` and ``weight_v`` load too.

    ``dim`` and ``eps`` are those of WeightNorm: 1 for transposed convolutions.

    Raises:
        OptionError: no such weight or axis, or the weight is already parametrized.

    >>> layer = weight_norm(nn.Linear(2, 1))
    >>> layer.weight = torch.tensor([[3.0, 4.0]])
    >>> layer.parametrizations.weight.original0.detach()
    tensor([[5.]])
    """
    weight = weight_of(layer, name, "weight_norm")
    weight_norm_rule(weight.dim(), dim, eps)
    attach(layer, name, WeightNorm(dim, eps), splits=True, directed=True)

    layer.register_load_state_dict_pre_hook(partial(_older, name))
    return layer


def _older(name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Rename the keys of older checkpoints before a state_dict is loaded."""
    for key, now in (("g", "original0"), ("v", "original1")):
        if f"{prefix}{name}_{key}" in state and parametrize.is_parametrized(module, name):
            state[f"{prefix}parametrizations.{name}.{now}"] = state.pop(f"{prefix}{name}_{key}")


def rescale(g: Tensor, v: Tensor, dim: int | None = 0, eps: float = 1e-12) -> Tensor:
    """Weight normalization as a function: the weight g v / max(|v|, eps); see WeightNorm.

    >>> rescale(torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[1.2000, 1.6000]])
    """
    return WeightNorm(dim, eps)(g, v)


CARD = Card(
    name="weight_norm",
    title="Weight normalization",
    kind="weight",
    word="wn",
    normalized_over="each output unit's weights",
    formula="w = g * v / max(|v|, eps)",
    paper=paper("salimans2016weight"),
    use_cases="recurrent and generative networks, reinforcement learning, audio: where batches are small or noisy",
    strengths="independent of the data; no difference between training and inference; free once folded",
    weaknesses="does not bound activations; needs a good initialization; lengths grow with the learning rate",
    module=WeightNorm,
    functional=rescale,
    make=lambda layer: weight_norm(layer, dim=weight_layout(layer).output_axis),
    rule=weight_norm_rule(),
    invariances=frozenset({"weight scale", "row scale"}),
)
