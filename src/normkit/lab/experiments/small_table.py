"""A table of rows that the small network learns with: each at the best of its rates, with its difference from the first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from normkit.core.card import Paper
from normkit.lab.experiment import Bench, Drawing, Experiment, Table
from normkit.lab.experiments import runs
from normkit.lab.models.small_cnn import Shift, SmallCNN
from normkit.lab.report.drawing import COLOURS, FAINT, FULL, GREY, dots, rows_of
from normkit.lab.report.experiment_tables import edges, rates_table
from normkit.lab.seeding import reseed
from normkit.lab.stats import gain, judge_runs, known, spread, tell, tune, where
from normkit.lab.train.images import OK, Images, Size, Stream, accuracy, device, fit


@dataclass(frozen=True)
class Training(Size, path="batch={0.batch}/{0.row}/rate={0.rate:g}/seed={0.seed}"):
    module: str
    row: str
    batch: int
    rate: float
    seed: int


def learn(job: Training, folder: Path) -> dict[str, Any]:
    """Trains a row, and evaluates it."""
    plan: Plan = import_module(job.module).PLAN
    images = job.images()
    stream = Stream(images["train"], job.batch, job.seed)
    reseed(job.seed, "init")
    model = plan.make(job.row, channels=images["train"][0].shape[1], width=job.width).to(device())
    walked = fit(model, stream, job.epochs, job.rate, job.seed, folder, lambda part: plan.before(model, job, part))
    scores: dict[str, float | None] = dict.fromkeys(("val", "test"))
    if walked.status == OK:
        plan.settle(model.eval(), job, images["val"])
        scores = {part: accuracy(model, images[part]) for part in scores}
    return {"status": walked.status, "loss": [row["loss"] for row in walked.rows], **scores}


def turned(model: SmallCNN, activation: Callable[[], nn.Module] = nn.ReLU) -> SmallCNN:
    """Puts each norm behind its activation, and a bias before that."""
    old, layers = list(model.features.children()), list[nn.Module]()
    for layer, norm in zip(old[::3], old[1::3], strict=True):
        layers += [layer, Shift(layer.get_parameter("weight").shape[0]), activation(), norm]
    model.features = nn.Sequential(*layers)
    return model


@dataclass(frozen=True)
class Plan:
    """What is compared by an experiment whose module has this as ``PLAN``, and makes rows' networks with ``make(row, **size)``.

    By batch size: the rows' titles by name, the first of which the others are compared with, and the rates that each tries, with
    further ones where the best is the smallest or largest. `epochs` are of the small scale, `pairs` of rows are for remarks.
    """

    make: Callable[..., nn.Module]
    rows: Mapping[int, Mapping[str, str]]
    rates: Mapping[int, Sequence[float]]
    epochs: int
    pairs: Sequence[tuple[str, str]]
    about: str = ""
    # called before each step, with the part of the rate that is left
    before: Callable[[nn.Module, Training, float], None] = lambda model, job, part: None
    # chooses on held-out images what evaluation needs
    settle: Callable[[nn.Module, Training, Images], object] = lambda model, job, held_out: None

    def experiment(self, name: str, title: str, claim: str, paper: Paper) -> Experiment:
        """The experiment, of a claim."""
        parts = [partial(part, self) for part in (run, tables, figures, remarks)]
        # The report's account of what was run is the docstring of this module.
        parts[0].__module__ = self.make.__module__  # pyright: ignore[reportAttributeAccessIssue]
        return Experiment(name, "claim", title, claim, paper, *parts)  # pyright: ignore[reportArgumentType, reportCallIssue]


def run(plan: Plan, bench: Bench) -> dict[str, Any]:
    size, first, tiny = runs.size_of(bench, plan.epochs), bench.seeds[0], bench.scale == "tiny"
    names = [(f"{row}, {batch}", row, batch) for batch, some in plan.rows.items() for row in some]
    module = plan.make.__module__
    makers = {name: partial(Training, module=module, row=row, batch=batch, **size) for name, row, batch in names}
    rates = {batch: (0.1, 1e30) if tiny else plan.rates[batch] for batch in plan.rows}
    tried = {name: [makers[name](rate=rate, seed=first) for rate in rates[batch]] for name, _, batch in names}
    beyond = None if tiny else lambda name, rate: makers[name](rate=rate, seed=first)
    swept = tune(bench, learn, tried, look, beyond)
    jobs = [make(rate=swept[name]["rate"], seed=seed) for seed in bench.seeds for name, make in makers.items()]
    done = runs.labelled(bench, learn, jobs, "row", "batch", "rate", "seed")
    return {"runs": done, "swept": swept, **size, **runs.source_of(size, bench)}


def look(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says on held-out images."""
    loss = found["loss"][-1] if found["loss"] else None
    return {"status": found["status"], "score": found["val"], "loss": loss, "reached": len(found["loss"])}


