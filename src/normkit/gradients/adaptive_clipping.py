"""Adaptive gradient clipping: limit each unit's gradient to a fraction of its weights' norm."""

from collections.abc import Callable

import torch
from torch import nn

from normkit.core.card import Card, paper
from normkit.core.errors import OptionError
from normkit.weights.layout import raw_parameters

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


CARD = Card(
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
