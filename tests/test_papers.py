"""The studies behind a paper's tables: a small one on the handwritten digits, from sweep to report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from normkit.lab import record, task
from normkit.lab.data.split import Data, Split
from normkit.lab.experiment import Bench, Experiment
from normkit.lab.experiments import ablations, cost, fig1, table1
from normkit.lab.experiments.classification import PAPER, Plan, Row, difference, figures, study, sweep, tables, verdicts
from normkit.lab.experiments.table1 import PRINTED, plans
from normkit.lab.models.rows import scale_by_norm
from normkit.lab.perform import perform
from normkit.lab.report.experiment_tables import lowered, rates_table, time_table, within
from normkit.lab.stats import best
from normkit.lab.train.learning import Training, changed, images, initial, make
from normkit.surgery.condition import condition

BASE = Training("digits", "inception", "", "bn", 0.0, 0, epochs=2, batch_size=64)
ROWS = (Row("BN", "bn", printed=(83.1, 94.3)), Row("BN + E", "bn+e", printed=(83.3, 94.6)))
LENGTHS = {"like": "BN + E", "conditioning": (("lengths", 1.0),)}
CONTROLS = (Row("two", "bn+wn@first_last", **LENGTHS), Row("unit", "bn", unit="first_last", like="BN + E"))
PLANS = (
    Plan("Digits", BASE, ROWS, CONTROLS, (0.1, 1e30), 0.2, same=True, costs=1.0),
    Plan("Again", replace(BASE, width=0.5), ROWS, borrow="Digits", costs=0.0),
)


def ran(bench: Bench) -> dict[str, Any]:
    first, second = PLANS
    again = replace(second, base=replace(second.base, model="normkit.lab.models.convolutional:digits_inception"))
    return study(bench, (first, again))


EXPERIMENT = Experiment("digits", "reproduce", "Digits", "A claim.", PAPER, ran, tables, figures, verdicts)


def test_a_row_has_an_optimizer_and_rates_of_its_own_and_goes_beyond_them() -> None:
    class Fake:
        def sweep(self, learn: Any, jobs: Any) -> list[dict[str, Any]]:
            assert all((job.name == "Muon") == (job.optimizer == "muon") for job in jobs)
            return [{"status": "ok", "val_score": job.rate, "val_loss": 1.0, "epochs": 1} for job in jobs]

    rows = Row("SGD", "bn"), Row("Muon", "bn", optimizer="muon", rates=(1e-3, 1e-2))
    bench: Any = Fake()
    bench.seeds = (0,)
    few, many = ([0.1, 0.2], [1e-3, 1e-2]), ([0.1, 0.2, 0.4, 0.8, 1.6], [1e-3, 1e-2, 0.1, 1.0, 10.0])
    for beyond, rates in ((True, many), (False, few)):
        found = sweep(bench, lambda job, folder: {}, Plan("", BASE, rows, rates=(0.1, 0.2), beyond=beyond), rows)
        assert tuple([run["rate"] for run in found[row.name]["sweep"]] for row in rows) == rates
        assert found["Muon"]["edge"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papers") / "out"
    perform(EXPERIMENT, Bench("small", folder, seeds=(0, 1), console=Console(quiet=True)))
    return folder


def test_tables(out: Path) -> None:
    result = record.read_json(out / "result.json")["result"]
    made = {table.title: table for table in tables(result)}
    scores = "Digits: test accuracy in %, small scale, "
    given, tuned = made[f"{scores}rate 0.2"], made[f"{scores}each at the best of its rates"]
    for table in (given, tuned):
        assert [row[0] for row in table.rows] == ["BN", "BN + E"]
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert table.rows[1][1:4] == [83.3, "+0.2", 94.6]
        assert "[" in str(table.rows[1][5])
        assert "719 images to learn from" in table.notes[0]
    assert [row[-3] for row in tuned.rows] == [0.1, 0.1]
    assert "edge of those tried" in " ".join(tuned.notes)
    rates = made["Digits: learning rates"]
    assert all("diverged in epoch 1" in row for row in rates.rows)
    time = made["Digits: equal time and equal epochs"]
    assert (time.rows[0][2], time.rows[0][4]) == ("1.000", time.rows[0][6])
    again = made["Again: test accuracy in %, small scale, each at the best of its rates"]
    assert "Rates are those chosen on Digits." in again.notes
    assert "Digits: controls, rate 0.2" in made


def test_remarks_and_figures(out: Path) -> None:
    text = (out / "result.md").read_text()
    assert "are the same training: after 11 steps every loss and every weight is equal to the last bit" in text
    assert "(printed +0.2)" in text
    assert "*Digits, each method at its chosen rate: training loss" in text
    assert "*Digits, all methods at rate 0.2: training loss" in text
    assert (out / "report.html").stat().st_size > 10_000
    found = {path.name for path in (out / "figures").glob("*.png")}
    assert found == {"digits-curves.png", "digits-given-rate-curves.png", "digits-rates.png", "again-curves.png"}


def test_many_methods_are_drawn_at_the_end_of_training(out: Path) -> None:
    part = record.read_json(out / "result.json")["result"]["parts"]["Again"]
    (drawing,) = figures({"parts": {"Again": {"sets": {"tuned": 4 * part["sets"]["tuned"]}}}})
    assert drawing.name == "again-ends"
    assert "of the last epoch" in drawing.caption


def test_a_row_has_its_own_start_and_the_same_data(out: Path) -> None:
    configs = [record.read_json(path) for path in out.glob("runs/digits/inception/*/rate=0.1/seed=0/origin.json")]
    assert len(configs) == 4
    assert len({config["init_sha256"] for config in configs}) == 1
    assert len({config["order_sha256"] for config in configs}) == 1


def test_unit_rows_and_averaged_images() -> None:
    whole, small = (images("digits", size, None, None, None) for size in (None, 4))
    norms = changed(replace(BASE, unit="first_last"), initial(BASE, whole)).classifier.weight.norm(dim=1)
    assert norms.tolist() == pytest.approx([1.0] * len(norms), rel=1e-5)
    assert small.train.inputs.shape == (719, 1, 4, 4)
    assert whole.train.inputs[0, 0, :2, :2].mean().item() == pytest.approx(small.train.inputs[0, 0, 0, 0].item())


def test_best_of_a_sweep() -> None:
    def run(rate: float, status: str = "ok", score: Any = 0.5, loss: Any = 1.0, epochs: int = 3) -> dict[str, Any]:
        return {"rate": rate, "status": status, "score": score, "loss": loss, "reached": epochs}

    assert best([run(0.1), run(0.2, score=0.6), run(0.3, "diverged", None, None)])["rate"] == 0.2
    assert best([run(0.1, loss=2.0), run(0.2)])["rate"] == 0.2
    assert best([run(0.1, "diverged", None, None, 1), run(0.2, "diverged", None, None, 2)])["rate"] == 0.2
    # What is infinite is None in a record.
    assert best([run(0.1, score=None), run(0.2), run(0.3, loss=None)])["rate"] == 0.2
    sweep = [run(0.1), run(0.2, score=None), run(0.3, "diverged", None, None)]
    (table,) = rates_table("Rates", [{"name": "BN", "sweep": sweep}], "")
    assert table.rows == [["BN", "50.0", None, "diverged in epoch 4"]]


def test_condition_numbers_of_singular_weights_are_left_out() -> None:
    def run(raw: float | None, condition: float | None) -> dict[str, Any]:
        return {"curve": [{"raw_condition": raw, "condition": condition}]}

    regular, singular = run(100.0, 98.0), [run(None, 3.0), run(3.0, None), run(None, None), {"curve": []}]
    assert lowered([regular, *singular]) == lowered([regular])
    assert lowered(singular) == []


def test_equal_time() -> None:
    assert [within(100, ratio) for ratio in (1.0, 1.019, 1.1, 2.0)] == [100, 100, 92, 51]
    # Slower beyond doubt; not told apart; slower beyond doubt, but by less than counts.
    intervals = [(1.02, 1.15), (0.99, 1.15), (1.005, 1.018)]
    assert [within(100, 1.1, interval=ends) for ends in intervals[:2]] == [92, 100]
    assert within(100, 1.01, interval=intervals[2]) == 100
    base: dict[str, Any] = {"ms_per_step": 10.0, "mb_per_step": 1.0, "ratio": 1.0, "ratio_interval": None}
    costs = {"BN": base, **{str(ends): {**base, "ratio": 1.1, "ratio_interval": ends} for ends in intervals[:2]}}
    table = time_table("Time", costs, 100, lambda name, epoch: [epoch / 100], what="val")
    assert [row[2] for row in table.rows] == ["1.000", "1.100 [1.020, 1.150]", "1.100 [0.990, 1.150]"]
    assert [row[5] for row in table.rows] == [100, 92, 100]


def test_plans_of_table1() -> None:
    small, full = plans("small"), plans("full")
    assert [plan.label for plan in small] == list(PRINTED) == [plan.label for plan in full]
    assert small[1].borrow == "CIFAR-10"
    assert [(plan.rate, plan.base.epochs, plan.base.width) for plan in full] == [(1e-3, 200, 1)] * 2


def ten_classes() -> Data:
    split = Split(torch.arange(20) % 10, torch.randn(20, 3, 16, 16))
    return Data(split, split, split)


def test_every_row_of_the_plans_can_be_made() -> None:
    scale = "full"
    everything = [
        *plans(scale),
        *plans(scale, "densenet", table1.PRINTED_2),
        *fig1.plans(scale),
        *ablations.plans(scale),
    ]
    seen = set()
    for plan in everything:
        for row in (*plan.rows, *plan.controls):
            if (plan.base.model, row) not in seen:
                seen.add((plan.base.model, row))
                job = plan.job(row, 0.1, 0)
                model = changed(job, initial(replace(job, width=0.125), ten_classes()))
                assert any(parameter.requires_grad for parameter in model.parameters())
                assert job.settings().recipes
    paths = [plan.job(row, 0.1, 0).path for plan in ablations.plans(scale) for row in plan.rows]
    assert len(set(paths)) == len(paths)


def test_rows_by_other_norms() -> None:
    for order, norm in ((1.0, 1.0), (3.0, 3.0), ("inf", float("inf"))):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        scale_by_norm(model, norm=order)
        found = torch.linalg.vector_norm(model[0].weight.flatten(1), norm, dim=1)
        torch.testing.assert_close(found, torch.ones(4))


def test_kept_norms_are_looked_at_every_so_many_steps() -> None:
    layer = nn.Linear(4, 2)
    model = nn.Sequential(layer)
    scale_by_norm(model, every=3)
    norms = []
    for _ in range(7):
        with torch.no_grad():  # looking on does not count
            norms.append(float(layer.weight.norm(dim=1)[0]))
        model(torch.randn(5, 4)).sum().backward()
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(2.0)
    # Kept factors let the weight grow, until they are taken anew at the next step.
    assert norms == pytest.approx([1, 2, 4, 8, 2, 4, 8])
    again = nn.Sequential(nn.Linear(4, 2))
    scale_by_norm(again, every=3)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again[0].weight, layer.weight)


def test_held_norms_of_every_step_are_a_detached_gradient() -> None:
    x = torch.randn(5, 4)
    gradients = []
    for build in (lambda m: scale_by_norm(m, every=1), lambda m: condition(m, gradient="detach")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2))
        build(model)
        model(x).square().sum().backward()
        gradients.append(model[0].parametrizations.weight.original.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", cost.NETWORKS)
def test_networks_of_the_cost_have_a_loss(name: str) -> None:
    network = cost.NETWORKS[name]
    model = cost._made(cost.Measure(name, "small", 100), list(network.recipes.values())[-1])
    inputs, targets = network.inputs(100), network.targets(100)
    few = {key: value[:2] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:2]
    predicted = task.call(model, few)
    wanted = targets if targets.is_floating_point() else targets.topk(2).values  # the highest classes have outputs too
    assert task.loss(predicted, wanted[:2]).isfinite()


def test_weight_norm_from_the_start_of_e_is_e_at_first() -> None:
    data = images("digits", None, None, None, None)
    methods = {"bn+e": (), "bn+wn@first_last": (("lengths", 1.0),)}.items()
    e, free = (make(replace(BASE, recipe=recipe, conditioning=options), data) for recipe, options in methods)
    x = data.train.batch(torch.arange(8), torch.device("cpu"))[0]
    torch.testing.assert_close(free(x), e(x))
    raw = [value for name, value in e.named_parameters() if name.endswith("original")]
    directions = [value for name, value in free.named_parameters() if name.endswith("original1")]
    torch.testing.assert_close(directions, raw, rtol=0, atol=0)
    lengths = [value for name, value in free.named_parameters() if name.endswith("original0")]
    assert all(value.requires_grad for value in lengths)


def test_warm_up_goes_with_the_epochs(tmp_path: Path) -> None:
    plan = Plan("Digits", replace(BASE, epochs=4, warmup=1.0), ROWS[:1], rate=0.1, costs=0.0)
    found = study(Bench("small", tmp_path, seeds=(0,), epochs=1, console=Console(quiet=True)), [plan])
    assert (found["parts"]["Digits"]["base"]["epochs"], found["parts"]["Digits"]["base"]["warmup"]) == (1, 0.25)


def test_differences_say_whether_they_show_one() -> None:
    def row(name: str, scores: list[float | None]) -> dict[str, Any]:
        return {"name": name, "runs": [{"seed": seed, "test_score": score} for seed, score in enumerate(scores)]}

    rows = [
        *(row("a", [0.5, 0.6, 0.7]), row("b", [0.4, 0.5, 0.61]), row("c", [0.6, 0.5, 0.7]), row("d", [0.1])),
        *(row("even", [0.4, 0.5, 0.6]), row("lost", [0.4, 0.51, None])),
    ]
    result = {"parts": {"L": {"sets": {"given": rows}}}}
    assert difference(result, "L", "a", "b") == "+9.67 [+8.23, +11.10]"
    assert "no difference shown" in str(difference(result, "L", "a", "c"))
    assert difference(result, "L", "a", "d") == "+40.00 (one seed, no interval)"
    assert difference(result, "L", "a", "none") is None
    # Differences that are the same but for rounding, and survivors alone: not judged, whichever side they are of.
    assert difference(result, "L", "a", "even") == "+10.00 [+10.00, +10.00] (no difference shown)"
    assert str(difference(result, "L", "a", "lost")).endswith("(2 of 3 seeds, not judged)")
    assert str(difference(result, "L", "lost", "a")).endswith("(2 of 3 seeds, not judged)")
    judged = [{**row, "control": False, "printed": None} for row in rows]
    for one in judged:
        one["runs"] = [{**run, "status": "ok" if run["test_score"] is not None else "diverged"} for run in one["runs"]]
    (said, lost) = verdicts({"parts": {"L": {"sets": {"given": judged}}}})
    found = [part.rpartition(", ")[2] for part in said.rstrip(".").split("; ")]
    assert found == ["worse", "no difference shown", "no interval", "no difference shown", "not judged"]
    assert lost == "L: runs that diverged: lost (1 of 3)."
