"""Wrong inputs of every kind: what each message must say, and that it is one message, with the cure, and no traceback."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from normkit.cli import app
from wrong_inputs import line_of

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
