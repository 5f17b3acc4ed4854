"""Steps of a walk: a stop anywhere leaves no trace in what comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normkit.lab.folder import CHECKPOINT
from normkit.lab.train import images as loops
from normkit.lab.train.images import DIVERGED, OK, Diverged, walk


def journey(folder: Path, stop: int | None = None, bad: int | None = None) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)

    def step(number: int) -> dict[str, float] | None:
        if number == stop:
            raise KeyboardInterrupt
        if number == bad:
            raise Diverged
        optimizer.zero_grad()
        loss = (model(torch.randn(4, 3)) ** 2).mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()} if number % 2 else None

    walked = walk(folder, 9, {"model": model, "optimizer": optimizer}, step, seed=3)
    return walked, model.weight[0].tolist()


def test_a_stop_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = journey(tmp_path / "whole")
    monkeypatch.setattr(loops, "PAUSE", 0.0)
    for stop in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            journey(tmp_path / "parts", stop)
    torch.manual_seed(99)
    assert journey(tmp_path / "parts") == whole
    assert whole[0].status == OK
    assert [row["step"] for row in whole[0].rows] == [1, 3, 5, 7, 9]


def test_a_finished_walk_is_not_walked_again(tmp_path: Path) -> None:
    whole = journey(tmp_path)
    assert journey(tmp_path, stop=1) == whole
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(KeyboardInterrupt):
        journey(tmp_path, stop=1)


def test_divergence_ends_a_walk(tmp_path: Path) -> None:
    walked, _ = journey(tmp_path, bad=5)
    assert (walked.status, walked.steps, len(walked.rows)) == (DIVERGED, 5, 2)
