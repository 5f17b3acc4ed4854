"""What a user's factory may return, and how the rest is refused."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import lab_samples
from foreign_norms import wired
from normkit.core.errors import ProtocolError
from normkit.lab import task
from normkit.lab.data import reader
from normkit.lab.data.split import Data, Split
from normkit.lab.protocol import check_fit, make_data, make_model, suited

X, Y = torch.randn(30, 8), torch.arange(30) % 3
LINE = nn.Linear(8, 3)


def replaced(values: torch.Tensor, row: int, value: float) -> torch.Tensor:
    values = values.clone()
    values[row] = value
    return values


def tensor(split: Split) -> torch.Tensor:
    assert isinstance(split.inputs, torch.Tensor)
    return split.inputs


class Picture:
    """A photograph as pillow has it."""

    def getbands(self) -> tuple[str, ...]:
        return ("R", "G", "B")


# Sentences of unequal length, as dicts: what Hugging Face's library gives, of which only this much is used.
ROW = {"input_ids": [1, 2, 3, 4], "text": "words"}
RAGGED = lab_samples.Samples(30, lambda row: {**ROW, "input_ids": ROW["input_ids"][: 2 + row % 3], "label": row % 3})
RAGGED.features = ("input_ids", "text", "label")


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    held = {"input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)}
    return {**held, "attention_mask": held["input_ids"] > 0, "labels": torch.tensor([row["label"] for row in rows])}


def language(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    made = padded(rows)
    return {**made, "labels": torch.where(made["attention_mask"], made["input_ids"], -100)}


class Stream(torch.utils.data.IterableDataset):
    """Samples in a row, as many as it says."""

    def __init__(self, count: int = 30) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return zip(X, Y.tolist(), strict=True)


class Pooled(nn.Module):
    """A classifier of sentences, or of their tokens."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.embedding, self.out, self.tokens = nn.Embedding(9, 8), nn.Linear(8, 9), tokens

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        held = self.embedding(input_ids)
        return {"logits": self.out(held if self.tokens else held.mean(1))}


def unreadable(row: int) -> tuple[torch.Tensor, int]:
    if row == 20:
        raise OSError("image file is truncated")
    return X[row], int(Y[row])


def with_a_damaged_file() -> Any:
    return lab_samples.Samples(30, unreadable)


