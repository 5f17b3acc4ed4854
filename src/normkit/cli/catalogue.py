"""What the catalogue says: list, show, draw and cite."""

from pathlib import Path
from typing import Annotated

import typer

from normkit.cli.command import app, command
from normkit.core.errors import NotationError
from normkit.lab.say import visible


@command(app, "list")
def list_methods(
    of: Annotated[str | None, typer.Option(metavar="KIND", help="input, activation, weight or gradient")] = None,
    batch_dependent: Annotated[
        bool | None, typer.Option("--batch-dependent/--batch-independent", help="a sample depends on the others")
    ] = None,
    running: Annotated[bool | None, typer.Option("--running/--no-running", help="it keeps running statistics")] = None,
    foldable: Annotated[
        bool | None, typer.Option("--foldable/--not-foldable", help="it can be baked into the weights")
    ] = None,
) -> None:
    """Lists the methods, each with its word in recipes."""
    from rich.console import Console

    from normkit.catalogue.page import list_table

    list_table(Console(), of, batch_dependent=batch_dependent, running_state=running, foldable=foldable)


@command(app, "show")
def show(name: Annotated[str, typer.Argument(metavar="METHOD", help="as in the list, such as group_norm")]) -> None:
    """Shows one method: formula, support set, paper, uses."""
    from rich.console import Console

    from normkit.catalogue.page import show_page

    show_page(name, Console())


@command(app, "draw")
def draw(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="METHOD", help="methods, or slides; default: all that have a support set"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="where to")] = Path("figures"),
    ending: Annotated[str, typer.Option("--format", metavar="svg|png|pdf", help="of the files")] = "svg",
    together: Annotated[bool, typer.Option("--together", help="all in one picture, support-sets")] = False,
) -> None:
    """Draws the support sets of methods, for papers and slides."""
    from normkit.catalogue.drawing import draw_methods

    for path in draw_methods(names or [], output, ending, together=together):
        typer.echo(visible(str(path)))


@command(app, "cite")
def cite(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="methods, or package.module:factory of a model")],
) -> None:
    """Prints BibTeX of methods, or of every norm found in a model."""
    from normkit.catalogue.entry import entry

    for name in names:
        try:
            typer.echo(entry(name).bibtex)
        except NotationError:
            from normkit.catalogue.citation import cite as cite_model
            from normkit.lab.protocol import MODELS, load_factory, make_model

            if ":" not in name and name not in MODELS:
                raise
            typer.echo(cite_model(make_model(load_factory(name, MODELS), name, None)))
