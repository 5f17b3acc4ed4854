"""Gradient normalization to unit length, or to mean zero over each unit's fan-in, before the optimizer's step."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal, Self

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
            raise OptionError(
                "GradientNormalizer: mode='layer' needs the model, to know which parameters are one layer's"
            )
        given: Iterable[Any] = (
            (p for group in target.param_groups for p in group["params"]) if isinstance(target, Optimizer) else target
        )
        rows = Support("o *", over="*")
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
