"""Fields on balls and on solids: they learn, resume exactly, and their reports say what happened."""

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
from normkit.lab.data.spheres import spheres
from normkit.lab.experiment import Bench
from normkit.lab.experiments import shape, table4
from normkit.lab.fields.occupancy import OccupancyJob, extract, learn_solid, surface_of, write_mesh
from normkit.lab.fields.radiance import RadianceJob, decode, learn_scene
from normkit.lab.fields.rendering import psnr
from normkit.lab.models.nerf import nerf
from normkit.lab.models.rows import scale_rows
from normkit.lab.perform import perform
from normkit.lab.seeding import epoch_order

SCENE: dict[str, Any] = {"width": 8, "depth": 3, "reduce": 12, "rays": 16, "coarse": 6, "fine": 6}
SCENE |= {"steps": 6, "rate": 1e-3, "every": 2}
SOLID: dict[str, Any] = {"width": 8, "depth": 2, "points": 400, "batch": 100, "epochs": 3, "every": 1, "grid": 8}


def on_balls(**options: Any) -> RadianceJob:
    return RadianceJob("spheres", "nerf", **{"recipe": "none", "seed": 0, **SCENE, **options})


def on_a_torus(**options: Any) -> OccupancyJob:
    rest = {"recipe": "none", "kind": "gaussian", "seed": 0, "rate": 1e-2}
    return OccupancyJob("torus", "plain", **{**rest, **SOLID, **options})


def bench(output: Path, scale: Any = "small", **options: Any) -> Bench:
    return Bench(scale, output, console=Console(quiet=True), **options)


def test_a_run_without_a_number_ends(tmp_path: Path) -> None:
    scene = learn_scene(on_balls(rate=1e30), tmp_path / "scene")
    assert scene["steps"] < 6
    solid = learn_solid(on_a_torus(rate=1e30, kind="relu"), tmp_path / "solid")
    assert [found["status"] for found in (scene, solid)] == ["diverged"] * 2
    assert scene["psnr"] is solid["iou"] is None


