"""What diagnostics measure on a model: audit and conditions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normkit.cli.command import app, command

if TYPE_CHECKING:
    from torch import nn

NAME = "package.module:factory, or a name as in compare"
MODEL = typer.Argument(metavar="MODEL", help=NAME, show_default=False)
SOURCE = typer.Option(metavar="NAME", help=NAME)
FAIL_ON = typer.Option(metavar="info|warning|error", help="end with code 1 on such a finding or a worse one")


def loaded(model: str, data: str, samples: int) -> "tuple[nn.Module, Any]":
    """A model of a factory, sized and suited to its data, and a batch of them on the CPU."""
    import torch

    from normkit.lab.protocol import DATA, MODELS, check_fit, load_factory, make_data, make_model, sized, suited

    read = make_data(load_factory(data, DATA), data)
    made = sized(make_model(load_factory(model, MODELS), model, read.classes), read, model)
    read = suited(read, made, model)
    check_fit(made, read, model)
    return made, read.train.batch(torch.arange(min(samples, len(read.train))), torch.device("cpu"))


@contextmanager
def on_digits(default: bool) -> Iterator[None]:
    """Ends an error of a model on the default data with how to name other data."""
    from normkit.core.errors import ProtocolError

    try:
        yield
    except ProtocolError as error:
        if not default:
            raise
        hint = "this is the default data, digits; name yours: --data package.module:factory"
        raise ProtocolError(f"{error}; {hint}") from error


@command(app, "audit")
def audit(
    model: Annotated[str, MODEL],
    data: Annotated[str | None, SOURCE] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="batch size, as in training")] = 64,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="package.module:factory, called with the model")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    fail_on: Annotated[str, FAIL_ON] = "",
) -> None:
    """Finds normalization mistakes in a model by one forward and backward.

    Prints a table of what was found, with the evidence and the cures. The code it ends with is 0, or 1 by --fail-on.
    Without --data the batch is of handwritten digits.

    Such as:
    normkit audit mine.models:make --data mine.data:load --fail-on warning
    """
    from normkit.diagnostics.audit.checks import audit
    from normkit.diagnostics.audit.finding import Audit
    from normkit.lab.protocol import MODELS, load_factory, user_code
    from normkit.lab.say import visible
    from normkit.lab.task import call, loss

    Audit().at_least(fail_on or "info")  # refuses a word before the work
    if data is None:
        typer.echo("audited on digits; --data names other data", err=True)
    load_factory(model, MODELS)  # an error of its name is none of the data
    with on_digits(data is None):
        made, batch = loaded(model, data or "digits", samples)
    with user_code(f"making the optimizer of {model}"):
        steps = load_factory(optimizer, {})(made) if optimizer else None
    with on_digits(data is None), user_code(f"auditing {model}"):
        found = audit(made, batch, optimizer=steps, loss=lambda y, b: loss(y, b[1]), forward=lambda m, b: call(m, b[0]))
    typer.echo(visible(found.json() if as_json else str(found)))
    if fail_on and found.at_least(fail_on):
        raise typer.Exit(1)


@command(app, "conditions")
def conditions(
    model: Annotated[str, MODEL],
    data: Annotated[str | None, SOURCE] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="for conditions.json and a figure")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Reports how every weight of a model is conditioned, and what equilibration changes.

    Singular values, condition number, stable rank and the spread of row and column norms of each weight, and the
    condition number with its rows, its columns or both equilibrated. With --data also those of convolutions as
    operators, on images of that size.

    Such as:
    normkit conditions mine.models:trained --output conditions
    """
    import inspect
    import json

    from normkit.core.errors import OptionError
    from normkit.diagnostics.conditioning import conditions
    from normkit.lab.experiment import Drawing
    from normkit.lab.protocol import MODELS, load_factory, make_model, user_code
    from normkit.lab.record import write_bytes
    from normkit.lab.report.drawing import save
    from normkit.lab.report.terminal import print_table
    from normkit.lab.report.weights import conditions_figure, conditions_table
    from normkit.lab.say import Terminal

    if data is not None:
        made, (example, _) = loaded(model, data, 1)
    else:
        factory, example = load_factory(model, MODELS), None
        classes = inspect.signature(factory).parameters.get("classes")
        if classes is not None and classes.default is classes.empty:
            raise OptionError(f"{model} takes the number of classes; name the data that says it, as in --data digits")
        made = make_model(factory, model, None)
    console = Terminal(stderr=True)
    with user_code(f"measuring {model}"), console.status("") as status:
        found = conditions(
            made, example=example, progress=lambda done, total, name: status.update(f"{done} of {total}: {name}")
        )
    rows = json.dumps([row.json() for row in found], indent=1, allow_nan=False)
    if as_json:
        typer.echo(rows)
    else:
        print_table(conditions_table(f"Conditions of {model}", found), Terminal())
    if output is not None:
        write_bytes(output / "conditions.json", rows.encode())
        for path in save([Drawing("conditions", lambda: conditions_figure({model: found}), "")], output):
            typer.echo(path, err=as_json)
