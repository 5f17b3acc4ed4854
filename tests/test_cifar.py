"""CIFAR in its published layout, small: what is read, what is held out, and every way in which files can be wrong."""

import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from normkit.core.errors import OptionError, ProtocolError
from normkit.lab.data import cifar
from normkit.lab.data.augment import FlipAndCrop, Standardize
from normkit.lab.data.cifar import cifar10, cifar100, download_missing
from normkit.lab.data.download import Archive, download
from normkit.lab.data.pickled import read_pickle
from normkit.lab.data.split import Data, Split
from normkit.lab.models.convolutional import inception8
from normkit.lab.protocol import DATA, check_fit, load_factory, make_data
from published import FOLDERS, batch, write_cifar, write_pickle

CPU = torch.device("cpu")


def pixels(split: Split) -> Tensor:
    assert isinstance(split.inputs, Tensor)
    return split.inputs


def counts(split: Split, classes: int = 10) -> list[int]:
    return torch.bincount(split.targets, minlength=classes).tolist()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cifar(tmp_path)
    return tmp_path


@pytest.mark.parametrize("python2", [True, False])
def test_reads_every_image_once_with_its_label(tmp_path: Path, python2: bool) -> None:
    folder = write_cifar(tmp_path, python2=python2)
    data = cifar10(tmp_path)
    assert [len(split) for split in data.splits.values()] == [180, 20, 100]
    assert [counts(split) for split in data.splits.values()] == [[18] * 10, [2] * 10, [10] * 10]
    rows = [pickle.loads((folder / f"data_batch_{k}").read_bytes(), encoding="bytes") for k in range(1, 6)]
    pairs = [zip(part[b"data"].tolist(), part[b"labels"], strict=True) for part in rows]
    written = {tuple(image): label for pair in pairs for image, label in pair}
    found = {}
    for split in (data.train, data.val):
        found |= {tuple(x.flatten().tolist()): int(y) for x, y in zip(pixels(split), split.targets, strict=True)}
    assert found == written
    test = pickle.loads((folder / "test_batch").read_bytes(), encoding="bytes")
    assert_close(pixels(data.test).flatten(1), torch.from_numpy(test[b"data"]), rtol=0, atol=0)
    assert data.test.targets.tolist() == test[b"labels"]


def test_batches_are_standardized_by_train(root: Path) -> None:
    data = cifar10(root)
    x, y = data.train.batch(torch.arange(len(data.train)), CPU)
    assert isinstance(x, Tensor)
    assert (x.dtype, x.shape, y.dtype) == (torch.float32, (180, 3, 32, 32), torch.int64)
    std, mean = torch.std_mean(x, (0, 2, 3), correction=0)
    assert_close(std, torch.ones(3), rtol=0, atol=1e-5)  # of 180,000 values in float32
    assert_close(mean, torch.zeros(3), rtol=0, atol=1e-5)
    assert data.train.prepare == data.val.prepare == data.test.prepare
    # The first third of a row is red, which the samples make brighter with the label.
    assert x[y == 9, 0].mean() > x[y == 0, 0].mean() + 1
    assert abs(float(x[y == 9, 1].mean() - x[y == 0, 1].mean())) < 0.1


def test_cifar100(tmp_path: Path) -> None:
    write_cifar(tmp_path, classes=100)
    data = cifar100(tmp_path)
    assert [counts(split, 100) for split in data.splits.values()] == [[18] * 100, [2] * 100, [10] * 100]
    assert data.classes == 100


def test_subsets_are_stratified_nested_and_always_the_same(root: Path) -> None:
    whole = cifar10(root)
    small, smaller = cifar10(root, train=90, test=20), cifar10(root, train=20, val=15, test=20)
    assert [len(split) for split in small.splits.values()] == [90, 10, 20]
    assert counts(small.train) == [9] * 10
    assert counts(small.val) == [1] * 10
    assert sorted(counts(smaller.val)) == [1] * 5 + [2] * 5
    for key in ("train", "test"):
        images = [{tuple(x.flatten().tolist()) for x in pixels(data.splits[key])} for data in (whole, small, smaller)]
        assert images[2] <= images[1] <= images[0]
    assert cifar10(root, train=90, test=20).sha256() == small.sha256()
    assert len({whole.sha256(), small.sha256(), cifar10(root, train=90, test=20, augment=False).sha256()}) == 3


