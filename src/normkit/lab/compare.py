"""The comparison: a sweep of learning rates for each recipe, the chosen rate over all seeds, costs, and the result."""

import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from normkit.core.errors import OptionError, RecordError
from normkit.lab import folder as folders
from normkit.lab import record
from normkit.lab import result as summary
from normkit.lab.cluster import joined
from normkit.lab.data.root import set_root
from normkit.lab.devices import device_name, environment
from normkit.lab.remote import Distant, Here, There, describe
from normkit.lab.say import Terminal, counted, say
from normkit.lab.seeding import borrowed_randomness
from normkit.lab.session import BEGUN, CONFIG, CURE, ENVIRONMENT, RESULT, Session, now
from normkit.lab.settings import Settings
from normkit.lab.stop import stoppable
from normkit.lab.study import Study
from normkit.lab.train.fabric import start_fabric
from normkit.lab.train.trainer import Run

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
    """Compares recipes on a model and data, and writes a folder of records.

    Each recipe tries every rate with the first seed; its rate is the one with the best validation score at the end. At
    that rate it trains with every seed. All recipes start from the same weights and see the same data in the same
    order. The test split is looked at once a run, when its training is over, and chooses nothing. A stopped comparison
    goes on where it was when it is started again with the same settings and folder; a finished one is read back.

    Args:
        settings: what to train and how.
        output: the folder of the records. Default: None, ``runs/<data>-<model>``.
        overwrite: replace the records in the folder. Default: False.
        report: draw figures and ``report.html`` as well. Default: True.
        threads: of torch on the CPU. Default: None, as many as the record was begun with, else one for a model of fewer than
            100,000 parameters and torch's own number for larger ones.
        console: where progress and the table go. Default: None, standard output.
        model: a model factory in place of the one that `settings` names. Default: None.
        data: a data factory in place of the one that `settings` names. Default: None.
        ray: None to train in this process; ``"local"`` for a Ray cluster on this machine, else the address of one, whose
            machines all see `output`. Threads are then one a run, if not said. Default: None.
        tensorboard: write curves for TensorBoard into ``OUT/tensorboard``. Default: False.
        data_root: where data sets lie; the environment variable ``NORMKIT_DATA`` is set to it. Default: None, as it is set.

    Returns:
        What ``result.json`` holds.

    Raises:
        OptionError: Ray or TensorBoard is asked for and is not there.
        ProtocolError: the model or data breaks the protocol.
        RecordError: the folder holds something else, is damaged, in use or not writable.
    """
    set_root(data_root)
    settings = replace(settings, model=_named(model, settings.model), data=_named(data, settings.data)).canonical()
    folder = Path(output) if output is not None else default_output(settings)
    fabric = start_fabric(settings)
    console = console or Terminal()
    if not fabric.is_global_zero:
        console = Console(quiet=True)
    with ExitStack() as stack:
        stack.enter_context(stoppable())
        cluster = None
        if ray is not None:
            if fabric.world_size > 1:
                raise OptionError("--ray does not go with torchrun; wanted one of them")
            threads = threads or _begun_with(folder, overwrite) or 1
            cluster = stack.enter_context(joined(ray, threads))
        began = now()
        device, here = device_name(fabric), None
        distant = Distant(settings, folder.absolute(), threads or 1, model, data, tensorboard, overwrite)
        if cluster is not None:
            device, here = cluster.call(describe, distant, began)
        config = settings.record(device)
        if fabric.is_global_zero:
            folders.check_ours(folder)
            if not overwrite and (folder / CONFIG).exists() and not (folder / folders.REPLACING).exists():
                record.check_config(folder / CONFIG, config, CURE)
        with borrowed_randomness(threads):
            curves = folder / "tensorboard" if tensorboard else None
            trained_on = None if cluster is None else device
            study = Study(settings, fabric, folder, model, data, curves, trained_on, overwrite)
            result = _read_back(study, config) if fabric.is_global_zero and not overwrite else None
            if fabric.world_size > 1:
                result = fabric.broadcast(result)
            finished = result is not None
            if result is None:
                with folders.locked(folder) if fabric.is_global_zero else nullcontext():
                    if fabric.is_global_zero:
                        folders.replace(folder, config, overwrite)
                        if threads is None:
                            _set_threads(folder, max(study.parameters.values()), overwrite)
                    trains = Here(study) if cluster is None else There(study, cluster, distant)
                    here = here or environment(fabric, began)
                    again = command(settings, folder, data_root)
                    result = Session(study, trains, folder, config, here, console, again).result()
    if fabric.is_global_zero:
        if finished:
            say(console, f"{folder} holds this comparison, finished {result['finished']}")
        _show(result, folder, report, console, finished)
    return result


