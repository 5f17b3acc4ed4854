"""Surgery in three processes: what each ends with is what one process with all the data ends with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import surgery_worker as worker
from processes import run_together


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    return torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double() + 1


@pytest.fixture(scope="module")
def reports(data: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder: Path = tmp_path_factory.mktemp("surgery")
    torch.save(data, folder / "data")
    run_together("surgery_worker.py", 3, folder, str(folder / "data"), str(folder / "found"))
    return [torch.load(folder / f"found{rank}") for rank in range(3)]


def test_synchronized_norms_there_and_back(data: torch.Tensor, reports: list[dict[str, Any]]) -> None:
    alone = worker.make()
    worker.step(alone, data, len(data))  # batch normalization of the whole batch
    for report in reports:
        found = report["sync"]
        assert (found["rows"], found["back"], found["kinds"].count("SyncBatchNorm")) == (2, 2, 2)
        assert_close(dict(found["state"]), dict(alone.state_dict()), rtol=1e-9, atol=1e-9)  # sums in another order


def test_frozen_norms_stay_in_every_process(data: torch.Tensor, reports: list[dict[str, Any]]) -> None:
    alone, before = worker.make(), worker.make().state_dict()
    state = worker.frozen(alone, data, len(data), lambda model: model)["state"]
    for report in reports:
        found = report["freeze"]["state"]
        assert_close(dict(found), dict(state), rtol=1e-9, atol=1e-9)
        for key in before:
            assert torch.equal(found[key], before[key]) == key.startswith(("1.", "3."))


@pytest.mark.parametrize("case", ["recalibrate", "one has none"])
def test_recalibration_counts_the_batches_of_all(case: str, data: torch.Tensor, reports: list[dict[str, Any]]) -> None:
    seen = [part for size in (data.split(worker.SIZES)) for part in size.split(2)]
    seen = seen if case == "recalibrate" else list(data.split(worker.SIZES)[1:])
    alone = worker.recalibrated(worker.make(), seen)
    for report in reports:
        found = report[case]
        assert_close(dict(found["state"]), dict(alone["state"]), rtol=1e-9, atol=1e-9)
        assert_close(dict(found["state"]), dict(reports[0][case]["state"]), rtol=0, atol=0)
        assert_close(dict(found["undone"]), dict(worker.make().state_dict()), rtol=0, atol=0)
        assert found["note"] == alone["note"]
