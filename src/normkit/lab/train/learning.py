"""Classifiers of images trained for a paper's table: one training as a job, what its step costs, and E against frozen WN."""

import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from normkit.lab import record
from normkit.lab.data.augment import Standardize
from normkit.lab.data.split import Data, Split
from normkit.lab.models.rows import scale_by_norm, unit_rows
from normkit.lab.progress import tell
from normkit.lab.protocol import DATA, MODELS, load_factory, make_data, make_model
from normkit.lab.seeding import init_sha256, order_sha256, reseed, tensors_sha256
from normkit.lab.settings import Settings
from normkit.lab.sweep import CURE, Work
from normkit.lab.train.cost import Costs, measure_costs
from normkit.lab.train.parallel import start_fabric
from normkit.lab.train.trainer import METRICS, METRICS_FILE, Trainer
from normkit.surgery.condition import condition
from normkit.surgery.recipe import apply_recipe
from normkit.surgery.select import select


@dataclass(frozen=True)
class Training:
    """One training of a classifier of images."""

    data: str  # a built-in name of the lab, or package.module:factory
    model: str  # likewise
    name: str  # of the row of the table; a folder
    recipe: str  # of apply_recipe
    rate: float
    seed: int
    epochs: int  # passes over the training data
    size: int | None = None  # height and width that images are averaged down to
    train: int | None = None  # as many training images
    val: int | None = None  # the same of validation
    test: int | None = None  # the same of test
    width: float = 1.0  # factor of every number of channels
    # where the rows of layers are divided by their norms once, before training: "first_last", "all" or nowhere
    unit: str = ""
    # options of condition, of scale_by_norm or of set_lengths, put on after the recipe
    conditioning: tuple[tuple[str, Any], ...] = ()
    batch_size: int = 128
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "constant"
    warmup: float = 0.0  # in epochs
    clip: float | None = None
    label_smoothing: float = 0.0
    precision: str = "32-true"
    condition: bool = True  # take condition numbers of the weights along training

    @property
    def subject(self) -> str:
        return f"{self.data}/{self.model.rpartition(':')[2]}"

    @property
    def path(self) -> str:
        """The folder: data, model and optimizer where it is not SGD, row, rate, seed."""
        optimizer = "" if self.optimizer == "sgd" else f"-{self.optimizer}"
        return f"{self.subject}{optimizer}/{folder_name(self.name)}/rate={self.rate:g}/seed={self.seed}"

    def settings(self) -> Settings:
        """The settings of the trainer."""
        names = set(Settings.__dataclass_fields__) & set(self.__dataclass_fields__)
        shared = {name: getattr(self, name) for name in names}
        shared |= {"recipes": (self.recipe,), "rates": (self.rate,), "seeds": (self.seed,)}
        return Settings(**shared, devices="1", channels_last=True).canonical()


@dataclass(frozen=True)
class Same(Work, path="{0.base.subject}/same"):
    """Trains with E, and with weight norm on the same layers whose lengths are frozen at 1."""

    base: Training


def folder_name(name: str) -> str:
    """Makes a folder's name of a row's."""
    name = name.lower().replace(" + ", "+")
    words = "".join(letter if letter.isalnum() or letter == "+" else " " for letter in name).split()
    return "-".join(words)


@lru_cache(maxsize=2)
def images(name: str, size: int | None, train: int | None, val: int | None, test: int | None) -> Data:
    """Loads a data set, optionally subsampled and with images averaged down to `size` pixels per side."""
    factory = load_factory(name, DATA)
    counts = {key: count for key, count in {"train": train, "val": val, "test": test}.items() if count is not None}
    data = make_data(partial(factory, **counts), name)
    held = data.train.inputs
    if size is None or not isinstance(held, torch.Tensor) or held.shape[-1] == size:
        return data
    times = held.shape[-1] // size
    small = {key: _shrunk(split, times) for key, split in data.splits.items()}
    if held.dtype == torch.uint8:
        prepare = Standardize.of(torch.as_tensor(small["train"].inputs))
        small = {key: replace(split, prepare=prepare) for key, split in small.items()}
    return replace(data, **small)


def make(job: Training, data: Data) -> nn.Module:
    """Makes a job's model, with its recipe applied."""
    reseed(job.seed, "init")
    return changed(job, initial(job, data))


def initial(job: Training, data: Data) -> nn.Module:
    """Makes a job's model before its recipe is applied, from torch's generator."""
    factory: Callable[..., Any] = load_factory(job.model, MODELS)
    if "width" in inspect.signature(factory).parameters:
        factory = partial(factory, width=job.width)
    return make_model(factory, job.model, data.classes)


