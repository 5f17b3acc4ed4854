"""A generator and a critic that learn against each other, and what is seen of them along the way."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.lab.jobs.spectra import Memory, constrain, demand_numbers, raw_weights, spectra, steepness, weights
from normkit.lab.models.gan import PointDiscriminator, PointGenerator, centres, ring
from normkit.lab.seeding import reseed
from normkit.lab.sweep import Work
from normkit.lab.train.walk import OK, Diverged, descend, walk
from normkit.surgery.reassign_spectral import reassign_spectral_
from normkit.surgery.recipe import apply_recipe

FOLLOWED = ("none", "sn")


STD, BATCH, CRITIC = 0.05, 128, 2
RATES = 1e-3, 5e-4
LOOKS = 20
GRID, WIDE = 41, 3.0


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
        loss = critic_loss(job.loss, judged, faked)
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


def critic_loss(loss: str, judged: Tensor, faked: Tensor) -> Tensor:
    """What a discriminator lowers: the hinge loss, or the difference of means that estimates Wasserstein's distance.

    hinge         mean(relu(1 - D(x))) + mean(relu(1 + D(G(z)))) wasserstein   mean(D(G(z))) - mean(D(x))

    >>> critic_loss("hinge", torch.tensor([2.0]), torch.tensor([0.5])).item()
    1.5
    """
    if loss == "hinge":
        return F.relu(1 - judged).mean() + F.relu(1 + faked).mean()
    return faked.mean() - judged.mean()


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
