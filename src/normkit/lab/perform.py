"""Performing an experiment: folder, resume, record and reports."""

import os
import platform
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from normkit.core.errors import OptionError, RecordError
from normkit.lab import folder, option, record
from normkit.lab.cluster import joined
from normkit.lab.data.root import set_root
from normkit.lab.devices import cores, hardware, processor, versions
from normkit.lab.experiment import Bench, Experiment
from normkit.lab.folder import CONFIG, ENVIRONMENT, FIGURES, RESULT, TIMING
from normkit.lab.progress import stoppable
from normkit.lab.record import COUNT, NUMBER, OBJECT, TEXT, each, fields, maybe, one_of, optional, version
from normkit.lab.say import counted, say

SCHEMA = 1
ABOUT = fields(name=TEXT, kind=one_of("reproduce", "claim", "theory", "demo", "compare"), title=TEXT)
BEGUN = fields(scale=optional(TEXT), seeds=each(COUNT, least=1), epochs=maybe(COUNT), threads=COUNT)
BUILT = fields(torch=TEXT, started=TEXT)
# What a record of an experiment holds; its result is checked by its hash.
FOUND = version(
    SCHEMA,
    fields(
        experiment=ABOUT,
        command=TEXT,
        config=BEGUN,
        environment=fields(
            torch=TEXT, devices=optional(each(TEXT)), device=optional(TEXT), processor=TEXT, cores=COUNT
        ),
        result=OBJECT,
        sha256=optional(TEXT),
        started=TEXT,
        finished=TEXT,
        seconds=NUMBER,
    ),
)
COARSE = 50  # dots per inch of what nobody looks at
CURE = "choose another --output, or --overwrite to replace them"


