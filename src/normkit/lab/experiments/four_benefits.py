"""Faster convergence, less sensitivity to the scale of inputs, less overfitting, better generalization: four claims, every norm.

A small network learns CIFAR-10 with each norm and with none. The rate of each is the best of four on held-out images at
the usual scale of inputs; then inputs are multiplied by 0.1, 1 and 10, with that same rate. What is reported is the number of
steps to a training loss of 1.8 nats (guessing gives 2.3), test accuracy, and training minus test accuracy. A norm is said to
differ from none where the 95 % interval of the differences, paired by seed, excludes 0.

Ours: SGD with momentum 0.9 and cosine decay, batches of 64; a bias stands where there is no norm, also with weight norm and with
equilibrated weights, which are on all layers; the first layer's bias starts at 0, so that inputs scale what it gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from normkit.activations.batch_norm import CARD
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments import runs
from normkit.lab.experiments.runs import CHANCE, drawn, side
from normkit.lab.models.small_cnn import MAKERS, Shift
from normkit.lab.report.drawing import COLOURS, FAINT, GREY, SHAPES, marked, name_ends, rows_of
from normkit.lab.stats import differences, known, mean, spread, tell, where
from normkit.lab.train.images import OK, Size, Stream, accuracy, fit
from normkit.surgery.recipe import apply_recipe

METHODS = {
    "none": "no norm",
    "bn": "BatchNorm",
    "ln": "LayerNorm",
    "in": "InstanceNorm",
    "gn": "GroupNorm",
    "gn+ws": "GroupNorm + WS",
    "wn": "WeightNorm",
    "e": "equilibrated",
}
HUES = dict(zip(METHODS, (GREY, *COLOURS, "#8c6d5a"), strict=True))
MARKS = dict(zip(METHODS, (*SHAPES, "X", "p"), strict=True))

BATCH, TARGET, EVERY = 64, 1.8, 5
RATES = (0.001, 0.01, 0.1, 0.5)
SCALES = (0.1, 1.0, 10.0)
RECIPES = {"gn+ws": "keep+ws", "wn": "keep+wn", "e": "keep+e@all"}


@dataclass(frozen=True)
class Training(Size, path="{0.method}/scale={0.scale:g}/rate={0.rate:g}/seed={0.seed}"):
    method: str
    rate: float
    scale: float
    seed: int


def train(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a network on scaled inputs, and evaluates it on inputs of the same scale."""
    images = {part: (job.scale * x, y) for part, (x, y) in job.images().items()}
    stream = Stream(images["train"], BATCH, job.seed)
    model = runs.network(job, images, MAKERS.get(job.method.removesuffix("+ws"), Shift))
    if job.method in RECIPES:
        apply_recipe(model, RECIPES[job.method])
    walked = fit(model, stream, job.epochs, job.rate, job.seed, folder, every=EVERY)
    scores: dict[str, float | None] = dict.fromkeys(("train", "val", "test"))
    reached = None
    if walked.status == OK:
        model.eval()
        scores = {part: accuracy(model, images[part]) for part in scores}
        reached = next((row["step"] for row in walked.rows if row["loss"] <= TARGET), None)
    return {"status": walked.status, "steps": reached, "planned": job.epochs * stream.per_epoch, **scores}


def run(bench: Bench) -> dict[str, Any]:
    size = runs.size_of(bench, 4)
    rates = RATES if bench.scale != "tiny" else (0.1, 1e30)  # one that learns and one that diverges
    tried = [Training(method, rate, 1.0, bench.seeds[0], **size) for method in METHODS for rate in rates]
    found = runs.labelled(bench, train, tried, "method", "rate")
    sweeps = [{key: run[key] for key in ("method", "rate", "val")} for run in found]
    chosen = {method: best(where(sweeps, method=method)) for method in METHODS}
    each = [(method, chosen[method], scale, seed) for seed in bench.seeds for method in METHODS for scale in SCALES]
    done = runs.labelled(bench, train, [Training(*one, **size) for one in each], "method", "scale", "seed")
    return {"runs": done, "sweeps": sweeps, "rates": chosen, **size, **runs.source_of(size, bench)}


