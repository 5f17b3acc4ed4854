"""The comparison of recipes, as an experiment on a user's model and data.

Each recipe tries every learning rate with the first seed; its rate is the one with the best validation score at the end. At that
rate it trains with every seed.

All recipes start from the same weights and see the same data in the same order. The test split is looked at once per run, when
its training is over, and chooses nothing.
"""

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from normkit.core.errors import OptionError
from normkit.lab import folder as folders
from normkit.lab import option, record, rounds
from normkit.lab.cluster import joined
from normkit.lab.data.root import set_root
from normkit.lab.experiment import Bench, Experiment
from normkit.lab.perform import CONFIG, check, kept, perform
from normkit.lab.progress import stoppable
from normkit.lab.rounds import fit, fitted, measure
from normkit.lab.say import Terminal
from normkit.lab.seeding import borrowed_randomness
from normkit.lab.settings import RATES, Reports, Settings, Site
from normkit.lab.study import FREE, Study, forget, made
from normkit.lab.train.parallel import Processes, start_fabric

__all__ = ["EXPERIMENT", "command", "compare", "default_output", "kept"]

# More names than a title holds.
MANY = 8
# Threads of so small a model wait for each other longer than they work, and for ever where other programs take the cores.
FEW_PARAMETERS = 100_000


def compare(
    settings: Settings,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    report: bool = True,
    threads: int | None = None,
    console: Console | None = None,
    model: Callable[..., Any] | None = None,
    data: Callable[[], Any] | None = None,
    ray: str | None = None,
    tensorboard: bool = False,
    data_root: Path | None = None,
) -> dict[str, Any]:
    """Compares recipes, with factories in place of those that `settings` name; see :func:`normkit.lab.outcome.compare`."""
    set_root(data_root)
    settings = replace(settings, model=_named(model, settings.model), data=_named(data, settings.data)).canonical()
    folder = Path(output) if output is not None else default_output(settings)
    curves = folder.absolute() / folders.CURVES if tensorboard else None
    study, fabric = Study(settings, model, data, curves), start_fabric(settings)
    group = Processes(fabric)
    forget()
    there = group.share(lambda: _begun_with(folder, overwrite))
    why = (note,) if (note := getattr(model, "note", "")) else ()
    if not settings.recipes:
        with borrowed_randomness():
            recipes, reason = made(study).recipes()
        why = (*why, f"recipes {','.join(recipes)}: {reason}")
        settings = replace(settings, recipes=recipes).canonical()
        study = replace(study, settings=settings)
    given = settings
    if settings.budget is not None:
        if ray is not None:
            raise OptionError("budget is of runs one after the other, so it does not go with --ray; wanted one of them")
        with borrowed_randomness(threads):
            if threads is None and _is_small(study):
                torch.set_num_threads(1)  # as the runs will be done
            settings = _planned(study, there, group)
        why = (*why, fitted(settings))
        study = replace(study, settings=settings)
    site = Site(folder, data_root, ray=ray, threads=threads, tensorboard=tensorboard)
    again = command(given, site, Reports(report=report))
    if not (_importable(model) and _importable(data)):
        again = f"from Python: {again}"
    # Sums depend on how many threads share them, so a comparison goes on with as many as it was begun with.
    begun: int | None = there.get("threads")
    with ExitStack() as stack:
        stack.enter_context(stoppable())
        device = study.device()
        if ray is not None:
            if fabric.world_size > 1:
                raise OptionError("--ray does not go with torchrun; wanted one of them")
            threads = threads or begun or 1
            device = stack.enter_context(joined(ray, threads)).call(Study.device, study)
        console = (console or Terminal()) if group.first else Console(quiet=True)
        bench = Bench("full", folder, data_root, seeds=settings.seeds, console=console, ray=ray, group=group)
        bench.threads = threads or begun or 1
        experiment = _experiment(study, device, again)
        if begun and not overwrite:
            # Before the model is made, which may be another.
            group.share(lambda: check(experiment, bench))
        stack.enter_context(borrowed_randomness())
        stack.callback(forget)
        if not _is_small(study):
            bench.threads = threads or begun or torch.get_num_threads()
        for note in (*why, *made(study).data.notes):
            bench.watch(note)
        return perform(experiment, bench, overwrite=overwrite, report=report, command=again)