@pytest.mark.parametrize("options", [{"train": 9}, {"train": 181}, {"val": 21}, {"test": 101}, {"test": 0}])
def test_subsets_out_of_range(root: Path, options: dict[str, int]) -> None:
    ((key, count),) = options.items()
    with pytest.raises(OptionError, match=rf"{key} is {count}; wanted from 10 .* the {key} split of CIFAR-10"):
        cifar10(root, **options)


def test_root_may_be_the_environments_or_the_folder_itself(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cifar10(root).sha256()
    assert cifar10(root / FOLDERS[10]).sha256() == expected
    monkeypatch.setenv("NORMKIT_DATA", str(root))
    assert cifar10().sha256() == expected
    data = make_data(load_factory("cifar10", DATA), "cifar10")
    assert data.sha256() == expected
    assert data.augment == FlipAndCrop()
    check_fit(inception8(width=0.25), data, "inception8")


def test_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMKIT_DATA", raising=False)
    with pytest.raises(ProtocolError, match=r"^no folder of data sets is given; use --data-root .* NORMKIT_DATA"):
        make_data(load_factory("cifar10", DATA), "cifar10")


def test_missing_file_is_named_with_the_cure(root: Path) -> None:
    (root / FOLDERS[10] / "data_batch_3").unlink()
    words = r"data_batch_3 is missing; download CIFAR-10 \(--download\), or fetch https://\S+-python.tar.gz by hand and unpack"
    with pytest.raises(ProtocolError, match=words):
        cifar10(root)
    with pytest.raises(ProtocolError, match=r"cifar-100-python/train is missing; download CIFAR-100"):
        cifar100(root)


def test_truncated_at_any_place(root: Path) -> None:
    path = root / FOLDERS[10] / "data_batch_2"
    whole = path.read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(whole) - 1, len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ProtocolError, match=r"data_batch_2 .*delete .* and download .* \(--download\), or unpack"):
            cifar10(root)


def test_damaged_bytes_never_raise_anything_else(root: Path) -> None:
    path = root / FOLDERS[10] / "test_batch"
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), []
    edges = [*range(300), *range(len(whole) - 1500, len(whole))]  # pixels in between may have any value
    for place in rng.choice(edges, 150, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            read_pickle(path, "delete it")
            cifar10(root)
        except ProtocolError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all("test_batch" in message for message in refused)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda part: part.pop(b"data"), "data is a NoneType; wanted bytes"),
        (lambda part: part.update({b"data": part[b"data"][:, :-1]}), r"data is uint8 \(40, 3071\); wanted .*3072"),
        (lambda part: part.update({b"data": part[b"data"].astype(float)}), "data is float64"),
        (lambda part: part.update({b"data": [[1, 2]]}), "data is a list"),
        (lambda part: part.pop(b"labels"), "labels is a NoneType; wanted a list of integers"),
        (lambda part: part.update({b"labels": part[b"labels"][:-1]}), "40 images and 39 labels"),
        (lambda part: part.update({b"labels": [10] * 40}), "labels from 10 to 10; wanted from 0 to 9"),
        (lambda part: part.update({b"labels": [-1] * 40}), "labels from -1 to -1"),
        (lambda part: part.update({b"labels": [0.5] * 40}), "labels is a list; wanted a list of integers"),
    ],
)
def test_content_of_another_kind(root: Path, change: Callable[[dict], Any], words: str) -> None:
    part = batch(np.arange(40) % 10, 10, seed=0)
    change(part)
    write_pickle(root / FOLDERS[10] / "data_batch_4", part)
    with pytest.raises(ProtocolError, match=f"data_batch_4 is damaged or of another data set: {words}"):
        cifar10(root)