def best(sweep: Sequence[Mapping[str, Any]]) -> float:
    """The rate with the highest accuracy on held-out images; a run that diverged has none."""
    return max(sweep, key=lambda run: -1.0 if run["val"] is None else run["val"])["rate"]


def values(result: dict[str, Any], method: str, key: str, scale: float = 1.0) -> list[float | None]:
    """A value over seeds; ``"gap"`` is training minus test accuracy."""
    runs = where(result["runs"], method=method, scale=scale)
    if key == "gap":
        return [None if run["test"] is None else run["train"] - run["test"] for run in runs]
    return [run[key] for run in runs]


def counted(result: dict[str, Any], method: str, key: str, scale: float = 1.0) -> list[float | None]:
    """A value over seeds as it is compared, so that no norm looks better for the runs that failed.

    A target that was not reached counts as reached at the look after the last step, the earliest that it can have been, and a
    run that diverged as guessing; only a gap it has none. ``"range"`` is the highest minus the lowest test accuracy over scales.
    """
    if key == "range":
        scores = [[value or 0.0 for value in counted(result, method, "test", scale)] for scale in SCALES]
        return [max(seed) - min(seed) for seed in zip(*scores, strict=True)]
    if key == "gap":
        return values(result, method, key, scale)
    runs = where(result["runs"], method=method, scale=scale)
    if key == "steps":
        return [run["planned"] + EVERY if run["steps"] is None else run["steps"] for run in runs]
    return [CHANCE if run[key] is None else run[key] for run in runs]


