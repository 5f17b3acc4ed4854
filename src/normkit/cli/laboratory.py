"""What the laboratory does: compare, reproduce, claim, theory, demo, report, bench, and info on the machine that does it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from normkit.cli.command import StoppedError, app, command
from normkit.lab.settings import UNSAID, Place, Reports, Settings, Site, Size, Speed

NAME = typer.Argument(metavar="NAME", help="of the experiment; without it they are listed", show_default=False)


@contextmanager
def going_on(said: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Says what is kept and how to go on, where the work is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        kept, again = said()
        raise StoppedError(f"{kept}\nto go on:  {again}") from None


@command(app, "compare", Settings, Site, Reports)
def compare(settings: Settings, site: Site, reports: Reports) -> None:
    """Compares recipes of normalization on a model and data.

    Each recipe tries the learning rates with the first seed, then trains with every seed at its best rate. All start
    from the same weights and see the same data in the same order. The end is a table, report.html, figures and the
    records.

    Without options: a small Inception network on handwritten digits, with bn, bn+ws (weight standardization), bn+wn
    (weight norm) and bn+e (weight conditioning), in about two minutes on two cores.

    Stop it at any time: the same command goes on where it was.

    Such as:
    normkit compare --recipes bn,gn:2,ln --seeds 5
    normkit compare --model mine.models:make --data mine.data:load --epochs 30
    """
    from normkit.lab import comparison as lab
    from normkit.lab.devices import part

    site = site if site.output != UNSAID else replace(site, output=lab.default_output(settings))
    how = {"threads": site.threads, "ray": site.ray, "tensorboard": site.tensorboard, "data_root": site.data_root}
    with going_on(lambda: (lab.kept(site.output), lab.command(settings, site, reports))):
        lab.compare(settings, site.output, overwrite=reports.overwrite, report=reports.report, **how)
        part()


STOP = """Stop it at any time: the same command goes on where it was. Several such commands with one output share the runs.

"""
KINDS = {
    "reproduce": f"""Reproduces a table or figure of a paper, next to its numbers.

{STOP}Such as:
normkit reproduce table1 --data-root data --scale small""",
    "claim": f"""Puts a claim of the literature to the test.

{STOP}Such as:
normkit claim batch-size --data-root data --scale small""",
    "theory": """Measures what theorems on conditioning predict, and where they fail.

Such as:
normkit theory van-der-sluis""",
    "demo": """Demonstrates what normalization does, by a table, a figure or an animation.

Such as:
normkit demo learning-rate""",
}


def _declare(kind: str, about: str) -> None:
    def run(size: Size, place: Place, reports: Reports, name: Annotated[str | None, NAME] = None) -> None:
        _experiment(kind, name, size, place, reports)

    run.__doc__ = about
    command(app, kind, Size, Place, Reports)(run)


for kind, about in KINDS.items():
    _declare(kind, about)


def _experiment(kind: str, name: str | None, size: Size, place: Place, reports: Reports) -> None:
    from normkit.lab.experiment import Bench
    from normkit.lab.experiments import find_experiment, names
    from normkit.lab.perform import command, default_output, kept, perform

    if name is None:
        width = max(map(len, names(kind))) + 2
        for known in names(kind):
            typer.echo(f"{known:<{width}}{find_experiment(kind, known).title}")
        return
    experiment = find_experiment(kind, name)
    place = place if place.output != UNSAID else replace(place, output=default_output(experiment, size.scale))
    bench = Bench(**vars(size), **vars(place))
    again = command(experiment, bench, reports)
    with going_on(lambda: (kept(bench.output), again)):
        perform(experiment, bench, overwrite=reports.overwrite, report=reports.report, command=again)


@command(app, "report")
def report(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a finished comparison or experiment")],
) -> None:
    """Redraws tables, figures and report.html from the records."""
    from normkit.lab.experiments import reshow
    from normkit.lab.option import at_home

    reshow(at_home(str(output)))


@command(app, "bench", Speed)
def bench(speed: Speed) -> None:
    """Compares the layers' speed with torch's own.

    Writes speed.json, speed.md and figures. Stop it at any time: the same command goes on where it was.
    """
    from normkit.lab.bench import again, bench

    with going_on(lambda: (f"kept in {speed.output}: what was measured", again(speed))):
        bench(speed)


@command(app, "info")
def info() -> None:
    """Says what runs here: versions, device, threads, back ends."""
    import torch

    from normkit.engine.dispatch import backends
    from normkit.engine.library import description
    from normkit.lab.devices import cores, processor, versions

    for key, value in versions().items():
        typer.echo(f"{key:<18}{value or 'not installed'}")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    typer.echo(f"{'processor':<18}{processor()}\n{'cores':<18}{cores()}\n{'threads':<18}{torch.get_num_threads()}")
    typer.echo(f"{'device':<18}{cuda or 'cpu'}")
    for name, reason in backends().items():
        where = f"runs here: {description()}" if name == "native" else "runs here"
        typer.echo(f"{'back end':<18}{name:<12}{where if reason is None else f'does not run here: {reason}'}")
