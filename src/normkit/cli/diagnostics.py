"""What diagnostics measure on a model: audit."""

from typing import Annotated

import typer

from normkit.cli.command import app, command

MODEL = typer.Argument(metavar="MODEL", help="package.module:factory, or a name as in compare", show_default=False)
DATA = typer.Option(metavar="DATA", help="package.module:factory, or a name as in compare")


@command(app, "audit")
def audit(
    model: Annotated[str, MODEL],
    data: Annotated[str, DATA] = "digits",
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="batch size, as in training")] = 64,
    optimizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="package.module:factory; is called with the model")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    fail_on: Annotated[
        str | None, typer.Option(metavar="info|warning|error", help="end with code 1 on such a finding or a worse one")
    ] = None,
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

    Audit().at_least(fail_on or "info")  # pyright: ignore[reportArgumentType]  # refuses a word before the work
    read = make_data(load_factory(data, DATA), data)
    made = sized(make_model(load_factory(model, MODELS), model, read.classes), read, model)
    read = suited(read, made, model)
    check_fit(made, read, model)
    train = read.train
    batch = train.batch(torch.arange(min(samples, len(train))), torch.device("cpu"))
    with user_code(f"auditing {model}"):
        steps = load_factory(optimizer, {})(made) if optimizer else None
        found = audit(
            made, batch, optimizer=steps, loss=lambda y, of: loss(y, of[1]), forward=lambda net, of: call(net, of[0])
        )
    typer.echo(visible(found.json() if as_json else str(found)))
    if fail_on and found.at_least(fail_on):  # pyright: ignore[reportArgumentType]
        raise typer.Exit(1)
