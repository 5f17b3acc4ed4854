"""Which elements share statistics, found by differentiating layers: the five pictures of a lecture.

The elements on which one output depends are the non-zeros of its gradient by the input, here of three samples with six channels
and four positions (in a transformer, four tokens of six features). ``normkit draw slides`` writes the same pictures as files.
"""

from typing import Any

import torch

from normkit.catalogue.drawing import Cube, slides, together
from normkit.catalogue.methods import method
from normkit.lab.experiment import Bench, Experiment, Table
from normkit.lab.experiments.runs import drawings, drawn
from normkit.lab.report.drawing import FULL


def run(bench: Bench) -> dict[str, Any]:
    found = slides()
    return {"pictures": [[cube.name, cube.title, cube.reached.int().tolist(), list(cube.labels)] for cube in found]}


def cubes(result: dict[str, Any]) -> list[Cube]:
    """The pictures of a result."""
    return [
        Cube(name, title, torch.tensor(reached).bool(), labels) for name, title, reached, labels in result["pictures"]
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    lines = []
    for cube in cubes(result):
        count = int(cube.reached.sum())
        reach = [cube.reached.any(dim=[d for d in range(3) if d != axis]).sum().item() for axis in range(3)]
        axes = [f"{n} of {size} {label}" for n, size, label in zip(reach, cube.reached.shape, cube.labels, strict=True)]
        lines.append([cube.title, *axes, count, cube.reached.numel() // count])
    columns = ("layer", "along depth", "along rows", "along columns", "elements", "statistics of the tensor")
    return [Table("Elements that share the statistic of one", columns, lines)]


def remarks(result: dict[str, Any]) -> list[str]:
    found = {cube.name: int(cube.reached.sum()) for cube in cubes(result)}
    return [
        f"LayerNorm in a ConvNet has one statistic per sample ({found['slide_layer_norm_convnet']} elements), in a "
        f"transformer one per token ({found['slide_layer_norm_transformer']} elements); they are different layers."
    ]


@drawn(
    "support-sets",
    "A tensor of three samples as a cube for five layers. The output at the orange element depends on the elements in "
    "blue and on itself alone, as automatic differentiation finds; they are its support set.",
)
def _cubes(result: dict[str, Any]) -> Any:
    return together(cubes(result), 3, FULL / 3)


EXPERIMENT = Experiment(
    "support-sets", "demo", "Five layers by their support sets",
    "Variants of normalization differ in the elements that share a mean and a variance.",
    method("group_norm").paper, run, tables, drawings(_cubes), remarks, ("tiny", "small"),
)  # fmt: skip
