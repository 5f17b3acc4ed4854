"""What an experiment is, and the bench on which it is run: records, resume and reports are the same for all.

An experiment is one file in ``lab/experiments`` that ends with ``EXPERIMENT = Experiment(...)``. Its ``run``
gets a :class:`Bench`, makes jobs and gives them to :meth:`Bench.sweep`; its ``tables``, ``figures`` and ``remarks`` are pure
functions of what ``run`` returned, so that a report can be remade from the records alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from normkit.core.card import Paper
from normkit.lab.option import command
from normkit.lab.say import Terminal, say
from normkit.lab.settings import Place, Scale, Size
from normkit.lab.sweep import Group, Job, spent_on, sweep

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]  # strings and numbers; None for what is not known
    notes: Sequence[str] = ()  # below it, a sentence each


@dataclass(frozen=True)
class Drawing:
    """A figure of a report."""

    name: str  # of its files, without ending
    # draws it, as a figure of matplotlib, or a Motion if it moves
    make: Callable[[], Any]
    caption: str  # below it: what is drawn and how to read it, in plain sentences without markup
    moves: bool = False  # it is written as GIF too; the still is the last frame

    @property
    def file(self) -> str:
        """Name of the file that a page shows."""
        return f"{self.name}.{'gif' if self.moves else 'png'}"

    @property
    def title(self) -> str:
        return self.name.replace("-", " ").replace("_", " ")


@dataclass
class Bench(Place, Size):
    """Where and at what size an experiment is run."""

    console: Console = field(default_factory=Terminal, kw_only=True)  # where progress is written
    # of processes that do each run together, as torchrun starts them
    group: Group = field(default_factory=Group, kw_only=True)
    # do a run again whose record is of other data or code, in place of refusing it
    replaces: bool = field(default=False, kw_only=True, metadata={"option": None})
    # those on which the runs that were swept so far were done, whichever process did them
    devices: set[str] = field(init=False, default_factory=set)
    _spent: dict[str, float] = field(init=False, default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds that the runs took, all together."""
        return sum(self._spent.values())

    def watch(self, text: str) -> None:
        """Says how far the experiment is."""
        say(self.console, text)

    def sweep(self, function: Callable[[Any, Path], Mapping[str, Any]], jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Does the jobs that are not yet done, and gives the results of all in the order of `jobs`.

        ``function(job, folder)`` is of a module, or a method of an object that pickle knows; JSON can hold what it gives. It
        seeds what it draws, and goes on from its own checkpoint in `folder`, ``output/runs/<path>`` of the job. Each process
        of a group calls it, and the first one's result counts.
        """
        how: dict[str, Any] = {"group": self.group, "replaces": self.replaces, "console": self.console}
        results = sweep(function, jobs, self.output, threads=self.threads, ray=self.ray, say=self.watch, **how)
        for job in jobs:
            self._spent[job.path], devices = self.group.share(lambda job=job: spent_on(job, self.output))
            self.devices |= devices
        return results


@dataclass(frozen=True)
class Experiment:
    """An experiment of a source."""

    name: str  # as it is called on the command line, like its file
    # "reproduce" for a table or figure of a paper, "claim" for a sentence, "theory" for theorems,
    # "demo" for a demonstration, "compare" for a comparison
    kind: Literal["reproduce", "claim", "theory", "demo", "compare"]
    title: str
    claim: str  # what the source says, or what is asked, in one sentence
    paper: Paper | None  # the source; None where there is none
    run: Callable[[Bench], dict[str, Any]]  # does what is missing and returns the result, which JSON can hold
    tables: Callable[[dict[str, Any]], list[Table]]  # the source's numbers next to ours, from the result
    figures: Callable[[dict[str, Any]], list[Drawing]]
    remarks: Callable[[dict[str, Any]], list[str]]  # observations on a result in sentences, with oddities of the source
    scales: tuple[Scale, ...] = ("tiny", "small", "full")  # at which it can be run
    settings: Mapping[str, Any] | None = None  # what is recorded of how it is run, in place of scale and epochs
    # what of the configuration can change over the runs that are there: they stay, and the result is made again
    free: tuple[str, ...] = ("seeds",)
    command: Sequence[str] | None = None  # the words that give it again, in place of those of a scale
    # whether all runs of a result are there, of these data and this code
    whole: Callable[[Bench, dict[str, Any]], bool] = lambda bench, result: True
    about: str = ""  # what was run, in paragraphs, in place of the docstring of `run`'s module without its title
    together: bool = False  # processes that torchrun started can do its runs
    # what ``comparison.html`` is given of a result, with charts to point at and to zoom into, in place of ``experiment.html``
    interactive: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def sentence(self) -> str:
        return self.claim if self.paper is None else f"{self.claim} ({self.paper.cite()})"

    def words(self, scale: Any, seeds: Sequence[int], epochs: int | None) -> list[str]:
        """The words of the command line that say what is run, not where."""
        if self.command is not None:
            return list(self.command)
        return command("normkit", self.kind, self.name, of=(Size(scale, seeds=tuple(seeds), epochs=epochs),))
