"""Gradients scaled to unit length and centralized, or clipped by the norm of their weights."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError
from normkit.core.support import Support
from normkit.weights.layout import raw_parameters

Mode = Literal["tensor", "layer", "global"]
Target = nn.Module | Optimizer | Iterable[Tensor]

_MODES = ("tensor", "layer", "global")


class GradientNormalizer:
    """Scale gradients to unit length and centralize them, after every backward pass, until it is removed.

    ``"tensor"``: g <- g / ||g|| for each parameter; ``"layer"``: for all parameters of a layer together; ``"global"``: for all
    parameters together, which is clipping without a threshold. With ``centralize``, first g <- g - mean(g) over the inputs of
    each output unit, for parameters of two or more axes. Apart from that, directions do not change. A zero gradient stays zero,
    and a non-finite one unchanged.

    Given a model or parameters it acts at the end of each backward pass, so that gradients accumulated over several passes are
    normalized at each of them. Given an optimizer it acts right before ``step``, on the accumulated gradients: the choice with
    accumulation, a gradient scaler or several processes.

    Args:
        target: a model, parameters, or the optimizer that steps them.
        mode: ``"tensor"``, ``"layer"`` (needs a model), ``"global"``, or None to centralize only. Default: ``"global"``.
        centralize: whether to subtract the mean over each unit's fan-in. Default: False.

    Raises:
        OptionError: an unknown mode, nothing to do, no parameters, or unknown layers.

    Reference: Unit length: Hazan, Levy, Shalev-Shwartz, "Beyond Convexity: Stochastic Quasi-Convex Optimization"
    (2015), https://arxiv.org/abs/1507.02030. Centralization: Yong et al., "Gradient Centralization" (2020),
    https://arxiv.org/abs/2004.01461.

    >>> w = nn.Parameter(torch.zeros(2))
    >>> with GradientNormalizer([w]):
    ...     (w @ torch.tensor([3.0, 4.0])).backward()
    >>> w.grad
    tensor([0.6000, 0.8000])
    """

    def __init__(self, target: Target, mode: Mode | None = "global", *, centralize: bool = False) -> None:
        self.groups = _groups(target, mode, centralize)
        self.mode: Mode | None = mode
        self.centralize = centralize
        self._pass = -1
        parameters = [parameter for group in self.groups for parameter, _ in group]
        if isinstance(target, Optimizer):
            self._handles = [target.register_step_pre_hook(lambda *_: self.apply())]
        else:
            self._handles = [p.register_post_accumulate_grad_hook(self._queue) for p in parameters if p.requires_grad]

    def apply(self) -> None:
        """Normalize the current gradients; the hooks call it."""
        _normalize(self.groups, self.mode, self.centralize)

    def remove(self) -> None:
        """Remove the hooks, so that gradients are no longer normalized. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _queue(self, parameter: Tensor) -> None:
        # The gradients of a layer or model are complete only when the backward pass is. Its number tells passes apart, as one
        # that fails halfway never calls back.
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self.apply)  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        count = sum(len(group) for group in self.groups)
        return f"GradientNormalizer({self.mode!r}, centralize={self.centralize}, parameters={count})"


def normalize_gradients(target: Target, mode: Mode | None = "global", *, centralize: bool = False) -> None:
    """Normalize the existing gradients in place, between ``backward`` and ``step``; see GradientNormalizer.

    >>> w = nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([3.0, 4.0])
    >>> normalize_gradients([w])
    >>> w.grad
    tensor([0.6000, 0.8000])
    """
    _normalize(_groups(target, mode, centralize), mode, centralize)


_Group = list[tuple[Tensor, Support | None]]


def _groups(target: Target, mode: Mode | None, centralize: bool) -> list[_Group]:
    """Groups of parameters that share one length, each with the support of an output unit if it is a weight."""
    if mode is not None and mode not in _MODES:
        raise OptionError(f"GradientNormalizer: mode={mode!r}; wanted one of {', '.join(map(repr, _MODES))}, or None")
    if mode is None and not centralize:
        raise OptionError("GradientNormalizer: mode=None without centralize does nothing; choose one")
    layers: list[_Group] = []
    if isinstance(target, nn.Module):
        by_layer: dict[int, _Group] = {}
        for _, layer, parameter, rows in raw_parameters(target):
            by_layer.setdefault(id(layer), []).append((parameter, rows))
        layers = list(by_layer.values())
    else:
        if mode == "layer":
            raise OptionError("GradientNormalizer: mode='layer' needs the model, to know the parameters of each layer")
        held = target.param_groups if isinstance(target, Optimizer) else [{"params": target}]
        given, rows = (parameter for group in held for parameter in group["params"]), Support("o *", over="*")
        layers = [[(parameter, rows if parameter.dim() > 1 else None)] for parameter in given]
    if not layers:
        raise OptionError("GradientNormalizer: no parameters; give a model, parameters or an optimizer that has some")
    if mode == "layer":
        return layers
    single = [entry for layer in layers for entry in layer]
    return [single] if mode == "global" else [[entry] for entry in single]