def broken() -> nn.Module:
    raise RuntimeError("no weights")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lab_samples.no_module, "returned a str; wanted a torch.nn.Module"),
        (lambda: None, "returned None"),
        (lambda: 5, "returned an int; wanted a torch.nn.Module"),
        (lambda: nn.Linear, "returned the class Linear; .* return an instance"),
        (lambda: nn.ReLU(), "no parameter to train"),
        (lambda width: nn.Linear(width, 1), "raised TypeError"),
        (broken, "raised RuntimeError: no weights"),
        (lambda: nn.Linear(8, 3, device="meta"), "weight is on the meta device, without values; .*to_empty"),
    ],
)
def test_models_that_are_refused(factory: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        make_model(factory, "model", 3)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, 'data is None; wanted a dict with "train"'),
        ({"test": (X, Y)}, 'a dict with test; wanted a dict with "train"'),
        ({"train": (X, Y), "tset": (X, Y)}, "leave 'tset' out"),
        ({"train": X, "test": (X, Y)}, "train is a Tensor; wanted a dict"),
        ({"train": ({}, Y), "test": (X, Y)}, "empty dict"),
        ({"train": ({"text": ["a"] * 30}, Y)}, "hold nothing but text or None under text"),
        ({"train": (X, ["cat", "dog"] * 15)}, r"targets are text, such as 'cat'; wanted class indices, such as"),
        ({"train": (X, [{}] * 30)}, "makes no tensor"),
        ((X, torch.eye(3)[Y].long()), r"a single 1 per row \(one-hot\); give class indices, targets.argmax\(1\)"),
        ((X, torch.eye(3)[Y]), "one-hot"),
        ((X, torch.full((30,), 2)), "all targets of train are 2, a single class"),
        ((X, torch.ones(30, 2)), "a single class"),
        ({"train": (X, Y), "test": (X, Y - 9)}, "published without labels\\? leave this split out"),
        ([{"x": X[0]}], "has no target among x; wanted one called labels, label"),
        ([{"image": Picture(), "label": 1}], r"are pictures \(Picture\); make tensors"),
        (DataLoader(RAGGED, 4), "inputs of unequal shapes or names.*DataLoader with a collate_fn that pads"),
        (DataLoader(RAGGED, 4, collate_fn=lambda rows: (torch.zeros(7, 4), Y[:4])), r"collate .* inputs \(7, 4\)"),
        (DataLoader(RAGGED, None), "batch_size=None"),
        (iter([(X[0], 1)]), "an iterable needs a length"),
        ({"train": (X[:29], Y), "test": (X, Y)}, "do not match 30 targets in length"),
        ({"train": ({"a": X[:7]}, Y), "test": (X, Y)}, "do not match 30 targets in length"),
        ({"train": (X[:0], Y[:0]), "test": (X, Y)}, "train is empty"),
        ({"train": (X, Y), "test": (X[:0], Y[:0])}, "test is empty"),
        ({"train": (X[:1], Y[:1]), "test": (X, Y)}, "too few to hold out"),
        ({"train": (replaced(X, 4, float("nan")), Y), "test": (X, Y)}, r"inputs hold NaN at \[4, 0\]"),
        ({"train": (X, Y), "test": (replaced(X, 4, float("inf")), Y)}, "test inputs hold infinity"),
        ({"train": (X, replaced(X[:, 0], 2, float("nan"))), "test": (X, X[:, 0])}, r"targets hold NaN at \[2\]"),
        ({"train": (X, np.where(Y == 2, np.nan, Y)), "test": (X, Y)}, r"targets hold NaN at \[2\]"),
        ({"train": (X, replaced(Y, 5, -1)), "test": (X, Y)}, r"hold -1 at \[5\]; wanted class indices from 0"),
        ({"train": (X, replaced(Y, 5, -100)), "test": (X, Y)}, "hold -100"),
        ({"train": (X, torch.full((30, 2), -100)), "test": (X, torch.ones(30, 2).long())}, "all -100"),
        ({"train": (X, Y), "test": (X, Y.float())}, "targets of test are torch.float32"),
        ({"train": (X, Y[:, None, None]), "test": (X, Y[:, None, None])}, r"wanted classes \(n,\)"),
        ({"train": (X, X[:, 0]), "test": (X, torch.ones(30))}, "targets of test are all equal"),
        ({"train": [X, Y, Y], "test": (X, Y)}, r"train\[0\] is a Tensor; wanted a pair"),
        ({"train": [(X[0], Y[:1]), (X[0], Y[:2]), (X[0], Y[:2])], "test": (X, Y)}, "targets of unequal shapes"),
        ({"train": [(X[0], 0), (X[0, :7], 1), (X[0], 2)], "test": (X, Y)}, "train has inputs of unequal shapes"),
        ({"train": [(replaced(X, 0, float("nan"))[0], 1)], "test": (X, Y)}, "hold NaN"),
        (Data(Split(Y, X), Split(Y, X), Split(Y[:0], X[:0])), "test is empty"),
        ({"train": torch.utils.data.Subset(TensorDataset(X, Y), []), "test": (X, Y)}, "train is empty"),
        ({"train": (X, X > 0), "test": (X, (X > 0).long())}, "targets of test are torch.int64"),
    ],
)
def test_data_that_is_refused(made: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        make_data(lambda: made, "data")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (
            lambda: lab_samples.Samples(30, unreadable),
            r"reading the samples of data .* OSError: .*truncated \(at .*protocol.py",
        ),
        (broken, r"raised RuntimeError: no weights \(at .*test_protocol.py:\d+, in \w+: raise"),
    ],
)
def test_code_of_the_user_that_fails(factory: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        make_data(factory, "data")


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (lab_samples.model(2), lab_samples.data, "returned 2 logits, but the highest label is 2; wanted at least 3"),
        (nn.Linear(9, 3), lab_samples.data, r"on two samples of train \(inputs torch.float32 \(2, 8\)\) raised"),
        (nn.Flatten(0), lab_samples.data, r"returned \(16,\) for class targets \(2,\) of train; wanted \(2, classes\)"),
        (nn.GRU(8, 4), lab_samples.data, "returned a tuple; wanted a tensor of logits"),
        (nn.Linear(8, 2), lab_samples.regression, r"returned \(2, 2\) for float targets \(2,\) of train"),
        (nn.Linear(8, 3), lab_samples.tokens, "on two samples of train .*input_ids.* raised TypeError"),
        (nn.Linear(8, 3).double(), lab_samples.data, r"weights are torch.float64; return model.float\(\).*precision"),
        (LINE, lambda: (X.half(), Y), r"make the inputs torch.float32 too, such as inputs.float\(\)"),
        (LINE, lambda: (X, Y[:, None]), r"wanted \(2, 1, classes\); for one class .* targets.squeeze\(1\)"),
    ],
)
def test_models_that_do_not_fit(model: nn.Module, data: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        check_fit(model.train(), make_data(data, "data"), "model")
    assert model.training


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("inputs", "words"), [(torch.randn(50, 9), ""), ({"x": torch.randn(50, 8)}, r"\['x'\]")])
def test_splits_that_do_not_fit_as_train_does(split: str, inputs: Any, words: str) -> None:
    made = lab_samples.changed(**{split: (inputs, torch.arange(50) % 3)})
    cure = rf"it took inputs torch.float32 \(2, 8\) of train: make {split} alike"
    with pytest.raises(ProtocolError, match=f"on two samples of {split} .*inputs{words} torch.float32.*{cure}"):
        check_fit(lab_samples.model(), make_data(made, "data"), "model")


