"""The settings of a comparison and of an experiment: each is an option, declared here once.

    python -m normkit.lab.settings docs/compare.md

writes the table of a comparison's options between the lines ``<!-- options -->`` and ``<!-- end -->`` of a page.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from normkit.core.errors import OptionError
from normkit.lab.option import HOW, RECORDS, WHAT, WHERE, at_home, check, option, options, table, words

RATES = {
    "sgd": (0.06, 0.25, 1.0, 4.0),
    **dict.fromkeys(("adam", "adamw"), (3e-4, 1e-3, 3e-3, 1e-2)),
    # Updates of a matrix have root mean square 0.2, where those of Adam have about 1.
    **dict.fromkeys(("muon", "muoneq"), (1e-3, 3e-3, 1e-2, 3e-2)),
}
Scale = Literal["tiny", "small", "full"]
REFUSALS = ("raise", "leave")


def first_seeds(count: int) -> tuple[int, ...]:
    """Gives the seeds 0 to `count` - 1."""
    if count < 1:
        raise OptionError(f"seeds is {count}; wanted {_SEEDS['wanted']}")
    return tuple(range(count))


def _seeds_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, words(text.removesuffix(",")))) if "," in text else first_seeds(int(text))


def _seeds_in_words(seeds: tuple[int, ...]) -> str:
    # One seed that is not the first reads as a list by its comma.
    first = seeds == tuple(range(len(seeds)))
    return str(len(seeds)) if first else ",".join(map(str, seeds)) + "," * (len(seeds) == 1)


def _letters(text: str | tuple[str, ...]) -> bool:
    # Names are printed and written; a letter that is not printable may steer a terminal.
    return bool(text) and "".join(text).isprintable()


def _seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    return float(text[:-1]) * unit if unit else float(text)


def _range(check: Callable[[Any], bool], wanted: str) -> dict[str, Any]:
    return {"check": check, "wanted": wanted}


_SEEDS = _range(
    lambda seeds: bool(seeds) and len(set(seeds)) == len(seeds) and min(seeds) >= 0,
    "at least one seed: how many, or different seeds from 0 separated by commas",
) | {"metavar": "N", "parse": _seeds_of, "write": _seeds_in_words}
_RATES: dict[str, Any] = _range(
    lambda rates: len(set(rates)) == len(rates) and all(math.isfinite(rate) and rate > 0 for rate in rates),
    "different learning rates above 0, separated by commas",
) | {"parse": lambda text: tuple(map(float, words(text)))}
_TIME = _range(lambda seconds: 0 < seconds < math.inf, "a time above 0 such as 90s, 10m or 2h")
_TIME |= {"metavar": "TIME", "parse": _seconds, "write": lambda seconds: f"{seconds:g}s"}
_COUNT = _range(lambda count: count >= 1, "a whole number from 1")
_PART = _range(lambda part: 0 <= part < 1, "from 0 to below 1")
_LEVEL = _range(lambda level: 0 < level < 1, "between 0 and 1, such as 0.95")
_SCORE = _range(math.isfinite, "a finite score")
_LENGTH = _range(lambda norm: 0 < norm < math.inf, "a length above 0")
_FROM_0 = _range(lambda value: 0 <= value < math.inf, "0 or above")
_NAME = _range(_letters, "printable letters")
_RECIPES = _range(_letters, "at least one recipe, in printable letters, separated by commas")
_MODEL = "inception, inception8, densenet, googlenet, resnet18, resnet50, vit_tiny, vit_s, vit_b16, dit, or "
_MODEL += "package.module:factory"
# Where no folder is given; the folder that one is in is given by its full name.
UNSAID = Path()
_FOLDER: dict[str, Any] = {"help": "folder of the records", "panel": RECORDS, "short": "-o", "metavar": "FOLDER"}
_FOLDER["parse"] = lambda text: at_home(text) if Path(text) != UNSAID else Path.cwd()


@dataclass(frozen=True)
class Settings:
    """What a comparison trains, and how; every field is an option of ``normkit compare``, with a default.

    ``seeds`` is a tuple here, and on the command line how many or which. Empty ``recipes`` stand for those that suit the model
    (:func:`normkit.lab.study.default_recipes`), empty ``rates`` for four that suit the optimizer; they are kept in ascending
    order. The help of each field is its declaration; the page on comparing methods shows them all.

    >>> Settings(optimizer="adam").rates
    (0.0003, 0.001, 0.003, 0.01)
    """

    model: str = option("inception", _MODEL, WHAT, **_NAME)
    data: str = option("digits", "digits, cifar10, cifar100, imagefolder, or package.module:factory", WHAT, **_NAME)
    recipes: tuple[str, ...] = option(
        (),
        "what to compare, separated by commas; the first is the baseline",
        WHAT,
        rest="those that suit the model",
        **_RECIPES,
    )
    on_refusal: Literal["raise", "leave"] = option(
        "raise",
        "norms that a recipe can't replace: refuse the recipe, or leave them as they are",
        WHAT,
        REFUSALS,
        later=True,
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "runs of each recipe: how many, or their seeds by commas", WHAT, **_SEEDS
    )
    rates: tuple[float, ...] = option(
        (), "learning rates that each recipe tries", WHAT, rest="four for the optimizer", **_RATES
    )
    target: float | None = option(
        None, "validation score whose time is taken", WHAT, rest="the highest that all reach", **_SCORE
    )
    level: float = option(0.95, "coverage of the intervals", WHAT, **_LEVEL)
    condition: bool = option(True, "take the condition numbers of the weights after each epoch", WHAT)
    epochs: int = option(12, "passes over the training data", HOW, **_COUNT)
    batch_size: int = option(64, "samples per step, over all processes", HOW, **_COUNT)
    optimizer: str = option("sgd", "what trains the weights", HOW, tuple(RATES))
    momentum: float = option(0.9, "momentum of SGD", HOW, **_PART)
    weight_decay: float = option(1e-4, "weight decay", HOW, **_FROM_0)
    schedule: str = option(
        "cosine",
        "learning rate over a run: cosine down to 0, constant, or a tenth after 1/2 and again after 3/4",
        HOW,
        ("cosine", "constant", "step"),
    )
    warmup: float = option(0.0, "epochs over which the learning rate rises", HOW, later=True, **_FROM_0)
    accumulate: int = option(
        1, "parts in which a batch is run, to save memory; batch statistics are of a part", HOW, later=True, **_COUNT
    )
    clip: float | None = option(
        None, "greatest norm of the gradient; longer ones are scaled to it", HOW, rest="none", later=True, **_LENGTH
    )
    ema: float = option(
        0.0,
        "decay D per step of the average of the weights that is judged, at step n min(D, (1 + n) / (10 + n)); 0: none",
        HOW,
        later=True,
        **_PART,
    )
    label_smoothing: float = option(
        0.0, "part of each target that is spread over all classes", HOW, later=True, **_PART
    )
    accelerator: str = option("auto", "auto, cpu, cuda or mps", WHERE)
    devices: str = option("auto", "how many; processes of torchrun count by themselves", WHERE, metavar="N")
    precision: str = option("32-true", "32-true, bf16-mixed, 16-mixed, 64-true, ...", WHERE)
    compile: bool = option(False, "run the model through torch.compile", WHERE, later=True)
    channels_last: bool = option(False, "keep the channels of images last in memory", WHERE, later=True)
    strategy: str = option(
        "auto",
        "processes of torchrun: a copy of the model in each (ddp, which auto is), or a shard (fsdp)",
        WHERE,
        ("auto", "ddp", "fsdp"),
        later=True,
    )
    extend: bool = option(
        True, "try further rates, 3 per side at most, where the best lies at the edge of the sweep", WHAT, later=True
    )
    equal_time: bool = option(
        False, "judge each recipe also by a training that takes no longer than the baseline's", WHAT, later=True
    )
    resample: bool = option(
        False, "intervals that cover the draw of the test samples as well as that of the seeds", WHAT, later=True
    )
    full_epochs: int = option(100, "epochs of a full training, whose hours are estimated", WHAT, later=True, **_COUNT)
    budget: float | None = option(
        None,
        "time for all trainings, such as 90s, 10m or 2h: chooses how many epochs, rates and seeds",
        HOW,
        later=True,
        **_TIME,
    )

    def __post_init__(self) -> None:
        """Checks every field, and makes tuples of sequences and numbers."""
        for name, of in {"seeds": int, "rates": float, "recipes": str}.items():
            object.__setattr__(self, name, tuple(map(of, getattr(self, name))))
        check(self)
        object.__setattr__(self, "rates", tuple(sorted(self.rates or RATES[self.optimizer])))
        if self.warmup >= self.epochs:
            raise OptionError(f"warmup is {self.warmup}; wanted from 0 to below the {self.epochs} epochs")
        if self.optimizer.startswith("muon") and self.strategy == "fsdp":
            raise OptionError(f"optimizer {self.optimizer} needs whole matrices; wanted strategy auto or ddp, not fsdp")
        if self.accumulate > self.batch_size:
            raise OptionError(
                f"accumulate is {self.accumulate}; wanted at most the {self.batch_size} samples of a batch"
            )

    def canonical(self) -> "Settings":
        """Writes each recipe in its canonical form."""
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
        known = {name: (about, getattr(self, name)) for name, about in options(self).items()}
        settings = {
            name: list(value) if isinstance(value, tuple) else value
            for name, (about, value) in known.items()
            if not (about.later and value == about.default)
        }
        if self.optimizer != "sgd":
            del settings["momentum"]
        return {**settings, "device": device}


@dataclass
class Size:
    """How large an experiment of a paper or a claim is."""

    scale: Scale = option(
        "small",
        "small (two cores, minutes) or full",
        WHAT,
        ("tiny", "small", "full"),
        metavar="small|full",
        always=True,
    )
    _: KW_ONLY
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "runs of each method: how many, or their seeds by commas", WHAT, always=True, **_SEEDS
    )
    epochs: int | None = option(
        None, "passes over the training data", WHAT, rest="the experiment's own number", **_COUNT
    )
    download: bool = option(False, "fetch data that is missing", WHERE)
    threads: int = option(1, "threads of torch on the CPU, per run", WHERE, **_COUNT)


@dataclass
class Place:
    """Where runs are done, and where their records lie."""

    output: Path = option(UNSAID, rest="runs/NAME-SCALE", **_FOLDER)
    data_root: Path | None = option(
        None, "folder of the data sets, as they were published", WHERE, variable="NORMKIT_DATA", metavar="FOLDER"
    )
    _: KW_ONLY
    ray: str | None = option(
        None, "do the runs on a Ray cluster; alone: on one started here", WHERE, metavar="[ADDRESS]", alone="local"
    )


@dataclass
class Site(Place):
    """Where a comparison is done."""

    threads: int | None = option(None, "threads of torch on the CPU", WHERE, rest="1 for small models", **_COUNT)
    tensorboard: bool = option(False, "write curves into FOLDER/tensorboard", RECORDS)
    output: Path = option(UNSAID, rest="runs/DATA-MODEL", **_FOLDER)


@dataclass
class Reports:
    """What becomes of records: whether they are replaced, and drawn."""

    overwrite: bool = option(False, "replace the records there", RECORDS, once=True)
    report: bool = option(True, "draw figures and write report.html", RECORDS)


@dataclass
class Speed:
    """How ``normkit bench`` measures."""

    methods: tuple[str, ...] = option(
        (), "which, separated by commas", WHAT, rest="all", check=_letters, wanted="printable letters"
    )
    quick: bool = option(False, "one shape, float32, few rounds: about a minute", WHAT)
    compile: bool = option(False, "compare with torch.compile too, which compiles for minutes", WHAT)
    rounds: int | None = option(None, "samples of each variant", WHAT, rest="15, or 5 if quick", **_COUNT)
    threads: int | None = option(None, "threads of torch", WHERE, **_COUNT)
    output: Path = option(Path("runs/bench"), **_FOLDER)
    results: Path | None = option(
        None,
        "a Markdown file whose section Layers is replaced, with all cells in a .json next to it",
        RECORDS,
        metavar="FILE",
    )
    against: Path | None = option(
        None, "an earlier record to compare with: what got slower beyond noise", RECORDS, metavar="FILE", once=True
    )
    overwrite: bool = option(False, "measure again what is found there", RECORDS, once=True)


def with_options(text: str) -> str:
    """A page's text with the table of a comparison's options made again."""
    made = table(Settings, Site, Reports)
    return re.sub(
        r"(<!-- options -->\n).*?(<!-- end -->)", lambda match: match[1] + made + match[2], text, flags=re.DOTALL
    )


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(with_options(page.read_text()))
