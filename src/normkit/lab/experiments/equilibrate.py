"""Whether to equilibrate the weight or the update: E, weight norm, Muon and MuonEq on a convolutional network and a transformer.

Weight conditioning (E) divides each row of a weight by its norm; MuonEq-R divides each row of Muon's momentum by its norm,
before it is orthogonalized. The same diagonal, on the weight or on its update: so each is run alone, with the other, and
neither, and plain Muon tells what orthogonalizing does alone. E and weight norm (WN) are on all layers; Muon steps hidden
weights, AdamW the last layer, gains and biases. Each row takes the best of its rates, chosen with the first seed on held-out
images; where that is the smallest or the largest, further ones are tried.

Controls of E: on the last layer alone; on all layers with one learned temperature per layer; rows that merely begin with norm 1;
weight norm with its lengths frozen at 1, which is E. Condition numbers are those of the weights that layers compute with, at the
end of each epoch, and of the change that the step in its middle makes in them; a row's is the median over layers.

Ours: Inception of eight blocks with BN, by SGD with momentum 0.9 and weight decay 1e-4; a transformer with LN, by AdamW with
decay 0.05; cosine decay. At small scale images are 16x16, and 1,024 are learned in batches of 64 for 5 epochs: Inception has
half its channels, the transformer patches of 4, 64 features and 3 blocks. At full scale it is ViT-S, in batches of 128, 100
epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor, nn

from normkit.diagnostics.conditioning import condition_number, weight_conditions
from normkit.gradients.muon import CARD
from normkit.lab import record
from normkit.lab.experiment import Experiment, Table
from normkit.lab.experiments import classification, vit_s
from normkit.lab.experiments.classification import TUNED, Plan, Row, curve, early, study
from normkit.lab.experiments.classification import figures as curves_of
from normkit.lab.experiments.runs import drawn
from normkit.lab.models.vit import VisionTransformer
from normkit.lab.report.drawing import FULL, SEEDS, along, log, name_ends, styles
from normkit.lab.stats import BETTER, WORSE, gain, judge_runs, spread, tell, where
from normkit.lab.train.learning import Training, layer_weights, learn
from normkit.lab.train.trainer import METRICS, METRICS_FILE, Trainer

MUON, EQ = "Muon", "MuonEq-R"
LAST, WARM, FROZEN, UNIT = "E, last layer", "E, temperature", "WN, lengths 1", "unit rows at the start"
MUON_RATES = (1e-3, 3e-3, 1e-2)
SMALL: dict[str, Any] = {"size": 16, "train": 1024, "val": 500, "test": 2000, "epochs": 5, "batch_size": 64}
KINDS = {"weights": "κ of the weights", "updates": "κ of the updates"}


class Watched(Trainer):
    """Takes, for each layer, the condition number of the change of its weight in the middle of an epoch, not the raw weight's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken, self.before, self.change = 0, dict[str, Tensor](), dict[str, Tensor]()
        self.placed.optimizer.register_step_pre_hook(self._look)
        self.placed.optimizer.register_step_post_hook(self._compare)

    def _look(self, *_: Any) -> None:
        # Not the last step: a cosine schedule ends at a rate at which float32 weights no longer show a change.
        if self.taken % self.steps == self.steps // 2:
            self.before = layer_weights(self.placed.model)

    def _compare(self, *_: Any) -> None:
        if self.taken % self.steps == self.steps // 2:
            after = layer_weights(self.placed.model)
            self.change = {name: after[name] - weight for name, weight in self.before.items()}
        self.taken += 1

    def conditions(self) -> dict[str, list[float | None]]:
        """Takes the condition numbers of every layer's change and of its weight."""
        found = {}
        for name, (_, used) in weight_conditions(self.placed.model).items():
            pair = condition_number(self.change[f"{name}.weight"].flatten(1)), used
            found[name] = [k if math.isfinite(k) else None for k in pair]
        return found


