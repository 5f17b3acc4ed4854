"""A generator and a critic of points that learn against each other, and the critic's singular values along the way."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from normkit.lab.seeding import reseed
from normkit.lab.sweep import Work
from normkit.lab.train.images import OK, Diverged, descend, walk
from normkit.surgery.reassign_spectral import reassign_spectral_
from normkit.surgery.recipe import apply_recipe
from normkit.weights.spectral_norm import power_iteration

SLOPE = 0.1
CLIP = 0.1
TOLERANCE = 1e-3
FOLLOWED = ("none", "sn")
STD, BATCH, CRITIC = 0.05, 128, 2
RATES = 1e-3, 5e-4
LOOKS = 20
GRID, WIDE = 41, 3.0


def ring(
    samples: int, generator: torch.Generator | None = None, modes: int = 8, radius: float = 2.0, std: float = 0.05
) -> Tensor:
    """Draws `samples` points (samples, 2) from a mixture of equal Gaussians whose means lie on a circle."""
    which = torch.randint(modes, (samples,), generator=generator)
    return centres(modes, radius)[which] + std * torch.randn(samples, 2, generator=generator)


def centres(modes: int = 8, radius: float = 2.0) -> Tensor:
    """The means of :func:`ring`'s Gaussians, (modes, 2)."""
    angles = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)


class PointGenerator(nn.Sequential):
    """A perceptron with two hidden layers from noise (N, noise) to points (N, 2)."""

    def __init__(self, noise: int = 8, hidden: int = 64) -> None:
        self.noise = noise
        super().__init__(
            *(nn.Linear(noise, hidden), nn.ReLU()), *(nn.Linear(hidden, hidden), nn.ReLU()), nn.Linear(hidden, 2)
        )


class PointDiscriminator(nn.Sequential):
    """A perceptron from points (N, 2) to one number (N, 1); its activations are Lipschitz with constant 1."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__(
            *(nn.Linear(2, hidden), nn.LeakyReLU(SLOPE)),
            *(nn.Linear(hidden, hidden), nn.LeakyReLU(SLOPE)),
            nn.Linear(hidden, 1),
        )


def demand_numbers(model: nn.Module) -> None:
    """Raises :class:`Diverged` where a parameter is not finite: such a weight has no singular values to divide by or to show."""
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
    """The length of a scalar model's gradient at each point; the largest bounds its Lipschitz constant from below."""
    points = points.detach().requires_grad_()
    return torch.autograd.grad(model(points).sum(), points)[0].norm(dim=1).detach()


