"""The command line: ``normkit compare``, ``reproduce``, ``claim``, ``report``, ``list``, ``show``, ``draw``, ``cite``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperCommand
except ModuleNotFoundError:
    raise SystemExit("error: the command line needs typer; pip install 'normkit[lab]'") from None

from normkit.core.errors import NormkitError, NotationError, OptionError

app = typer.Typer(
    name="normkit",
    help="Normalization for PyTorch: every method, and a fair comparison of them on your own model and data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

LAB = (
    "lightning_fabric",
    "lightning",
    "numpy",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "skimage",
    "trimesh",
    "matplotlib",
    "plotly",
)
WHAT, HOW, WHERE, RECORDS = "What is compared", "How it is trained", "Where it runs", "Records"


class _Sweeping(TyperCommand):
    """A command whose ``--ray`` may stand alone, for a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        for word, after in zip(args, [*args[1:], ""], strict=False):
            words.append(word)
            if word == "--ray" and not (after in ("local", "auto") or (":" in after and not after.startswith("-"))):
                words.append("local")
        return super().parse_args(ctx, words)


NAME = typer.Argument(help="of the experiment; without it they are listed", show_default=False)
SCALE = typer.Option(help="small (two cores, minutes) or full", rich_help_panel=WHAT)
SEEDS = typer.Option(help="how many; 0 to n - 1", rich_help_panel=WHAT)
EPOCHS = typer.Option(help="in place of the experiment's own number", rich_help_panel=WHAT)
DATA_ROOT = typer.Option(
    envvar="NORMKIT_DATA", help="folder of the data sets, as they were published", rich_help_panel=WHERE
)
DOWNLOAD = typer.Option("--download", help="fetch data that is missing", rich_help_panel=WHERE)
RAY = typer.Option(
    metavar="[ADDRESS]", help="do the runs on a Ray cluster; alone: on one started here", rich_help_panel=WHERE
)
THREADS = typer.Option(help="of torch on the CPU, per run", rich_help_panel=WHERE)
FOLDER = typer.Option("--output", "-o", help="folder; default: runs/<name>-<scale>", rich_help_panel=RECORDS)
OVERWRITE = typer.Option("--overwrite", help="replace the records there", rich_help_panel=RECORDS)
NO_REPORT = typer.Option("--no-report", help="no figures, no report.html", rich_help_panel=RECORDS)