def tables(plan: Plan, result: Mapping[str, Any]) -> list[Table]:
    found = []
    for batch, titles in plan.rows.items():
        base = where(result["runs"], row=next(iter(titles)), batch=batch)
        swept = [{"name": title, **result["swept"][f"{row}, {batch}"]} for row, title in titles.items()]
        lines: list[list[Any]] = []
        for row, title in titles.items():
            own = where(result["runs"], row=row, batch=batch)
            scores, losses = [run["test"] for run in own], [run["loss"][-1] for run in own if run["status"] == OK]
            change = [None, None] if own == base else [difference(own, base), judge_runs(own, base, "test")]
            lines.append([title, own[0]["rate"], spread(scores, ".1f", 100), *change, spread(losses, ".2f")])
        said = (
            f"{result['data']}: {result['train'] or 'all'} training images, {result['epochs']} epochs of SGD with momentum 0.9, "
            "cosine decay; mean ± standard deviation over seeds, differences in points, paired by seed, with their 95 % interval."
        )
        columns = ("row", "rate", "test, %", f"minus {swept[0]['name']}", "it is", "training loss")
        said = runs.notes(result, said, *filter(None, [plan.about]), *edges(swept))
        found.append(Table(f"Batch {batch}", columns, lines, said))
        note = "Accuracy on held-out images in %, first seed; it chooses the rate."
        found += rates_table(f"Batch {batch}: learning rates", swept, note)
    return found


def difference(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> str | None:
    """The difference in test accuracy, in points."""
    return tell(gain(runs, base, "test"), "+.1f", 100)


def remarks(plan: Plan, result: Mapping[str, Any]) -> list[str]:
    said = []
    for batch, titles in plan.rows.items():
        told = []
        for one, other in plan.pairs:
            if one in titles and other in titles:
                own, base = (where(result["runs"], row=row, batch=batch) for row in (one, other))
                change = f"{difference(own, base)}, {judge_runs(own, base, 'test')}"
                told.append(f"{titles[one]} minus {titles[other]} {change}")
        said.append(f"Batch {batch}, test accuracy in points: {'; '.join(told)}.")
    return [*said, runs.diverged(result["runs"])]


def figures(plan: Plan, result: Mapping[str, Any]) -> list[Drawing]:
    caption = (
        "Test accuracy of each row at its chosen rate; a dot is a seed, a bar the mean over seeds, and the vertical line that of "
        "the first row. Look for rows whose dots are all on one side of the line; a seed that diverged has no dot."
    )
    return [Drawing("accuracy", lambda: _accuracies(plan, result), caption)]


def _accuracies(plan: Plan, result: Mapping[str, Any]) -> Figure:
    titles = [f"batch {batch}" for batch in plan.rows]
    figure, axes = runs.titled(2.0, *titles, width=FULL if len(titles) > 1 else FULL * 0.7)
    for axis, (batch, titles) in zip(axes, plan.rows.items(), strict=True):
        for y, row in enumerate(titles):
            tests = (run["test"] for run in where(result["runs"], row=row, batch=batch))
            scores = [100 * score for score in known(tests)]
            dots(axis, y, scores, COLOURS[0] if y else GREY)
            if scores and not y:
                axis.axvline(fmean(scores), color=FAINT, linewidth=0.8)
        axis.set_xlabel("test accuracy, %")
        rows_of(axis, list(titles.values()))
    return figure