def test_what_a_run_gives(tmp_path: Path) -> None:
    found = learn_scene(on_balls(epochs=1, every=42), tmp_path)
    pixels = 21 * 8 * 8
    assert (found["pixels"], found["steps"], found["views"]) == (pixels, pixels // 16, [0, 8, 16])
    assert len(found["psnr"]) == 3
    assert [row["step"] for row in found["curve"]] == [42, 84]
    assert found["curve"][-1]["rate"] == pytest.approx(1e-3 * 0.1**0.8, rel=0.03)
    views = sorted(path.name for path in (tmp_path / "views").iterdir())
    assert views[:3] == [f"000-{what}.png" for what in ("colour", "depth", "truth")]
    assert decode(found["pictures"]["colour"]).shape == (8, 8, 3)
    assert decode(found["pictures"]["depth"]).shape == (8, 8)


def test_it_learns_a_scene(tmp_path: Path) -> None:
    job = on_balls(width=32, reduce=6, rays=64, coarse=24, fine=12, steps=200, every=200, rate=3e-3)
    found = learn_scene(job, tmp_path)
    scene = spheres(16)
    white = psnr(float((scene.images[[0, 8, 16]] - 1).square().mean()))
    # An empty scene is white.
    assert sum(found["psnr"]) / 3 > white + 1.5


def test_controls_of_scale() -> None:
    plain, unit, kept = (nerf(width=16) for _ in range(3))
    for model, scale in ((unit, "unit"), (kept, "kept")):
        model.load_state_dict(plain.state_dict())
        scale_rows(model, scale)
    for name in ("coarse", "fine"):
        for layers in zip(*(getattr(model, name).trunk for model in (plain, unit, kept)), strict=True):
            own, one, same = (layer.weight.detach().norm(dim=1) for layer in layers)
            torch.testing.assert_close(one, torch.ones(16))
            torch.testing.assert_close(same, own.square().mean().sqrt().expand(16))
    assert sum(p.numel() for p in kept.parameters()) == sum(p.numel() for p in plain.parameters())


def test_jobs(tmp_path: Path) -> None:
    small = bench(tmp_path)
    tried = table4.sweeps(small, "fern")
    assert [len(jobs) for jobs in tried.values()] == [1] * len(table4.ROWS)
    chosen = {name: jobs[0] for name, jobs in tried.items()}
    jobs = table4.jobs(small, chosen)
    assert len({job.path for job in jobs}) == len(jobs) == 3 + 3 + 5
    assert {job.scene for job in jobs} == {"fern"}
    root = tmp_path / "data"
    for scene in ("fern", "room"):
        (root / "nerf_llff_data" / scene).mkdir(parents=True)
    large = Bench("full", tmp_path, data_root=root, seeds=(0, 1))
    assert table4.scenes(large) == ["fern", "room"]
    tried = table4.sweeps(large, "fern")
    assert len(table4.jobs(large, {name: jobs[0] for name, jobs in tried.items()})) == 2 * len(table4.ROWS) * 2
    assert [job.rate for job in tried[table4.PLAIN]] == [1e-4, 5e-4, 2e-3]
    job = tried[table4.PLAIN][1]
    assert (job.width, job.depth, job.rays, job.coarse, job.fine, job.steps) == (256, 8, 1024, 64, 64, 200_000)


def test_a_run_that_diverged_is_told_and_rates_are_the_best_tried(tmp_path: Path) -> None:
    found = perform(table4.EXPERIMENT, bench(tmp_path, "tiny", seeds=(0, 1)))["result"]
    assert (len(found["runs"]), set(found["pictures"]["spheres"])) == (2 + 2 + 5, set(table4.ROWS))
    assert {row["rate"] for row in found["rates"].values()} == {1e-3}
    ours, _, rates, time, _ = table4.tables(found)
    assert rates.columns == ["method", "0.001", "1e+30"]
    assert time.rows[0][-2:] == [2, time.rows[0][-3]]
    assert "[" in str(ours.rows[1][3])  # two seeds have an interval
    assert "[" not in str(ours.rows[2][3])
    lost = [{**run, "status": "diverged", "score": None} if run["row"] == "E-NeRF" else run for run in found["runs"]]
    said = " ".join(table4.remarks({**found, "runs": lost}))
    assert "can't be compared" in said
    assert "Diverged: E-NeRF on spheres, seed 0; E-NeRF on spheres, seed 1." in said


def test_what_is_left_of_a_scene_is_not_judged() -> None:
    def said(conditioned: list[float | None]) -> str:
        scores = {table4.PLAIN: [10.0, 11.0, 12.0], table4.CONDITIONED: conditioned}
        found = [(row, seed, score) for row, values in scores.items() for seed, score in enumerate(values)]
        runs = [{"scene": "spheres", "row": row, "seed": seed, "score": score} for row, seed, score in found]
        return table4._verdict({"runs": runs}, "spheres")

    assert "2.00 dB above NeRF (95 % interval +0.76 to +3.24, better);" in said([11.5, 13.0, 14.5])
    assert "(95 % interval -4.60 to +8.10, 2 of 3 seeds, not judged);" in said([11.25, 13.25, None])
    assert "(one seed, no interval);" in said([11.5])


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
    wanted = 4 / 3 * np.pi * 1.2**3 - 6 * np.pi * 0.04 * (1.2 - 0.2 / 3)
    assert volume(vertices, faces) == pytest.approx(wanted, rel=0.06)


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


def test_points_are_permuted_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def order(seed: int, epoch: int, samples: int) -> Tensor:
        drawn.append(epoch)
        return epoch_order(seed, epoch, samples)

    monkeypatch.setattr("normkit.lab.train.images.epoch_order", order)
    found = learn_solid(on_a_torus(), tmp_path)
    assert drawn == [1, 2, 3]
    assert [(row["epoch"], row["step"]) for row in found["curve"]] == [(1, 4), (2, 8), (3, 12)]
    few = learn_solid(on_a_torus(batch=10**6), tmp_path / "few")  # all points are one batch
    assert [(row["epoch"], row["step"]) for row in few["curve"]] == [(1, 1), (2, 2), (3, 3)]


def test_it_learns_a_solid(tmp_path: Path) -> None:
    job = on_a_torus(width=32, depth=3, points=8000, batch=500, epochs=12, every=6, grid=24, rate=3e-3)
    found = learn_solid(job, tmp_path)
    assert found["iou"] > 0.75
    assert [row["epoch"] for row in found["curve"]] == [6, 12]
    assert found["true_volume"] == pytest.approx(torus().volume, rel=0.1)
    read = trimesh.load(tmp_path / "mesh.ply", force="mesh")
    again = trimesh.load(tmp_path / "mesh.obj", force="mesh")
    assert read.volume == pytest.approx(found["volume"], rel=1e-3)
    assert again.volume == pytest.approx(found["volume"], rel=1e-3)
    assert decode(found["pictures"]["learnt"]).shape == (96, 96, 3)


def test_solids_and_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMKIT_DATA", raising=False)
    small = bench(tmp_path)
    assert shape.solids(small) == ("torus", "gyroid")
    with_data = bench(tmp_path, data_root=tmp_path)
    assert shape.solids(with_data) == ("bunny",)
    (tmp_path / "meshes").mkdir()
    assert shape.solids(with_data) == ("bunny",)
    for name in ("spot.obj", "armadillo.obj", "bunny.off", "stanford-bunny.obj"):
        (tmp_path / "meshes" / name).touch()
    assert shape.solids(with_data) == ("bunny", "armadillo")
    assert shape.solids(Bench("full", tmp_path, data_root=tmp_path)) == ("bunny", "armadillo", "spot")
    assert [len(tried) for tried in shape.sweeps(with_data, "bunny").values()] == [4] * 9
    chosen = {key: jobs[0] for key, jobs in shape.sweeps(with_data, "bunny").items()}
    jobs = shape.jobs(with_data, ("bunny", "armadillo"), chosen)
    assert len({job.path for job in jobs}) == len(jobs) == 2 * 3 * 3 + 2 * 3
    tried = shape.sweeps(Bench("full", tmp_path, data_root=tmp_path), "bunny")[f"gaussian {shape.PLAIN}"]
    assert [job.rate for job in tried] == [1e-5, 1e-4, 1e-3]
    assert (tried[0].width, tried[0].batch, tried[0].epochs, tried[0].grid) == (256, 50_000, 200, 512)


def test_a_folder_of_data_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path / "environment"))
    for root, named in ((tmp_path / "option", "option"), (None, "environment")):
        with pytest.raises(ProtocolError, match=f"{named} is no folder"):
            shape.solids(bench(tmp_path, data_root=root))
    (tmp_path / "option").mkdir()
    with pytest.raises(ProtocolError, match=r"bunny.* is missing; put a closed mesh"):
        perform(shape.EXPERIMENT, bench(tmp_path / "out", data_root=tmp_path / "option"))
