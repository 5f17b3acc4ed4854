"""Occupancy of solids: surfaces against closed forms, exact resume, and the report."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from rich.console import Console
from torch import Tensor

from normkit.core.errors import ProtocolError
from normkit.lab.data.mesh import volume
from normkit.lab.data.solid import SHAPES, draw_points, iou, torus
from normkit.lab.experiment import Bench
from normkit.lab.experiments import shape
from normkit.lab.fields.occupancy import OccupancyJob, extract, learn_solid, surface_of, write_mesh
from normkit.lab.fields.radiance import decode
from normkit.lab.perform import perform
from normkit.lab.seeding import epoch_order
from normkit.lab.train import walk as loops
from normkit.lab.train.images import Stream

TINY: dict[str, Any] = {
    **{"width": 8, "depth": 2, "points": 400, "batch": 100, "epochs": 3},
    **{"rate": 1e-2, "every": 1, "grid": 8},
}


def tiny(row: str = "plain", seed: int = 0, **options: Any) -> OccupancyJob:
    return OccupancyJob("torus", row, **{"recipe": "none", "kind": "gaussian", "seed": seed, **TINY, **options})


class Stop(Exception):
    pass


def test_extracted_torus_has_its_volume() -> None:
    vertices, faces = extract(lambda p: -torus().value(p), 64)
    # Flat pieces cut the tube: its area is short by about (1/32)^2 / (6 * 0.25^2), a third of a percent.
    assert volume(vertices, faces) == pytest.approx(torus().volume, rel=0.01)
    np.testing.assert_allclose(np.abs(vertices).max(0), [0.85, 0.85, 0.25], atol=0.005)
    body = trimesh.Trimesh(vertices, faces)
    assert body.is_watertight
    assert body.euler_number == 0


def test_what_leaves_the_cube_is_closed() -> None:
    vertices, faces = extract(lambda p: 1.2 - p.norm(dim=1), 24)
    assert trimesh.Trimesh(vertices, faces).is_watertight
    # The ball of radius 1.2 less six caps of height 0.2: 4/3 pi r^3 - 6 pi h^2 (r - h/3).
    assert volume(vertices, faces) == pytest.approx(
        4 / 3 * np.pi * 1.2**3 - 6 * np.pi * 0.04 * (1.2 - 0.2 / 3), rel=0.06
    )


def test_nothing_learnt_is_an_empty_surface(tmp_path: Path) -> None:
    vertices, faces = extract(lambda p: torch.full((len(p),), -1.0), 8)
    assert volume(vertices, faces) == 0.0
    write_mesh(vertices, faces, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SHAPES)
def test_a_perfect_guess_has_iou_1(name: str) -> None:
    solid = SHAPES[name]
    points, truth = draw_points(solid, 5000, 0)
    assert iou(solid.inside(points), truth) == 1.0
    assert len(surface_of(solid)[1]) > 100


def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny(recipe="none+e@re:trunk")
    whole = learn_solid(job, tmp_path / "whole")
    monkeypatch.setattr(loops, "PAUSE", 0.0)
    real, left = Stream.__call__, [6]

    def stop(stream: Stream, number: int) -> tuple[Tensor, Tensor]:
        left[0] -= 1
        if not left[0]:
            raise Stop
        return real(stream, number)

    monkeypatch.setattr(Stream, "__call__", stop)
    with pytest.raises(Stop):
        learn_solid(job, tmp_path / "parts")
    left[0] = 100
    assert learn_solid(job, tmp_path / "parts") == whole
    assert left[0] == 100 - 7  # steps 6 to 12
    for name in ("mesh.ply", "mesh.obj"):
        there = [tmp_path / part / name for part in ("whole", "parts")]
        assert {path.exists() for path in there} in ({True}, {False})


def test_points_are_permuted_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def order(seed: int, epoch: int, samples: int) -> Tensor:
        drawn.append(epoch)
        return epoch_order(seed, epoch, samples)

    monkeypatch.setattr("normkit.lab.train.images.epoch_order", order)
    found = learn_solid(tiny(), tmp_path)
    assert drawn == [1, 2, 3]
    assert [(row["epoch"], row["step"]) for row in found["curve"]] == [(1, 4), (2, 8), (3, 12)]
    few = learn_solid(tiny(batch=10**6), tmp_path / "few")  # all points are one batch
    assert [(row["epoch"], row["step"]) for row in few["curve"]] == [(1, 1), (2, 2), (3, 3)]


def test_it_learns(tmp_path: Path) -> None:
    found = learn_solid(
        tiny(width=32, depth=3, points=8000, batch=500, epochs=12, every=6, grid=24, rate=3e-3), tmp_path
    )
    assert found["iou"] > 0.75
    assert [row["epoch"] for row in found["curve"]] == [6, 12]
    assert found["true_volume"] == pytest.approx(torus().volume, rel=0.1)
    read = trimesh.load(tmp_path / "mesh.ply", force="mesh")
    again = trimesh.load(tmp_path / "mesh.obj", force="mesh")
    assert read.volume == pytest.approx(found["volume"], rel=1e-3)
    assert again.volume == pytest.approx(found["volume"], rel=1e-3)
    assert decode(found["pictures"]["learnt"]).shape == (96, 96, 3)


def test_a_run_without_a_number_ends(tmp_path: Path) -> None:
    found = learn_solid(tiny(rate=1e30, kind="relu"), tmp_path)
    assert found["status"] == "diverged"
    assert found["iou"] is None


def test_solids_and_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMKIT_DATA", raising=False)
    small = Bench("small", tmp_path, console=Console(quiet=True))
    assert shape.solids(small) == ("torus", "gyroid")
    with_data = Bench("small", tmp_path, data_root=tmp_path)
    assert shape.solids(with_data) == ("bunny",)
    (tmp_path / "meshes").mkdir()
    assert shape.solids(with_data) == ("bunny",)
    for name in ("spot.obj", "armadillo.obj", "bunny.off", "stanford-bunny.obj"):
        (tmp_path / "meshes" / name).touch()
    assert shape.solids(with_data) == ("bunny", "armadillo")
    assert shape.solids(Bench("full", tmp_path, data_root=tmp_path)) == ("bunny", "armadillo", "spot")
    assert [len(tried) for tried in shape.sweeps(with_data, "bunny").values()] == [4] * 9
    jobs = shape.jobs(with_data, ("bunny", "armadillo"), first(shape.sweeps(with_data, "bunny")))
    assert len({job.path for job in jobs}) == len(jobs) == 2 * 3 * 3 + 2 * 3
    tried = shape.sweeps(Bench("full", tmp_path, data_root=tmp_path), "bunny")[f"gaussian {shape.PLAIN}"]
    assert [job.rate for job in tried] == [1e-5, 1e-4, 1e-3]
    assert (tried[0].width, tried[0].batch, tried[0].epochs, tried[0].grid) == (256, 50_000, 200, 512)


def first(tried: dict[Any, list[OccupancyJob]]) -> dict[Any, OccupancyJob]:
    return {key: jobs[0] for key, jobs in tried.items()}


def test_a_folder_of_data_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path / "environment"))
    console = Console(quiet=True)
    for root, named in ((tmp_path / "option", "option"), (None, "environment")):
        with pytest.raises(ProtocolError, match=f"{named} is no folder"):
            shape.solids(Bench("small", tmp_path, data_root=root, console=console))
    (tmp_path / "option").mkdir()
    with pytest.raises(ProtocolError, match=r"bunny.* is missing; put a closed mesh"):
        perform(shape.EXPERIMENT, Bench("small", tmp_path / "out", data_root=tmp_path / "option", console=console))
