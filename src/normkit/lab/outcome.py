"""Comparisons from Python: any model and data as objects in, an outcome to look at and to go on with out."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import nn

from normkit.core.errors import OptionError, ProtocolError
from normkit.lab.report.wording import findings, ms_per_step, verdict
from normkit.lab.settings import Settings, first_seeds
from normkit.surgery.select import closest


class Best(NamedTuple):
    """The recipe with the highest mean test score, and how sure that is."""

    recipe: str
    verdict: str


@dataclass(frozen=True)
class Outcome:
    """What a comparison found; in a notebook it shows as a table.

    Args:
        record: what ``result.json`` holds.
        folder: of the records.
    """

    record: dict[str, Any]
    folder: Path

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row per recipe: plain numbers, None where there is none. ``pandas.DataFrame(outcome.table)`` takes it."""
        result, rows = self.record["result"], []
        for found in result["recipes"]:
            paired, score, cost = (found.get(key) or {} for key in ("paired", "test_score", "cost"))
            rows.append(
                {
                    "recipe": found["recipe"],
                    "rate": found["rate"],
                    "rate_at_edge": found["rate_at_edge"],
                    **{f"test_{key}": score.get(key) for key in ("mean", "std", "n")},
                    "difference": paired.get("mean"),
                    "low": paired.get("low"),
                    "high": paired.get("high"),
                    "verdict": " ".join(verdict(found, result).split()),
                    "ms_per_step": ms_per_step(found, result)[0],
                    **{key: cost.get(key) for key in ("ratio", "ratio_interval", "mb_per_step")},
                    "parameters": found["parameters"],
                    "changes": len(found["changes"]),
                }
            )
        return rows

    @property
    def best(self) -> Best:
        """The recipe with the highest mean test score (None is below all), and in words whether that is more than chance."""
        found = max(self.table, key=lambda row: -float("inf") if row["test_mean"] is None else row["test_mean"])
        return Best(found["recipe"], findings(self.record["result"])[0])

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the figures that :meth:`plot` draws."""
        return tuple(self._drawings())

    def plot(self, name: str = "validation_score") -> Any:
        """Draws a figure, as one of matplotlib.

        Args:
            name: one of :attr:`figures`. Default: ``"validation_score"``, against epochs.

        Raises:
            OptionError: there is no such figure.
        """
        import matplotlib.pyplot  # noqa: F401  # by which a notebook learns to show figures

        drawings = self._drawings()
        if name not in drawings:
            raise OptionError(f"figure {name!r} is not there; wanted one of {', '.join(drawings)}")
        return drawings[name].make()

    def report(self) -> Path:
        """Writes the page with all tables and curves.

        Returns:
            The path of ``report.html``.

        Raises:
            RecordError: the folder can't be written.
        """
        from normkit.lab.comparison import reread
        from normkit.lab.report.sheet import write_sheet

        return write_sheet(reread(self.record), self.record, [], self.folder)

    def _drawings(self) -> dict[str, Any]:
        from normkit.lab.comparison import figures

        return {drawing.name: drawing for drawing in figures(self.record["result"])}

    def _repr_html_(self) -> str:
        from normkit.lab.comparison import remarks, tables

        shown = []
        for table in tables(self.record["result"]):
            heads = "".join(f"<th>{_lines(column)}</th>" for column in table.columns)
            rows = "".join(f"<tr>{''.join(f'<td>{_lines(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
            shown.append(f"<p><b>{escape(table.title)}</b></p><table><tr>{heads}</tr>{rows}</table>")
        return "".join(shown) + "".join(f"<p>{escape(text)}</p>" for text in remarks(self.record["result"]))

    def __repr__(self) -> str:
        return f"Outcome({', '.join(row['recipe'] for row in self.table)} in {self.folder}: {self.best.verdict})"


def compare(
    model: str | nn.Module | Callable[..., nn.Module] = Settings.model,
    data: Any = Settings.data,
    recipes: str | Iterable[str] | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    report: bool = True,
    console: Console | None = None,
    threads: int | None = None,
    ray: str | None = None,
    tensorboard: bool = False,
    data_root: str | Path | None = None,
    **settings: Any,
) -> Outcome:
    """Compares recipes on a model and data; the same as ``normkit compare``, with objects.

    A stopped comparison goes on where it was when it is started again with the same settings and folder; a finished one is read
    back. Several processes given the same folder share the runs.

    Args:
        model: a factory, called with no arguments or with ``classes=`` when it accepts that name; a module, of which each seed
            gets a copy with weights drawn afresh by the ``reset_parameters`` of its layers; or a name, as on the command line.
        data: whatever a data factory may return (see :mod:`normkit.lab.protocol`), such as a DataLoader, a Dataset, a pair of
            arrays or a dict of splits; a factory; or a name.
        recipes: a sequence, or one text with commas; the first is the baseline. Default: None, those that suit the model.
        output: the folder of the records. Default: None, ``runs/<data>-<model>``.
        overwrite: replace the records in the folder. Default: False.
        report: draw figures and ``report.html`` as well. Default: True.
        console: where progress and the table go. Default: None, standard output, or the notebook.
        threads: of torch on the CPU. Default: None, as many as the record was begun with, else one for a model of fewer than
            100,000 parameters and torch's own number for larger ones.
        ray: None to train in this process; ``"local"`` for a Ray cluster on this machine, else the address of one, whose
            machines all see `output`. Threads are then one a run, if not said. Default: None.
        tensorboard: write curves for TensorBoard into ``OUTPUT/tensorboard``. Default: False.
        data_root: where data sets lie; the environment variable ``NORMKIT_DATA`` is set to it. Default: None, as it is set.
        **settings: fields of :class:`~normkit.lab.settings.Settings`, such as ``epochs=5``; ``seeds`` may say how many.

    Raises:
        OptionError: a setting is not known or outside its range.
        ProtocolError: the model or data breaks the protocol.
        RecordError: the folder holds something else, is damaged or not writable.
    """
    from normkit.lab import comparison as lab

    known = {each.name for each in fields(Settings)} - {"model", "data", "recipes"}
    for name in settings.keys() - known:
        raise OptionError(
            f"compare has no setting {name!r}{closest(name, tuple(known))}; wanted {', '.join(sorted(known))}"
        )
    if isinstance(settings.get("seeds"), int):
        settings["seeds"] = first_seeds(settings["seeds"])
    if recipes is not None:
        settings["recipes"] = tuple(recipes.split(",") if isinstance(recipes, str) else recipes)
    names = {key: value for key, value in (("model", model), ("data", data)) if isinstance(value, str)}
    made = Settings(**names, **settings)
    factory = callable(data) and not isinstance(data, Mapping) and not hasattr(data, "__getitem__")
    factories = {
        "model": None if isinstance(model, str) else Template(model) if isinstance(model, nn.Module) else model,
        "data": None if isinstance(data, str) else data if factory else Given(data),
    }
    options = {"overwrite": overwrite, "report": report, "threads": threads, "ray": ray, "tensorboard": tensorboard}
    root = None if data_root is None else Path(data_root)
    record = lab.compare(made, output, console=console, data_root=root, **options, **factories)  # pyright: ignore[reportArgumentType]
    named = {key: record["config"][key] for key in ("model", "data")}
    return Outcome(record, Path(output) if output is not None else lab.default_output(Settings(**named)))


class Given:
    """A data factory that gives what it was given.

    Args:
        value: of the user.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__module__, self.__qualname__ = type(value).__module__, type(value).__qualname__

    def __call__(self) -> Any:
        return self.value


