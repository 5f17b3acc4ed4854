"""The command line: its options, and wrong inputs of every kind, which give one message with the cure, and no traceback."""

import json
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
from wrong_inputs import line_of

TESTS = Path(__file__).parent
EXPERIMENT = (Size, Place, Reports)
DECLARED = {
    "compare": (Settings, Site, Reports), "reproduce": EXPERIMENT, "claim": EXPERIMENT, "theory": EXPERIMENT,
    "demo": EXPERIMENT, "bench": (Speed,),
}  # fmt: skip


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
    "recipes": ("keep", "gn:8+e@re:a b"), "seeds": (4,), "rates": (1e-05, 0.5), "optimizer": "adamw",
    "momentum": 0.3, "schedule": "step", "strategy": "fsdp", "on_refusal": "leave", "target": -0.25, "clip": 1.5,
    "threads": 3, "data_root": Path("a 'folder'"), "ray": "10.0.0.1:6379", "scale": "full", "epochs": 7,
    "methods": ("layer_norm", "layer_norm over channels"), "rounds": 2, "results": Path("page.md"),
}  # fmt: skip


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


TINY = "--recipes keep --seeds 1 --rates 0.1 --epochs 1 --batch-size 32 --accelerator cpu --no-report".split()
SAMPLES = ["--model", "lab_samples:model", "--data", "lab_samples:data"]
COMPARE = ["compare", *TINY, *SAMPLES, "--output", "out"]

# The words, and what is said of them.
WORDS = [
    ("compar", "no command 'compar'; did you mean 'compare'?; see normkit --help"),
    ("--verson", "no option '--verson'; did you mean '--version'?"),
    ("compare --optimiser adam", "no option '--optimiser'; did you mean '--optimizer'?; see normkit compare --help"),
    ("compare --epochs", "'--epochs' requires an argument; see normkit compare --help"),
    ("compare stray", "unexpected extra argument", "see normkit compare --help"),
    ("compare --epochs -1", "epochs is -1; wanted a whole number from 1"),
    ("compare --epochs three", "epochs is 'three'; wanted a whole number from 1"),
    ("compare --batch-size 0", "batch_size is 0; wanted a whole number from 1"),
    ("compare --seeds 0", "seeds is '0'; wanted at least one seed"),
    ("compare --seeds 1,1", "seeds is (1, 1); wanted", "different seeds from 0"),
    ("compare --rates 0.1,fast", "rates is '0.1,fast'; wanted different learning rates above 0"),
    ("compare --rates 0.1,-1", "rates is (0.1, -1.0); wanted different learning rates above 0"),
    ("compare --optimizer adm", "optimizer is 'adm'; wanted sgd or adam or adamw or", "did you mean 'adam'?"),
    ("compare --schedule cosin", "schedule is 'cosin'; wanted", "did you mean 'cosine'?"),
    ("compare --on-refusal leaf", "on_refusal is 'leaf'; wanted raise or leave; did you mean 'leave'?"),
    ("compare --momentum 1", "momentum is 1.0; wanted from 0 to below 1"),
    ("compare --weight-decay nan", "weight_decay is nan; wanted 0 or above"),
    ("compare --level 95", "level is 95.0; wanted between 0 and 1, such as 0.95"),
    ("compare --epochs 3 --warmup 3", "warmup is 3.0; wanted from 0 to below the 3 epochs"),
    ("compare --accumulate 65", "accumulate is 65; wanted at most the 64 samples of a batch"),
    ("compare --threads 0", "threads is 0; wanted a whole number from 1"),
    ("compare --recipes keep,,bn", "recipes is 'keep,,bn'; wanted at least one recipe"),
    ("compare --recipes keep,bm", "norm 'bm' is not known; did you mean 'bn'?"),
    ("compare --recipes keep+we", "weight method 'we' is not known; did you mean", "weight methods that exist: "),
    ("compare --recipes keep+e@hiden", "place 'hiden' is not known; did you mean 'hidden'?"),
    ("compare --recipes bn,bn+e,bn+e@first_last", "'bn+e' and 'bn+e@first_last' are the same (bn+e); wanted each once"),
    ("compare --model \x1b[2J", "model is '\\x1b[2J'; wanted printable letters"),
    ("compare --\x1b[2J", "has no option '--\\x1b[2J'"),
    ("reproduce tabel1", "knows no experiment 'tabel1'", "did you mean 'table1'?"),
    ("claim table1", "give normkit reproduce table1"),
    ("claim gan --scale ful", "scale is 'ful'; wanted tiny or small or full; did you mean 'full'?"),
    ("claim gan --threads 0", "threads is 0; wanted a whole number from 1"),
    ("report nowhere", "nowhere is not there; give a folder of records"),
    ("show groupnrom", "no method 'groupnrom'; did you mean group_norm"),
    ("cite groupnrom", "no method 'groupnrom'; did you mean group_norm"),
    ("list --of wieght", "no methods of 'wieght'; wanted one of input, activation", "did you mean 'weight'?"),
    ("draw groupnrom", "no method 'groupnrom'; did you mean group_norm"),
    ("draw --format gif", "pictures are svg, png or pdf, not 'gif'"),
    ("bench --methods layer_nrom", "methods has 'layer_nrom'; wanted some of", "did you mean 'layer_norm'?"),
    ("bench --rounds 0", "rounds is 0; wanted a whole number from 1"),
]
# What replaces the model or the data, and what is said of it; a name marked in wrong_inputs stands for its line.
CODE = [
    ("--model incepton", "'incepton' names no factory", "did you mean 'inception'?"),
    ("--data digit", "'digit' names no factory", "did you mean 'digits'?"),
    ("--model nosuchmodule:make", "there is no module 'nosuchmodule'; looked in "),
    ("--model wrong_inputs:mismatchd", "wrong_inputs has no 'mismatchd'", "did you mean 'mismatched'?"),
    ("--model wrong_inputs:needs_more", "missing 1 required positional argument: 'width'"),
    ("--model wrong_inputs:raises", "raised RuntimeError", "here: factory"),
    ("--model wrong_inputs:missing_part", "No module named 'nosuchpackage'", "here: missing"),
    ("--model lab_samples:no_module", "returned a str; wanted a torch.nn.Module"),
    ("--model wrong_inputs:Wrong", "missing 1 required positional argument: 'then'"),
    ("--model wrong_inputs:no_parameters", "with no parameter to train"),
    ("--model wrong_inputs:mismatched", "on two samples of train", "raised RuntimeError", "here: forward"),
    ("--model wrong_inputs:returns_tuple", "returned a tuple; wanted a tensor of logits"),
    ("--model wrong_inputs:fails_late", "with keep raised RuntimeError: mat1 and", "here: forward"),
    ("--model lab_samples:one_output", "returned 1 logits, but the highest label is 2"),
    ("--data wrong_inputs:data_raises", "raised FileNotFoundError", "here: data"),
    ("--data wrong_inputs:broken_rows", "IndexError", "here: sample"),
    ("--data wrong_inputs:collates_wrong", "TypeError", "here: collate"),
    ("--data lab_samples:nan_labels", "targets hold NaN at [7]"),
    ("--recipes gn:3", "gn:3: 1: 16 channels do not split into 3 groups"),
    ("--recipes keep,keep+ws,keep+e", "choose other recipes with --recipes, such as keep,keep+e"),
    ("--accelerator abacus", "can't start with accelerator=abacus"),
    ("--precision 3-bit", "can't start with", "precision=3-bit"),
    ("--devices many", "can't start with", "devices=many"),
    ("--data cifar10 --data-root nowhere", "nowhere is no folder; give the one that holds the data sets"),
    ("--output /proc/nothing/out", "cannot write", "--output"),
]