class Memory:
    """u and v of each matrix, kept while the matrices change, with one power iteration each time."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.vectors = [power_iteration(matrix, iterations=15) for matrix in matrices]

    def follow(self, matrices: list[Tensor]) -> None:
        self.vectors = [power_iteration(m, u, v) for m, (u, v) in zip(matrices, self.vectors, strict=True)]

    def look(self, matrices: list[Tensor]) -> dict[str, Any]:
        """Counts iterations to a thousandth of sigma, and the error after one, from the vectors kept and from random ones."""
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
    """The sum of squared singular values by the largest of them: how many count."""
    return sum(value * value for value in values) / max(max(values) ** 2, 1e-30)


@dataclass(frozen=True)
class Game(Work, path="{0.loss}/{0.kind}/seed={0.seed}"):
    """One training."""

    loss: str
    kind: str
    seed: int
    steps: int


def play(job: Game, folder: Path) -> dict[str, Any]:
    """Trains a generator against a discriminator, and looks at the discriminator twenty times meanwhile."""
    reseed(job.seed, "init")
    generator, critic = PointGenerator(), PointDiscriminator()
    if job.kind in ("sn", "wn"):
        apply_recipe(critic, f"keep+{job.kind}")
    if job.kind == "hard":
        reassign_spectral_(critic)
    first = weights(critic)
    follow = partial(raw_weights, critic) if job.kind in FOLLOWED else list
    memory = Memory(follow())
    both = zip((generator, critic), RATES, strict=True)
    optimizers = [torch.optim.Adam(model.parameters(), rate, betas=(0.0, 0.9)) for model, rate in both]

    def judge() -> float:
        real, fake = ring(BATCH, std=STD), invent(generator, BATCH).detach()
        # One call for both, so that power iteration steps once per step and both see the same weight.
        judged, faked = critic(torch.cat([real, fake])).chunk(2)
        hinge = job.loss == "hinge"  # else the difference of means, which estimates Wasserstein's distance
        loss = F.relu(1 - judged).mean() + F.relu(1 + faked).mean() if hinge else faked.mean() - judged.mean()
        descend(optimizers[1], loss)
        demand_numbers(critic)
        constrain(critic, job.kind)
        memory.follow(follow())
        return loss.item()

    def step(number: int) -> dict[str, Any] | None:
        losses = [judge() for _ in range(CRITIC)]
        aim = -critic(invent(generator, BATCH)).mean()
        descend(optimizers[0], aim)
        demand_numbers(generator)
        if not torch.isfinite(aim):
            raise Diverged
        if number % max(1, job.steps // LOOKS):
            return None
        return {"critic": losses[-1], "generator": aim.item(), **look(generator, critic), **memory.look(follow())}

    parts = {
        "generator": generator,
        "critic": critic,
        "adam": optimizers[0],
        "adam of critic": optimizers[1],
        "memory": memory,
    }
    walked = walk(folder, job.steps, parts, step, job.seed)
    found: dict[str, Any] = dict.fromkeys(("modes", "near", "spectra", "points", "field"))
    if walked.status == OK:
        reseed(job.seed, "end")
        points = invent(generator, 2048).detach()
        modes, near = coverage(points)
        found = {
            "modes": modes,
            "near": near,
            "spectra": {"first": spectra(first), "last": spectra(weights(critic))},
            "points": [[round(value, 3) for value in point] for point in points[:600].tolist()],
            "field": [[round(value, 4) for value in row] for row in field(critic).tolist()],
        }
    return {"status": walked.status, "rows": walked.rows, **found}


def invent(generator: PointGenerator, samples: int) -> Tensor:
    """Points of a generator, from noise of torch's global generator."""
    return generator(torch.randn(samples, generator.noise))


def look(generator: PointGenerator, critic: nn.Module) -> dict[str, Any]:
    """Measures a discriminator: sigma of each layer, their product, its steepest place, and iterations for sigma."""
    matrices = weights(critic)
    sigmas = [torch.linalg.matrix_norm(matrix.double(), 2).item() for matrix in matrices]
    fake = invent(generator, 512).detach()
    critic.eval()
    steepest = steepness(critic, torch.cat([ring(512, std=STD), fake, plane()])).max().item()
    critic.train()
    modes, near = coverage(fake)
    row = {"sigmas": sigmas, "bound": torch.tensor(sigmas).prod().item(), "steepest": steepest}
    return {**row, "modes": modes, "near": near}


def coverage(points: Tensor) -> tuple[int, float]:
    """Modes that at least a fiftieth of the points is near to, and the share of points near to any: three deviations."""
    nearest = torch.cdist(points, centres()).min(dim=1)
    near = nearest.values < 3 * STD
    counts = torch.bincount(nearest.indices[near], minlength=8)
    return int((counts >= 0.02 * len(points)).sum()), near.float().mean().item()


def plane() -> Tensor:
    """A grid of points over the plane where the ring lies, row by row from below."""
    ticks = torch.linspace(-WIDE, WIDE, GRID)
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1).reshape(-1, 2)


@torch.no_grad()
def field(critic: nn.Module) -> Tensor:
    """A discriminator over the plane."""
    return critic.eval()(plane()).reshape(GRID, GRID)