def _tell_version(asked: bool) -> None:
    if asked:
        from normkit import __version__

        typer.echo(f"normkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


@app.command(cls=_Sweeping)
def compare(
    model: Annotated[
        str,
        typer.Option(
            help="inception, inception8, densenet, googlenet, resnet18, resnet50, vit_tiny, vit_s, vit_b16, dit, or "
            "package.module:factory",
            rich_help_panel=WHAT,
        ),
    ] = "inception",
    data: Annotated[
        str,
        typer.Option(help="digits, cifar10, cifar100, imagefolder, or package.module:factory", rich_help_panel=WHAT),
    ] = "digits",
    recipes: Annotated[
        str, typer.Option(help="separated by commas; the first is the baseline", rich_help_panel=WHAT)
    ] = "bn,bn+ws,bn+wn,bn+e",
    seeds: Annotated[int, typer.Option(help="how many; 0 to n - 1", rich_help_panel=WHAT)] = 3,
    rates: Annotated[
        str | None,
        typer.Option(help="learning rates, separated by commas; default: four for the optimizer", rich_help_panel=WHAT),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="validation score whose time is taken; default: the highest all reach", rich_help_panel=WHAT),
    ] = None,
    level: Annotated[float, typer.Option(help="coverage of the intervals", rich_help_panel=WHAT)] = 0.95,
    condition: Annotated[
        bool, typer.Option("--condition/--no-condition", help="condition numbers of the weights", rich_help_panel=WHAT)
    ] = True,
    epochs: Annotated[int, typer.Option(help="passes over the training data", rich_help_panel=HOW)] = 12,
    batch_size: Annotated[int, typer.Option(help="samples per step, over all processes", rich_help_panel=HOW)] = 64,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw", rich_help_panel=HOW)] = "sgd",
    momentum: Annotated[float, typer.Option(help="of sgd", rich_help_panel=HOW)] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="of the optimizer", rich_help_panel=HOW)] = 1e-4,
    schedule: Annotated[
        str, typer.Option(help="cosine (down to 0), constant or step (tenths)", rich_help_panel=HOW)
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="epochs over which the rate rises", rich_help_panel=HOW)] = 0.0,
    accumulate: Annotated[int, typer.Option(help="parts that a batch is run in", rich_help_panel=HOW)] = 1,
    clip: Annotated[
        float | None, typer.Option(help="greatest length of the gradient; default: any", rich_help_panel=HOW)
    ] = None,
    ema: Annotated[float, typer.Option(help="decay of the average of the weights; 0: none", rich_help_panel=HOW)] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="spread over all classes", rich_help_panel=HOW)] = 0.0,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda, mps", rich_help_panel=WHERE)] = "auto",
    devices: Annotated[
        str, typer.Option(help="how many; torchrun's processes count by themselves", rich_help_panel=WHERE)
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="32-true, bf16-mixed, 16-mixed, 64-true, ...", rich_help_panel=WHERE)
    ] = "32-true",
    compiled: Annotated[
        bool, typer.Option("--compile", help="run through torch.compile", rich_help_panel=WHERE)
    ] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="channels of images last in memory", rich_help_panel=WHERE)
    ] = False,
    strategy: Annotated[
        str, typer.Option(help="of torchrun's processes: auto, ddp or fsdp", rich_help_panel=WHERE)
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="of torch on the CPU; default: 1 for small models", rich_help_panel=WHERE)
    ] = None,
    ray: Annotated[str | None, RAY] = None,
    data_root: Annotated[Path | None, DATA_ROOT] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="folder; default: runs/<data>-<model>", rich_help_panel=RECORDS),
    ] = None,
    overwrite: Annotated[bool, OVERWRITE] = False,
    no_report: Annotated[bool, NO_REPORT] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="curves in OUT/tensorboard", rich_help_panel=RECORDS)
    ] = False,
) -> None:
    """Compares recipes of normalization on a model and data.

    Each recipe tries the learning rates with the first seed, then trains with every seed at its best rate. All start
    from the same weights and see the same data in the same order. The end is a table, report.html, figures and the
    records.

    Without options: a small Inception network on handwritten digits, with bn, bn+ws (weight standardization), bn+wn
    (weight norm) and bn+e (weight conditioning), in about two minutes on two cores.

    Stop it at any time: the same command goes on where it was.

    Example: normkit compare --recipes bn,gn:2,ln --seeds 5

    Example: normkit compare --model mine.models:make --data mine.data:load --epochs 30 --optimizer adamw
    """
    with _faults():
        from normkit.lab.settings import Settings, first_seeds

        settings = Settings(
            model=model,
            data=data,
            recipes=tuple(_words("recipes", recipes)),
            seeds=first_seeds(seeds),
            rates=() if rates is None else tuple(_number("rates", word) for word in _words("rates", rates)),
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup=warmup,
            accumulate=accumulate,
            clip=clip,
            ema=ema,
            label_smoothing=label_smoothing,
            target=target,
            level=level,
            condition=condition,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            compile=compiled,
            channels_last=channels_last,
            strategy=strategy,
        )
        if threads is not None and threads < 1:
            raise OptionError(f"threads is {threads}; wanted 1 or more")
        lab = None
        try:
            from normkit.lab import compare as lab
            from normkit.lab.devices import part

            more = {"threads": threads, "ray": ray, "tensorboard": tensorboard, "data_root": data_root}
            lab.compare(settings, output, overwrite=overwrite, report=not no_report, **more)
            part()
        except KeyboardInterrupt:
            said = "before anything was begun"
            if lab is not None:
                folder = output or lab.default_output(settings)
                said = f"{lab.kept(folder)}\nto go on:  {lab.command(settings, folder, data_root)}"
            typer.echo(f"\nstopped; {said}", err=True)
            raise typer.Exit(130) from None