def perform(
    experiment: Experiment, bench: Bench, *, overwrite: bool = False, report: bool = True, command: str = ""
) -> dict[str, Any]:
    """Runs or resumes an experiment, and writes its records and reports into ``bench.output``."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not experiment.together:
        raise OptionError("an experiment's runs are of one process each, so it does not go with torchrun; use --ray")
    if bench.scale not in experiment.scales:
        raise OptionError(f"scale is {bench.scale!r}; wanted {' or '.join(experiment.scales)} for {experiment.name}")
    set_root(bench.data_root)
    config, share = configuration(experiment, bench), bench.group.share
    share(lambda: folder.check_ours(bench.output))
    found = None if overwrite else share(lambda: _read_back(experiment, bench, config))
    finished = found is not None
    if found is None:
        here = share(lambda: _begin(experiment, bench, config, overwrite))
        bench.replaces = bench.replaces or overwrite
        # A cluster is joined once for all of the experiment's sweeps.
        with stoppable(), joined(bench.ray, bench.threads) if bench.ray is not None else nullcontext():
            result = experiment.run(bench)
        found = share(lambda: _finish(experiment, bench, config, here, result, command))
    else:
        bench.watch(f"{bench.output} holds this experiment, finished {found['finished']}")
    share(lambda: show(experiment, found, bench.output, bench.console, report, kept=finished))
    return found


def configuration(experiment: Experiment, bench: Bench) -> dict[str, Any]:
    """What an experiment records of how it is run: records of another configuration are not gone on with."""
    size = {"scale": bench.scale, "epochs": bench.epochs} if experiment.settings is None else experiment.settings
    return {"experiment": experiment.name, **size, "threads": bench.threads, "seeds": list(bench.seeds)}


def show(
    experiment: Experiment,
    found: Mapping[str, Any],
    output: Path,
    console: Console,
    report: bool = True,
    kept: bool = False,
) -> None:
    """Prints the tables and remarks of a result, writes ``result.md`` and, if asked for, figures and ``report.html``."""
    # A record that was kept is read back, and may lie on a disk that is only read: then nothing is written.
    from normkit.lab.report.drawing import save
    from normkit.lab.report.sheet import print_sheet, write_markdown, write_sheet

    try:
        print_sheet(experiment, found, console)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if "sha256" in found:
            raise
        # A record from before results were hashed; what it holds is not what this experiment writes.
        raise RecordError(
            f"{output / RESULT} is damaged ({type(error).__name__}: {error}); remove it and give the same command: finished "
            "runs are kept"
        ) from error
    if kept and not record.writable(output):
        say(console, f"\nresult   {output / RESULT}\nno report is written: {output} is only read")
        return
    figures = experiment.figures(found["result"]) if report else []
    save(figures, output / FIGURES, COARSE if found["config"].get("scale") == "tiny" else None)
    lines = [f"result   {output / RESULT}", f"table    {write_markdown(experiment, found, figures, output)}"]
    if report:
        lines += [f"report   {write_sheet(experiment, found, figures, output)}", f"figures  {output / FIGURES}"]
    say(console, "\n" + "\n".join(lines))


def command(experiment: Experiment, bench: Bench, *more: Any) -> str:
    """Writes the command line that makes this record."""
    rest = default_output(experiment, bench.scale)
    return shlex.join(option.command("normkit", experiment.kind, experiment.name, of=(bench, *more), output=rest))


def default_output(experiment: Experiment, scale: str) -> Path:
    """Names the folder of an experiment after it and its scale."""
    return Path("runs") / f"{experiment.name}-{scale}"


def kept(output: Path) -> str:
    """Says what a stopped experiment has kept."""
    done = sum((path.parent / TIMING).exists() for path in output.glob(f"runs/**/{RESULT}"))
    return f"kept in {output}: {counted(done, 'finished run')}, and checkpoints of those begun"


def check(experiment: Experiment, bench: Bench) -> None:
    """Refuses a folder of something else, or of another configuration; writes nothing."""
    folder.check_ours(bench.output)
    path = bench.output / CONFIG
    if path.exists() and not (bench.output / folder.REPLACING).exists():
        wanted = _over(experiment, configuration(experiment, bench), record.read_json(path))
        record.check_config(path, wanted, CURE)


def _over(experiment: Experiment, config: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    # More seeds, as all that is free, are more runs next to those that are there; anything else would make the runs unlike.
    kept = {key: there[key] for key in experiment.free if key in there}
    return {**{key: value for key, value in config.items() if key not in experiment.free}, **kept}


def _begin(experiment: Experiment, bench: Bench, config: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    output = bench.output
    with folder.waited_for(output):
        folder.replace(output, config, overwrite)
        if (output / CONFIG).exists():
            there = record.read_json(output / CONFIG)
            wanted = _over(experiment, config, there)
            if there != wanted and not _begun(output):
                folder.empty(output)
            record.check_config(output / CONFIG, wanted, CURE)
        here: dict[str, Any] = {
            **versions(),
            "platform": platform.platform(),
            "processor": processor(),
            "cores": cores(),
            "threads": bench.threads,
            "started": _now(),
        }
        if (output / ENVIRONMENT).exists():
            there = record.read_json(output / ENVIRONMENT, BUILT)
            if there["torch"] != here["torch"]:
                unlike = f"torch {there['torch']}, now it is {here['torch']}: the runs would not be alike"
                raise RecordError(f"{output} was begun with {unlike}; {CURE}")
            here = {**here, "started": there["started"]}
        record.write_json(output / CONFIG, config)
        record.write_json(output / ENVIRONMENT, here)
    return here


def _finish(
    experiment: Experiment,
    bench: Bench,
    config: Mapping[str, Any],
    here: Mapping[str, Any],
    result: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    about = {key: getattr(experiment, key) for key in ("name", "kind", "title", "claim")}
    path = bench.output / RESULT
    found = {
        "schema": SCHEMA,
        "experiment": {**about, "paper": experiment.paper and asdict(experiment.paper)},
        "command": command,
        "config": config,
        "environment": {**here, "devices": sorted(bench.devices) or [hardware()]},
        "result": result,
        "sha256": record.digest(result),
        "started": here["started"],
        "finished": _now(),
        "seconds": round(bench.seconds, 3),
    }
    with folder.waited_for(bench.output):
        record.write_json(path, found)
        # The records are whole: replacing them would begin from nothing.
        folder.remove(bench.output / folder.REPLACING)
    return record.read_json(path)


def _begun(output: Path) -> bool:
    # A run that failed before its first checkpoint leaves no more than what it was and how long it took.
    failed = {folder.LOCK, CONFIG, TIMING}
    files = (path for path in output.glob("runs/**/*") if path.is_file())
    return (output / RESULT).exists() or any(path.name not in failed for path in files)


def _read_back(experiment: Experiment, bench: Bench, config: Mapping[str, Any]) -> dict[str, Any] | None:
    output = bench.output
    if (output / folder.REPLACING).exists() or not (output / RESULT).exists():
        return None
    check(experiment, bench)
    found = record.read_json(output / RESULT, FOUND)
    return found if found["config"] == config and experiment.whole(bench, found["result"]) else None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
