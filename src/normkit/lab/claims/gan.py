"""Spectral normalization of a discriminator: what it bounds, what it leaves free, and what memory of u and v is worth.

A generator learns eight Gaussians on a ring. The discriminator's weights are left alone, clipped after each step, weight
normalized, spectrally normalized with a gradient through sigma, or divided by their largest singular value after each step.

Ours: networks of two hidden layers of 64 units; Adam with beta (0, 0.9), at 5e-4 for the discriminator and 1e-3 for the
generator, the same for every kind; two steps of the discriminator for each of the generator's; weights clipped at 0.1, as at the
0.01 of Wasserstein GAN so small a network passes nothing on. An iteration of power is counted on the weights before
normalization, whose vectors u and v are kept and get one iteration after each of the discriminator's steps.
An epoch of ``--epochs`` is 100 steps of the generator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from normkit.core.card import Paper
from normkit.lab.claims.gan_drawing import KINDS, LOSSES, draw
from normkit.lab.claims.numbers import choose, known, mean, spread
from normkit.lab.claims.steps import OK, Diverged, forget, walk
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.models.gan import PointDiscriminator, PointGenerator, centres, ring
from normkit.lab.seeding import reseed
from normkit.surgery.reassign_spectral import reassign_spectral_
from normkit.surgery.recipe import apply_recipe
from normkit.weights.power_iteration import power_iteration

STEPS = {"small": 1500, "full": 20000}
FOLLOWED = ("none", "sn")
STD, CLIP, BATCH, CRITIC = 0.05, 0.1, 128, 2
RATES = 1e-3, 5e-4
LOOKS = 20
TOLERANCE = 1e-3
GRID = 41
WIDE = 3.0


@dataclass(frozen=True)
class Job:
    """One training."""

    loss: str
    kind: str
    seed: int
    steps: int

    @property
    def path(self) -> str:
        """The folder."""
        return f"{self.loss}/{self.kind}/seed={self.seed}"


def play(job: Job, folder: Path) -> dict[str, Any]:
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
        optimizers[1].zero_grad()
        # One call for both, so that power iteration steps once a step and both see the same weight.
        judged, faked = critic(torch.cat([real, fake])).chunk(2)
        loss = critic_loss(job.loss, judged, faked)
        loss.backward()
        optimizers[1].step()
        demand_numbers(critic)
        constrain(critic, job.kind)
        memory.follow(follow())
        return loss.item()

    def step(number: int) -> dict[str, Any] | None:
        losses = [judge() for _ in range(CRITIC)]
        optimizers[0].zero_grad()
        aim = -critic(invent(generator, BATCH)).mean()
        aim.backward()
        optimizers[0].step()
        demand_numbers(generator)
        if not torch.isfinite(aim):
            raise Diverged
        if number % max(1, job.steps // LOOKS):
            return None
        return {
            "critic": losses[-1],
            "generator": aim.item(),
            **look(generator, critic),
            **memory.look(follow()),
        }

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
    forget(folder)
    return {"status": walked.status, "rows": walked.rows, **found}


def invent(generator: PointGenerator, samples: int) -> Tensor:
    """Points of a generator, from noise of torch's global generator."""
    return generator(torch.randn(samples, generator.noise))


def demand_numbers(model: nn.Module) -> None:
    """Raises :class:`Diverged` where a parameter is not finite: such a weight has no singular values to divide by or to show.

    >>> demand_numbers(nn.Linear(2, 1))
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise Diverged


def critic_loss(loss: str, judged: Tensor, faked: Tensor) -> Tensor:
    """What a discriminator lowers: the hinge loss, or the difference of means that estimates Wasserstein's distance.

    hinge         mean(relu(1 - D(x))) + mean(relu(1 + D(G(z))))
    wasserstein   mean(D(G(z))) - mean(D(x))

    >>> critic_loss("hinge", torch.tensor([2.0]), torch.tensor([0.5])).item()
    1.5
    """
    if loss == "hinge":
        return F.relu(1 - judged).mean() + F.relu(1 + faked).mean()
    return faked.mean() - judged.mean()


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


class Memory:
    """u and v of each matrix, kept while the matrices change, with one power iteration each time.

    Args:
        matrices: as they start.
    """

    def __init__(self, matrices: list[Tensor]) -> None:
        self.vectors = [power_iteration(matrix, iterations=15) for matrix in matrices]

    def follow(self, matrices: list[Tensor]) -> None:
        """Does one iteration on each."""
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
        """The vectors."""
        return {"vectors": [list(pair) for pair in self.vectors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the vectors."""
        self.vectors = [(u, v) for u, v in state["vectors"]]


