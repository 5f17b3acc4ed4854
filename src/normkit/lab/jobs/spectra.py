"""Singular values of a network under constraint, and how well power iteration knows them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from normkit.lab.train.walk import Diverged
from normkit.surgery.reassign_spectral import reassign_spectral_
from normkit.weights.spectral_norm import power_iteration

CLIP = 0.1
TOLERANCE = 1e-3


def demand_numbers(model: nn.Module) -> None:
    """Raises :class:`Diverged` where a parameter is not finite: such a weight has no singular values to divide by or to show.

    >>> demand_numbers(nn.Linear(2, 1))
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise Diverged


@torch.no_grad()
def constrain(critic: nn.Module, kind: str) -> None:
    """What is done to a discriminator's weights after a step of its optimizer."""
    if kind == "hard":
        reassign_spectral_(critic)
    if kind == "clip":
        for parameter in critic.parameters():
            parameter.clamp_(-CLIP, CLIP)


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of the weights that a model multiplies by, first layer first, without a step of power iteration."""
    training = model.training
    with torch.no_grad():
        found = [layer.weight.clone() for layer in model.eval().modules() if isinstance(layer, nn.Linear)]
    model.train(training)
    return found


def raw_weights(model: nn.Module) -> list[Tensor]:
    """The parameters of all layers with more than one row, before spectral normalization; one row has no direction to find."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features > 1]
    return [
        layer.get_parameter("parametrizations.weight.original" if is_parametrized(layer) else "weight").detach()
        for layer in layers
    ]


def spectra(matrices: list[Tensor]) -> list[list[float]]:
    """All singular values of each matrix, the largest first."""
    return [torch.linalg.svdvals(matrix.double()).tolist() for matrix in matrices]


def steepness(model: nn.Module, points: Tensor) -> Tensor:
    """The length of a scalar model's gradient at each point; the largest bounds its Lipschitz constant from below.

    >>> steepness(nn.Sequential(nn.Linear(2, 1)), torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    points = points.detach().requires_grad_()
    return torch.autograd.grad(model(points).sum(), points)[0].norm(dim=1).detach()


class Memory:
    """u and v of each matrix, kept while the matrices change, with one power iteration each time."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.vectors = [power_iteration(matrix, iterations=15) for matrix in matrices]

    def follow(self, matrices: list[Tensor]) -> None:
        self.vectors = [power_iteration(m, u, v) for m, (u, v) in zip(matrices, self.vectors, strict=True)]

    def look(self, matrices: list[Tensor]) -> dict[str, Any]:
        """Counts iterations to a thousandth of sigma, and the error after one, from the vectors kept and from random ones.

        The vectors kept had their last iteration on these very matrices, which is the first one counted.
        """
        kept, fresh = [], []
        for matrix, (u, v) in zip(matrices, self.vectors, strict=True):
            kept.append({"iterations": needed(matrix, u, v, done=1), "error": error(matrix, u, v)})
            fresh.append({"iterations": needed(matrix), "error": error(matrix, *power_iteration(matrix))})
        return {"kept": kept, "fresh": fresh}

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": [list(pair) for pair in self.vectors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vectors = [(u, v) for u, v in state["vectors"]]


def error(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """By what part of sigma u^T W v falls short of it."""
    exact = torch.linalg.matrix_norm(matrix.double(), 2)
    return (1 - u.double() @ matrix.double() @ v.double() / exact).item()


def needed(matrix: Tensor, u: Tensor | None = None, v: Tensor | None = None, done: int = 0, limit: int = 200) -> int:
    """Power iterations up to an error of sigma of a thousandth, from given vectors, which had `done` already, or random ones."""
    if done and u is not None and v is not None and error(matrix, u, v) <= TOLERANCE:
        return done
    for count in range(done + 1, limit + 1):
        u, v = power_iteration(matrix.double(), u, v, 1)
        if error(matrix, u, v) <= TOLERANCE:
            return count
    return limit


def stable_rank(values: list[float]) -> float:
    """The sum of squared singular values by the largest of them: how many count.

    >>> stable_rank([2.0, 2.0, 1.0])
    2.25
    """
    return sum(value * value for value in values) / max(max(values) ** 2, 1e-30)
