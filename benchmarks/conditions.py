"""Which layers of three small models are badly conditioned, random and trained, and what equilibration changes.

An Inception network on handwritten digits, a convolutional network and a vision transformer on CIFAR-10, which lies where
``NORMKIT_DATA`` says. Trained weights are kept in the folder; the table is printed as Markdown, and the figure written there.

    python benchmarks/conditions.py --output runs/conditions
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.diagnostics.conditioning import WeightCondition, conditions
from normkit.lab.experiment import Drawing, Table
from normkit.lab.models.inception import digits_inception
from normkit.lab.models.small_cnn import SmallCNN
from normkit.lab.models.vit import VisionTransformer
from normkit.lab.report.drawing import save
from normkit.lab.report.terminal import markdown
from normkit.lab.report.weights import MODES, conditions_figure
from normkit.lab.train.images import Images, Stream, load

# Name, model, data and training images, steps, batch, optimizer.
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, int | None], int, int, Optimizer]] = {
    "Inception, digits": (
        digits_inception, ("digits", None), 600, 64, lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    ),
    "CNN, CIFAR-10": (
        lambda: SmallCNN(nn.BatchNorm2d), ("cifar10", 10000), 500, 64,
        lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4),
    ),
    "ViT, CIFAR-10": (
        lambda: VisionTransformer(size=32, patch=4, features=64, depth=4, heads=4), ("cifar10", 10000), 700, 64,
        lambda model: torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05),
    ),
}  # fmt: skip


def trained(name: str, folder: Path) -> tuple[nn.Module, nn.Module, float]:
    """The model with its first weights and with its last, and the test accuracy; resumed from the folder if it is there."""
    make, (data, count), steps, batch, optimize = MODELS[name]
    torch.manual_seed(0)
    first, last = make(), make()
    last.load_state_dict(first.state_dict())
    images = load(data, count)
    path = folder / f"{name.partition(',')[0].lower()}.pt"
    if path.exists():
        last.load_state_dict(torch.load(path, weights_only=True))
        return first, last, accuracy(last, images["test"])
    optimizer, stream = optimize(last), Stream(images["train"], batch, 0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], steps)
    for number in range(1, steps + 1):
        x, y = stream(number)
        optimizer.zero_grad()
        F.cross_entropy(last(x), y).backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(last.state_dict(), path)
    return first, last, accuracy(last, images["test"])


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of test images that are recognized."""
    model.eval()
    right: list[Tensor] = [
        model(x).argmax(1) == y for x, y in zip(images[0].split(500), images[1].split(500), strict=True)
    ]
    return torch.cat(right).float().mean().item()


def summary(name: str, state: str, found: list[WeightCondition]) -> list[str]:
    """A row: the worst weight, and over weights how often and by how much each mode lowers the condition number."""
    worst = max(found, key=lambda row: row.condition)
    cells = [
        name,
        state,
        f"{geometric_mean(row.condition for row in found):.1f}",
        f"{worst.name} ({worst.condition:.0f})",
    ]
    for mode in MODES:
        better = sum(row.after[mode] < row.condition for row in found)
        change = geometric_mean(row.after[mode] / row.condition for row in found)
        cells.append(f"{change:.2f} ({better} of {len(found)})")
    return cells


def main() -> None:
    """Trains, measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/conditions"))
    options = parser.parse_args()
    rows, panels = [], {}
    for name in MODELS:
        first, last, score = trained(name, options.output)
        for state, model in (("random", first), (f"trained, accuracy {score:.2f}", last)):
            found = [row for row in conditions(model) if min(row.shape) > 1]
            rows.append(summary(name, state, found))
        panels[f"{name}, trained"] = found
    columns = ("model", "weights", "mean κ", "worst weight (κ)", *(f"κ under {mode}, of κ" for mode in MODES.values()))
    print(markdown(Table("", columns, rows)))
    for name, found in panels.items():
        lines = [
            [row.name, f"{row.condition:.1f}", *(f"{row.after[mode]:.1f}" for mode in MODES)]
            for row in sorted(found, key=lambda row: -row.condition)[:4]
        ]
        print(f"\n{name}: the four worst\n")
        print(markdown(Table("", ("weight", "κ", *(f"κ {mode}" for mode in MODES.values())), lines)))
    save([Drawing("diagnostics", lambda: conditions_figure(panels), "")], options.output, dpi=150)


if __name__ == "__main__":
    main()