@app.command(cls=_Sweeping)
def reproduce(
    name: Annotated[str | None, NAME] = None,
    scale: Annotated[str, SCALE] = "small",
    seeds: Annotated[int, SEEDS] = 3,
    epochs: Annotated[int | None, EPOCHS] = None,
    data_root: Annotated[Path | None, DATA_ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    ray: Annotated[str | None, RAY] = None,
    threads: Annotated[int, THREADS] = 1,
    output: Annotated[Path | None, FOLDER] = None,
    overwrite: Annotated[bool, OVERWRITE] = False,
    no_report: Annotated[bool, NO_REPORT] = False,
) -> None:
    """Reproduces a table or figure of a paper on its data, and prints the paper's numbers next to ours.

    Stop it at any time: the same command goes on where it was. Several such commands with one output share the runs.

    Example: normkit reproduce table1 --data-root data --scale small
    """
    _experiment(
        "reproduce", name, scale, seeds, epochs, data_root, download, ray, threads, output, overwrite, no_report
    )


@app.command(cls=_Sweeping)
def claim(
    name: Annotated[str | None, NAME] = None,
    scale: Annotated[str, SCALE] = "small",
    seeds: Annotated[int, SEEDS] = 3,
    epochs: Annotated[int | None, EPOCHS] = None,
    data_root: Annotated[Path | None, DATA_ROOT] = None,
    download: Annotated[bool, DOWNLOAD] = False,
    ray: Annotated[str | None, RAY] = None,
    threads: Annotated[int, THREADS] = 1,
    output: Annotated[Path | None, FOLDER] = None,
    overwrite: Annotated[bool, OVERWRITE] = False,
    no_report: Annotated[bool, NO_REPORT] = False,
) -> None:
    """Puts a claim of the literature to the test.

    Stop it at any time: the same command goes on where it was. Several such commands with one output share the runs.

    Example: normkit claim batch-size --data-root data --scale small
    """
    _experiment("claim", name, scale, seeds, epochs, data_root, download, ray, threads, output, overwrite, no_report)


@app.command()
def report(output: Annotated[Path, typer.Argument(help="folder of a finished comparison or experiment")]) -> None:
    """Redraws the figures and report.html of a comparison or experiment from its records, and prints its tables."""
    with _faults():
        from normkit.lab.experiments import reshow

        reshow(output)


@app.command("list")
def list_methods(
    of: Annotated[str | None, typer.Option(help="input, activation, weight or gradient")] = None,
    batch_dependent: Annotated[
        bool | None, typer.Option("--batch-dependent/--batch-independent", help="a sample depends on the others")
    ] = None,
    running: Annotated[bool | None, typer.Option("--running/--no-running", help="it keeps running statistics")] = None,
    foldable: Annotated[
        bool | None, typer.Option("--foldable/--not-foldable", help="it can be baked into the weights")
    ] = None,
) -> None:
    """Lists the methods: name, what each normalizes over, year. Options leave some out."""
    with _faults():
        from rich.console import Console

        from normkit.catalogue.page import list_table

        list_table(Console(), of, batch_dependent=batch_dependent, running_state=running, foldable=foldable)


@app.command()
def show(name: Annotated[str, typer.Argument(help="as in the list, such as group_norm")]) -> None:
    """Shows one method: support set, formula, paper, use cases, strengths and weaknesses."""
    with _faults():
        from rich.console import Console

        from normkit.catalogue.page import show_page

        show_page(name, Console())


@app.command()
def draw(
    names: Annotated[list[str] | None, typer.Argument(help="methods; default: all that have a support set")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder")] = Path("figures"),
    ending: Annotated[str, typer.Option("--format", help="svg, png or pdf")] = "svg",
    together: Annotated[bool, typer.Option("--together", help="all in one picture, support-sets")] = False,
) -> None:
    """Draws the support sets of methods, for papers and slides."""
    with _faults():
        from normkit.catalogue.drawing import draw_methods

        for path in draw_methods(names or [], output, ending, together=together):
            typer.echo(path)


@app.command()
def cite(
    names: Annotated[list[str], typer.Argument(help="methods, or package.module:factory of a model")],
) -> None:
    """Prints BibTeX of methods, or of every norm found in a model."""
    with _faults():
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


@app.command()
def bench(
    methods: Annotated[str | None, typer.Option(help="separated by commas; default: all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one shape, float32, few rounds: about a minute")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="compare with torch.compile too, which compiles for minutes")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="samples of each; default: 15, or 5 if quick")] = None,
    threads: Annotated[int | None, typer.Option(help="of torch")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder")] = Path("runs/bench"),
    results: Annotated[Path | None, typer.Option(help="a Markdown file whose section Layers is replaced")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="measure again what is found there")] = False,
) -> None:
    """Compares the layers' speed with torch's own in one run, and with the copy bandwidth.

    Writes speed.json, speed.md and figures. Stop it at any time: the same command goes on where it was.
    """
    with _faults():
        from normkit.lab.bench import bench as measure_all

        names = [] if methods is None else _words("methods", methods)
        more = {"rounds": rounds, "threads": threads, "results": results, "overwrite": overwrite}
        measure_all(output, names, quick=quick, compiled=compiled, **more)