def default_output(settings: Settings) -> Path:
    """Names the folder of a comparison after its data and model.

    >>> default_output(Settings()).as_posix()
    'runs/digits-inception'
    """
    names = [re.sub(r"[^\w.-]+", ".", name).strip(".") for name in (settings.data, settings.model)]
    return Path("runs") / "-".join(names)


def command(settings: Settings, output: Path, data_root: Path | None = None) -> str:
    """Writes the command line that makes this comparison.

    >>> command(Settings(seeds=(0, 1)), Path("runs/digits-inception"))
    'normkit compare --seeds 2'
    """
    words = ["normkit", "compare"]
    plain = Settings()
    for name in settings.__dataclass_fields__:
        value = getattr(settings, name)
        default = Settings(optimizer=settings.optimizer).rates if name == "rates" else getattr(plain, name)
        if value == default:
            continue
        if isinstance(value, bool):
            words.append("--no-condition" if name == "condition" else f"--{name.replace('_', '-')}")
            continue
        if name == "seeds" and value == tuple(range(len(value))):
            value = len(value)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    if output != default_output(settings):
        words += ["--output", str(output)]
    if data_root is not None:
        words += ["--data-root", str(data_root)]
    return shlex.join(words)


def kept(folder: Path) -> str:
    """Says what a stopped comparison has kept."""
    done = len(list(folder.glob("runs/*/*/*/result.json")))
    begun = len(list(folder.glob("runs/*/*/*/checkpoint.pt")))
    also = f" and {begun} begun, up to its last whole epoch" if begun else ""
    return f"kept in {folder}: {counted(done, 'finished run')}{also}"


def _read_back(study: Study, config: dict[str, Any]) -> dict[str, Any] | None:
    """Reads a result whose runs are all there, of these data and this code; None where there is work left."""
    folder = study.folder
    if (folder / folders.REPLACING).exists() or not all((folder / name).exists() for name in (CONFIG, RESULT)):
        return None
    result = record.read_json(folder / RESULT, summary.RESULT)
    if result["config"] != config:
        raise RecordError(f"{folder / RESULT} is of another configuration than {folder / CONFIG}; {CURE}")
    for recipe in result["recipes"]:
        for row, rate in [(row, row["rate"]) for row in recipe["sweep"]] + [
            (row, recipe["rate"]) for row in recipe["runs"]
        ]:
            run = Run(recipe["recipe"], rate, row["seed"])
            if not (folder / run.path).is_dir() or study.kept(run) is None:
                return None
    return result


def _set_threads(folder: Path, parameters: int, overwrite: bool) -> None:
    # Sums depend on how many threads share them, so a comparison goes on with as many as it was begun with.
    if begun := _begun_with(folder, overwrite):
        torch.set_num_threads(begun)
    elif parameters < FEW_PARAMETERS:
        torch.set_num_threads(1)


def _begun_with(folder: Path, overwrite: bool) -> int | None:
    replaces = overwrite and not (folder / folders.REPLACING).exists()
    if replaces or not (folder / ENVIRONMENT).exists():
        return None
    return record.read_json(folder / ENVIRONMENT, BEGUN)["threads"]


def rebuild(folder: Path, console: Console) -> None:
    """Redraws the figures and the page of a finished comparison from its records.

    Raises:
        RecordError: the folder holds no finished comparison, is damaged or not writable.
    """
    from normkit.lab.report.account import write_page
    from normkit.lab.report.figures import draw

    figures = draw(folder)
    page = write_page(folder)
    say(console, f"report   {page}\nfigures  {figures[0].parent}")


def reprint(folder: Path, console: Console | None = None) -> None:
    """Prints the table of a finished comparison and redraws its report.

    Raises:
        RecordError: the folder holds no finished comparison, is damaged or not writable.
    """
    from normkit.lab.report.comparison import read_comparison

    _show(read_comparison(folder).result, folder, True, console or Terminal())


def _show(result: dict[str, Any], folder: Path, report: bool, console: Console, finished: bool = False) -> None:
    from normkit.lab.report.table import print_result

    print_result(result, console)
    say(console, f"\nresult   {folder / RESULT}")
    if report and finished and not record.writable(folder):
        say(console, f"no report is written: {folder} is only read")
    elif report:
        rebuild(folder, console)


def _named(factory: Callable[..., Any] | None, name: str) -> str:
    if factory is None:
        return name
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', type(factory).__name__)}"
