"""What diagnostics measure on a model: audit."""

from typing import Annotated

import typer

from normkit.cli.command import app, command

NAME = "package.module:factory, or a name as in compare"
MODEL = typer.Argument(metavar="MODEL", help=NAME, show_default=False)
FAIL_ON = typer.Option(metavar="info|warning|error", help="end with code 1 on such a finding or a worse one")


@command(app, "audit")
def audit(
    model: Annotated[str, MODEL],
    data: Annotated[str, typer.Option(metavar="NAME", help=NAME)] = "digits",
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="batch size, as in training")] = 64,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="package.module:factory, called with the model")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    fail_on: Annotated[str, FAIL_ON] = "",
) -> None:
    """Finds normalization mistakes in a model by one forward and backward.

    Prints a table of what was found, with the evidence and the cure. The code it ends with is 0, or 1 by --fail-on.

    Such as:
    normkit audit mine.models:make --data mine.data:load --fail-on warning
    """
    import torch

    from normkit.diagnostics.audit.checks import audit
    from normkit.diagnostics.audit.finding import Audit
    from normkit.lab.protocol import (
        DATA,
        MODELS,
        check_fit,
        load_factory,
        make_data,
        make_model,
        sized,
        suited,
        user_code,
    )
    from normkit.lab.say import visible
    from normkit.lab.task import call, loss

    Audit().at_least(fail_on or "info")  # refuses a word before the work
    read = make_data(load_factory(data, DATA), data)
    made = sized(make_model(load_factory(model, MODELS), model, read.classes), read, model)
    read = suited(read, made, model)
    check_fit(made, read, model)
    batch = read.train.batch(torch.arange(min(samples, len(read.train))), torch.device("cpu"))
    with user_code(f"auditing {model}"):
        steps = load_factory(optimizer, {})(made) if optimizer else None
        found = audit(made, batch, optimizer=steps, loss=lambda y, b: loss(y, b[1]), forward=lambda m, b: call(m, b[0]))
    typer.echo(visible(found.json() if as_json else str(found)))
    if fail_on and found.at_least(fail_on):
        raise typer.Exit(1)
