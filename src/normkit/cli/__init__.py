"""The command line: ``normkit compare``, ``reproduce``, ``claim``, ``report``, ``list``, ``show``, ``draw``, ``cite``, ..."""

from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("error: the command line needs typer; pip install 'normkit[lab]'") from None

from normkit.cli import laboratory  # isort: skip  # help lists commands in this order
from normkit.cli import diagnostics  # isort: skip
from normkit.cli import catalogue
from normkit.cli.command import app

__all__ = ["app", "catalogue", "diagnostics", "laboratory", "main"]


def _tell_version(asked: bool) -> None:
    if asked:
        from normkit import __version__

        typer.echo(f"normkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


def main() -> None:
    """Runs the command line."""
    app(prog_name="normkit")