class Made:
    """Pickles as a call of something by its name, with a state given to what comes back."""

    def __init__(self, call: Any, given: tuple[Any, ...], state: Any = None) -> None:
        self.made = (call, given) if state is None else (call, given, state)

    def __reduce__(self) -> Any:
        return self.made


def test_pickles_run_no_code(tmp_path: Path) -> None:
    path, target = tmp_path / "evil", tmp_path / "made_by_the_pickle"
    write_pickle(path, {b"data": Made(os.mkdir, (str(target),))}, python2=False)
    with pytest.raises(ProtocolError, match=r"evil asks for (posix|nt)\.mkdir, which .*; it is not loaded; go"):
        read_pickle(path, "go")
    assert not target.exists()
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ProtocolError, match="holds a list; wanted a dict"):
        read_pickle(path, "go")
    # bytes that name a codec of their own would import a module
    path.write_bytes(pickle.dumps({"a": b"\xff"}, protocol=2).replace(b"latin1", b"base64"))
    with pytest.raises(ProtocolError, match=r"truncated or damaged .*bytes in encoding 'base64'"):
        read_pickle(path, "go")
    with pytest.raises(ProtocolError, match="missing"):
        read_pickle(tmp_path / "absent", "go")
    with pytest.raises(ProtocolError, match="cannot read"):
        read_pickle(tmp_path, "go")


def archive(place: Path, classes: int = 10, name: str = "") -> Archive:
    """Packs a small data set as it is published, and says where it is."""
    folder = write_cifar(place / "made", classes)
    path = place / f"cifar-{classes}-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=name or folder.name)
    return Archive(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest(), folder.name)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, root = archive(tmp_path), tmp_path / "new" / "root"
    monkeypatch.setattr(cifar, "CIFAR10", dataclasses.replace(cifar.CIFAR10, archive=there))
    with pytest.raises(ProtocolError, match="is no folder"):
        cifar10(root)
    expected = cifar10(tmp_path / "made").sha256()
    assert cifar10(root, download=True).sha256() == expected
    assert {path.name for path in root.iterdir()} == {"cifar-10-python.tar.gz", FOLDERS[10]}
    # A file that went missing comes from the archive that lies there; nothing is fetched.
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    (root / FOLDERS[10] / "test_batch").unlink()
    assert cifar10(root, download=True).sha256() == expected
    # All is there: nothing is touched.
    (root / "cifar-10-python.tar.gz").unlink()
    assert cifar10(root, download=True).sha256() == expected


def test_experiments_make_the_folder_that_they_download_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "new" / "root"
    monkeypatch.setenv("NORMKIT_DATA", str(root))
    for name in ("digits", "imagefolder", "package.module:factory"):
        download_missing(name)  # nothing that can be fetched
    assert not root.exists()
    published = dataclasses.replace(cifar.CIFAR10, archive=archive(tmp_path))
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", published)
    download_missing("cifar10")
    assert cifar10().sha256() == cifar10(tmp_path / "made").sha256()
    (tmp_path / "file").touch()
    with pytest.raises(ProtocolError, match=r"cannot make .*file.*; give another by --data-root or NORMKIT_DATA"):
        download_missing("cifar10", tmp_path / "file" / "root")


def test_download_that_fails(tmp_path: Path) -> None:
    there, root = archive(tmp_path), tmp_path / "root"
    with pytest.raises(ProtocolError, match=r"cannot fetch file://.*absent.*; look at .*or fetch .* by hand"):
        download(dataclasses.replace(there, url=there.url + "absent"), root)
    with pytest.raises(ProtocolError, match=r"gave \d+ bytes with SHA-256 .*, not the published file .*thrown away"):
        download(dataclasses.replace(there, sha256="0" * 64), root)
    assert list(root.iterdir()) == []
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(ProtocolError, match=r"cannot write under .*blocked"):
        download(there, tmp_path / "blocked")


