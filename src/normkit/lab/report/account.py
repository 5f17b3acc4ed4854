"""The page of a comparison: what was found, how sure it is, and what it rests on."""

from collections.abc import Sequence
from typing import Any

from normkit.lab.experiment import Table
from normkit.lab.report import further
from normkit.lab.report.page import Account, Block, Chart, Points, Text
from normkit.lab.report.palette import styles
from normkit.lab.report.series import pictures
from normkit.lab.report.table import tables
from normkit.lab.report.wording import at, cautions, findings, level, listing, number, score_name, words
from normkit.lab.say import counted


def account(result: dict[str, Any]) -> Account:
    """What the page of a comparison says."""
    names, score, base = [recipe["recipe"] for recipe in result["recipes"]], score_name(result), result["baseline"]
    validation, by_time, loss, paired, rates, conditions, cost = pictures(result)
    scores, costs, *conditioned, changes = tables(result)
    train, val, test = (number(at(result, f"task.{part}"), "count") for part in ("train", "val", "test"))
    target = at(result, "target.score")
    dotted = "" if target is None else f" Dotted: the target {number(target, 'score')}."
    swept = sorted({str(entry["seed"]) for recipe in result["recipes"] for entry in recipe["sweep"]}, key=len)
    sections: dict[str, list[Block]] = {
        "What was found": [
            Text(" ".join(findings(result)), "lead"),
            *_listed(cautions(result), "cautions"),
            Table(
                scores.title,
                scores.columns,
                scores.rows,
                [
                    f"Test {score} after the last epoch, on {test} samples that no choice has seen. Point at a number for its "
                    "full value."
                ],
            ),
            *_listed(words(names), "cautions"),
            costs,
        ],
        changes.title: [
            Table("", changes.columns, changes.rows),
            *(
                Points(rows, "code", f"{recipe['recipe']}: {counted(len(rows), 'change')}")
                for recipe in result["recipes"]
                if (rows := recipe.get("changes"))
            ),
        ],
        "How sure this is": [
            Chart(
                paired,
                [
                    f"Test {score} of each recipe minus that of {base} with the same seed: mean, "
                    f"{level(at(result['recipes'][-1], 'paired'))} interval, and each seed as a dot. An interval across zero "
                    "shows no difference."
                ],
            ),
            Text(
                "Recipes are compared seed by seed: with one seed all start from the same initial weights and see the data in "
                "the same order, so what a seed does to all of them cancels in the difference. The interval is Student's t on "
                "these differences; one seed alone has none."
            ),
            Text(
                "It covers what another choice of seeds, that is of initial weights and of data order, would change. "
                f"{_samples(result, test)} With few seeds it also leans on the differences being roughly normal."
            ),
        ],
        "How far this goes": [*_listed(further.remarks(result)), *further.tables(result)],
        "Training": [
            Chart(
                validation,
                [
                    f"Validation {score} ({val} samples): mean over seeds, and as a band the range from the lowest seed to the "
                    f"highest.{dotted} Drag to zoom, double-click for the whole training, click a name to hide it."
                ],
            ),
            Chart(by_time, ["The same means against training time, in which the cost of a step shows."]),
            Chart(loss, [f"Training loss ({train} samples), mean and range over seeds, on a logarithmic scale."]),
        ],
        "Learning rates": [
            Text(
                f"Each recipe has a learning rate of its own. It was trained at every rate tried with "
                f"{'seed' if len(swept) == 1 else 'seeds'} {listing(swept) if swept else 'none'}; the rate with the highest "
                f"validation {score} after the last epoch was kept (of equals the one with the lower validation loss), and the "
                "other seeds were trained at it. The test set took no part in it."
            ),
            Chart(
                rates,
                [
                    f"Validation {score} at each learning rate tried; the filled mark is the one kept. A cross at the bottom is "
                    "a run that diverged."
                ],
            ),
            _swept(result),
        ],
        "Conditioning of the weights": [
            Text(
                "The condition number of a weight, its largest singular value over its smallest, after each epoch (geometric "
                "mean over seeds). Solid: the effective weight, which the layer computes with. Dotted, where it differs: the raw "
                "weight that is stored and trained."
            ),
            *conditioned,
            Chart(conditions, ["First weight of the model.", "Last weight.", "Geometric mean over all."]),
        ],
        "Cost": [
            Text(
                "One training step: forward, backward and update on one batch. In each round all recipes take a step in turn, so "
                "that a busy moment of the machine falls on all of them."
            ),
            Chart(
                cost,
                [
                    f"Milliseconds per step: {base}'s median times the recipe's ratio to it, with the ratio's interval.",
                    "Megabytes per step: the most that it holds at once beyond weights, optimizer state and batch.",
                ],
            ),
        ],
        "Every run": [_runs(result)],
    }
    looks = dict(zip(names, styles(names, base), strict=True))
    return Account(sections, looks)


def _listed(items: Sequence[str], look: str = "said") -> list[Points]:
    return [Points(items, look)] if items else []


def _samples(result: dict[str, Any], count: str) -> str:
    if "test samples" in (at(result["recipes"][-1], "paired.covers") or ()):
        return f"It also covers what another draw of the {count} test samples would change."
    return (
        f"It does not cover the sampling of the test set: every run is judged on the same {count} test samples, and another set "
        "of them could shift the scores of all recipes; --resample covers it."
    )


def _swept(result: dict[str, Any]) -> Table:
    columns = ["recipe", "learning rate", "seed", f"validation {score_name(result)}", "status", "records"]
    rows = [
        [
            recipe["recipe"],
            number(entry["rate"], "rate"),
            number(entry["seed"], "count"),
            number(entry.get("val_score"), "score"),
            entry["status"] + (", kept" if entry["rate"] == recipe.get("rate") else ""),
            entry["run"],
        ]
        for recipe in result["recipes"]
        for entry in recipe["sweep"]
    ]
    return Table("Learning rates tried", columns, rows, [f"Validation {score_name(result)} after the last epoch."])


def _runs(result: dict[str, Any]) -> Table:
    score = score_name(result)
    kinds = {
        "seed": ("seed", "count"),
        f"validation {score}": ("val_score", "score"),
        f"test {score}": ("test_score", "score"),
        "test loss": ("test_loss", "score"),
        "steps to target": ("steps_to_target", "count"),
        "time to target": ("seconds_to_target", "seconds"),
    }
    rows = [
        [recipe["recipe"], *(number(run.get(key), kind) for key, kind in kinds.values()), run["status"], run["run"]]
        for recipe in result["recipes"]
        for run in recipe["runs"]
    ]
    note = (
        "Each seed at the learning rate kept. The folder holds its settings, its metrics epoch by epoch and its result."
    )
    return Table("Runs", ["recipe", *kinds, "status", "records"], rows, [note])