class Template(Given):
    """A model factory that gives copies of a module with weights drawn afresh.

    Args:
        value: the module; it is left as it is.

    Raises:
        ProtocolError: a layer with weights can't draw them again.

    Attributes:
        note: what a comparison says of it.

    >>> one = nn.Linear(2, 2)
    >>> bool((Template(one)().weight == one.weight).any())
    False
    """

    note = (
        "the model is a module: its own weights are not used, each seed draws others by its layers' reset_parameters; "
        "to start from its weights, pass a factory"
    )

    def __init__(self, value: nn.Module) -> None:
        super().__init__(value)
        for name, layer in value.named_modules():
            if [*layer.parameters(recurse=False)] and _reset_of(layer) is None:
                raise ProtocolError(
                    f"model: {name or 'the module'} ({type(layer).__name__}) has weights and no reset_parameters to draw them "
                    "again for each seed; pass a factory, such as model=lambda: Net(), or lambda: copy.deepcopy(net) to start "
                    "each seed from these weights"
                )

    def __call__(self) -> nn.Module:
        model = copy.deepcopy(self.value)
        # Outer layers last: what they draw, such as a transformer's matrices, replaces what inner ones drew.
        for layer in reversed(list(model.modules())):
            if reset := _reset_of(layer):
                reset()
        return model


def _reset_of(layer: nn.Module) -> Callable[[], None] | None:
    return getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)


def _lines(cell: Any) -> str:
    from normkit.lab.report.sheet import cell as text

    return escape(text(cell)).replace("\n", "<br>")