def default_output(settings: Settings) -> Path:
    """Names the folder of a comparison after its data and model."""
    names = [re.sub(r"[^\w.-]+", ".", name).strip(".") for name in (settings.data, settings.model)]
    return Path("runs") / "-".join(names)


def command(settings: Settings, *site: Any) -> str:
    """Writes the command line that makes this comparison."""
    rest = {"output": default_output(settings), "rates": RATES[settings.optimizer]}
    return shlex.join(option.command("normkit", "compare", of=(settings, *site), **rest))


def reread(found: Mapping[str, Any]) -> Experiment:
    """Gives the experiment of a comparison's record, to show it again."""
    return replace(EXPERIMENT, title=found["experiment"]["title"], command=shlex.split(found["command"]))


def _later(module: str, name: str) -> Any:
    # The report draws, which what only trains need not wait for.
    return lambda result: getattr(import_module(f"normkit.lab.report.{module}"), name)(result)


tables, remarks, interactive = (
    _later("comparison_tables", name) for name in ("all_tables", "all_remarks", "page_context")
)
figures = _later("figures", "drawings")


def _experiment(study: Study, device: str, again: str) -> Experiment:
    settings = study.settings
    count = len(settings.recipes)
    names = ", ".join(settings.recipes) if count <= MANY else f"{count} recipes"

    def run(bench: Bench) -> dict[str, Any]:
        return rounds.run(study, made(study), bench, device)

    def whole(bench: Bench, result: dict[str, Any]) -> bool:
        return rounds.whole(study, made(study), bench, device, result)

    return replace(
        EXPERIMENT,
        title=f"{names} on {rounds.said(settings.data)}",
        settings=settings.record(device),
        free=FREE,
        command=shlex.split(again),
        run=run,
        whole=whole,
    )


def _planned(study: Study, there: Mapping[str, Any], group: Processes) -> Settings:
    """Settings that fit the budget: those that the record was begun with, as times differ each time they are measured."""
    settings = study.settings
    if there.get("budget") == settings.budget:
        kept = {key: there[key] for key in ("epochs", "warmup", "rates", "seeds") if key in there}
        return replace(settings, **kept)
    seconds = measure(made(study))
    return group.share(lambda: fit(settings, seconds))


def _is_small(study: Study) -> bool:
    return max(made(study).parameters.values()) < FEW_PARAMETERS


def _begun_with(folder: Path, overwrite: bool) -> dict[str, Any]:
    """The configuration that a record was begun with, or that replaces it; empty where there is none to go on with."""
    try:
        if (folder / folders.REPLACING).exists():
            return dict(record.read_json(folder / folders.REPLACING)["wanted"])
        return record.read_json(folder / CONFIG) if (folder / CONFIG).exists() and not overwrite else {}
    except (record.RecordError, LookupError, TypeError):
        return {}  # it is looked at more closely later


def _named(factory: Callable[..., Any] | None, name: str) -> str:
    if factory is None:
        return name
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', type(factory).__name__)}"


def _importable(factory: Callable[..., Any] | None) -> bool:
    # What was defined in a notebook or inside a function is not found again by its name.
    module = getattr(factory, "__module__", "?")
    found: Any = sys.modules.get(module)
    for part in getattr(factory, "__qualname__", "?").split("."):
        found = getattr(found, part, None)
    return factory is None or (found is factory and module != "__main__")


def _unbound(bench: Bench) -> dict[str, Any]:
    raise OptionError("a comparison is of a model and data; call normkit.lab.comparison.compare")


EXPERIMENT = Experiment(
    "compare",
    "compare",
    "A comparison of recipes",
    "Each recipe at its own best learning rate: from the same weights, on the same data in the same order.",
    None,
    _unbound,
    tables,
    figures,
    remarks,
    together=True,
    interactive=interactive,
)
