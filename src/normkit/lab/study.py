"""The runs of a comparison: the same initial weights and data in the same order for every recipe; recipes that suit a model."""

import copy
import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from torch import nn
from torch.nn.modules.conv import _ConvNd

from normkit.core.errors import RecordError, SurgeryError
from normkit.lab import protocol, record
from normkit.lab.devices import device_name
from normkit.lab.progress import tell
from normkit.lab.say import counted
from normkit.lab.seeding import init_sha256, order_sha256, reseed
from normkit.lab.settings import Settings
from normkit.lab.train.cost import measure_costs
from normkit.lab.train.parallel import start_fabric
from normkit.lab.train.trainer import METRICS_FILE, TIMING_FILE, Trainer
from normkit.surgery.norms import is_norm, read_norm
from normkit.surgery.recipe import why_not

# Each kind of norm that stands in for another of the same reach: over features alone.
OTHERS = {"layer_norm": "rms", "rms_norm": "ln"}
WORDS = {"batch_norm": "batch norm", "layer_norm": "layer norm", "rms_norm": "RMS norm", "group_norm": "group norm"}
MARKS_FILE = "test.npz"  # what each test sample adds to the score
# Settings of which others can be given to the runs that are there, and what settings say of all runs together.
FREE = ("recipes", "rates", "seeds", "target", "level", "extend", "equal_time", "resample", "full_epochs")


def default_recipes(model: nn.Module, example: Any = None) -> tuple[tuple[str, ...], str]:
    """Chooses recipes by what a model has, and says in a sentence why these.

    The first, the baseline, is the model as it is: ``bn`` where all its norms are batch norms, else ``keep``. Next come
    RMS norm where it has layer norms, or the reverse; weight standardization where it has convolutions; weight norm; and
    weight conditioning of its first and last layer. Each is tried on the model; one that it can't have is left out.
    """
    kinds = Counter(_kind(name, module) for name, module in model.named_modules() if is_norm(module))
    convolutions = sum(isinstance(module, _ConvNd) for module in model.modules())
    base = "bn" if list(kinds) == ["batch_norm"] else "keep"
    most = kinds.most_common(1)[0][0] if kinds else ""
    swap = [OTHERS[most]] if most in OTHERS else []
    # A patch embedding is a convolution too, which no norm follows.
    standardized = [f"{base}+ws"] if convolutions > 1 and not swap else []
    reasons = {text: why_not(model, text, example) for text in (*swap, *standardized, f"{base}+wn", f"{base}+e")}
    left = "; ".join(reason for reason in reasons.values() if reason)
    has = [counted(count, WORDS.get(kind, kind.replace("_", " "))) for kind, count in kinds.items()] or ["no norm"]
    for of, what in (((_ConvNd,), "convolution"), ((nn.RNNBase,), "recurrent layer"), ((nn.Linear,), "linear layer")):
        if count := sum(isinstance(module, of) for module in model.modules()):
            has.append(counted(count, what))
    listed = has[0] if len(has) == 1 else f"{', '.join(has[:-1])} and {has[-1]}"
    reason = f"the model has {listed}" + (f"; left out, as they don't apply: {left}" if left else "")
    return (base, *(text for text, why in reasons.items() if not why)), reason


def _kind(name: str, module: nn.Module) -> str:
    try:
        return read_norm(name, module).kind
    except SurgeryError:
        return "norm of its own"


OF_ALL = (*FREE, "budget", "accelerator", "devices")


@dataclass(frozen=True)
class Run:
    """One training, with all that it depends on."""

    recipe: str  # canonical
    rate: float  # the learning rate at its height
    seed: int  # of the initial weights, the order of the data and all else that is random
    epochs: int = 0  # passes over the train split; 0: those of the settings
    # settings, and hashes of the data and of the initial weights
    origin: Mapping[str, Any] = field(default_factory=dict, hash=False)
    files: ClassVar = (METRICS_FILE, TIMING_FILE, MARKS_FILE)

    @property
    def path(self) -> str:
        length = f"/epochs={self.epochs}" if self.epochs else ""
        return f"{quote(self.recipe, safe='+@:,')}/rate={self.rate}{length}/seed={self.seed}"

    @property
    def label(self) -> str:
        length = f"  {counted(self.epochs, 'epoch')}" if self.epochs else ""
        return f"{self.recipe}  rate {self.rate:g}{length}  seed {self.seed}"


@dataclass(frozen=True)
class Steps:
    """Measures what a training step of each recipe costs, side by side."""

    recipes: tuple[str, ...]
    origin: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def path(self) -> str:
        return f"costs/{hashlib.sha256(','.join(self.recipes).encode()).hexdigest()[:8]}"

    @property
    def label(self) -> str:
        return "milliseconds and megabytes per step, all recipes side by side"


