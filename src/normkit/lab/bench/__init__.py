"""``normkit bench``: every cell measured, shown as it comes, and kept; an interrupted run goes on where it was."""

import shlex
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from normkit.core.errors import RecordError
from normkit.engine.library import description
from normkit.lab import record
from normkit.lab.bench.report import brief, draw, replace_section, show
from normkit.lab.bench.speed import cases, changes, measure, summary
from normkit.lab.devices import cores, processor
from normkit.lab.option import check, command
from normkit.lab.record import ANY, OBJECT, TEXT, each, fields
from normkit.lab.say import Terminal, counted, say
from normkit.lab.settings import Speed

QUICK_ROUNDS, ROUNDS = 7, 15
EARLIER = fields(rows=each(OBJECT), date=TEXT)


def bench(speed: Speed) -> dict[str, Any]:
    """Measures the layers' speed, prints a table, and writes speed.json, speed.md and figures.

    Cells found in the folder that were measured alike are not measured again.
    """
    check(speed)
    earlier = None if speed.against is None else record.read_json(speed.against, EARLIER)
    console = Terminal()
    if speed.threads is not None:
        torch.set_num_threads(speed.threads)
    rounds = speed.rounds or (QUICK_ROUNDS if speed.quick else ROUNDS)
    chosen = list(cases(speed.methods, speed.quick))
    path = speed.output / "speed.json"
    how = {
        "machine": f"{processor()}, {cores()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": description(),
        "rounds": rounds,
        "compiled": speed.compile,
    }
    known, when = ({}, "") if speed.overwrite else _known(path, how)
    found = [case for case in chosen if str(case) in known]
    day = when if len(found) == len(chosen) else str(date.today())
    about = {"command": again(speed), "date": day, **how}
    say(console, f"{counted(len(chosen), 'cell')}; records in {speed.output}")
    if found:
        say(console, f"{len(found)} of them measured {when}, printed again; --overwrite measures them again")
    with console.status("") as status:
        for number, case in enumerate(chosen, 1):
            status.update(Text(f"[{number}/{len(chosen)}] {case}"))
            if str(case) not in known:
                known[str(case)] = measure(case, rounds, speed.compile) | {"case": str(case)}
            # What was measured before stays, whether or not it is asked for now.
            rows = list(known.values())
            record.write_json(path, {**about, "summary": summary(rows), "rows": rows})
    rows = [known[str(case)] for case in chosen]
    result = {**about, "summary": summary(rows), "rows": rows}
    if earlier is not None:
        both, worse, better = changes(rows, earlier["rows"])
        seen = {"file": str(speed.against), "date": earlier["date"]}
        result["against"] = {**seen, "both": both, "worse": worse, "better": better}
    record.write_bytes(speed.output / "speed.md", brief(result).encode())
    if speed.results is not None:
        title = "Layers and torch.compile" if speed.compile else "Layers"
        replace_section(speed.results, title, brief(result))
        beside = speed.results.with_stem(f"{speed.results.stem}-compile") if speed.compile else speed.results
        record.write_json(beside.with_suffix(".json"), result)
    show(result, console)
    for written in [path, speed.output / "speed.md", *draw(result, speed.output / "figures")]:
        say(console, f"written  {written}")
    return result


def again(speed: Speed) -> str:
    """Writes the command line that measures this.

    >>> again(Speed(quick=True, methods=("layer_norm",)))
    'normkit bench --methods layer_norm --quick'
    """
    return shlex.join(command("normkit", "bench", of=(speed,)))


def _known(path: Path, how: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
    """The cells that were measured before in the same way, and when."""
    if not path.exists():
        return {}, ""
    found = record.read_json(path, fields(rows=each(OBJECT), date=TEXT, **dict.fromkeys(how, ANY)))
    for key, value in how.items():
        if found[key] != value:
            raise RecordError(
                f"{path} holds cells measured otherwise: {key} is {found[key]} there, {value} now; choose another --output, or "
                "--overwrite to replace them"
            )
    return {row["case"]: row for row in found["rows"]}, found["date"]