@app.command()
def info() -> None:
    """Says what runs here: versions, device, cores, threads and back ends."""
    with _faults():
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


def _experiment(
    kind: str,
    name: str | None,
    scale: str,
    seeds: int,
    epochs: int | None,
    data_root: Path | None,
    download: bool,
    ray: str | None,
    threads: int,
    output: Path | None,
    overwrite: bool,
    no_report: bool,
) -> None:
    with _faults():
        from normkit.lab.experiment import Bench
        from normkit.lab.experiments import find_experiment, names
        from normkit.lab.perform import command, kept, perform
        from normkit.lab.settings import first_seeds

        if name is None:
            width = max(map(len, names(kind))) + 2
            for known in names(kind):
                typer.echo(f"{known:<{width}}{find_experiment(kind, known).title}")
            return
        if scale not in ("small", "full"):
            raise OptionError(f"scale is {scale!r}; wanted small or full")
        for option, number in {"epochs": epochs, "threads": threads}.items():
            if number is not None and number < 1:
                raise OptionError(f"{option} is {number}; wanted 1 or more")
        experiment = find_experiment(kind, name)
        folder = output or Path("runs") / f"{name}-{scale}"
        bench = Bench(
            scale, folder, data_root, download, seeds=first_seeds(seeds), epochs=epochs, ray=ray, threads=threads
        )
        again = command(experiment, bench)
        try:
            perform(experiment, bench, overwrite=overwrite, report=not no_report, command=again)
        except KeyboardInterrupt:
            typer.echo(f"\nstopped; {kept(folder)}\nto go on:  {again}", err=True)
            raise typer.Exit(130) from None


def main() -> None:
    """Runs the command line."""
    app(prog_name="normkit")


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except NormkitError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LAB:
            raise
        typer.echo(f"error: {error.name} is not installed; pip install 'normkit[lab]'", err=True)
        raise typer.Exit(2) from None


def _words(name: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise OptionError(f"{name} is {text!r}; wanted words separated by commas")
    return words


def _number(name: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise OptionError(f"{name} has {word!r}; wanted numbers separated by commas") from None


if __name__ == "__main__":
    main()
