"""The settings of a comparison, checked."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from normkit.core.errors import OptionError

RECIPES = ("bn", "bn+ws", "bn+wn", "bn+e")
RATES = {"sgd": (0.06, 0.25, 1.0, 4.0), "adam": (3e-4, 1e-3, 3e-3, 1e-2), "adamw": (3e-4, 1e-3, 3e-3, 1e-2)}
SCHEDULES = ("cosine", "constant", "step")
STRATEGIES = ("auto", "ddp", "fsdp")
# A record made before these existed lacks them, and is of the same configuration where they are at rest.
LATER = ("warmup", "accumulate", "clip", "ema", "label_smoothing", "compile", "channels_last", "strategy")


@dataclass(frozen=True)
class Settings:
    """What a comparison trains, and how; every field has a default.

    Args:
        model: a built-in name or ``package.module:factory``. Default: ``"inception"``.
        data: a built-in name or ``package.module:factory``. Default: ``"digits"``.
        recipes: in the notation of :func:`normkit.surgery.recipe.apply_recipe`; the first is the baseline.
        seeds: Default: ``(0, 1, 2)``.
        rates: learning rates that each recipe tries with its first seed. Default: four that suit the optimizer.
        epochs: passes over the train split. Default: 12.
        batch_size: samples a step, over all processes; what does not fill a batch is left out of the epoch. Default: 64.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``. Default: ``"sgd"``.
        momentum: of SGD; unused by the others. Default: 0.9.
        weight_decay: Default: 1e-4.
        schedule: ``"cosine"`` down to 0 over the run, ``"constant"``, or ``"step"``: a tenth after a half and again after three
            quarters of the run. Default: ``"cosine"``.
        warmup: epochs over which the rate rises from 0 to its height, in equal steps. Default: 0.
        accumulate: parts that a batch is run in, one after the other, to save memory; batch statistics are those of a part.
            Default: 1.
        clip: the greatest length of the gradient over all weights; longer ones are scaled to it. Default: None, any.
        ema: decay a step of the average of the weights that is judged in place of the weights, such as 0.999; at step n no
            more than (1 + n) / (10 + n). Default: 0, none.
        label_smoothing: the part of the target that is spread over all classes. Default: 0.
        target: the validation score whose time is taken. Default: None, the highest that every run reached.
        level: coverage of the intervals. Default: 0.95.
        condition: take the condition numbers of the weights after each epoch. Default: True.
        accelerator: of Lightning Fabric. Default: ``"auto"``.
        devices: of Lightning Fabric. Default: ``"auto"``.
        precision: of Lightning Fabric. Default: ``"32-true"``.
        compile: run the model through ``torch.compile``. Default: False.
        channels_last: keep the channels of images last in memory, which is faster where convolutions are. Default: False.
        strategy: of several processes: ``"ddp"``, a copy of the model in each, or ``"fsdp"``, a shard. Default: ``"auto"``, ddp.

    Raises:
        OptionError: a value is outside its range.

    >>> Settings(optimizer="adam").rates
    (0.0003, 0.001, 0.003, 0.01)
    """

    model: str = "inception"
    data: str = "digits"
    recipes: tuple[str, ...] = RECIPES
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = ()
    epochs: int = 12
    batch_size: int = 64
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.0
    accumulate: int = 1
    clip: float | None = None
    ema: float = 0.0
    label_smoothing: float = 0.0
    target: float | None = None
    level: float = 0.95
    condition: bool = True
    accelerator: str = "auto"
    devices: str = "auto"
    precision: str = "32-true"
    compile: bool = False
    channels_last: bool = False
    strategy: str = "auto"

    def __post_init__(self) -> None:
        """Checks every field, and makes tuples of sequences and numbers."""
        _one_of("optimizer", self.optimizer, RATES)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("strategy", self.strategy, STRATEGIES)
        for name in ("epochs", "batch_size", "accumulate"):
            _check(name, value := getattr(self, name), isinstance(value, int) and value >= 1, "a whole number from 1")
        seeds = tuple(self.seeds)
        _check("seeds", seeds, bool(seeds), "at least one seed")
        _check("seeds", seeds, len(set(seeds)) == len(seeds) and min(seeds) >= 0, "different seeds from 0")
        rates = tuple(sorted(float(rate) for rate in self.rates or RATES[self.optimizer]))
        for rate in rates:
            _check("rates", rate, math.isfinite(rate) and rate > 0, "learning rates above 0")
        _check("rates", rates, len(set(rates)) == len(rates), "different learning rates")
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 to below 1")
        decays = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        _check("weight_decay", self.weight_decay, decays, "0 or above")
        _check("warmup", self.warmup, 0 <= self.warmup < self.epochs, f"from 0 to below the {self.epochs} epochs")
        parts = self.accumulate <= self.batch_size
        _check("accumulate", self.accumulate, parts, f"at most the {self.batch_size} samples of a batch")
        clips = self.clip is None or (math.isfinite(self.clip) and self.clip > 0)
        _check("clip", self.clip, clips, "a length above 0")
        _check("ema", self.ema, 0 <= self.ema < 1, "from 0 to below 1")
        _check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "from 0 to below 1")
        _check("level", self.level, 0 < self.level < 1, "between 0 and 1, such as 0.95")
        _check("target", self.target, self.target is None or math.isfinite(self.target), "a finite score")
        _check("recipes", self.recipes, bool(self.recipes), "at least one recipe")
        for name, words in {"model": [self.model], "data": [self.data], "recipes": self.recipes}.items():
            for word in words:
                # Names are printed and written; a letter that is not printable may steer a terminal.
                _check(name, repr(word), word.isprintable(), "printable letters")
        for name, value in {"seeds": seeds, "rates": rates, "recipes": tuple(self.recipes)}.items():
            object.__setattr__(self, name, value)

    def canonical(self) -> "Settings":
        """Writes each recipe in its canonical form.

        Raises:
            NotationError: a recipe has an unknown word.
            OptionError: two recipes are the same.
        """
        from normkit.surgery.recipe import Recipe

        recipes = tuple(str(Recipe.parse(text)) for text in self.recipes)
        for place, recipe in enumerate(recipes):
            first = recipes.index(recipe)
            if first < place:
                given = f"{self.recipes[first]!r} and {self.recipes[place]!r}"
                raise OptionError(f"recipes {given} are the same ({recipe}); wanted each once")
        return replace(self, recipes=recipes)

    def record(self, device: str) -> dict[str, Any]:
        """Gives the configuration that a folder records, with the device that it resolved to."""
        settings = asdict(self)
        settings |= {name: list(settings[name]) for name in ("recipes", "seeds", "rates")}
        if self.optimizer != "sgd":
            del settings["momentum"]
        for name in LATER:
            if settings[name] == self.__dataclass_fields__[name].default:
                del settings[name]
        return {**settings, "device": device}


def first_seeds(count: int) -> tuple[int, ...]:
    """Gives the seeds 0 to `count` - 1.

    Raises:
        OptionError: `count` is below 1.

    >>> first_seeds(3)
    (0, 1, 2)
    """
    _check("seeds", count, count >= 1, "at least one seed")
    return tuple(range(count))


def _check(name: str, got: Any, good: bool, wanted: str) -> None:
    if not good:
        raise OptionError(f"{name} is {got}; wanted {wanted}")


def _one_of(name: str, got: str, known: Iterable[str]) -> None:
    _check(name, repr(got), got in known, " or ".join(known))
