"""An experiment as a whole: records, resume, sharing among processes, reports."""

import multiprocessing
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import experiment_samples
import written_experiment
from experiment_samples import EXPERIMENT, Walk, walk
from interruption import Stop, at_call
from lab_samples import files
from normkit.cli import app
from normkit.core.errors import OptionError, RecordError
from normkit.lab import folder, record
from normkit.lab.devices import hardware
from normkit.lab.experiment import Bench, Scale, Table
from normkit.lab.experiments import FILES, find_experiment, names
from normkit.lab.perform import command, perform
from normkit.lab.report.sheet import facts, setup
from normkit.lab.report.terminal import is_text
from normkit.lab.sweep import spent_on, sweep


def bench(folder: Path, scale: Scale = "small", **options: Any) -> Bench:
    return Bench(scale, folder, console=Console(quiet=True), **options)


def records(folder: Path) -> dict[str, bytes]:
    """What must not depend on how the jobs were done."""
    kept = files(folder).items()
    return {name: content for name, content in kept if re.fullmatch(r"runs/.*/(config|result)\.json", name)}


def test_records_and_reports(tmp_path: Path) -> None:
    found = perform(EXPERIMENT, bench(tmp_path))
    assert found == record.read_json(tmp_path / "result.json")
    assert len(found["result"]["walks"]) == 6
    assert len(records(tmp_path)) == 12
    figures = ("figures/far_ends.png", "figures/far_ends.svg")
    for name in ("config.json", "environment.json", "result.md", "report.html", *figures):
        assert (tmp_path / name).stat().st_size > 0
    text = (tmp_path / "result.md").read_text()
    assert "| name | seed | end \\| of it |" in text
    assert "| nowhere | 0 | – |" in text
    assert "What was run" not in text  # its title says all
    assert "![far ends](figures/far_ends.png)\n\n*Where each walk ended, 0 < t & after.*\n" in text
    page = (tmp_path / "report.html").read_text()
    assert "Ends of &lt;walks&gt;." in page
    assert "<figcaption>Where each walk ended, 0 &lt; t &amp; after.</figcaption>" in page
    assert not any(name in page for name in figures)  # the page may be mailed without them
    assert "data:image/png;base64," in page
    assert "://" not in page.replace("https://example.org", "")


def test_results_say_what_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(experiment_samples, "__doc__", "A title.\n\nTwo\nwalks & ``--epochs``.\n\nOurs: four\nsteps.\n")
    assert setup(EXPERIMENT) == ["Two walks & `--epochs`.", "Ours: four steps."]
    perform(EXPERIMENT, Bench("small", tmp_path))
    assert "Ours:" not in capsys.readouterr().out
    text = (tmp_path / "result.md").read_text()
    assert ".\n\n## What was run\n\nTwo walks & `--epochs`.\n\nOurs: four steps.\n\n## Walks" in text
    page = (tmp_path / "report.html").read_text()
    assert "<p>Two walks &amp; --epochs.</p>\n  <p>Ours: four steps.</p>" in page