def changed(job: Training, model: nn.Module) -> nn.Module:
    """Applies a job's recipe and conditioning to a model, in place."""
    reseed(job.seed, "recipe")
    if job.unit:
        for layer in select(model, job.unit).values():
            unit_rows(layer.get_parameter("weight"))
    model = apply_recipe(model, job.recipe).model
    options = dict(job.conditioning)
    if "lengths" in options:
        set_lengths(model, **options)
    elif options.keys() & {"norm", "every"}:
        scale_by_norm(model, **options)
    elif options:
        model = condition(model, **options).model
    return model


def learn(job: Training, folder: Path, trainer: type[Trainer] = Trainer) -> dict[str, Any]:
    """Trains, or goes on where it was; gives the result with its curve over epochs."""
    settings = job.settings()
    fabric = start_fabric(settings)
    data = images(job.data, job.size, job.train, job.val, job.test)
    reseed(job.seed, "init")
    model = initial(job, data)
    hashes = {"init_sha256": init_sha256(model), "order_sha256": order_sha256(job.seed, job.epochs, len(data.train))}
    record.check_config(folder / "origin.json", {**hashes, "data_sha256": data.sha256()}, CURE)
    run = trainer(job.rate, job.seed, settings, changed(job, model), data, fabric, folder)
    found, rows = run.train(lambda epoch, score: tell(epoch, job.epochs, score)), run.metrics
    curve = {key: [row[key] for row in rows] for key in ("train_loss", "val_loss", "val_score")}
    ends = list(rows[-1]["condition"].items()) if rows else []
    return {
        **found,
        **hashes,
        "curve": curve,
        "condition": {"first": ends[0][1], "last": ends[-1][1]} if ends else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def measure(job: Costs[Training], folder: Path) -> dict[str, Any]:
    """Measures milliseconds and megabytes of a training step of every row, side by side in one process."""
    first = job.rows[0]
    settings = first.settings()
    data = images(first.data, first.size, first.train, first.val, first.test)
    models = {row.name: make(row, data) for row in job.rows}
    return measure_costs(models, settings, data, start_fabric(settings), budget=job.budget)


def compare_same(job: Same, folder: Path) -> dict[str, Any]:
    """Trains twice, with E and with frozen weight norm, and tells how far apart losses and weights are after it."""
    base = replace(job.base, condition=False)
    settings = base.settings()
    data = images(base.data, base.size, base.train, base.val, base.test)
    fabric = start_fabric(settings)
    found: dict[str, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]] = {}
    for name, recipe in {"e": f"{base.recipe}+e", "wn": f"{base.recipe}+wn@first_last"}.items():
        # Short, and repeated after a stop: both must be of one piece.
        shutil.rmtree(folder / name, ignore_errors=True)
        model = make(replace(base, recipe=recipe), data)
        if name == "wn":
            set_lengths(model, 1.0, frozen=True)
        before = layer_weights(model)
        Trainer(base.rate, base.seed, settings, model, data, fabric, folder / name).train()
        after = layer_weights(model)
        assert any((after[layer] != before[layer]).any() for layer in after), "nothing was learned"
        found[name] = record.read_lines(folder / name / METRICS_FILE, METRICS), after
    (lines, ours), (others, theirs) = found.values()
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return {
        "epochs": len(lines),
        "steps": lines[-1]["step"],
        "losses": [line["train_loss"] for line in lines],
        "others": [line["train_loss"] for line in others],
        "same_metrics": lines == others,
        "greatest_difference": apart,
        "sha256": [tensors_sha256(weights) for weights in (ours, theirs)],
    }


@torch.no_grad()
def set_lengths(model: nn.Module, lengths: float, frozen: bool = False) -> None:
    """Sets the lengths of all rows under weight norm; what they are multiplied with stays as it is."""
    for name, parameter in model.named_parameters():
        if name.endswith("parametrizations.weight.original0"):
            parameter.fill_(lengths).requires_grad_(not frozen)


@torch.no_grad()
def layer_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The effective weights and biases of all layers."""
    found = {}
    for name, module in model.named_modules():
        for key in ("weight", "bias"):
            value = getattr(module, key, None)
            if isinstance(value, torch.Tensor) and "parametrizations" not in name.split("."):
                found[f"{name}.{key}"] = value.detach().cpu().clone()
    return found


def _shrunk(split: Split, times: int) -> Split:
    held = torch.as_tensor(split.inputs)
    small = functional.avg_pool2d(held.float(), times)
    return replace(split, inputs=small.round().to(held.dtype) if not held.is_floating_point() else small)