def error(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """By what part of sigma u^T W v falls short of it."""
    exact = torch.linalg.matrix_norm(matrix.double(), 2)
    return (1 - u.double() @ matrix.double() @ v.double() / exact).item()


def needed(matrix: Tensor, u: Tensor | None = None, v: Tensor | None = None, done: int = 0, limit: int = 200) -> int:
    """Power iterations up to a relative error of sigma of a thousandth.

    Args:
        matrix: whose largest singular value is sought.
        u: left vector to start with. Default: None, random.
        v: right vector to start with. Default: None, random.
        done: iterations that the vectors had already. Default: 0.
        limit: where it gives up. Default: 200.

    >>> needed(torch.diag(torch.tensor([2.0, 1.0])), v=torch.tensor([1.0, 0.0]))
    1
    """
    if done and u is not None and v is not None and error(matrix, u, v) <= TOLERANCE:
        return done
    for count in range(done + 1, limit + 1):
        u, v = power_iteration(matrix.double(), u, v, 1)
        if error(matrix, u, v) <= TOLERANCE:
            return count
    return limit


def coverage(points: Tensor) -> tuple[int, float]:
    """Modes that at least a fiftieth of the points is near to, and the share of points near to any: three deviations.

    >>> coverage(centres().repeat(5, 1))
    (8, 1.0)
    """
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


def run(bench: Bench) -> dict[str, Any]:
    """Trains every kind with every loss and seed."""
    steps = 100 * bench.epochs if bench.epochs else STEPS[bench.scale]
    jobs = [Job(loss, kind, seed, steps) for seed in bench.seeds for loss in LOSSES for kind in KINDS]
    played = bench.sweep(play, jobs)
    runs = [
        {"loss": job.loss, "kind": job.kind, "seed": job.seed, **result}
        for job, result in zip(jobs, played, strict=True)
    ]
    for run in runs:
        if run["seed"] != bench.seeds[0]:  # the pictures show one seed
            del run["points"], run["field"]
    return {"runs": runs, "steps": steps, "seeds": len(bench.seeds)}


def tables(result: dict[str, Any]) -> list[Table]:
    """What each constraint bounds, and what comes of it."""
    columns = ("weights", "modes of 8", "near, %", "sigma", "product", "steepest", "stable rank")
    found = []
    for loss in LOSSES:
        rows: list[list[Any]] = []
        for kind, name in KINDS.items():
            runs = choose(result["runs"], loss=loss, kind=kind)
            last = [run["rows"][-1] if run["status"] == OK else {} for run in runs]
            rows.append(
                [
                    name,
                    spread([run["modes"] for run in runs], ".1f"),
                    spread([run["near"] for run in runs], ".1f", 100),
                    spread([max(row["sigmas"]) if row else None for row in last], ".3g"),
                    spread([row.get("bound") for row in last], ".3g"),
                    spread([row.get("steepest") for row in last], ".3g"),
                    spread(ranks(runs, "last"), ".1f"),
                ]
            )
        notes = [
            f"After {result['steps']} steps of the generator; mean ± standard deviation over {result['seeds']} seeds.",
            "Near: points within three deviations of a mode. Sigma: the largest of all layers. Product: of all layers' sigma, "
            "which bounds the steepest gradient found. Stable rank: of the second layer, its squared singular values' sum by "
            "the largest of them.",
        ]
        found.append(Table(LOSSES[loss], columns, rows, notes))
    rows = []
    for kind in FOLLOWED:
        for layer in range(2):
            kept, fresh = memory_of(result, kind, layer)
            rows.append([f"{KINDS[kind]}, layer {layer + 1}", *kept, *fresh])
    note = f"Iterations to an error of {TOLERANCE:g} of sigma, and the error after one; means over training, seeds and losses."
    ways = [f"{way}: {what}" for way in ("kept", "random") for what in ("iterations", "error, %")]
    columns = ("weight before normalization", *ways)
    return [*found, Table("Power iteration from the vectors kept and from random ones", columns, rows, [note])]


def stable_rank(values: list[float]) -> float:
    """The sum of squared singular values by the largest of them: how many count.

    >>> stable_rank([2.0, 2.0, 1.0])
    2.25
    """
    return sum(value * value for value in values) / max(max(values) ** 2, 1e-30)


def ranks(runs: Sequence[Mapping[str, Any]], when: str) -> list[float | None]:
    """The second layer's stable rank before (``"first"``) or after training (``"last"``); a run that diverged has none."""
    return [stable_rank(run["spectra"][when][1]) if run["spectra"] else None for run in runs]


def memory_of(result: dict[str, Any], kind: str, layer: int) -> list[tuple[float | None, float | None]]:
    """Mean iterations and mean error in percent, from kept and from fresh vectors."""
    rows = [row for run in choose(result["runs"], kind=kind) for row in run["rows"]]
    return [
        (
            mean(row[way][layer]["iterations"] for row in rows),
            mean(100 * error for error in known(row[way][layer]["error"] for row in rows)),
        )
        for way in ("kept", "fresh")
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    """What was seen of each claim."""
    said = []
    for loss in LOSSES:
        for kind, why in (("sn", " (one power iteration lags behind the weights)"), ("hard", "")):
            rows = [row for run in choose(result["runs"], loss=loss, kind=kind) for row in run["rows"]]
            sigmas = [sigma for row in rows for sigma in known(row["sigmas"])]
            bounds, slopes = (known(row[key] for row in rows) for key in ("bound", "steepest"))
            if sigmas and bounds and slopes:
                # The product is what holds for certain; a slope that was found says only how steep the network is at least.
                said.append(
                    f"{loss}, {KINDS[kind]}: a layer's sigma was up to {max(sigmas):.4f} when looked at along training{why}, so "
                    f"the guaranteed bound, their product, is up to {max(bounds):.4f}; the steepest gradient found, a "
                    f"lower estimate, was {max(slopes):.3f}, {'below' if max(slopes) < 1 else 'not below'} 1."
                )
        free = [run["rows"][-1]["bound"] for run in choose(result["runs"], loss=loss, kind="none", status=OK)]
        if known(free):
            said.append(
                f"{loss}, nothing: the product of sigmas ends at up to {max(known(free)):.3g}; nothing holds it."
            )
        # A generator that diverged covers nothing.
        best = {kind: mean(run["modes"] or 0 for run in choose(result["runs"], loss=loss, kind=kind)) for kind in KINDS}
        names = ", ".join(f"{KINDS[kind]} {modes:.1f}" for kind, modes in best.items() if modes is not None)
        said.append(f"{loss}: modes covered of 8, mean over seeds: {names}.")
    for kind in ("sn", "hard"):
        first, last = (mean(ranks(choose(result["runs"], kind=kind), when)) for when in ("first", "last"))
        if first is not None and last is not None:
            said.append(
                f"{KINDS[kind]}: only the largest singular value is held; the others go where they like, and the stable rank of "
                f"the second layer goes from {first:.1f} to {last:.1f}."
            )
    flat = [value for run in choose(result["runs"], kind="sn") for row in run.get("field") or () for value in row]
    if flat and all(value is not None and abs(value) < 1 for value in flat):
        said.append(
            "spectral norm: at the end the first seed's discriminators are within -1 and 1 on the plane, where the hinge loss is "
            "the Wasserstein loss plus 2: as long as that is so, both losses give the same training but for rounding."
        )
    for kind in FOLLOWED:
        (kept, lag), (fresh, far) = memory_of(result, kind, 1)
        if None not in (kept, lag, fresh, far):
            said.append(
                f"Keeping u and v, second layer, {KINDS[kind]}: one iteration a step errs by {lag:.2g} % in sigma, one from "
                f"random vectors by {far:.2g} %; a thousandth takes {kept:.1f} iterations against {fresh:.1f}."
            )
    lost = [run for run in result["runs"] if run["status"] != OK]
    said.append(f"{len(lost)} of {len(result['runs'])} runs diverged.")
    return said


EXPERIMENT = Experiment(
    name="gan",
    kind="claim",
    title="Spectral normalization of a discriminator, on eight Gaussians",
    claim=(
        "Dividing each weight of a discriminator by its largest singular value makes it Lipschitz with constant 1, leaves the "
        "other singular values free, and costs one power iteration a step if u and v are kept."
    ),
    paper=Paper(
        "Miyato, Takeru and Kataoka, Toshiki and Koyama, Masanori and Yoshida, Yuichi",
        "Spectral Normalization for Generative Adversarial Networks",
        2018,
        "https://arxiv.org/abs/1802.05957",
    ),
    run=run,
    tables=tables,
    draw=draw,
    remarks=remarks,
)