def test_a_split_of_longer_sequences_is_taken() -> None:
    splits = {part: (torch.randn(9, n, 8), torch.randn(9, n, 1)) for part, n in (("train", 5), ("test", 7))}
    check_fit(nn.Linear(8, 1), make_data(lambda: splits, "data"), "model")


IDS = torch.arange(60).view(30, 2) % 9
BITS = (X[:, :3] > 0).float()
DRAWN = "no test split was given: 6 of 30 samples are drawn from train"


BOTH = wired(lambda self, one, other: self.out(torch.cat([one, other], 1)), out=nn.Linear(16, 3))


def case(
    made: Any, *, model: nn.Module = LINE, kind: str = "classification", sizes: Any = (19, 5, 6), words: str = DRAWN
) -> tuple[Any, ...]:
    """Data, the model that they suit, the task that they pose, sizes of the splits, and what is noted."""
    return made, model, kind, sizes, words


CASES = [
    *(
        case(make(), model=lab_samples.model(), sizes=(128, 32, 80), words="no val split")
        for make in (lab_samples.data, lab_samples.dataset)
    ),
    case(lab_samples.regression(), model=lab_samples.one_output(), kind="regression", sizes=(72, 18, 30), words="no"),
    case(lab_samples.tokens(), model=lab_samples.Tagger(), sizes=(32, 8, 20), words="no val split"),
    case((X, Y)),
    case({"train": (X, Y), "validation": (X[:9], Y[:9])}, sizes=(24, 9, 6)),
    case((TensorDataset(X, Y), TensorDataset(X[:9], Y[:9])), sizes=(24, 6, 9), words="no val split"),
    case(TensorDataset(X, X, Y), model=BOTH),
    case([(x, y) for x, y in zip(X, Y, strict=True)]),
    case({"data": X.numpy(), "target": Y.numpy(), "DESCR": "words"}),
    case({"pixels": X, "labels": Y}),
    case({"pixels": X.double(), "labels": X[:, 0].double()}, model=nn.Linear(8, 1), kind="regression", words="float32"),
    case(DataLoader(TensorDataset(X, Y), 7), words=r"not its own \(7\)"),
    case(DataLoader(TensorDataset(X, Y), 7, sampler=SubsetRandomSampler(range(20))), sizes=(13, 3, 4), words=""),
    case(DataLoader(TensorDataset(X, Y), sampler=[1, 1, 2]), words="list draws by weight or repeats samples"),
    case(
        DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * 30, 30)),
        words="WeightedRandomSampler draws by weight or repeats samples, which is not done here",
    ),
    case(Data(*[Split(BITS[:, 0], X)] * 3), model=nn.Linear(8, 1), kind="regression", sizes=(30, 30, 30), words=""),
    case({"train": (X, Y % 2), "test": (X, Y)}, sizes=(24, 6, 30), words="10 of 30 .*test.* that train lacks: 2"),
    case((X.numpy().astype(">f4"), Y.numpy().astype(">i8"))),
    case(DataLoader(RAGGED, 4, collate_fn=padded), model=Pooled(), words="text and empty columns.* text"),
    case(DataLoader(RAGGED, 4, collate_fn=language), model=Pooled(True), words="target is the next one"),
    case(DataLoader(Stream()), words="held in memory: 30 samples, 0.0 MB"),
    case({"input_ids": IDS, "speaker": Y, "labels": IDS}, model=Pooled(True), words="no argument called speaker"),
    case((X, BITS), kind="multi-label", words="binary cross-entropy"),
    case((X, BITS.bool().numpy()), kind="multi-label"),
    case((X, BITS[:, 0]), model=nn.Linear(8, 1), kind="binary", words="binary cross-entropy"),
    case((X, Y > 1)),
]


