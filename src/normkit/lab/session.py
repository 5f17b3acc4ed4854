"""One session of a comparison: its remaining runs, its costs and its result."""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from normkit.core.errors import RecordError
from normkit.lab import folder as folders
from normkit.lab import record
from normkit.lab import result as summary
from normkit.lab.progress import Watch
from normkit.lab.remote import Here, There
from normkit.lab.result import COST as COSTS
from normkit.lab.result import SCHEMA, Records, choose, find_target, summarize
from normkit.lab.say import counted
from normkit.lab.schema import COUNT, NUMBER, TEXT, each, fields
from normkit.lab.settings import Settings
from normkit.lab.study import Study
from normkit.lab.train.trainer import Run

CONFIG, ENVIRONMENT, RESULT, COST, SESSIONS = (
    "config.json",
    "environment.json",
    "result.json",
    "cost.json",
    "sessions.json",
)
SESSION = fields(sessions=each(fields(started=TEXT, seconds=NUMBER)))
BEGUN = fields(torch=TEXT, threads=COUNT, started=TEXT)
CURE = "choose another --output, or --overwrite to replace them"


class Session:
    """One stretch of work on a comparison, from a start to its end or to an interruption."""

    def __init__(
        self,
        study: Study,
        trains: Here | There,
        folder: Path,
        config: dict[str, Any],
        here: dict[str, Any],
        console: Console,
        again: str,
    ) -> None:
        self.study, self.trains, self.folder, self.config, self.console = study, trains, folder, config, console
        self.here, self.again = here, again
        self.settings, self.fabric = study.settings, study.fabric
        self.records = Records(folder)
        self.began, self.started = time.monotonic(), now()
        self.earlier: list[dict[str, Any]] = []
        if self.fabric.is_global_zero:
            self._open()
        self.fabric.barrier()

    def result(self) -> dict[str, Any]:
        """Does what is left to do and writes the result."""
        settings = self.settings
        seeds, rates = settings.seeds, settings.rates
        count = len(settings.recipes) * (len(rates) + len(seeds) - 1)
        runs: dict[str, list[Run]] = {}
        with Watch(self.console, count, settings.epochs) as watch:
            watch.say(_plan(settings, self.folder))
            sweeps = {recipe: [Run(recipe, rate, seeds[0]) for rate in rates] for recipe in settings.recipes}
            if self.trains.side_by_side:
                self._train([run for sweep in sweeps.values() for run in sweep], watch)
            for recipe in settings.recipes:
                if not self.trains.side_by_side:
                    self._train(sweeps[recipe], watch)
                chosen = self._choose(sweeps[recipe])
                runs[recipe] = [replace(chosen, seed=seed) for seed in seeds]
                watch.say(f"{recipe}: rate {chosen.rate:g} is the best of {', '.join(f'{rate:g}' for rate in rates)}")
            self._train([runs[recipe][seed] for seed in range(1, len(seeds)) for recipe in settings.recipes], watch)
            costs = self._costs(watch)
        result = self._summary(sweeps, runs, costs) if self.fabric.is_global_zero else {}
        if self.fabric.world_size > 1:
            result = self.fabric.broadcast(result)
        return result

    def _open(self) -> None:
        folder = self.folder
        record.check_config(folder / CONFIG, self.config, CURE)
        here = self.here
        if (folder / ENVIRONMENT).exists():
            there = record.read_json(folder / ENVIRONMENT, BEGUN)
            for key in ("torch", "threads"):
                if there[key] != here[key]:
                    unlike = f"{key} {there[key]}, now it is {here[key]}: the runs would not be alike"
                    raise RecordError(f"{folder} was begun with {unlike}; {CURE}")
        else:
            record.write_json(folder / ENVIRONMENT, here)
        if (folder / SESSIONS).exists():
            self.earlier = record.read_json(folder / SESSIONS, SESSION)["sessions"]

    def _train(self, runs: Sequence[Run], watch: Watch) -> None:
        def trained() -> None:
            if self.fabric.is_global_zero:
                record.write_json(self.folder / SESSIONS, {"sessions": self._sessions()})

        self.trains.train(runs, watch, trained)

    def _sessions(self) -> list[dict[str, Any]]:
        return [*self.earlier, {"started": self.started, "seconds": round(time.monotonic() - self.began, 3)}]

    def _choose(self, sweep: Sequence[Run]) -> Run:
        rate = choose(self.records, sweep).rate if self.fabric.is_global_zero else 0.0
        if self.fabric.world_size > 1:
            rate = self.fabric.broadcast(rate)
        return replace(sweep[0], rate=rate)

    def _costs(self, watch: Watch) -> dict[str, dict[str, Any]]:
        path, costs = self.folder / COST, None
        if self.fabric.is_global_zero and path.exists():
            costs = record.read_json(path, fields(**dict.fromkeys(self.settings.recipes, COSTS)))
        if self.fabric.world_size > 1:
            costs = self.fabric.broadcast(costs)
        if costs is None:
            costs = self.trains.costs(watch)
            if self.fabric.is_global_zero:
                record.write_json(path, costs)
        return costs

    def _summary(
        self, sweeps: dict[str, list[Run]], runs: dict[str, list[Run]], costs: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        settings, data, study = self.settings, self.study.data, self.study
        target = find_target(self.records, chain.from_iterable(runs.values()), settings.target)
        baseline = settings.recipes[0]
        recipes = []
        for recipe in settings.recipes:
            shared = (target["score"], settings.level)
            found = summarize(self.records, recipe, sweeps[recipe], runs[recipe], runs[baseline], *shared)
            known = {"parameters": study.parameters[recipe], "changes": study.changes[recipe]}
            recipes.append({"recipe": recipe, **known, **found, "cost": costs[recipe]})
        where = record.read_json(self.folder / ENVIRONMENT, BEGUN)
        sessions = self._sessions()
        result = {
            "schema": SCHEMA,
            "title": f"{', '.join(settings.recipes)} on {settings.data}",
            "command": self.again,
            "started": where["started"],
            "finished": now(),
            "seconds": round(sum(session["seconds"] for session in sessions), 3),
            "config": self.config,
            "environment": where,
            "task": {
                "kind": data.kind,
                "score": data.score,
                **{name: len(split) for name, split in data.splits.items()},
            },
            "baseline": baseline,
            "target": target,
            "recipes": recipes,
        }
        record.write_json(self.folder / RESULT, result)
        folders.settle(self.folder)
        return record.read_json(self.folder / RESULT, summary.RESULT)


def _plan(settings: Settings, folder: Path) -> str:
    counts = ", ".join(counted(len(getattr(settings, f"{noun}s")), noun) for noun in ("recipe", "rate", "seed"))
    length = f"{counted(settings.epochs, 'epoch')} per run"
    return f"{settings.model} on {settings.data}: {counts}, {length}; records in {folder}"


def now() -> str:
    """The time, in ISO format."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