@dataclass(frozen=True)
class Study:
    """What is compared, as every process that does a run of it must know it."""

    settings: Settings  # canonical
    model: Callable[..., Any] | None = None  # a factory in place of the one that the settings name
    data: Callable[[], Any] | None = None  # likewise
    curves: Path | None = None  # an absolute folder for TensorBoard

    def learn(self, run: Run, folder: Path) -> dict[str, Any]:
        """Trains, or goes on where it was."""
        made = _made_of(self, run.origin, run.seed)
        curves = self.curves and self.curves / run.path
        model, *_ = made.apply(run.seed, run.recipe)
        settings = self.settings
        if run.epochs:
            # The whole schedule in less time.
            warmup = settings.warmup * run.epochs / settings.epochs
            settings = replace(settings, epochs=run.epochs, warmup=warmup)
        trainer = Trainer(run.rate, run.seed, settings, model, made.data, made.fabric, folder, curves)
        with protocol.user_code(f"{settings.model} with {run.recipe}"):
            result = trainer.train(lambda epoch, score: tell(epoch, settings.epochs, score))
        if made.fabric.is_global_zero:
            record.write_numbers(folder / MARKS_FILE, trainer.marks.numpy())
        return result

    def measure(self, job: Steps, folder: Path) -> dict[str, Any]:
        made, seed = _made_of(self, job.origin, self.settings.seeds[0]), self.settings.seeds[0]
        models = {recipe: made.apply(seed, recipe)[0] for recipe in job.recipes}
        return measure_costs(models, self.settings, made.data, made.fabric)

    def device(self) -> str:
        """Names the device that the runs are done on."""
        return device_name(start_fabric(self.settings))


class Made:
    """Models by seed and recipe, and the data; made once, so that whatever is wrong shows before the first run."""

    def __init__(self, study: Study) -> None:
        settings = self.settings = study.settings
        self.fabric = start_fabric(settings)
        self._factory = study.model or protocol.load_factory(settings.model, protocol.MODELS)
        reseed(0, "data")
        self.data = _data(study.data or protocol.load_factory(settings.data, protocol.DATA), settings.data)
        self._base: tuple[int, nn.Module, str] | None = None
        self._orders: dict[int, str] = {}
        self.changes: dict[str, dict[str, list[str]]] = {}
        self.parameters: dict[str, int] = {}
        seed = settings.seeds[0]
        self.data = protocol.suited(self.data, self._initial(seed)[0], settings.model)
        self._data_sha256 = self.data.sha256()
        protocol.check_fit(self._initial(seed)[0], self.data, settings.model)
        for recipe, (model, rows, left) in self._applied(seed).items():
            protocol.check_fit(model, self.data, f"{settings.model} with {recipe}")
            self.changes[recipe] = {"changes": rows, "passed_over": left}
            self.parameters[recipe] = sum(parameter.numel() for parameter in model.parameters())

    def recipes(self) -> tuple[tuple[str, ...], str]:
        """Chooses recipes that suit the model, and says why these."""
        return default_recipes(self._initial(self.settings.seeds[0])[0], protocol.two(self.data.train)[0])

    def run(self, recipe: str, rate: float, seed: int, device: str, epochs: int = 0) -> Run:
        return Run(recipe, rate, seed, epochs, self.origin(seed, device))

    def origin(self, seed: int, device: str) -> dict[str, Any]:
        """Everything that a run depends on, but its recipe, rate and seed."""
        shared = {key: value for key, value in self.settings.record(device).items() if key not in OF_ALL}
        return {**shared, **self.hashes(seed)}

    def hashes(self, seed: int) -> dict[str, str]:
        """Hashes of the data, of their order and of the initial weights."""
        if seed not in self._orders:
            self._orders[seed] = order_sha256(seed, self.settings.epochs, len(self.data.train))
        known = {"data_sha256": self._data_sha256, "order_sha256": self._orders[seed]}
        return {**known, "init_sha256": self._initial(seed)[1]}

    def apply(self, seed: int, recipe: str) -> tuple[nn.Module, list[str], list[str]]:
        """Makes a recipe's model of a seed, and says what was changed and what was passed over."""
        from normkit.surgery.recipe import apply_recipe

        model = copy.deepcopy(self._initial(seed)[0])
        reseed(seed, "recipe")
        changes = apply_recipe(model, recipe, on_refusal=self.settings.on_refusal)
        return changes.model, [str(row) for row in changes.rows], [str(left) for left in changes.passed_over]

    def _initial(self, seed: int) -> tuple[nn.Module, str]:
        if self._base is None or self._base[0] != seed:
            reseed(seed, "init")
            model = protocol.make_model(self._factory, self.settings.model, self.data.classes)
            model = protocol.sized(model, self.data, self.settings.model)
            self._base = seed, model, init_sha256(model)
        return self._base[1:]

    def _applied(self, seed: int) -> dict[str, tuple[nn.Module, list[str], list[str]]]:
        # All are tried where one is refused, to say which are possible.
        applied, refused = {}, []
        for recipe in self.settings.recipes:
            try:
                applied[recipe] = self.apply(seed, recipe)
            except SurgeryError as error:
                refused.append(error)
        if refused:
            fit = f", such as {shlex.quote(','.join(applied))}" if applied else ""
            raise SurgeryError(f"{refused[0]}; choose other recipes with --recipes{fit}") from refused[0]
        return applied


# A process does run after run of one comparison.
made = lru_cache(maxsize=1)(Made)
_data = lru_cache(maxsize=1)(protocol.make_data)


def forget() -> None:
    """Drops what was made: models and data of a comparison may be made again."""
    made.cache_clear()
    _data.cache_clear()


def _made_of(study: Study, origin: Mapping[str, Any], seed: int) -> Made:
    hashes = {}
    for _ in range(2):
        hashes = made(study).hashes(seed)
        if all(origin.get(key) == value for key, value in hashes.items()):
            return made(study)
        forget()  # an earlier comparison by the same factories
    differ = ", ".join(key for key, value in hashes.items() if origin.get(key) != value)
    raise RecordError(f"data or model are made differently each time or on another machine: {differ} differ; seed them")