@pytest.mark.parametrize(("made", "model", "kind", "sizes", "words"), CASES)
def test_data_as_people_have_them(made: Any, model: nn.Module, kind: str, sizes: tuple[int, ...], words: str) -> None:
    data = suited(make_data(lambda: made, "data"), model, "model")
    check_fit(model, data, "model")
    assert (data.kind, data.score) == (kind, "r2" if kind == "regression" else "accuracy")
    assert tuple(map(len, data.splits.values())) == sizes
    assert data.sha256() == data.sha256()
    assert re.search(words, "; ".join(data.notes))
    inputs, targets = data.train.batch(torch.tensor([3, 1]), torch.device("cpu"))
    task.loss(task.call(model, inputs), targets).backward()
    stored = data.train.targets[[3, 1]]  # of sequences, padded to the longest of all batches
    torch.testing.assert_close(targets, stored if stored.ndim == 1 else stored[:, : targets.shape[1]])


def test_a_causal_loss_is_that_of_hugging_face() -> None:
    ids, logits = torch.randint(0, 9, (4, 6)), torch.randn(4, 6, 9)
    targets = make_data(lambda: ({"input_ids": ids.repeat(9, 1)}, ids.repeat(9, 1)), "data").train.targets[:1]
    expected = nn.functional.cross_entropy(logits[0, :-1], torch.cat([targets[0, :-1]]))
    torch.testing.assert_close(task.loss(logits[:1], targets), expected)


def test_an_iterable_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_free_bytes", lambda: 100)
    with pytest.raises(ProtocolError, match=r"first 2 of 30 samples fill half of the free memory .*map-style"):
        make_data(Stream, "data")


def test_inputs_that_a_model_does_not_name() -> None:
    data = make_data(lambda: {"a": X, "b": X, "labels": Y}, "data")
    with pytest.raises(ProtocolError, match="its forward takes input, but the samples hold a, b; name them alike"):
        suited(data, LINE, "model")


def test_arrays_that_are_only_read_are_taken() -> None:
    pixels = np.ones((30, 2), np.float32)
    pixels.flags.writeable = False  # as pandas and memory maps give them; torch would warn
    assert tensor(make_data(lambda: (pixels, Y), "data").train).shape == (19, 2)


def test_doubles_of_numpy_become_floats() -> None:
    given = {"train": (np.ones((10, 2)), np.arange(10) % 2), "test": (np.ones((4, 2)), np.eye(4)[0] > 0)}
    made = make_data(lambda: given, "d")
    assert (tensor(made.train).dtype, made.test.targets.dtype) == (torch.float32, torch.int64)
