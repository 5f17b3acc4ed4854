"""The studies behind a paper's tables: a small one on the handwritten digits, from sweep to report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from normkit.lab import record
from normkit.lab.experiment import Bench, Experiment, perform
from normkit.lab.papers.classification import PAPER, Plan, Row, best, study, tables, verdicts, within
from normkit.lab.papers.classification_drawing import draw
from normkit.lab.papers.learning import Training, changed, images, initial
from normkit.lab.papers.table1 import PRINTED, plans

BASE = Training("digits", "inception", "", "bn", 0.0, 0, epochs=2, batch_size=64)
ROWS = (Row("BN", "bn", printed=(83.1, 94.3)), Row("BN + E", "bn+e", printed=(83.3, 94.6)))
CONTROLS = (Row("two", "bn+wn@first_last", like="BN + E"), Row("unit", "bn", unit="first_last", like="BN + E"))
PLANS = (
    Plan("Digits", BASE, ROWS, CONTROLS, (0.1, 1e30), 0.2, same=True, costs=1.0),
    Plan("Again", replace(BASE, width=0.5), ROWS, borrow="Digits", costs=0.0),
)


def ran(bench: Bench) -> dict[str, Any]:
    first, second = PLANS
    again = replace(second, base=replace(second.base, model="normkit.lab.models.inception:digits_inception"))
    return study(bench, (first, again))


EXPERIMENT = Experiment("digits", "reproduce", "Digits", "A claim.", PAPER, ran, tables, draw, verdicts)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papers") / "out"
    perform(EXPERIMENT, Bench("small", folder, seeds=(0, 1), console=Console(quiet=True)))
    return folder


def test_tables(out: Path) -> None:
    result = record.read_json(out / "result.json")["result"]
    made = {table.title: table for table in tables(result)}
    given, tuned = (
        made[f"Digits: test accuracy in %, small scale, {how}"] for how in ("rate 0.2", "each at the best of its rates")
    )
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
    time = made["Digits: equal time beside equal epochs"]
    assert time.rows[0][2] == "1.000"
    assert time.rows[0][4] == time.rows[0][6]
    again = made["Again: test accuracy in %, small scale, each at the best of its rates"]
    assert "Rates are those chosen on Digits." in again.notes
    assert "Digits: controls, rate 0.2" in made


def test_remarks_and_figures(out: Path) -> None:
    text = (out / "result.md").read_text()
    assert "are the same training: after 11 steps every loss and every weight is equal to the last bit" in text
    assert "(printed +0.2)" in text
    assert (out / "report.html").stat().st_size > 10_000
    found = {path.name for path in (out / "figures").glob("*.png")}
    assert found == {"digits-curves.png", "digits-given-rate-curves.png", "digits-rates.png", "again-curves.png"}


def test_a_row_has_its_own_start_and_the_same_data(out: Path) -> None:
    configs = [
        record.read_json(path) for path in out.glob("runs/digits/inception/*/rate=0.1/seed=0/training/config.json")
    ]
    assert len(configs) == 4
    assert len({config["init_sha256"] for config in configs}) == 1
    assert len({config["order_sha256"] for config in configs}) == 1


def test_unit_rows() -> None:
    data = images("digits", None, None, None, None)
    model = changed(replace(BASE, unit="first_last"), initial(BASE, data))
    norms = model.classifier.weight.norm(dim=1)
    assert norms.tolist() == pytest.approx([1.0] * len(norms), rel=1e-5)


def test_images_are_averaged() -> None:
    whole, small = images("digits", None, None, None, None), images("digits", 4, None, None, None)
    assert small.train.inputs.shape == (719, 1, 4, 4)
    assert whole.train.inputs[0, 0, :2, :2].mean().item() == pytest.approx(small.train.inputs[0, 0, 0, 0].item())


def test_best_of_a_sweep() -> None:
    def run(
        rate: float, status: str = "ok", score: float | None = 0.5, loss: float | None = 1.0, epochs: int = 3
    ) -> dict[str, Any]:
        return {"rate": rate, "status": status, "val_score": score, "val_loss": loss, "epochs": epochs}

    assert best([run(0.1), run(0.2, score=0.6), run(0.3, "diverged", None, None)]) == 0.2
    assert best([run(0.1, loss=2.0), run(0.2)]) == 0.2
    assert best([run(0.1, "diverged", None, None, 1), run(0.2, "diverged", None, None, 2)]) == 0.2


def test_equal_time() -> None:
    assert [within(100, ratio) for ratio in (1.0, 1.019, 1.1, 2.0)] == [100, 100, 92, 51]


def test_plans_of_table1() -> None:
    small, full = plans("small"), plans("full")
    assert [plan.label for plan in small] == list(PRINTED) == [plan.label for plan in full]
    assert small[1].borrow == "CIFAR-10"
    assert [plan.rate for plan in full] == [1e-3, 1e-3]
    assert full[0].base.epochs == 200
    assert full[0].base.width == 1