def refused(words: list[str], *said: str) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.output
    assert "\x1b" not in done.output
    for part in said:
        wanted = line_of(part.removeprefix("here: ")) if part.startswith("here: ") else part
        assert wanted in done.stderr
    return done.stderr


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMKIT_DATA", "")  # which --data-root sets


@pytest.mark.parametrize(("words", "said"), [(words, said) for words, *said in WORDS])
def test_words_that_are_wrong(words: str, said: list[str]) -> None:
    refused(words.split(), *said)


@pytest.mark.parametrize(("words", "said"), [(words, said) for words, *said in CODE])
def test_models_and_data_that_are_wrong(words: str, said: list[str]) -> None:
    refused([*COMPARE, *words.split()], *said)
    assert not Path("out").exists() or "fails_late" in words


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import torch\n\nlayers = [1, 2][7]\n", "mine_1.py:3, in <module>: layers = [1, 2][7]"),
        ("import torch\n\ndef make(:\n", "mine_1.py:3: def make(:"),
        ("import torch\nimport nosuchpackage\n", "mine_1.py:2, in <module>: import nosuchpackage"),
    ],
    ids=["raises", "syntax", "missing"],
)
def test_a_module_that_fails_on_import(tmp_path: Path, code: str, said: str, request: pytest.FixtureRequest) -> None:
    name = f"mine_{request.node.callspec.id}"  # Python keeps what it has imported
    (tmp_path / f"{name}.py").write_text(code)
    refused([*COMPARE, "--model", f"{name}:make"], f"{tmp_path}/{said.replace('mine_1', name)}")


def test_the_whole_traceback_on_request() -> None:
    done = CliRunner().invoke(app, [*COMPARE, "--model", "wrong_inputs:mismatched", "--traceback"])
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "in widens" in done.stderr
    assert "\nerror: " in done.stderr


def test_outputs_that_are_nan_from_the_first_step() -> None:
    done = CliRunner().invoke(app, [*COMPARE, "--model", "wrong_inputs:returns_nan"])
    assert "diverged" in done.output
    assert "Traceback" not in done.output


def test_a_norm_that_a_recipe_cannot_replace_may_be_left() -> None:
    done = CliRunner().invoke(app, [*COMPARE, "--recipes", "keep,gn:3", "--on-refusal", "leave"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("out/config.json").read_text())["on_refusal"] == "leave"


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "bert"}')
    refused(COMPARE, "so it is no record of normkit and is left alone; choose another --output")
    (tmp_path / "file").write_text("")
    refused([*COMPARE, "--output", "file/out"], "cannot write", "choose another --output")
    refused(["report", "."], "holds neither result.json nor config.json, so it is no record of normkit")
    refused(["report", "file"], "file is a file, not a folder; give a folder of records")


def test_torchrun_and_extras_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused([*COMPARE, "--ray"], "pip install 'normkit[ray]'")
    refused(["claim", "gan", "--scale", "tiny", "--ray"], "pip install 'normkit[ray]'")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    refused(["claim", "gan"], "does not go with torchrun; use --ray")
