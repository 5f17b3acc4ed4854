"""The experiments that ``normkit reproduce`` and ``normkit claim`` know, one file a line."""

from difflib import get_close_matches
from importlib import import_module

from normkit.core.errors import OptionError
from normkit.lab.experiment import Experiment

# Files of lab/papers and of lab/claims; an experiment is called like its file, with dashes.
FILES = {
    "reproduce": (
        "table1",
        "table2",
        "table3",
        "table4",
        "fig1",
        "vit_s",
        "shape",
        "cost",
        "ablations",
    ),
    "claim": (
        "batch_size",
        "disparity",
        "pre_post_ln",
        "gan",
    ),
}
FOLDERS = {"reproduce": "papers", "claim": "claims"}


def names(kind: str) -> tuple[str, ...]:
    """Names the experiments of a kind.

    Args:
        kind: ``"reproduce"`` or ``"claim"``.
    """
    return tuple(file.replace("_", "-") for file in FILES[kind])


def find_experiment(kind: str, name: str) -> Experiment:
    """Imports an experiment.

    Args:
        kind: ``"reproduce"`` or ``"claim"``.
        name: of the experiment, such as ``"table1"``.

    Raises:
        OptionError: there is none of that name.
    """
    known = names(kind)
    if name not in known:
        close = get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise OptionError(f"{kind} knows no experiment {name!r}{hint}; there are {', '.join(known) or 'none'}")
    module = import_module(f"normkit.lab.{FOLDERS[kind]}.{name.replace('-', '_')}")
    return module.EXPERIMENT
