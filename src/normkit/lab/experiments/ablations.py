"""Which parts of weight conditioning matter: sides, gradient, layers, company, gain, norm, refreshing, optimizer.

The paper's ablations are in a supplement that is not public; this list is ours. All on the Inception network of Table 1 on
CIFAR-10; Jacobi scaling, which needs square matrices, on a perceptron with three square layers on handwritten digits.
Learning rates are swept in Table 1; other losses than cross-entropy are not run.

At full scale: 40 epochs at rate 0.1. At small scale: images of 16x16, half the channels, 1,024 images, 8 epochs.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from normkit.lab.experiment import Experiment
from normkit.lab.experiments.classification import PAPER, Plan, Row, early, figures, study, tables, verdicts
from normkit.lab.say import counted
from normkit.lab.train.learning import Training

BASE, E = "BN", "BN + E"
# What the small scale leaves out.
LARGE = ("E, norms of 100 steps ago", "BN + W + E", "BN + SN", "BN + SN + E", "Ruiz", "both at once")


def _e(name: str, recipe: str = "bn", **options: Any) -> Row:
    return Row(name, recipe, conditioning=tuple(options.items()))


PARTS: dict[str, tuple[Row, ...]] = {
    "sides": (
        Row(E, "bn+e"),
        _e("columns", mode="col"),
        _e("rows, then columns", mode="rowcol"),
        _e("both at once", mode="rowcol", order="simultaneous"),
        _e("Ruiz", mode="rowcol", order="ruiz"),
    ),
    "gradient": (_e("E, norms held constant", gradient="detach"), _e("E, norms of 10 steps ago", every=10)),
    "refresh": (_e("E, norms of 100 steps ago", every=100),),
    "layers": (
        _e("E, first layer", where="re:^stem\\.0$"),
        _e("E, last layer", where="re:^classifier$"),
        Row("E, all layers", "bn+e@all"),
        Row("E, hidden layers", "bn+e@hidden"),
    ),
    "company": (
        Row("BN + WS", "bn+ws"),
        Row("BN + WS + E", "bn+ws+e"),
        Row("BN + W + E", "bn+wn+e"),
        Row("BN + SN", "bn+sn"),
        Row("BN + SN + E", "bn+sn+e"),
    ),
    "without BN": (Row("no BN", "none"), Row("no BN, E", "none+e"), Row("no BN, E on all layers", "none+e@all")),
    "gain and norm": (
        _e("E, gain √2", gain=2**0.5),
        _e("rows of 1-norm 1", norm=1.0),
        _e("rows of greatest element 1", norm="inf"),
    ),
}
SMALL: dict[str, Any] = {"size": 16, "train": 1024, "val": 1000, "test": 1000, "width": 0.5, "epochs": 8}
OPTIMIZERS = {"Adam": 1e-3, "AdamW": 1e-3}


def square(classes: int = 10) -> nn.Module:
    """Makes a perceptron for digits: 64 inputs, three square layers with BN and ReLU, and a classifier."""
    blocks = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, classes))


def plans(scale: str) -> list[Plan]:
    """The plans at a scale."""
    small = scale != "full"
    base = Training("cifar10", "inception8", "", "bn", 0.0, 0, 40, condition=not small)
    base = replace(base, **SMALL) if small else base
    rows = [row for part in PARTS.values() for row in part if not (small and row.name in LARGE)]
    found = [Plan("SGD", base, (Row(BASE, "bn"), *rows), rate=0.1, costs=60.0)]
    for optimizer, rate in OPTIMIZERS.items():
        other = replace(base, optimizer=optimizer.lower())
        found.append(Plan(optimizer, other, (Row(BASE, "bn"), Row(E, "bn+e")), rate=rate, costs=0.0))
    layers = "re:^(1|4|7)$"
    jacobi = (Row(BASE, "bn"), _e("rows", mode="row", where=layers), _e("Jacobi", mode="jacobi", where=layers))
    digits = Training("digits", "normkit.lab.experiments.ablations:square", "", "bn", 0.0, 0, 12, batch_size=64)
    found.append(Plan("Square layers, digits", digits, jacobi, rate=0.1, costs=0.0))
    return found[-2:] if scale == "tiny" else found


def remarks(result: dict[str, Any]) -> list[str]:
    left = counted(len(LARGE), "row")
    return [
        *verdicts(result),
        "Each interval stands alone: of twenty, one is expected to miss by chance. Rates are the same for all rows of a table, "
        "so a difference can be one of the rate that suits a row; Table 1 sweeps rates.",
        *early(result, f"; differences are those of early training, and {left} are left out."),
    ]


EXPERIMENT = Experiment(
    "ablations", "reproduce", "Ablations of weight conditioning",
    "Row equilibration of the first and the last layer is the form of conditioning to use.",
    PAPER, lambda bench: study(bench, plans(bench.scale)), tables, figures, remarks,
)  # fmt: skip