def test_columns_of_words_stand_on_the_left(tmp_path: Path) -> None:
    rows = [["a", "yes", 1.5, "50 %", None], ["b", None, 2, "two of the four layers, of 8", None]]
    table = Table("T", ["name", "folds", "time", "share", "on"], [*rows, ["c", "no", 3, "none", "norm on 1 layer: 1"]])
    assert [is_text(table, place) for place in range(5)] == [True, True, False, True, True]
    perform(replace(EXPERIMENT, tables=lambda result: [table]), bench(tmp_path))
    assert "| --- | --- | ---: | --- | --- |" in (tmp_path / "result.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "<td>yes</td>" in page
    assert '<td class="n">1.5</td>' in page


def test_done_jobs_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, lines = [Walk("left", seed) for seed in range(3)], list[str]()
    first = sweep(walk, jobs[:1], tmp_path, say=lines.append) + sweep(walk, jobs, tmp_path, say=lines.append)[1:]
    heads = [line for line in lines if "records in" in line]
    assert heads == [f"{said}; records in {tmp_path}" for said in ("1 run", "3 runs, 1 found finished")]
    assert lines[-1] == "run 3/3  left/seed=2"
    monkeypatch.setattr(record, "write_checkpoint", lambda *given: pytest.fail("done again"))
    assert sweep(walk, jobs, tmp_path, say=lines.append) == first
    assert sweep(walk, jobs[::-1], tmp_path, say=lines.append) == first[::-1]


def test_the_devices_are_those_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(name: str) -> None:
        monkeypatch.setattr("normkit.lab.sweep.hardware", lambda: name)

    on("GPU A")
    perform(EXPERIMENT, bench(tmp_path, seeds=(0,)), report=False)
    on("GPU B")
    found = perform(EXPERIMENT, bench(tmp_path, seeds=(0, 1)), report=False)
    assert found["environment"]["devices"] == ["GPU A", "GPU B"]  # the first seed's runs were kept
    assert " on GPU A, GPU B, " in facts(EXPERIMENT, found)
    found = perform(EXPERIMENT, bench(tmp_path, seeds=(1,)), report=False)
    assert found["environment"]["devices"] == ["GPU B"]
    # A run that was stopped on one machine and finished on another has two.
    job, place = Walk("left", 0), tmp_path / "runs/left/seed=0"
    (place / "result.json").unlink()
    sweep(walk, [job], tmp_path, say=lambda text: None)
    assert spent_on(job, tmp_path)[1] == {"GPU A", "GPU B"}
    record.write_json(place / "timing.json", {"seconds": 1.0})
    assert spent_on(job, tmp_path) == (1.0, set())


def test_what_a_record_without_devices_says(tmp_path: Path) -> None:
    found = perform(EXPERIMENT, bench(tmp_path), report=False)
    here = found["environment"]
    assert here["devices"] == [hardware()]
    del here["devices"]
    assert " on GPU C, " in facts(EXPERIMENT, {**found, "environment": {**here, "device": "GPU C"}})
    plain = {**found, "environment": {**here, "device": "cpu", "processor": "P", "cores": 3}}
    assert " on P, 3 cores, " in facts(EXPERIMENT, plain)


def test_a_relative_folder_of_data_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKIT_DATA", "")
    monkeypatch.chdir(tmp_path)
    perform(EXPERIMENT, bench(tmp_path / "out", data_root=Path("data")), report=False)
    assert os.environ["NORMKIT_DATA"] == str(tmp_path / "data")


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    perform(EXPERIMENT, bench(tmp_path, seeds=(0,)), report=False)
    with pytest.raises(RecordError, match=r"epochs is null there, 7 now; choose another --output, or --overwrite"):
        perform(EXPERIMENT, bench(tmp_path, epochs=7), report=False)
    perform(EXPERIMENT, bench(tmp_path, seeds=(0,), epochs=7), overwrite=True, report=False)
    with pytest.raises(RecordError, match="steps is 7 there, 4 now"):
        sweep(walk, [Walk("left", 0)], tmp_path, say=lambda text: None)


def test_a_failed_attempt_leaves_the_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise RecordError("no data")

    with monkeypatch.context() as patched:
        patched.setattr(record, "write_checkpoint", fail)
        with pytest.raises(RecordError, match="no data"):
            perform(EXPERIMENT, bench(tmp_path), report=False)
    place = tmp_path / "runs/left/seed=0"
    assert {path.name for path in place.iterdir()} == {".lock", "config.json", "timing.json"}
    with folder.locked(place), pytest.raises(RecordError, match="in use by another process"):
        perform(EXPERIMENT, bench(tmp_path, epochs=2), report=False)
    assert record.read_json(tmp_path / "config.json")["epochs"] is None
    found = perform(EXPERIMENT, bench(tmp_path, epochs=2), report=False)
    assert found["config"]["epochs"] == record.read_json(tmp_path / "config.json")["epochs"] == 2
    assert record.read_json(place / "config.json")["steps"] == 2


@pytest.mark.parametrize("left", ["result.json", "runs/left/seed=0/result.json", "runs/left/seed=0/checkpoint.pt"])
def test_whatever_was_begun_is_kept(tmp_path: Path, left: str) -> None:
    perform(EXPERIMENT, bench(tmp_path, seeds=(0,)), report=False)
    (tmp_path / "runs/left/seed=0/checkpoint.pt").touch()
    for path in tmp_path.rglob("*"):
        if path.name in ("result.json", "checkpoint.pt") and path != tmp_path / left:
            path.unlink()
    before = files(tmp_path)
    with pytest.raises(RecordError, match="holds records of another configuration: epochs"):
        perform(EXPERIMENT, bench(tmp_path, epochs=7), report=False)
    assert files(tmp_path) == before


def test_not_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(OptionError, match="does not go with torchrun"):
        perform(EXPERIMENT, bench(tmp_path))


def test_paths_must_be_unique_and_inside(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two jobs have the path"):
        sweep(walk, [Walk("left", 0), Walk("left", 0, 9)], tmp_path)
    for name in ("../left", "/left"):
        with pytest.raises(OptionError, match="wanted one within"):
            sweep(walk, [Walk(name, 0)], tmp_path)


def share(folder: Path) -> None:
    perform(EXPERIMENT, bench(folder, epochs=40), report=False)


def test_processes_share_the_jobs(tmp_path: Path) -> None:
    alone = perform(EXPERIMENT, bench(tmp_path / "alone", epochs=40), report=False)
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=share, args=(tmp_path / "shared",)) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join(240)
        assert process.exitcode == 0
    assert record.read_json(tmp_path / "shared" / "result.json")["result"] == alone["result"]
    assert records(tmp_path / "shared") == records(tmp_path / "alone")


def test_the_command_says_what_differs(tmp_path: Path) -> None:
    said = command(EXPERIMENT, Bench("full", Path("out put"), Path("data"), seeds=(0,), epochs=2, ray="auto"))
    words = "normkit claim walks --scale full --seeds 1 --epochs 2 --output 'out put' --data-root data --ray auto"
    assert said == words


def test_names_and_titles_stand_apart() -> None:
    for kind in FILES:
        lines = CliRunner().invoke(app, [kind], catch_exceptions=False).output.splitlines()
        titles = [find_experiment(kind, name).title for name in names(kind)]
        width = max(map(len, names(kind))) + 2
        assert lines == [f"{name:<{width}}{title}" for name, title in zip(names(kind), titles, strict=True)]


def test_an_experiment_is_a_short_file(tmp_path: Path) -> None:
    path = Path(written_experiment.__file__)
    assert len(path.read_text().splitlines()) <= 60
    found = perform(written_experiment.EXPERIMENT, Bench("tiny", tmp_path, seeds=(0, 1), console=Console(quiet=True)))
    assert [row["rate"] for row in found["result"]["rows"]]
    text = (tmp_path / "result.md").read_text()
    assert "| LayerNorm |" in text
    assert "![accuracy](figures/accuracy.png)" in text
    assert perform(written_experiment.EXPERIMENT, bench(tmp_path, scale="tiny", seeds=(0, 1)), report=False) == found


def test_what_is_no_scale_or_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="scale is 'small'; wanted tiny for norms"):
        perform(written_experiment.EXPERIMENT, bench(tmp_path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RecordError, match="file is a file, not a folder; choose another --output"):
        perform(EXPERIMENT, bench(tmp_path / "file"), overwrite=True)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from normkit.lab import experiments

    monkeypatch.setattr(experiments, "names", lambda kind: ("walks",))
    monkeypatch.setattr(experiments, "find_experiment", lambda kind, name: replace(EXPERIMENT, kind=kind))


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("kind", ["reproduce", "claim"])
def test_command_line(tmp_path: Path, kind: str) -> None:
    words = [kind, "walks", "--seeds", "2", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    for said in ("run 4/4", "Random walks", "4 walks ended.", "report.html"):
        assert said in done.output
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "holds this experiment, finished" in again.output
    (tmp_path / "out/report.html").unlink()
    report = CliRunner().invoke(app, ["report", str(tmp_path / "out")], catch_exceptions=False)
    assert "4 walks ended." in report.output
    assert (tmp_path / "out/report.html").exists()
    assert "walks  Random walks" in CliRunner().invoke(app, [kind]).output


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("words", "address"),
    [([], None), (["--ray"], "local"), (["--ray", "--seeds", "1"], "local"), (["--ray", "10.0.0.1:63"], "10.0.0.1:63")],
)
def test_ray_may_stand_alone(monkeypatch: pytest.MonkeyPatch, words: list[str], address: str | None) -> None:
    given: list[Bench] = []
    monkeypatch.setattr("normkit.lab.perform.perform", lambda experiment, bench, **options: given.append(bench))
    for order in (["walks", *words], [*words, "walks"]):
        done = CliRunner().invoke(app, ["claim", *order])
        assert done.exit_code == 0, done.output
    assert [bench.ray for bench in given] == [address] * 2


def test_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: None) -> None:
    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment_samples.record, "write_checkpoint", stop)
    done = CliRunner().invoke(app, ["claim", "walks", "--output", str(tmp_path / "out")])
    assert done.exit_code == 130
    assert "0 finished runs" in done.stderr
    assert "to go on:  normkit claim walks" in done.stderr
    report = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert report.exit_code == 2
    said = "result.json is missing; to finish it:  normkit reproduce walks --scale small --seeds 3 --output"
    assert said in report.stderr


def test_an_interrupted_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walked(name: str) -> Any:
        return sweep(walk, [Walk("left", 0)], tmp_path / name, say=lambda text: None)

    whole = walked("whole")
    with at_call(record, "write_checkpoint", 2, after=True), pytest.raises(Stop):
        walked("parts")
    with at_call(record, "write_checkpoint", 3, lambda: pytest.fail("all again")):
        assert walked("parts") == whole
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
