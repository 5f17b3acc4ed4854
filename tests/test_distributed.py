"""Every layer and parametrization, trained by two processes, against one process that averages what both would find."""

import json

import pytest

from processes import run_together

Report = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """What each process found, for each mode the layers with what was wrong; started once for all modes."""
    folder = tmp_path_factory.mktemp("distributed")
    run_together("distributed_worker.py", 2, folder, str(folder / "found"))
    return [json.loads((folder / f"found{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("mode", ["DDP", "FSDP1", "FSDP1, use_orig_params", "FSDP2"])
def test_two_processes_train_as_one(mode: str, reports: list[Report]) -> None:
    for report in reports:
        assert len(report[mode]) > 50
        wrong = [f"{name}: {text}" for name, text in report[mode].items() if text]
        assert not wrong, "\n".join(wrong)
