"""Comparisons from Python: objects in, an outcome out; and the recipes that suit a model."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lab_samples
from architectures import published
from foreign_norms import wired
from normkit.core.errors import OptionError, ProtocolError
from normkit.lab.outcome import Outcome, Template, compare
from normkit.lab.protocol import MODELS, load_factory
from normkit.lab.recipes import default_recipes
from normkit.surgery.recipe import why_not

QUICK: dict[str, Any] = {"rates": (0.01,), "epochs": 1, "batch_size": 32, "accelerator": "cpu", "report": False}


def tagger() -> nn.Module:
    """A recurrent tagger of tokens."""
    parts = {"embedding": nn.Embedding(9, 8), "out": nn.Linear(8, 4), "body": nn.LSTM(8, 8, batch_first=True)}
    return wired(lambda self, tokens: self.out(self.body(self.embedding(tokens))[0]), **parts)


class Translator(nn.Module):
    """A sequence to another, by torch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.out(self.body(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True))


def tags() -> Any:
    tokens = torch.randint(1, 9, (80, 5))
    return DataLoader(TensorDataset(tokens, torch.where(tokens < 7, tokens % 4, -100)), 16)


def sequences() -> Any:
    source = torch.randint(1, 9, (80, 5))
    return TensorDataset(source, source.roll(1, 1), source.flip(1))


def language() -> nn.Module:
    pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return published("LlamaForCausalLM", vocab_size=9, bos_token_id=0, eos_token_id=1, pad_token_id=0, **size)


def words() -> Any:
    return [{"input_ids": ids, "labels": ids, "text": "words"} for ids in torch.randint(0, 9, (80, 5)).tolist()]


def bunch() -> Any:
    from sklearn.datasets import load_wine

    return load_wine()


def perceptron(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, classes))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    data = lab_samples.data()
    loaders = {part: DataLoader(TensorDataset(*map(torch.as_tensor, pair)), 16) for part, pair in data.items()}
    options = {"output": tmp_path_factory.mktemp("python") / "out", "console": Console(quiet=True), "seeds": 2}
    return compare(lab_samples.model, loaders, "keep, keep+e", **{**QUICK, **options})


def test_an_outcome(outcome: Outcome) -> None:
    assert [row["recipe"] for row in outcome.table] == ["keep", "keep+e"]
    first, second = outcome.table
    assert second["difference"] == pytest.approx(second["test_mean"] - first["test_mean"])
    assert second["low"] <= second["difference"] <= second["high"]
    assert (first["changes"], second["changes"]) == (0, 2)
    assert outcome.best.recipe == max(outcome.table, key=lambda row: row["test_mean"])["recipe"]
    assert "mean test accuracy" in outcome.best.verdict
    assert outcome.record["config"]["model"] == "lab_samples:model"
    assert outcome.record["command"].startswith("from Python: normkit compare --model lab_samples:model --data bui")
    assert outcome.record["experiment"]["title"] == "keep, keep+e on a dict"
    assert first["ms_per_step"] * second["ratio"] == pytest.approx(second["ms_per_step"])
    assert outcome._repr_html_().count("each DataLoader") == 1
    assert outcome.report() == outcome.folder / "report.html"
    assert {outcome.plot(name).axes[0].get_ylabel() for name in outcome.figures} >= {"validation accuracy"}
    for text in ("<td>keep+e</td>", "2 seeds", "each DataLoader"):
        assert text in outcome._repr_html_()
    assert repr(outcome).startswith(f"Outcome(keep, keep+e in {outcome.folder}: ")
    with pytest.raises(OptionError, match="figure 'loss' is not there; wanted one of validation_score"):
        outcome.plot("loss")


@pytest.mark.parametrize(
    ("model", "data", "recipes"),
    [
        (tagger, tags, ("keep", "keep+wn", "keep+e")),
        (Translator, sequences, ("keep", "rms", "keep+wn", "keep+e")),
        (language, words, ("keep", "ln", "keep+wn", "keep+e")),
        (perceptron, bunch, ("keep", "keep+wn", "keep+e")),
    ],
)
def test_models_and_data_of_others(
    tmp_path: Path, model: Callable[..., nn.Module], data: Callable[[], Any], recipes: tuple[str, ...]
) -> None:
    text = StringIO()
    console = Console(file=text, width=400)
    torch.manual_seed(0)
    made = compare(model, data(), output=tmp_path / "out", console=console, seeds=1, optimizer="adamw", **QUICK)
    assert tuple(row["recipe"] for row in made.table) == recipes
    assert all(run["status"] == "ok" for row in made.record["result"]["recipes"] for run in row["runs"])
    assert f"recipes {','.join(recipes)}: the model has " in text.getvalue()
    assert "no test split was given: " in text.getvalue()


@pytest.mark.parametrize(
    ("model", "recipes"),
    [
        (load_factory("inception", MODELS), ("bn", "bn+ws", "bn+wn", "bn+e")),
        (load_factory("vit_tiny", MODELS), ("keep", "rms", "keep+wn", "keep+e")),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), ("keep", "keep+ws", "keep+wn", "keep+e")),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4)), ("keep", "keep+wn", "keep+e")),
        (lambda: nn.GRU(3, 4), ("keep", "keep+wn", "keep+e")),
    ],
)
def test_recipes_that_suit_a_model(model: Callable[[], nn.Module], recipes: tuple[str, ...]) -> None:
    made = model()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert default_recipes(made)[0] == recipes
    assert not any(why_not(made, recipe) for recipe in recipes)
    torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)


def test_a_module_as_a_template(tmp_path: Path) -> None:
    model, pair = lab_samples.model(), lab_samples.data()["train"]
    text = StringIO()
    options = {"output": tmp_path / "out", "console": Console(file=text, width=400), "seeds": 2, **QUICK}
    made = compare(model, pair, "keep", **options)
    first, second = (run["init_sha256"] for run in _runs(tmp_path / "out"))
    assert first != second
    assert "its own weights are not used" in text.getvalue()
    assert made.record["config"]["model"] == "torch.nn.modules.container:Sequential"
    drawn = Template(Translator())
    torch.manual_seed(0)
    one = drawn().state_dict()
    torch.manual_seed(0)
    torch.testing.assert_close(drawn().state_dict(), one, rtol=0, atol=0)


def _runs(folder: Path) -> list[dict[str, Any]]:
    from normkit.lab import record

    paths = sorted(folder.glob("runs/keep/*/*/config.json"))
    return [record.read_json(path)["origin"] for path in paths]


class Scaled(nn.Linear):
    """A layer whose gain nothing draws again."""

    class Gain(nn.Module):
        """The gain."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = Scaled.Gain()


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (Scaled(), {}, ProtocolError, r"scale \(Gain\) has weights and no reset_parameters .* model=lambda: Net\(\)"),
        (lab_samples.model, {"epoch": 5}, OptionError, r"no setting 'epoch'; did you mean 'epochs'\?; wanted acc"),
        (lab_samples.model, {"seeds": 0}, OptionError, "at least one seed"),
    ],
)
def test_calls_that_are_refused(model: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compare(model, lab_samples.data(), **options)