@torch.no_grad()
def _normalize(groups: list[_Group], mode: Mode | None, centralize: bool) -> None:
    for group in groups:
        found = [(p.grad, rows) for p, rows in group if p.grad is not None]
        if centralize:
            for gradient, rows in found:
                split = None if rows is None else rows.split(gradient.shape)
                if split is not None and split.count > 1:  # a single number minus its mean is zero
                    by_unit = gradient.reshape(split.shape)
                    gradient.copy_((by_unit - by_unit.mean(split.dims, keepdim=True)).view_as(gradient))
        if mode is not None and found:
            length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(_wide(g)) for g, _ in found]))
            length = torch.where((length > 0) & length.isfinite(), length, 1.0)
            for gradient, _ in found:
                gradient.copy_(_wide(gradient) / length)


def _wide(gradient: Tensor) -> Tensor:
    # In float64 the squares of float32 neither overflow nor vanish.
    return gradient.to(torch.float32 if gradient.device.type == "mps" else torch.float64)


CARD = Card(
    title="Gradient normalization and centralization",
    kind="gradient",
    normalized_over="each parameter's, each layer's or the whole gradient; or each output unit's fan-in",
    formula="g <- g / ||g||;  g <- g - mean(g)",
    paper=paper("yong2020gradient"),
    use_cases="plateaus and cliffs; losses whose scale is not known; recurrent networks",
    strengths="the learning rate alone sets the step's length; no threshold to choose",
    weaknesses="gradients no longer shrink near a minimum, so the rate must; noise steps as far as signal",
    module=GradientNormalizer,
    functional=normalize_gradients,
)


Skip = Callable[[str, nn.Module], bool] | None


def last_linear(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """A predicate that holds for the Linear layer registered last, usually the classifier."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return lambda name, module: bool(found) and module is found[-1]


class AdaptiveClipping:
    """Clip unit gradients whose norm exceeds a fraction of their weights' norm; call it before the optimizer's step.

    Where ||G_i|| > clip * max(||W_i||, eps):  G_i <- clip * max(||W_i||, eps) / ||G_i|| * G_i, for each output unit i of
    weights of two or more axes, and for each bias, gain and tensor of lengths as a whole. In a parametrized layer the raw
    weights' gradients are clipped, per unit of the layer. Non-finite gradients stay unchanged.

    Args:
        model: any module; shared parameters are clipped once.
        clip: the fraction, lambda in the paper. Default: 0.01.
        eps: floor of the weights' norm, so that units that start at zero can learn. Default: 1e-3.
        skip: ``skip(name, module)`` holds for layers to leave out. Default: the last Linear, as in the paper; give
            ``lambda name, module: False`` for none.

    Raises:
        OptionError: clip or eps is not above 0.

    Reference: Brock, De, Smith, Simonyan (2021), https://arxiv.org/abs/2102.06171, section 4.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data, layer.weight.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    >>> AdaptiveClipping(layer, clip=0.5, skip=lambda name, module: False)()
    1
    >>> layer.weight.grad
    tensor([[0.0000, 2.5000]])
    """

    def __init__(self, model: nn.Module, clip: float = 0.01, eps: float = 1e-3, skip: Skip = None) -> None:
        if not (clip > 0 and eps > 0):
            raise OptionError(f"AdaptiveClipping: clip={clip}, eps={eps}; wanted numbers above 0")
        skip = skip or last_linear(model)
        self.clip, self.eps = clip, eps
        self.units = [(raw, rows) for name, layer, raw, rows in raw_parameters(model) if not skip(name, layer)]

    @torch.no_grad()
    def __call__(self) -> int:
        """Clip the existing gradients; return how many units were clipped."""
        clipped = 0
        for parameter, rows in self.units:
            gradient = parameter.grad
            if gradient is None or not gradient.numel():
                continue
            split = None if rows is None else rows.split(gradient.shape)
            shape, dims = ((-1,), (0,)) if split is None else (split.shape, split.dims)
            # In float64 the squares of float32 neither overflow nor vanish.
            wide = torch.float32 if gradient.device.type == "mps" else torch.float64
            weights, unit = parameter.detach().to(wide).reshape(shape), gradient.to(wide).reshape(shape)
            allowed = self.clip * torch.linalg.vector_norm(weights, dim=dims, keepdim=True).clamp_min(self.eps)
            norm = torch.linalg.vector_norm(unit, dim=dims, keepdim=True)
            over = (norm > allowed) & norm.isfinite()
            gradient.copy_(torch.where(over, unit * (allowed / norm), unit).reshape(gradient.shape))
            clipped += int(over.sum())
        return clipped


def adaptive_gradient_clipping(model: nn.Module, clip: float = 0.01, eps: float = 1e-3, skip: Skip = None) -> int:
    """Clip the gradients of a model once; return how many units were clipped. See AdaptiveClipping.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> model(torch.ones(1, 2)).mul(100).sum().backward()
    >>> adaptive_gradient_clipping(model)
    4
    """
    return AdaptiveClipping(model, clip, eps, skip)()


CARD_ADAPTIVE_CLIPPING = Card(
    title="Adaptive gradient clipping",
    kind="gradient",
    normalized_over="each output unit's gradient, against the unit's weights",
    formula="G_i <- G_i * min(1, clip * max(||W_i||, eps) / ||G_i||)",
    paper=paper("brock2021highperformance"),
    use_cases="networks without activation norms at large batches and learning rates",
    strengths="a threshold that fits every layer, as it is relative to the weights",
    weaknesses="two norms per unit and step; the last layer must be left out",
    module=AdaptiveClipping,
    functional=adaptive_gradient_clipping,
)
