"""NeRF on the scene of balls: it learns, resumes exactly, and its report says what happened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from normkit.core.errors import ProtocolError
from normkit.lab.data.spheres import spheres
from normkit.lab.experiment import Bench
from normkit.lab.experiments import table4
from normkit.lab.fields import radiance
from normkit.lab.fields.radiance import RadianceJob, decode, find_scene, learn_scene
from normkit.lab.fields.rendering import psnr
from normkit.lab.models.nerf import nerf
from normkit.lab.models.rows import scale_rows
from normkit.lab.perform import perform
from normkit.lab.stats import gain
from normkit.lab.train import walk as loops

TINY: dict[str, Any] = {
    **{"width": 8, "depth": 3, "reduce": 12, "rays": 16, "coarse": 6, "fine": 6},
    **{"steps": 6, "rate": 1e-3, "every": 2},
}


def tiny(row: str = "nerf", seed: int = 0, **options: Any) -> RadianceJob:
    return RadianceJob("spheres", row, **{"recipe": "none", "seed": seed, **TINY, **options})


def bench(output: Path, **options: Any) -> Bench:
    return Bench("small", output, console=Console(quiet=True), **options)


class Stop(Exception):
    pass


def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn_scene(tiny(recipe="none+e@re:trunk"), tmp_path / "whole")
    monkeypatch.setattr(loops, "PAUSE", 0.0)
    real, left = radiance.render, [4]

    def stop(*args: Any, **options: Any) -> Any:
        left[0] -= options.get("training", False)
        if not left[0]:
            raise Stop
        return real(*args, **options)

    monkeypatch.setattr(radiance, "render", stop)
    with pytest.raises(Stop):
        learn_scene(tiny(recipe="none+e@re:trunk"), tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint.pt").exists()
    left[0] = 100
    assert learn_scene(tiny(recipe="none+e@re:trunk"), tmp_path / "parts") == whole
    assert left[0] == 100 - 3  # steps 4 to 6, not all again


def test_what_a_run_gives(tmp_path: Path) -> None:
    found = learn_scene(tiny(epochs=1, every=42), tmp_path)
    pixels = 21 * 8 * 8
    assert found["pixels"] == pixels
    assert found["steps"] == pixels // 16
    assert found["views"] == [0, 8, 16]
    assert len(found["psnr"]) == 3
    assert [row["step"] for row in found["curve"]] == [42, 84]
    assert found["curve"][-1]["rate"] == pytest.approx(1e-3 * 0.1**0.8, rel=0.03)
    assert sorted(path.name for path in (tmp_path / "views").iterdir())[:3] == [
        "000-colour.png",
        "000-depth.png",
        "000-truth.png",
    ]
    assert decode(found["pictures"]["colour"]).shape == (8, 8, 3)
    assert decode(found["pictures"]["depth"]).shape == (8, 8)


def test_it_learns(tmp_path: Path) -> None:
    found = learn_scene(
        tiny(width=32, reduce=6, rays=64, coarse=24, fine=12, steps=200, every=200, rate=3e-3), tmp_path
    )
    scene = spheres(16)
    white = psnr(float((scene.images[[0, 8, 16]] - 1).square().mean()))
    # An empty scene is white.
    assert sum(found["psnr"]) / 3 > white + 1.5


def test_a_run_without_a_number_ends(tmp_path: Path) -> None:
    found = learn_scene(tiny(rate=1e30), tmp_path)
    assert found["status"] == "diverged"
    assert found["psnr"] is None
    assert found["steps"] < 6


def test_controls_of_scale() -> None:
    torch.manual_seed(0)
    plain = nerf(width=16)
    torch.manual_seed(0)
    unit = nerf(width=16)
    scale_rows(unit, "unit")
    torch.manual_seed(0)
    kept = nerf(width=16)
    scale_rows(kept, "kept")
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


def test_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKIT_DATA", str(tmp_path))
    with pytest.raises(ProtocolError, match=r"fern is missing; unpack nerf_llff_data.zip"):
        find_scene("fern")
    with pytest.raises(ProtocolError, match=r"lego is missing; unpack nerf_synthetic.zip"):
        find_scene("lego")


def test_a_run_that_diverged_is_told_and_rates_are_the_best_tried(tmp_path: Path) -> None:
    tiny_bench = Bench("tiny", tmp_path, seeds=(0, 1), console=Console(quiet=True))
    found = perform(table4.EXPERIMENT, tiny_bench)["result"]
    assert len(found["runs"]) == 2 + 2 + 5
    assert set(found["pictures"]["spheres"]) == set(table4.ROWS)
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
        runs = [
            {"scene": "spheres", "row": row, "seed": seed, "score": score}
            for row, values in scores.items()
            for seed, score in enumerate(values)
        ]
        return table4._verdict({"runs": runs}, "spheres")

    assert "2.00 dB above NeRF (95 % interval +0.76 to +3.24, better);" in said([11.5, 13.0, 14.5])
    assert "(95 % interval -4.60 to +8.10, 2 of 3 seeds, not judged);" in said([11.25, 13.25, None])
    assert "(one seed, no interval);" in said([11.5])


def test_gains_are_paired_by_seed() -> None:
    runs = [{"seed": 0, "x": 2.0}, {"seed": 1, "x": None}, {"seed": 2, "x": 5.0}]
    base = [{"seed": 2, "x": 1.0}, {"seed": 0, "x": 1.5}, {"seed": 1, "x": 0.0}]
    assert gain(runs, base, "x").differences == (0.5, 4.0)
