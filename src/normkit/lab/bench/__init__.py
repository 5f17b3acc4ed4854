"""``normkit bench``: every cell measured, shown as it comes, and kept; an interrupted run goes on where it was."""

import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from normkit.engine.library import description
from normkit.lab import record
from normkit.lab.bench.report import COLUMNS, cells, draw, markdown, replace_section
from normkit.lab.bench.speed import cases, measure, summary
from normkit.lab.devices import cores, processor
from normkit.lab.say import counted, say
from normkit.lab.schema import ANY, OBJECT, TEXT, each, fields

QUICK_ROUNDS, ROUNDS = 5, 15


def bench(
    output: Path,
    methods: Sequence[str] = (),
    *,
    quick: bool = False,
    compiled: bool = False,
    rounds: int | None = None,
    threads: int | None = None,
    results: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measures the layers' speed.

    Args:
        output: folder for speed.json, speed.md and figures; cells found there that were measured alike are not measured again.
        methods: which; default all.
        quick: one shape, float32, few rounds: about a minute.
        compiled: whether torch.compile of the peer runs too, which takes its time to compile.
        rounds: samples of each variant. Default: 15, or 5 if quick.
        threads: of torch. Default: as it is.
        results: a Markdown file whose section "Layers" is replaced.
        overwrite: measure again what is found there. Default: False.

    Returns:
        What speed.json holds.

    Raises:
        OptionError: a method that can't be measured.
    """
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    chosen = list(cases(methods, quick))
    path = output / "speed.json"
    how = {
        "machine": f"{processor()}, {cores()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": description(),
        "rounds": rounds,
        "compiled": compiled,
    }
    known, when = ({}, "") if overwrite else _known(path, how)
    again = [case for case in chosen if str(case) in known]
    day = when if len(again) == len(chosen) else str(date.today())
    options = ["--quick"] * quick + ["--compile"] * compiled
    options += ["--methods", ",".join(methods)] * bool(methods) + ["--threads", str(threads)] * (threads is not None)
    options += ["--rounds", str(rounds)] * (rounds != (QUICK_ROUNDS if quick else ROUNDS))
    command = shlex.join(["normkit", "bench", *options])
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    say(console, f"{counted(len(chosen), 'cell')}; a ratio is a peer's time over normkit's: above 1, normkit is faster")
    if again:
        say(console, f"{len(again)} of them measured {when}, printed again; --overwrite measures them again")
    for number, case in enumerate(chosen, 1):
        row = known.get(str(case)) or measure(case, rounds, compiled) | {"case": str(case)}
        rows.append(row)
        line = dict(zip(COLUMNS, cells(row), strict=True))
        say(
            console,
            f"[{number}/{len(chosen)}] {case}: {line['ms']} ms, eager {line['eager'] or 'has none'}"
            + (f", compile {line['compile']}" if line["compile"] else "")
            + f", {line['of roofline']} of the roofline",
        )
        result = {"command": command, "date": day, **how, "summary": summary(rows), "rows": rows}
        record.write_json(path, result)
    text = markdown(result)
    record.write_bytes(output / "speed.md", text.encode())
    if results is not None:
        replace_section(results, "Layers", text)
    paths = [path, output / "speed.md", *draw(result, output / "figures")]
    for row in result["summary"]:
        say(
            console,
            f"{row['direction']} against {row['peer']}: {counted(row['cells'], 'cell')}, geometric mean "
            f"{row['geometric_mean']:.2f}, worst {row['worst']:.2f} ({row['worst_case']}), below 0.95: {row['below']}",
        )
    say(console, f"results: {', '.join(map(str, paths))}")
    return result


def _known(path: Path, how: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
    """The cells that were measured before in the same way, and when."""
    if not path.exists():
        return {}, ""
    found = record.read_json(path, fields(rows=each(OBJECT), date=TEXT, **dict.fromkeys(how, ANY)))
    if any(found[key] != value for key, value in how.items()):
        return {}, ""
    return {row["case"]: row for row in found["rows"]}, found["date"]
