"""The command line: help, exit codes, and messages a person can act on."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from normkit import __version__
from normkit.cli import app
from normkit.cli import command as cli
from normkit.lab.option import Option, command, options
from normkit.lab.settings import Place, Reports, Settings, Site, Size, Speed, with_options

TESTS = Path(__file__).parent
EXPERIMENT = (Size, Place, Reports)
DECLARED = {
    "compare": (Settings, Site, Reports),
    "reproduce": EXPERIMENT,
    "claim": EXPERIMENT,
    "theory": EXPERIMENT,
    "demo": EXPERIMENT,
    "bench": (Speed,),
}


def environ() -> dict[str, str]:
    source = str(TESTS.parent / "src")
    path = os.pathsep.join([source, str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("of", [Place, Site, Speed])
def test_a_path_may_begin_at_home(of: type) -> None:
    paths = [about for about in options(of).values() if about.type is Path]
    assert paths
    assert {about.read("~/my runs") for about in paths} == {Path.home() / "my runs"}


def test_report_of_an_unfinished_comparison(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "result.json is missing; " in done.stderr
    assert "give the `normkit compare` command" in done.stderr


@pytest.mark.parametrize("name", ["", *(command.name for command in app.registered_commands)])
def test_help_fits_a_narrow_terminal_and_has_every_option(name: str) -> None:
    done = CliRunner().invoke(app, [*filter(None, [name]), "--help"])
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    declared = DECLARED.get(name, ())
    for about in options(*declared).values():
        assert about.help, about.name
        assert f"{about.spelling.partition('/')[0]} " in done.output
        assert f"\n{about.panel}:\n" in done.output


def test_the_page_of_options_is_current() -> None:
    text = (TESTS.parent / "docs/compare.md").read_text()
    assert with_options(text) == text, "run: python -m normkit.lab.settings docs/compare.md"


# Of each option a value that is not the one at rest; the rest of a class is of one kind.
UNUSUAL = {
    "recipes": ("keep", "gn:8+e@re:a b"),
    "seeds": (4,),
    "rates": (1e-05, 0.5),
    "optimizer": "adamw",
    "momentum": 0.3,
    "schedule": "step",
    "strategy": "fsdp",
    "on_refusal": "leave",
    "target": -0.25,
    "clip": 1.5,
    "threads": 3,
    "data_root": Path("a 'folder'"),
    "ray": "10.0.0.1:6379",
    "scale": "full",
    "epochs": 7,
    "methods": ("layer_norm", "layer_norm over channels"),
    "rounds": 2,
    "results": Path("page.md"),
}


def unusual(about: Option) -> Any:
    """A value other than at rest."""
    if about.name in UNUSUAL:
        return UNUSUAL[about.name]
    plain = {bool: not about.default, int: 3, float: 0.5, str: "other", Path: Path("else where")}
    return plain[about.type]


@pytest.mark.parametrize("name", ["compare", "claim", "bench"])
@pytest.mark.parametrize("one", [True, False])
def test_the_command_to_go_on_gives_every_option_again(name: str, one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is added is tried by itself: the words that a command is given back with are read as they were."""
    monkeypatch.delenv("NORMKIT_DATA", raising=False)
    classes = DECLARED[name]
    known, read = {key: about for key, about in options(*classes).items() if not about.once}, list[Any]()
    for chosen in [[key] for key in known] if one else [list(known)]:
        values = {key: unusual(known[key]) for key in chosen}
        made = [each(**{key: values[key] for key in options(each) if key in values}) for each in classes]
        words = shlex.split(shlex.join(command(of=tuple(made))))
        read.clear()
        alone = typer.Typer()
        again = cli.command(alone, "again", *classes)
        again(lambda *given: read.extend(given))
        assert CliRunner().invoke(alone, words).exit_code == 0
        assert read == made


def test_no_words_ask_for_help() -> None:
    done, asked = CliRunner().invoke(app, []), CliRunner().invoke(app, ["--help"])
    assert (done.exit_code, done.output) == (0, asked.output)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--version", [f"normkit {__version__}\n"]),
        ("info", ["torch", "cores", "threads", "reference", "runs here"]),
        ("cite gn lab_samples:model", ["@misc{wu2018group,", "@misc{ioffe2015batch,"]),
    ],
)
def test_answers(words: str, said: list[str]) -> None:
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    assert [word for word in said if word not in done.output] == []


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("words", ["--help", "list", "cite bn"])
def test_standard_output_that_takes_no_more(words: str) -> None:
    run = [sys.executable, "-m", "normkit", *words.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environ())
    said = "error: cannot write to standard output: No space left on device; lead it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, said)


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
    words = "--model mine:make --data mine:load --recipes keep,keep+wn --seeds 2 --rates 0.1".split()
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
