"""The command line: help, exit codes, and messages a person can act on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from normkit import __version__
from normkit.cli import app

TESTS = Path(__file__).parent
TINY = "--recipes keep --seeds 1 --rates 0.1 --epochs 1 --batch-size 32 --accelerator cpu --no-report".split()
SAMPLES = ["--model", "lab_samples:model", "--data", "lab_samples:data"]


def environ() -> dict[str, str]:
    source = str(TESTS.parent / "src")
    path = os.pathsep.join([source, str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipes", "keep,banana"], "banana"),
        (["--recipes", "keep,,keep+e"], "separated by commas"),
        (["--recipes", "keep,keep"], "are the same"),
        (["--seeds", "0"], "seeds is '0'; wanted at least one seed"),
        (["--seeds", "-2"], "seeds is '-2'; wanted at least one seed"),
        (["--rates", "0.1,-1"], "rates is (0.1, -1.0); wanted different learning rates above 0"),
        (["--rates", "0.1,fast"], "rates is '0.1,fast'; wanted different learning rates above 0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--model", "lab_samples:no_module"], "returned a str; wanted a torch.nn.Module"),
        (["--model", "lab_samples:modle"], "lab_samples has no 'modle'"),
        (["--data", "lab_samples:nan_labels"], r"targets hold NaN at [7]"),
        (["--model", "lab_samples:one_output"], "returned 1 logits, but the highest label is 2"),
        (["--recipes", "keep,keep+ws,keep+e"], "choose other recipes with --recipes, such as keep,keep+e"),
        (["--recipes", "gn:3"], "gn:3: 1: 16 channels do not split into 3 groups"),
        (["--accelerator", "abacus"], "accelerator=abacus"),
    ],
)
def test_bad_input_ends_with_2(tmp_path: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["compare", *TINY, *SAMPLES, "--output", str(tmp_path / "out"), *words])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_folder_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMKIT_DATA", "elsewhere")
    done = CliRunner().invoke(app, ["compare", *TINY, "--data", "cifar10", "--data-root", "sets", "--output", "out"])
    assert done.exit_code == 2
    assert f"{tmp_path / 'sets'} is no folder" in done.stderr


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["compare", *TINY, *SAMPLES, "--output", str(tmp_path / "file" / "out")])
    assert done.exit_code == 2
    assert "cannot write" in done.stderr


def test_report_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, said in (
        (tmp_path, "holds neither result.json nor config.json, so it is no record of normkit"),
        (tmp_path / "none", "none is not there; give a folder of records"),
        (file, "file is a file, not a folder; give a folder of records"),
    ):
        done = CliRunner().invoke(app, ["report", str(path)])
        assert done.exit_code == 2
        assert said in done.stderr


def test_report_of_an_unfinished_comparison(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "result.json is missing; to finish it:  give the `normkit compare` command" in done.stderr


def test_help_names_the_commands() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    for name in ("compare", "report", "list", "show", "info"):
        assert name in done.output
    options = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "160"}).output
    for name in (
        "recipes",
        "seeds",
        "rates",
        "epochs",
        "batch-size",
        "optimizer",
        "schedule",
        "target",
        "output",
        "precision",
    ):
        assert f"--{name}" in options


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"normkit {__version__}\n")


def test_info() -> None:
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0
    for word in ("torch", "cores", "threads", "reference", "runs here"):
        assert word in done.output


@pytest.mark.parametrize(
    "words",
    ["--help", "compare --help", "--version", "list --of weight", "show group_norm", "cite bn rms_norm", "show nosuch"],
)
def test_an_answer_from_text_alone_loads_no_torch(words: str) -> None:
    script = f"import sys; sys.argv[1:] = {words.split()}; from normkit.cli import app\n"
    script += "try: app()\nfinally: print([m for m in ('torch', 'numpy', 'rich.markdown') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environ())
    assert done.stdout.endswith("[]\n"), done.stderr
    assert done.returncode == (2 if "nosuch" in words else 0)


def test_citations() -> None:
    done = CliRunner().invoke(app, ["cite", "gn", "lab_samples:model"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("@misc{wu2018group,")
    assert "@misc{ioffe2015batch," in done.output


def test_a_name_that_is_no_method() -> None:
    for command in ("show", "cite"):
        done = CliRunner().invoke(app, [command, "groupnrom"])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: no method 'groupnrom'; did you mean group_norm")


def test_a_users_own_model_and_an_interrupt(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import pathlib, time, torch\nfrom torch import nn\n"
        "class Slow(nn.Module):\n"  # so that the interrupt finds the comparison at work, however busy the machine
        "    def forward(self, x):\n"
        "        time.sleep(0.005 if pathlib.Path('slow').exists() else 0)\n"
        "        return x\n"
        "def make(classes):\n"
        "    return nn.Sequential(Slow(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))\n"
        "def load():\n"
        "    x = torch.randn(900, 4)\n"
        "    return {'train': (x[:600], (x[:600, 0] > 0).long()), 'test': (x[600:], (x[600:, 0] > 0).long())}\n"
    )
    (tmp_path / "slow").touch()
    words = [
        "--model",
        "mine:make",
        "--data",
        "mine:load",
        "--recipes",
        "keep,keep+wn",
        "--seeds",
        "2",
        "--rates",
        "0.1",
    ]
    words += ["--epochs", "30", "--batch-size", "32", "--accelerator", "cpu", "--no-report", "--no-condition"]
    run = [sys.executable, "-m", "normkit.cli", "compare", *words]
    folder = tmp_path / "runs" / "mine.load-mine.make"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Tests that run in the background ignore interrupts, and what they start would too.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    begun = subprocess.Popen(run, text=True, cwd=tmp_path, env=environ(), **pipes, **heed)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*/*/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    begun.send_signal(signal.SIGINT)
    _, said = begun.communicate(timeout=60)
    assert begun.returncode == 130, said
    assert "stopped; kept in" in said
    assert "to go on:  normkit compare --model mine:make" in said
    assert "Traceback" not in said
    (tmp_path / "slow").unlink()
    ended = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environ(), timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "run 4/4" in ended.stdout
    assert (folder / "result.json").exists()
