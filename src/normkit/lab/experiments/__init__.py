"""The experiments that ``normkit reproduce``, ``claim``, ``theory`` and ``demo`` know, one file per line."""

from importlib import import_module
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from normkit.core.errors import OptionError, RecordError, closest
from normkit.lab import comparison, record
from normkit.lab.experiment import Bench, Experiment
from normkit.lab.perform import BEGUN, CONFIG, CURE, FOUND, RESULT, command, show
from normkit.lab.say import Terminal

# An experiment is called like its file, with dashes.
FILES = {
    "reproduce": "table1 table2 table3 table4 fig1 vit_s shape cost ablations".split(),
    "claim": "batch_size disparity pre_post_ln placements gan why_bn blog_table cost_activations conditioning four_benefits "
    "equilibrate four_improvements local_norms bn_order linear_part gradnorm style_transfer".split(),
    "theory": "quadratic van_der_sluis proposition_1 hessian".split(),
    "demo": "learning_rate input_normalization depth three_operations support_sets".split(),
}
WITH = {"table2": "table1:TABLE2"}  # what shares a file with another
FOLDERS = {"theory": ".theory", "demo": ".demonstrations"}


def names(kind: str) -> tuple[str, ...]:
    """Names the experiments of a kind."""
    return tuple(file.replace("_", "-") for file in FILES[kind])


def find_experiment(kind: str, name: str) -> Experiment:
    """Imports an experiment."""
    known = names(kind)
    if name not in known:
        if other := _kind(name):
            raise OptionError(f"{name} is no experiment of {kind}; give normkit {other} {name}")
        there = f"there are {', '.join(known) or 'none'}"
        raise OptionError(f"{kind} knows no experiment {name!r}; {there}{closest(name, known)}")
    file, _, other = WITH.get(name, name.replace("-", "_")).partition(":")
    return getattr(import_module(f"normkit.lab.experiments{FOLDERS.get(kind, '')}.{file}"), other or "EXPERIMENT")


def reshow(output: Path, console: Console | None = None) -> None:
    """Prints an experiment's tables and redraws its report from its records."""
    if not output.is_dir():
        raise RecordError(
            f"{output} is {'a file, not a folder' if output.exists() else 'not there'}; give a folder of records"
        )
    if not (output / RESULT).exists():
        _refuse(output)
    if "experiment" not in record.read_json(output / RESULT):
        raise RecordError(f"{output} holds a comparison by an earlier normkit; make it again: {CURE}")
    found = record.read_json(output / RESULT, FOUND)
    about = found["experiment"]
    of_user = about["kind"] == "compare"
    experiment = comparison.reread(found) if of_user else find_experiment(about["kind"], about["name"])
    show(experiment, found, output, console or Terminal())


def _refuse(output: Path) -> NoReturn:
    if not (output / CONFIG).exists():
        raise RecordError(f"{output} holds neither {RESULT} nor {CONFIG}, so it is no record of normkit")
    name = str(record.read_json(output / CONFIG).get("experiment"))
    again = "give the `normkit compare` command of this folder again"
    if kind := _kind(name):
        config = record.read_json(output / CONFIG, BEGUN)
        size = {key: config[key] for key in ("scale", "epochs", "threads")}
        bench = Bench(**size, output=output, seeds=tuple(config["seeds"]))
        again = command(find_experiment(kind, name), bench)
    raise RecordError(f"{output / RESULT} is missing; to finish it:  {again}")


def _kind(name: str) -> str | None:
    return next((kind for kind in FILES if name in names(kind)), None)