def tables(result: dict[str, Any]) -> list[Table]:
    rows, rates = [], []
    for method, name in METHODS.items():
        tests = (spread(values(result, method, "test", scale), ".1f", 100) for scale in SCALES)
        steps, gap = spread(values(result, method, "steps"), ".0f"), spread(values(result, method, "gap"), ".1f", 100)
        apart = spread(counted(result, method, "range"), ".1f", 100)
        rows.append([name, result["rates"][method], steps, *tests, apart, gap])
        found = [run["val"] for run in where(result["sweeps"], method=method)]
        rates.append([name, *(None if score is None else 100 * score for score in found)])
    columns = ("norm", "rate", "steps", *(f"test, inputs x {scale:g}" for scale in SCALES), "range", "gap")
    about = (
        f"Steps to a training loss of {TARGET:g}; test accuracy in %; range: the highest minus the lowest over the scales of "
        "inputs, in points, where a run that diverged counts as guessing; gap: training minus test accuracy at the usual scale, "
        "in points. Mean ± standard deviation over seeds."
    )
    columns_of_rates = ("norm", *(f"rate {rate:g}" for rate in sorted({run["rate"] for run in result["sweeps"]})))
    return [
        Table("The four benefits", columns, rows, runs.notes(result, about)),
        Table("Accuracy on held-out images by rate, first seed, %", columns_of_rates, rates),
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    reached, trained = [], []
    for method, name in METHODS.items():
        found = values(result, method, "steps")
        reached.append(f"{name} {len(known(found))} of {len(found)}")
        trained.append(f"{name} {spread(values(result, method, 'train'), '.1f', 100)}")
    return [
        f"Faster convergence, steps to a training loss of {TARGET:g} minus those without a norm: "
        f"{verdict(result, 'steps', 1, 'fewer', 'more')}.",
        f"Seeds that reached it, where those that did not count as {EVERY} steps more than were made: {', '.join(reached)}.",
        "Sensitivity to the scale of inputs, range of test accuracy over x 0.1 to 10 minus that without a norm, in points: "
        f"{verdict(result, 'range', 100, 'less', 'more')}.",
        "Overfitting, training minus test accuracy, minus that without a norm, in points: "
        f"{verdict(result, 'gap', 100, 'smaller', 'larger')}.",
        f"A smaller gap at a lower training accuracy is not less overfitting; training accuracy, %: {', '.join(trained)}.",
        "Generalization, test accuracy minus that without a norm, in points: "
        f"{verdict(result, 'test', 100, 'better', 'worse', higher_first=True)}.",
        runs.diverged(result["runs"], "; they count as guessing, and have no gap"),
    ]


def verdict(
    result: dict[str, Any], key: str, times: float, first: str, second: str, *, higher_first: bool = False
) -> str:
    """Norms in groups by the interval of their differences from no norm, times `times`: below 0, above, and not told apart."""
    unsure, alone = "not told apart", "one seed alone, without an interval"
    groups: dict[str, list[str]] = {first: [], second: [], unsure: [], alone: []}
    below, above = (second, first) if higher_first else (first, second)
    for method, name in METHODS.items():
        gap = differences(counted(result, method, key), counted(result, "none", key))
        if method == "none" or gap.mean is None:
            continue
        group = alone if gap.low is None else side(gap, below, above, unsure)
        groups[group].append(f"{name} {tell(gap, '+.1f', times)}")
    return "; ".join(
        f"{group}: {', '.join(found) or 'none'}" for group, found in groups.items() if found or group in (first, second)
    )


@drawn(
    "benefits",
    f"Steps of training to a loss of {TARGET:g} nats, a mark per seed (left); test accuracy, mean over seeds, of inputs "
    "multiplied by a number at the same learning rate, with guessing as the grey line (middle); and test accuracy "
    "against training minus test accuracy, a mark per seed in the look of the left panel (right). Better is further "
    "left on the left, flat and high in the middle, and towards the upper left corner on the right.",
)
def _benefits(result: dict[str, Any]) -> Figure:
    figure, axes = runs.titled(2.7, "convergence", "scale of inputs", "overfitting and accuracy")
    ends = []
    for y, (method, name) in enumerate(METHODS.items()):
        usual = where(result["runs"], method=method, scale=1.0)
        steps = known(run["steps"] for run in usual)
        style: dict[str, Any] = {"color": HUES[method], "marker": MARKS[method], "markersize": 3.5}
        axes[0].plot(steps, [y] * len(steps), linestyle="", alpha=0.6, **style)
        if missed := len(usual) - len(steps):
            # Below the marks of the seeds that got there, if any did.
            place, words = (y + 0.33, f"{missed} of {len(usual)} not reached") if steps else (y, "not reached")
            axes[0].text(0.03, place, words, fontsize=6.5, va="center", transform=axes[0].get_yaxis_transform())
        curve = [100 * (mean(counted(result, method, "test", scale)) or 0.0) for scale in SCALES]
        axes[1].plot(SCALES, curve, linewidth=1.1, **style)
        ends.append((curve[-1], name, HUES[method]))
        for run in usual:
            if run["test"] is not None:
                axes[2].plot([100 * (run["train"] - run["test"])], [100 * run["test"]], linestyle="", **style)
    rows_of(axes[0], list(METHODS.values()))
    axes[0].set_xlim(left=0)
    axes[0].set(xlabel=f"steps to a training loss of {TARGET:g}")
    marked(axes[1], SCALES)
    axes[1].axhline(10, color=FAINT, linewidth=0.8)
    axes[1].set(xlabel="inputs multiplied by", ylabel="test accuracy, %")
    name_ends(axes[1], ends)
    axes[2].set(xlabel="training minus test, points", ylabel="test accuracy, %")
    return figure


EXPERIMENT = Experiment(
    "four-benefits", "claim", "Four benefits of normalization",
    "Normalization speeds up convergence, makes training less sensitive to the scale of inputs, reduces overfitting and "
        "generalizes better.",
    CARD.paper, run, tables, runs.drawings(_benefits), remarks,
)  # fmt: skip
