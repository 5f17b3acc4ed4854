"""Images in folders and their augmentation: what is read, how it is parted, what is drawn, and how files can be wrong."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from normkit.core.errors import OptionError, ProtocolError
from normkit.lab.data.augment import FlipAndCrop, Standardize
from normkit.lab.data.image_folder import imagefolder, read_square
from normkit.lab.data.root import reading
from normkit.lab.data.split import Split
from normkit.lab.protocol import DATA, load_factory, make_data
from normkit.preprocessing.image_standardization import ImageStandardization
from published import write_images

CPU = torch.device("cpu")


def read_all(folder: Path, memory: float) -> list[tuple[Tensor, Tensor]]:
    return [batch(split) for split in imagefolder(folder, size=8, memory=memory).splits.values()]


def batch(split: Split) -> tuple[Tensor, Tensor]:
    x, y = split.batch(torch.arange(len(split)), CPU)
    assert isinstance(x, Tensor)
    return x, y


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photographs", each=10)


def test_held_in_memory_and_read_each_time_are_the_same(folder: Path) -> None:
    held, read = imagefolder(folder, size=16), imagefolder(folder, size=16, memory=0)
    assert (held.train.source, read.train.inputs) == (None, None)
    assert held.classes == read.classes == 3
    for key, split in held.splits.items():
        for ours, theirs in zip(batch(split), batch(read.splits[key]), strict=True):
            assert_close(ours, theirs, rtol=0, atol=0)
    x, y = batch(held.train)
    assert (x.dtype, tuple(x.shape[1:])) == (torch.float32, (3, 16, 16))
    # Red is 0, 80 and 160 for the three classes.
    red = [float(x[y == label, 0, 8, 8].mean()) for label in range(3)]
    assert red[0] < red[1] - 0.5 < red[2] - 1
    assert held.augment is not None
    assert held.augment(x, torch.Generator().manual_seed(0)).shape == x.shape
    assert imagefolder(folder, size=16, augment=False).augment is None


SIZES = {"train": [24, 3, 3], "train val": [27, 3, 30], "train test": [27, 3, 30], "train val test": [30, 30, 30]}


@pytest.mark.parametrize(("parts", "sizes"), SIZES.items(), ids=SIZES)
def test_parts(tmp_path: Path, parts: str, sizes: list[int]) -> None:
    data = imagefolder(write_images(tmp_path / "photographs", each=10, parts=tuple(parts.split())), size=8)
    assert [len(split) for split in data.splits.values()] == sizes
    assert all(len(split.targets.unique()) == 3 for split in data.splits.values())
    seen = [{image.numpy().tobytes() for image in batch(split)[0]} for split in data.splits.values()]
    if len(parts) == 1:
        assert not seen[0] & seen[1]
        assert not seen[0] & seen[2]


def test_subsets_and_first_classes(folder: Path) -> None:
    data = imagefolder(folder, size=8, classes=2, train=9, val=2, test=4)
    assert [torch.bincount(split.targets).tolist() for split in data.splits.values()] == [[5, 4], [1, 1], [2, 2]]
    with pytest.raises(OptionError, match="classes is 4; wanted from 2 to 3, the folders of"):
        imagefolder(folder, classes=4)
    with pytest.raises(OptionError, match="size is 0"):
        imagefolder(folder, size=0)
    with pytest.raises(OptionError, match="a subset of 28 is wanted of 27"):
        imagefolder(folder, train=28)


def test_square_is_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 36:92] = 255  # 7/8 of 64 is 56, from 36 to 92
    Image.fromarray(pixels).save(tmp_path / "bars.png")
    # At the rim, antialiasing mixes in a little of what lies beyond.
    assert (read_square(tmp_path / "bars.png", 28)[:, :, 1:-1] == 255).all()
    pixels[30:34] = 0
    Image.fromarray(pixels).save(tmp_path / "bars.png")
    rows = read_square(tmp_path / "bars.png", 56)[0, :, 20]
    assert rows.eq(0).nonzero().flatten().tolist() == [26, 27, 28, 29]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_any_kind_of_image_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    image = Image.new("I;16", (20, 20), 40) if mode == "I;16" else Image.new("RGB", (20, 20), (9, 9, 9)).convert(mode)
    path = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    image.save(path)
    assert read_square(path, 8).shape == (3, 8, 8)


def test_root_may_hold_the_one_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKIT_DATA", str(folder.parent))
    data = make_data(load_factory("imagefolder", DATA), "imagefolder")
    assert [len(split) for split in data.splits.values()] == [27, 3, 30]
    write_images(folder.parent / "others", each=1)
    with pytest.raises(ProtocolError, match="holds no folder train; there are others, photographs: say which"):
        imagefolder()
    with pytest.raises(ProtocolError, match="holds no folder train; wanted train/CLASS"):
        imagefolder(folder / "train" / "n00000000")


def test_layouts_that_are_wrong(folder: Path) -> None:
    stray = folder / "val" / "n00000009"
    stray.mkdir()
    with pytest.raises(ProtocolError, match=r"n00000009 is a class that .*train does not have"):
        imagefolder(folder)
    stray.rmdir()
    (folder / "train" / "n00000009").mkdir()
    with pytest.raises(ProtocolError, match=r"n00000009 holds no images \(.jpg"):
        imagefolder(folder)
    flat = folder.parent / "flat"
    write_images(flat, parts=("train",))
    (flat / "val").mkdir()
    Image.new("RGB", (8, 8)).save(flat / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ProtocolError, match="val holds no folders; wanted one for each class"):
        imagefolder(flat)


@pytest.mark.parametrize("memory", [2.0, 0.0])
@pytest.mark.parametrize("name", ["0.JPEG", "1.png"])
@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_damaged_images_are_named(folder: Path, name: str, damage: str, memory: float) -> None:
    path = folder / "train" / "n00000001" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"not an image")
    with pytest.raises(ProtocolError, match=rf"n00000001/{name} is truncated or damaged .*replace it, or delete it"):
        read_all(folder, memory)


def test_images_that_are_empty_or_gone(folder: Path) -> None:
    data = imagefolder(folder, size=8, memory=0)
    path = folder / "train" / "n00000001" / "0.JPEG"
    path.write_bytes(b"")
    with pytest.raises(ProtocolError, match=r"0.JPEG is empty; replace or delete it"):
        imagefolder(folder)
    path.unlink()
    (folder / "val" / "n00000001" / "0.JPEG").unlink()
    with pytest.raises(ProtocolError, match=r"0.JPEG is missing; .*begin again"):
        batch(data.test)


def test_hidden_and_other_files_are_passed_over(folder: Path) -> None:
    for name in ("._0.JPEG", "notes.txt", ".DS_Store"):
        (folder / "train" / "n00000001" / name).write_text("not an image")
    (folder / "train" / ".hidden").mkdir()
    assert len(imagefolder(folder, size=8).train) == 27


def test_real_photographs() -> None:
    root = os.environ.get("NORMKIT_DATA")
    if not root or not (Path(root) / "imagenet-sample" / "train").is_dir():
        pytest.skip("NORMKIT_DATA names no folder with imagenet-sample")
    data = imagefolder(Path(root) / "imagenet-sample", size=32, classes=100)
    assert [len(split) for split in data.splits.values()] == [80, 10, 10]
    x, y = batch(data.train)
    assert x.isfinite().all()
    assert y.max() < 100


@pytest.mark.parametrize(
    "error",
    [ProtocolError("wanted images"), ModuleNotFoundError("No trimesh", name="trimesh"), MemoryError("not enough")],
    ids=lambda error: type(error).__name__,
)
def test_what_says_nothing_of_a_file_is_not_called_damage(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, reading(tmp_path / "a.png", "copy it again"):
        raise error
    assert raised.value is error


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(augment: FlipAndCrop, x: Tensor, seed: int) -> Tensor:
    """Cuts, resizes and flips each image by itself."""
    out = []
    for image, *where, flip in zip(x, *augment.draw(len(x), *x.shape[-2:], drawn(seed)), strict=True):
        top, left, height, width = (int(value) for value in where)
        cut = image[None, :, top : top + height, left : left + width]
        full = functional.interpolate(cut, x.shape[-2:], mode="bilinear", align_corners=False)
        out.append(full.flip(-1) if flip else full)
    return torch.cat(out)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (5, 7)])
@pytest.mark.parametrize(
    "augment", [FlipAndCrop(), FlipAndCrop((0.05, 1.0), (0.5, 2.0)), FlipAndCrop((0.3, 0.3), (1, 1), flip=0)]
)
def test_batch_equals_one_image_at_a_time(augment: FlipAndCrop, shape: tuple[int, int]) -> None:
    x = torch.randn(40, 3, *shape)
    # Places in the image are computed in another order: rounding of a few units in the last place.
    assert_close(augment(x, drawn(3)), one_by_one(augment, x, 3), rtol=1e-4, atol=1e-5)


def test_same_generator_same_images_and_the_global_one_untouched() -> None:
    x, before = torch.randn(4, 3, 8, 8), torch.get_rng_state()
    first, second, other = (FlipAndCrop()(x, drawn(seed)) for seed in (1, 1, 2))
    assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1, 8, 8, dtype=dtype)
    out = FlipAndCrop()(x, drawn())
    assert (out.dtype, out.shape) == (dtype, x.shape)
    # A mean of neighbours is never beyond them; bfloat16 rounds to 3 digits.
    assert out.abs().max() <= x.abs().max() * 1.01


def test_whole_image_and_flips() -> None:
    x = torch.randn(200, 3, 6, 9)
    still = FlipAndCrop(scale=(1, 1), ratio=(1, 1), flip=0)
    # Places are divided by the size and multiplied by it again: an error of a few units in the last place of 9.
    near = {"rtol": 0, "atol": 1e-5}
    assert_close(still(x, drawn()), x, **near)
    assert_close(FlipAndCrop(scale=(1, 1), ratio=(1, 1), flip=1)(x, drawn()), x.flip(-1), **near)
    half = FlipAndCrop(scale=(1, 1), ratio=(1, 1))(x, drawn())
    flipped = torch.isclose(half, x.flip(-1), **near).flatten(1).all(1)
    kept = torch.isclose(half, x, **near).flatten(1).all(1)
    assert bool((flipped ^ kept).all())
    assert 60 < int(flipped.sum()) < 140  # six deviations of 200 fair coins around 100


def test_rectangles_are_where_they_should_be() -> None:
    augment = FlipAndCrop(scale=(0.5, 0.9), ratio=(0.8, 1.25))
    top, left, height, width, _ = augment.draw(20_000, 100, 100, drawn())
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 100) & (left + width <= 100)).all())
    area, ratio = height * width / 1e4, width / height
    # Sides are rounded to whole pixels: up to 1 % of the area and of the ratio.
    assert 0.49 < area.min() < 0.52
    assert 0.88 < area.max() < 0.91
    assert 0.79 < ratio.min() < 0.82
    assert 1.23 < ratio.max() < 1.27
    # Uniform area within 0.5 to 0.9 has mean 0.7; large rectangles of an extreme shape do not fit and are drawn anew.
    assert 0.68 < area.mean() < 0.70
    assert abs(float(ratio.log().mean())) < 0.01
    # A place is uniform among those possible: the mean is in the middle.
    free = height < 100
    assert abs(float((top / (100 - height))[free].mean()) - 0.5) < 0.01


def test_what_can_never_fit_leaves_the_image_whole() -> None:
    augment = FlipAndCrop(scale=(1, 1), ratio=(0.25, 4))
    x = torch.randn(50, 1, 8, 8)
    top, left, height, width, _ = augment.draw(50, 8, 8, drawn())
    assert (height == 8).all()
    assert (width == 8).all()
    assert top.abs().max() == left.abs().max() == 0
    assert_close(augment(x, drawn()).sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": (0, 1)}, r"scale is \(0, 1\); wanted two parts of the area"),
        ({"scale": (0.9, 0.8)}, "scale is"),
        ({"scale": (0.9, 1.2)}, "scale is"),
        ({"ratio": (1.1, 2)}, "ratio is"),
        ({"ratio": (0.5, math.inf)}, "ratio is"),
        ({"flip": 1.5}, "flip is 1.5; wanted a probability"),
    ],
)
def test_options(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        FlipAndCrop(**options)


def test_standardize_is_image_standardization() -> None:
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    images[:, 1] //= 3
    ours, theirs = Standardize.of(images), ImageStandardization(None).fit(images)
    # Theirs divides by 255 in float32.
    assert_close(torch.tensor(ours.mean, dtype=torch.double), theirs.center(), rtol=1e-6, atol=0)
    assert_close(torch.tensor(ours.std, dtype=torch.double), theirs.scale(), rtol=1e-6, atol=0)
    assert_close(ours(images), theirs(images))
    std, mean = torch.std_mean(ours(images), (0, 2, 3), correction=0)
    assert_close(std, torch.ones(3))
    assert_close(mean, torch.zeros(3), rtol=0, atol=1e-6)  # of values near 1 in float32
