"""What a comparison is given: settings, factories by their names, splits, handwritten digits, scores."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normkit.core.errors import OptionError, ProtocolError
from normkit.lab import task
from normkit.lab.comparison import command, default_output
from normkit.lab.data.digits import digits
from normkit.lab.data.split import Split, hold_out, subset
from normkit.lab.protocol import DATA, MODELS, load_factory, make_model
from normkit.lab.settings import Reports, Settings, Site, first_seeds


def tensor(split: Split) -> torch.Tensor:
    assert isinstance(split.inputs, torch.Tensor)
    return split.inputs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a:", "names no factory"),
        ("json.not_there:model", r"there is no module 'json.not_there'"),
        ("math:pi", "a float; wanted a factory"),
        ("normkit.core:model", "has no 'model'"),
    ],
)
def test_import_paths(name: str, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        load_factory(name, MODELS)


def test_the_current_folder_is_behind_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("import late_alone\n\ndef model():\n    import later_alone\n    return 5\n")
    for name in ("late_alone", "later_alone"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.chdir(tmp_path)
    before = [path for path in sys.path if path not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", list(before))
    assert load_factory("digits", DATA)
    assert sys.path == before
    assert load_factory("mine_alone:model", MODELS)() == 5  # which imports more when it is called
    assert sys.path == [*before, str(tmp_path)]


def test_classes_are_given_where_they_are_taken() -> None:
    assert make_model(lambda classes: nn.Linear(2, classes), "model", 7).out_features == 7
    assert make_model(lambda: nn.Linear(2, 4), "model", 7).out_features == 4


def test_scores_of_labels_that_are_yes_or_no() -> None:
    logits, targets = torch.tensor([[2.0, -2.0], [2.0, 2.0]]), torch.tensor([[True, False], [False, True]])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, targets.float())
    torch.testing.assert_close(task.loss(logits, targets), expected)
    assert task.score(task.tally(logits, targets), targets) == (pytest.approx(expected.item()), 0.75)
    assert task.weight(targets) == 4


def test_held_out_is_stratified_and_repeats() -> None:
    split = Split(torch.tensor([0] * 70 + [1] * 20 + [2] * 10), torch.arange(100))
    rest, held = hold_out(split, 0.2, seed=1)
    assert torch.bincount(held.targets).tolist() == [14, 4, 2]
    assert sorted([*tensor(rest).tolist(), *tensor(held).tolist()]) == list(range(100))
    torch.testing.assert_close(tensor(hold_out(split, 0.2, seed=1)[1]), tensor(held))


def test_digits_are_whole_and_apart() -> None:
    data = digits()
    assert sum(map(len, data.splits.values())) == 1797
    assert data.classes == 10
    seen = [row.numpy().tobytes() for split in data.splits.values() for row in tensor(split)]
    assert len(set(seen)) == 1797
    std, mean = torch.std_mean(tensor(data.train))
    torch.testing.assert_close(torch.stack([mean, std]), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)  # float32 sums
    for split in data.splits.values():
        counts = torch.bincount(split.targets)
        # The whole has 174 to 183 samples a class; rounding adds one at either end.
        assert counts.max() - counts.min() <= (183 - 174) * len(split) / 1797 + 2


def test_scores_of_regression() -> None:
    targets = torch.tensor([1.0, 2.0, 4.0])
    mean = targets.mean().expand(3)
    assert task.score(task.tally(mean, targets), targets)[1] == pytest.approx(0.0, abs=1e-6)
    assert task.score(task.tally(targets, targets), targets) == (0.0, 1.0)


def test_ignored_tokens_count_for_nothing() -> None:
    logits, targets = torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]])
    assert task.tally(logits, targets)[2] == 2
    padded = task.loss(logits, torch.full((1, 3), -100))
    assert padded == 0


def test_subset_of_any_split() -> None:
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    split = Split(targets, torch.arange(100))
    for count in (1, 10, 20, 50, 100):
        drawn = subset(split, count)
        assert len(drawn) == count
        share = torch.bincount(drawn.targets, minlength=3) - torch.tensor([0.6, 0.3, 0.1]) * count
        assert share.abs().max() <= 1
        torch.testing.assert_close(drawn.targets, targets[tensor(drawn)], rtol=0, atol=0)
    assert len(subset(Split(torch.randn(10), torch.randn(10)), 4)) == 4
    with pytest.raises(OptionError, match="a subset of 101 is wanted of 100 samples"):
        subset(split, 101)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": ()}, "wanted at least one seed"),
        ({"seeds": (0, 0)}, "different seeds"),
        ({"rates": (float("nan"),)}, "above 0"),
        ({"rates": (0.1, 0.1)}, "different learning rates"),
        ({"optimizer": "muoneq", "strategy": "fsdp"}, "muoneq needs whole matrices"),
        ({"strategy": "pipeline"}, "strategy is 'pipeline'; wanted auto or ddp or fsdp"),
        ({"clip": 0.0}, "clip is 0.0; wanted a length above 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"target": float("nan")}, "target is nan"),
    ],
)
def test_settings_outside_their_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Settings(**options)


def test_the_command_says_what_differs() -> None:
    settings = Settings(model="a.b:c", seeds=first_seeds(5), rates=(0.5, 0.1), condition=False, target=0.9)
    words = "normkit compare --model a.b:c --seeds 5 --rates 0.1,0.5 --target 0.9 --no-condition"
    assert command(settings, Site(default_output(settings))) == words
    assert command(Settings(), Site(Path("else where"))) == "normkit compare --output 'else where'"
    assert command(Settings(), Site(Path("runs/digits-inception"), Path("sets"))) == "normkit compare --data-root sets"
    site = Site(Path("out"), Path("sets"), ray="local", threads=2, tensorboard=True)
    words = "normkit compare --output out --data-root sets --ray --threads 2 --tensorboard --no-report"
    assert command(Settings(), site, Reports(report=False, overwrite=True)) == words
