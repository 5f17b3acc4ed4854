"""A command: a function's own arguments, an option for each field of some dataclasses, and errors in one line of words."""

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from normkit.core.errors import NormkitError, closest
from normkit.lab.option import Option, check, options
from normkit.lab.progress import stoppable
from normkit.lab.say import let_go, theirs, told, visible
from normkit.lab.settings import Site

# What the extra [lab] brings.
LAB = "lightning_fabric lightning numpy PIL rich scipy sklearn skimage trimesh matplotlib plotly jinja2".split()
UsageError: Any = typer.BadParameter.__base__  # typer may carry a click of its own
GENERAL, LEFT = "Options", 26
TRACEBACK = typer.Option("--traceback", help="show all of an error, not its message alone")


class StoppedError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with how to go on."""


def format_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Writes a command's options group by group."""
    panels: dict[str, list[Any]] = {}
    for parameter in command.get_params(ctx):
        if (told := parameter.get_help_record(ctx)) is not None:
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or GENERAL, []).append(told)
    for panel in sorted(panels, key=GENERAL.__eq__):
        with formatter.section(panel):
            formatter.write_dl(panels[panel], col_max=LEFT)


class Group(TyperGroup):
    """All commands; whatever goes wrong in reading the words is said in one line, with what was probably meant."""

    def main(self, args: Sequence[str] | None = None, *given: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Reads the words and runs the command."""
        if not standalone_mode:
            return super().main(args, *given, standalone_mode=False, **more)
        try:
            code = super().main(args, *given, standalone_mode=False, **more)
        except UsageError as error:
            raise SystemExit(_say(self._usage(error))) from None
        except typer.Abort:
            raise SystemExit(130) from None
        except OSError as error:
            # Standard output's errors come from the system and name no file; others are code's own.
            if error.filename is not None or error.errno is None:
                raise
            let_go()
            # Whoever reads a pipe may have enough, as `head` has.
            broken = isinstance(error, BrokenPipeError)
            raise SystemExit(
                1 if broken else _say(f"cannot write to standard output: {error.strerror}; lead it elsewhere")
            ) from None
        raise SystemExit(code)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands, and the options before them."""
        self.format_commands(ctx, formatter)
        format_options(self, ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the options before the command; no words at all ask for help."""
        return super().parse_args(ctx, args or ["--help"])

    def _usage(self, error: Any) -> str:
        context, said = error.ctx, error.format_message()
        path = context.command_path if context else "normkit"
        if hasattr(error, "possibilities"):
            name, known = (
                error.option_name,
                [word for each in context.command.params for word in (*each.opts, *each.secondary_opts)],
            )
            said = f"{path} has no option {name!r}{closest(name, [*known, '--help'])}"
        return f"{said.rstrip('.')}; see {path} --help"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; UsageError suggests a similar name."""
        if not args[0].startswith("-") and args[0] not in self.commands:
            raise UsageError(f"there is no command {args[0]!r}{closest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="normkit",
    cls=Group,
    help="Normalization for PyTorch: every method, and a fair comparison of them on your own model and data.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


class Words(TyperCommand):
    """A command some of whose options may stand without a value, such as ``--ray``."""

    alone = {about.spelling: about.alone for about in options(Site).values() if about.alone}  # noqa: RUF012

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options group by group."""
        format_options(self, ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the values that are meant behind options that stand alone."""
        words: list[str] = []
        for word, after in zip(args, [*args[1:], ""], strict=False):
            words.append(word)
            value = self.alone.get(word)
            if value and not (after in (value, "auto") or (":" in after and not after.startswith("-"))):
                words.append(value)
        try:
            return super().parse_args(ctx, words)
        except UsageError as error:
            error.ctx = error.ctx or ctx
            raise


def command(app: typer.Typer, name: str, *declared: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the command line.

    It is called with an instance of each dataclass ``declared``, made of the options given, and with its other arguments.
    """
    known = options(*declared)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            with faults(values.pop("traceback")):
                given = {key: values.pop(key) for key in known}
                read = {
                    key: text if isinstance(text, bool) else known[key].read(text)
                    for key, text in given.items()
                    if text is not None
                }
                made = [each(**{key: read[key] for key in options(each) if key in read}) for each in declared]
                for each in made:
                    check(each)
                function(*made, **values)

        own = list(inspect.signature(function).parameters.values())[len(declared) :]
        all_of_it = inspect.Parameter("traceback", _KEYWORD, default=False, annotation=Annotated[bool, TRACEBACK])
        parameters = [each.replace(kind=_KEYWORD) for each in own] + [*map(_parameter, known.values()), all_of_it]
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        # Of click's help: lines after a backspace are not filled.
        run.__doc__ = (inspect.getdoc(function) or "").replace("Such as:\n", "\b\nSuch as:\n")
        app.command(name, cls=Words)(run)
        return function

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _parameter(about: Option) -> inspect.Parameter:
    of = bool | None if about.type is bool else str | None
    told = typer.Option(
        *filter(None, (about.spelling, about.short)),
        help=about.help + (f" [default: {about.at_rest}]" if about.at_rest else ""),
        metavar=about.placeholder or None,
        envvar=about.variable,
        rich_help_panel=about.panel,
        show_default=False,
    )
    return inspect.Parameter(about.name, _KEYWORD, default=None, annotation=Annotated[of, told])


@contextmanager
def faults(all_of_it: bool) -> Iterator[None]:
    """Report an error in one line on standard error, or with its traceback, and exit: 2, or 130 when stopped."""
    try:
        with stoppable():
            yield
    except KeyboardInterrupt as error:
        said = str(error) or "give the same command to go on"
        typer.echo(visible(f"\nstopped; {said}"), err=True)
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        said = _fault(error)
        if said is None:
            raise
        if all_of_it:
            typer.echo(visible("".join(traceback.format_exception(error))), err=True)
        raise typer.Exit(_say(said)) from None


def _say(said: str) -> int:
    typer.echo(visible(f"error: {said}"), err=True)
    return 2


def _fault(error: Exception) -> str | None:
    """What to say of an error; nothing where it is a fault of normkit's own."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in LAB:
        return f"{error.name} is not installed; pip install 'normkit[lab]'"
    where = theirs(error)
    if isinstance(error, NormkitError):
        said = str(error)
        return said if not where or where in said else f"{said} (at {where})"
    return f"{told(error)}; --traceback shows all of it" if where else None