def test_archives_that_are_not_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "escape.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("../escaped")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"bad"))
    wrong = Archive(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest(), "folder")
    with pytest.raises(ProtocolError, match="can't be unpacked"):
        download(wrong, tmp_path / "root")
    assert not (tmp_path / "escaped").exists()
    path.write_bytes(b"not a tar")
    wrong = dataclasses.replace(wrong, sha256=hashlib.sha256(b"not a tar").hexdigest())
    with pytest.raises(ProtocolError, match="can't be unpacked"):
        download(wrong, tmp_path / "root")
    other = archive(tmp_path, name="another-folder")
    with pytest.raises(ProtocolError, match="holds no folder cifar-10-batches-py"):
        download(other, tmp_path / "root")


def real(name: str) -> Path:
    root = os.environ.get("NORMKIT_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"NORMKIT_DATA names no folder with {name}")
    return Path(root)


@pytest.mark.parametrize(("factory", "classes"), [(cifar10, 10), (cifar100, 100)])
def test_real_data(factory: Callable[..., Data], classes: int) -> None:
    data = factory(real(FOLDERS[classes]))
    assert [len(split) for split in data.splits.values()] == [45_000, 5_000, 10_000]
    for split, each in zip(data.splits.values(), (45_000, 5_000, 10_000), strict=True):
        assert counts(split, classes) == [each // classes] * classes
    # What others publish for the whole training set.
    published = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}[classes]
    assert isinstance(data.train.prepare, Standardize)
    assert data.augment is not None
    assert_close(torch.tensor(data.train.prepare.mean), torch.tensor(published), rtol=0, atol=2e-3)
    x, _ = data.train.batch(torch.arange(256), CPU)
    assert data.augment(x, torch.Generator().manual_seed(0)).isfinite().all()


RECONSTRUCT = np.empty(0).__reduce__()[0]
PLAIN, OBJECTS = np.dtype("u1"), np.dtype("O")
FORGED = {
    "an array made over memory": Made(np.ndarray, ((1 << 20,), OBJECTS, b"\x01" * 64)),
    "an array of objects": Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), OBJECTS, False, [None])),
    "a kind of objects": OBJECTS,
    "a kind of records": np.dtype([("a", "u1"), ("b", "O")]),
    "a kind with fields in its state": Made(np.dtype, ("u1",), (3, "|", None, ("a",), {"a": (OBJECTS, 0)}, -1, -1, 0)),
    "less bytes than its shape says": Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (9, 9), PLAIN, False, b"1234")),
    "a shape below zero": Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (-2, -2), PLAIN, False, b"1234")),
    "a shape of no integers": Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, ("a",), PLAIN, False, b"1234")),
    "another class": Made(RECONSTRUCT, (dict, (0,), b"b")),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_arrays_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "forged"
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps({"data": FORGED[name]}, protocol=protocol))
        with pytest.raises(ProtocolError, match=r"forged (asks for|is truncated or damaged|holds)"):
            read_pickle(path, "go")


def test_names_of_the_reader_can_not_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "forged"
    for name in (b"numpy\nndarray", b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct", b"_codecs\nencode"):
        for state in (b"}X\x01\x00\x00\x00aK\x01sb", b"N}X\x08\x00\x00\x00__call__K\x01s\x86b"):
            path.write_bytes(b"\x80\x02}X\x04\x00\x00\x00datac" + name + b"\n" + state + b"s.")
            with pytest.raises(ProtocolError, match="forged"):
                read_pickle(path, "go")


@pytest.mark.parametrize("kind", ["bool", "i1", "<i8", ">i4", "u2", "f2", "<f4", ">f8"])
def test_plain_arrays_come_back(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "plain"
    whole = np.arange(12).reshape(3, 4).astype(kind)
    for array in (whole, np.asfortranarray(whole), whole[:1]):
        for protocol in (0, 2, 4):
            path.write_bytes(pickle.dumps({"data": array, "more": [array]}, protocol=protocol))
            found = read_pickle(path, "go")
            for back in (found["data"], found["more"][0]):
                np.testing.assert_array_equal(back, array)
                assert back.dtype == array.dtype.newbyteorder("=")
