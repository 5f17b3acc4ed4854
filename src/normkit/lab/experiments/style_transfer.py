"""Style transfer by adaptive instance normalization, with a small encoder trained here.

A small network without norms learns to classify images; its first two convolutions are the encoder f. Adaptive instance
normalization gives the features of a content image the means and deviations of a style image, t = AdaIN(f(c), f(s)), and a
decoder g learns to draw them: the loss is |f(g(t)) - t|² and ten times the distance of the means and deviations of features of
g(t) from those of s, at both layers.

Ours: CIFAR-10 as contents and styles, at 32x32, so that what is transferred is mostly colour and contrast; Adam at 0.002 on
batches of 16. The published system has a pretrained VGG-19 as its encoder and images of 256x256.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.activations.instance_norm import adaptive_instance_norm
from normkit.catalogue.methods import method
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments import runs
from normkit.lab.experiments.trials import grid
from normkit.lab.models.noisy_norm import Shift
from normkit.lab.stats import spread
from normkit.lab.train.images import Size, Stream, fit
from normkit.lab.train.walk import descend, device, walk

STEPS, BATCH, SHOWN = {"tiny": 3, "small": 500, "full": 5000}, 16, 4


@dataclass(frozen=True, kw_only=True)
class Transfer(Size, path="seed={0.seed}"):
    """One encoder and decoder."""

    seed: int
    steps: int


def moments(features: list[Tensor]) -> list[Tensor]:
    """Means and deviations of each sample and channel, layer by layer."""
    return [part for f in features for part in (f.mean((2, 3)), (f.var((2, 3), correction=0) + 1e-5).sqrt())]


def distance(these: list[Tensor], those: list[Tensor]) -> Tensor:
    """The squared distance of moments, summed over layers."""
    return torch.stack([F.mse_loss(a, b) for a, b in zip(these, those, strict=True)]).sum()


def transfer(job: Transfer, folder: Path) -> dict[str, Any]:
    """Trains the encoder, then the decoder, and measures it on test images."""
    data = job.images()
    classifier = runs.network(job, data, Shift)
    fit(classifier, Stream(data["train"], BATCH, job.seed), job.epochs, 0.02, job.seed, folder / "encoder")
    layers = classifier.features.requires_grad_(False)
    wide, channels = 2 * job.width, data["train"][0].shape[1]
    decoder = nn.Sequential(
        nn.Conv2d(wide, wide, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(wide, job.width, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(job.width, channels, 3, padding=1, padding_mode="reflect"),
    ).to(device())  # fmt: skip
    optimizer = torch.optim.Adam(decoder.parameters(), 0.002)

    def encode(x: Tensor) -> list[Tensor]:
        first = layers[:3](x)
        return [first, layers[3:6](first)]

    def losses(content: Tensor, style: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        styled = encode(style)
        target = adaptive_instance_norm(encode(content)[-1], styled[-1])
        made = decoder(target)
        found = encode(made)
        return made, F.mse_loss(found[-1], target), distance(moments(found), moments(styled))

    stream = Stream(data["train"], 2 * BATCH, job.seed + 1)

    def step(number: int) -> dict[str, float] | None:
        content, style = stream(number)[0].split(BATCH)
        _, kept, apart = losses(content, style)
        descend(optimizer, kept + 10 * apart)
        return {"content": kept.item(), "style": apart.item()} if number in (1, job.steps) else None

    walk(folder, job.steps, {"decoder": decoder, "optimizer": optimizer}, step, job.seed)
    with torch.no_grad():
        content, style = data["test"][0][:32], data["test"][0][32:64]
        _, kept, apart = losses(content, style)
        before = distance(moments(encode(content)), moments(encode(style)))
        c, s = (part[:SHOWN] for part in (content, style))
        made, _, _ = losses(c.repeat_interleave(SHOWN, 0), s.repeat(SHOWN, 1, 1, 1))
    found = {"content": kept.item(), "style": apart.item(), "before": before.item()}
    pictures = {name: pixels(part).tolist() for name, part in {"contents": c, "styles": s, "made": made}.items()}
    return {**found, "pictures": pictures if job.seed == 0 else None}


def pixels(images: Tensor) -> Tensor:
    """Standardized images as bytes, channels last; two deviations about the mean are black and white."""
    return ((images.clamp(-2, 2) + 2) * 63.75).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


def run(bench: Bench) -> dict[str, Any]:
    """Trains with every seed."""
    size = {**runs.size_of(bench, 6), "halve": False}
    jobs = [Transfer(seed=seed, steps=STEPS[bench.scale], **size) for seed in bench.seeds]
    done = runs.labelled(bench, transfer, jobs, "seed")
    return {"runs": done, "job": asdict(jobs[0]), **runs.source_of(size, bench)}


def tables(result: dict[str, Any]) -> list[Table]:
    """Distances on test images."""
    cells = [spread([run[key] for run in result["runs"]], ".3g") for key in ("before", "style", "content")]
    columns = ("distance of moments, content to style", "output to style", "output's features to their target")
    steps = result["job"]["steps"]
    about = f"Squared, on 32 test images; {steps} steps of the decoder. Mean ± standard deviation over seeds."
    return [Table("Style and content", columns, [cells], runs.notes(result, about))]


def remarks(result: dict[str, Any]) -> list[str]:
    """How much nearer the style is."""
    parts = spread([run["style"] / run["before"] for run in result["runs"]], ".3f")
    return [
        f"Means and deviations of the output's features are at {parts} of the content's squared distance from the style's."
    ]


def figures(result: dict[str, Any]) -> list[Drawing]:
    """The pictures of the first seed."""
    caption = (
        "Test images in the style of others, by the first seed: contents down the left column, styles along the top row. "
        "Each output should keep what is drawn on its left and take the colours and contrast from above it."
    )
    shown = [run["pictures"] for run in result["runs"] if run["pictures"]]
    return [Drawing("transfer", lambda: draw(shown[0]), caption)] if shown else []


def draw(pictures: dict[str, Any]) -> Figure:
    """A grid of contents, styles and outputs."""
    figure, axes = grid(SHOWN + 1, SHOWN + 1, 7.0)
    for k in range(SHOWN):
        axes[0, k + 1].imshow(pictures["styles"][k])
        axes[k + 1, 0].imshow(pictures["contents"][k])
        for j in range(SHOWN):
            axes[k + 1, j + 1].imshow(pictures["made"][k * SHOWN + j])
    return figure


EXPERIMENT = Experiment(
    "style-transfer", "claim", "Style transfer by adaptive instance normalization",
    "Giving features the means and deviations of a style image's features, and decoding them, transfers the style.",
    method("adaptive_instance_norm").paper, run, tables, figures, remarks,
)  # fmt: skip