def follow(job: Training, folder: Path) -> dict[str, Any]:
    """Trains, and adds to the curve the median over layers of the condition numbers of weights and of updates."""
    found = learn(job, folder, Watched)
    rows = [list(row["condition"].values()) for row in record.read_lines(folder / METRICS_FILE, METRICS)]
    for place, key in enumerate(("updates", "weights")):
        middles = [median(pair[place] or math.inf for pair in pairs) for pairs in rows]
        found["curve"][key] = [k if math.isfinite(k) else None for k in middles]
    return found


def small_vit(classes: int = 10) -> nn.Module:
    """Makes the small scale's transformer: images of 16x16, patches of 4, 64 features, 3 blocks, 4 heads."""
    return VisionTransformer(size=16, patch=4, features=64, depth=3, heads=4, classes=classes)


def rows(first: str, words: str, last: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows and controls of a network: its first row's name and recipe, and the last layer's name."""
    main = [Row(first, words), Row(f"{first} + E", f"{words}+e@all"), Row(f"{first} + WN", f"{words}+wn")]
    for name, kind in ((MUON, "muon"), (EQ, "muoneq")):
        for row, recipe in ((name, words), (f"{name} + E", f"{words}+e@all")):
            main.append(Row(row, recipe, optimizer=kind, rates=MUON_RATES))
    lengths = (("lengths", 1.0), ("frozen", True))
    controls = (
        Row(LAST, f"{words}+e@re:^{last}$"),
        Row(WARM, f"{words}+e:row:learned@all"),
        Row(UNIT, words, unit="all"),
        Row(FROZEN, f"{words}+wn@all", like=f"{first} + E", conditioning=lengths, once=True),
    )
    return tuple(main), controls


def plans(scale: str) -> list[Plan]:
    """The plans at a scale."""
    small = scale != "full"
    size: dict[str, Any] = SMALL if small else {"epochs": 100}
    inception = Training(
        "cifar10", "inception8", "", "bn", 0.0, 0, schedule="cosine", width=0.5 if small else 1.0, **size
    )
    data, model = "cifar10", f"{__name__}:small_vit" if small else "vit_s"
    if scale == "tiny":
        data, model, size = "digits", f"{vit_s.__name__}:tiny_vit", {"epochs": 1}
    transformer = Training(data, model, "", "keep", 0.0, 0, **vit_s.HOW, **size)
    found = [
        Plan("Inception", inception, *rows("SGD", "bn", "classifier"), (0.05, 0.15, 0.5), costs=0.0, beyond=True),
        Plan("ViT", transformer, *rows("AdamW", "keep", "head"), (2e-4, 6e-4, 2e-3), costs=0.0, beyond=True),
    ]
    return found[1:] if scale == "tiny" else found


def pairs(first: str) -> list[tuple[str, str]]:
    """The rows that are compared."""
    e, both = f"{first} + E", f"{EQ} + E"
    return [
        *((name, first) for name in (e, f"{first} + WN", MUON, EQ, both)),
        (EQ, MUON), (f"{MUON} + E", MUON), (both, EQ), (both, e), (EQ, e), (e, LAST), (LAST, first), (WARM, first),
        (UNIT, first), (e, UNIT), (both, UNIT),
    ]  # fmt: skip


def tables(result: dict[str, Any]) -> list[Table]:
    found = classification.tables(result)
    for label, part in result["parts"].items():
        runs = {row["name"]: row["runs"] for row in part["sets"][TUNED]}
        compared = [(one, other, (runs[one], runs[other])) for one, other in pairs(next(iter(runs)))]
        lines = [
            [
                *(f"{one}, minus {other}", tell(gain(*both, "test_score"), "+.1f", 100)),
                *(judge_runs(*both, "test_score"), tell(gain(*both, "test_loss"))),
            ]
            for one, other, both in compared
        ]
        notes = [
            "Points of Top-1, paired by seed. Each interval stands alone: of twenty, one is expected to miss by chance."
        ]
        columns = ("comparison", "test Top-1 [95 %]", "it is", "test loss [95 %]")
        found.append(Table(f"{label}: the weight or the update", columns, lines, notes))
        lines = [
            [name, *(spread([at(run, kind, place) for run in some], ".3g") for kind in KINDS for place in (0, -1))]
            for name, some in runs.items()
        ]
        columns = ("method", *(f"{title}, {when} epoch" for title in KINDS.values() for when in ("first", "last")))
        notes = [
            "Medians over layers, at the end of an epoch. An update is the change that the step in its middle makes in weights "
            "that layers compute with; weights are float32: their differences show no numbers much above 10,000."
        ]
        found.append(Table(f"{label}: condition numbers", columns, lines, notes))
    return found


def at(run: Mapping[str, Any], kind: str, place: int) -> float | None:
    """A condition number after an epoch."""
    numbers = run["curve"][kind]
    return numbers[place] if numbers else None


def remarks(result: dict[str, Any]) -> list[str]:
    said = []
    for label, part in result["parts"].items():
        runs = {row["name"]: row["runs"] for row in part["sets"][TUNED]}
        first = next(iter(runs))
        judged = [(one, other, judge_runs(runs[one], runs[other], "test_score")) for one, other in pairs(first)]
        told = [
            f"{one} is {word} than {other}, {tell(gain(runs[one], runs[other], 'test_score'), '+.1f', 100)}"
            for one, other, word in judged
            if word in (BETTER, WORSE)
        ]
        said.append(
            f"{label}, test Top-1: of {len(judged)} comparisons {len(told)} show a difference: {'; '.join(told) or 'none'}."
        )
        lower = [
            f"{one} has lower ones of {kind} than {other} in {_lower(runs[one], runs[other], kind)} seeds"
            for one, other in ((f"{first} + E", first), (MUON, first), (EQ, MUON), (f"{EQ} + E", EQ))
            for kind in KINDS
        ]
        said.append(f"{label}, condition numbers in the last epoch: {'; '.join(lower)}.")
        (e,) = where(runs[f"{first} + E"], seed=runs[FROZEN][0]["seed"])
        said.append(f"{label}: {_same(e, runs[FROZEN][0])}")
    return [
        *said,
        "With BN behind a layer, E on it leaves the network's function as it is and changes the size of its steps; on the last "
        "layer it bounds the logits, which is why E there alone and a learned temperature are controls. In the transformer E "
        "also changes what is computed at the start, as do rows that merely begin with norm 1.",
        *early(result, "; differences are those of early training."),
    ]


def _lower(these: list[Any], those: list[Any], kind: str) -> str:
    pairs = [[at(run, kind, -1) or math.inf for run in both] for both in zip(these, those, strict=True)]
    return f"{sum(one < other for one, other in pairs)} of {len(pairs)}"


def _same(e: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    pairs = zip(e["curve"]["train_loss"], frozen["curve"]["train_loss"], strict=False)
    apart = max((abs(one - other) for one, other in pairs), default=0.0)
    told = f"they differ by up to {apart:.2g}" if apart else "they are equal to the last bit"
    return f"weight norm with its lengths frozen at 1 is E: of the training losses of each epoch, {told}."


@drawn(
    "conditions",
    "Condition numbers, medians over layers, of the weights that layers compute with, at the end of an epoch (left), and of "
    f"the change that the step in its middle makes (right); {SEEDS}. Look whether E lowers the left ones, MuonEq the right.",
)
def _conditions(result: Mapping[str, Any]) -> Figure:
    parts = result["parts"]
    figure = Figure(figsize=(FULL, 2.7 * len(parts)), layout="constrained")
    for axes, (label, part) in zip(figure.subplots(len(parts), 2, squeeze=False), parts.items(), strict=True):
        main = where(part["sets"][TUNED], control=False)
        looks = styles([row["name"] for row in main], main[0]["name"])
        for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
            curves = [curve(row, look, kind) for row, look in zip(main, looks, strict=True)]
            ends = along(axis, curves, lambda point: point["x"], "epoch")
            log(axis)
            figure.canvas.draw()
            name_ends(axis, ends)
            axis.set_title(f"{label}: {title}", loc="left")
    return figure


EXPERIMENT = Experiment(
    "equilibrate", "claim", "Equilibrate the weight or the update?",
    "Rows of a weight or rows of its update can be equilibrated: which of them helps, do both, and is it the equilibration?",
    CARD.paper, lambda bench: study(bench, plans(bench.scale), follow), tables,
    lambda result: [*curves_of(result), _conditions(result)], remarks,
)  # fmt: skip
