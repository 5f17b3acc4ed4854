"""The runs of a comparison: the same initial weights and the same data in the same order for every recipe."""

import copy
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from normkit.core.errors import SurgeryError
from normkit.lab.data.split import Data
from normkit.lab.folder import discard
from normkit.lab.progress import Watch
from normkit.lab.protocol import DATA, MODELS, check_fit, load_factory, make_data, make_model
from normkit.lab.record import UnlikeError
from normkit.lab.seeding import init_sha256, order_sha256, reseed
from normkit.lab.settings import Settings
from normkit.lab.train.cost import measure_costs
from normkit.lab.train.trainer import Run, Trainer, finished


@dataclass
class Study:
    """Models by seed and recipe, the data, and how to train one run.

    Args:
        settings: canonical.
        fabric: started.
        folder: of the comparison.
        model: a factory in place of the one that the settings name. Default: None.
        make: a data factory in place of the one that the settings name. Default: None.
        curves: a folder for TensorBoard. Default: None, no curves.
        device: what the runs are trained on where that is not here. Default: None, here.
        replaces: train again what is of other data or code, in place of refusing it. Default: False.

    Raises:
        ProtocolError: the model or data breaks the protocol.
        SurgeryError: a recipe can't be applied to the model.
    """

    settings: Settings
    fabric: Fabric
    folder: Path
    model: Callable[..., Any] | None = None
    make: Callable[[], Any] | None = None
    curves: Path | None = None
    device: str | None = None
    replaces: bool = False
    data: Data = field(init=False)
    parameters: dict[str, int] = field(init=False, default_factory=dict)
    changes: dict[str, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Makes the data and every recipe's model once, so that whatever is wrong shows before the first run."""
        settings = self.settings
        self._factory = self.model or load_factory(settings.model, MODELS)
        make = self.make or load_factory(settings.data, DATA)
        reseed(0, "data")
        self.data = make_data(make, settings.data)
        self._data_sha256 = self.data.sha256()
        self._base: tuple[int, nn.Module, str] | None = None
        self._orders: dict[int, str] = {}
        seed = settings.seeds[0]
        check_fit(self._initial(seed)[0], self.data, settings.model)
        for recipe, (model, rows) in self._applied(seed).items():
            check_fit(model, self.data, f"{settings.model} with {recipe}")
            self.changes[recipe] = rows
            self.parameters[recipe] = sum(parameter.numel() for parameter in model.parameters())

    def train(self, run: Run, watch: Watch) -> dict[str, Any]:
        """Trains or resumes a run and returns its result.

        Args:
            run: which.
            watch: is told of every epoch.
        """
        result = self.found(run)
        watch.begin(run)
        if result is not None:
            watch.end(run, result["status"], result["val_score"], True)
            return result
        model, _ = self._apply(run.seed, run.recipe)
        curves = self.curves and self.curves / Path(run.path).relative_to("runs")
        places = (self.fabric, self.folder / run.path, self._hashes(run.seed), curves)
        result = Trainer(run, self.settings, model, self.data, *places).train(
            lambda epoch, score: watch.epoch(run, epoch, score)
        )
        watch.end(run, result["status"], result["val_score"], False)
        return result

    def found(self, run: Run) -> dict[str, Any] | None:
        """Gives the result of a run that is finished; None where there is work left."""
        result = self.kept(run) if self.fabric.is_global_zero else None
        if self.fabric.world_size > 1:
            result = self.fabric.broadcast(result)
        return result

    def kept(self, run: Run) -> dict[str, Any] | None:
        """Gives the result of a run that is finished, to the first process alone."""
        place, config = self.folder / run.path, {**self._config(run), **self._hashes(run.seed)}
        try:
            return finished(place, config)
        except UnlikeError:
            if not self.replaces:
                raise
        discard(self.folder, place)
        return finished(place, config)

    def costs(self, watch: Watch) -> dict[str, dict[str, Any]]:
        """Measures every recipe's step."""
        watch.stage("measuring milliseconds and megabytes a step, all recipes side by side")
        seed = self.settings.seeds[0]
        models = {recipe: self._apply(seed, recipe)[0] for recipe in self.settings.recipes}
        return measure_costs(models, self.settings, self.data, self.fabric)

    def _config(self, run: Run) -> dict[str, Any]:
        settings = self.settings.record(self.device or self.fabric.device.type)
        shared = {
            key: value
            for key, value in settings.items()
            if key not in ("recipes", "rates", "seeds", "target", "level", "accelerator", "devices")
        }
        which = {"recipe": run.recipe, "rate": run.rate, "seed": run.seed}
        return {**which, **shared, "processes": self.fabric.world_size, "data_sha256": self._data_sha256}

    def _initial(self, seed: int) -> tuple[nn.Module, str]:
        if self._base is None or self._base[0] != seed:
            reseed(seed, "init")
            model = make_model(self._factory, self.settings.model, self.data.classes)
            self._base = seed, model, init_sha256(model)
        return self._base[1:]

    def _apply(self, seed: int, recipe: str) -> tuple[nn.Module, list[str]]:
        from normkit.surgery.recipe import apply_recipe

        model = copy.deepcopy(self._initial(seed)[0])
        reseed(seed, "recipe")
        changes = apply_recipe(model, recipe, on_refusal=self.settings.on_refusal)
        return changes.model, [str(row) for row in changes.rows]

    def _applied(self, seed: int) -> dict[str, tuple[nn.Module, list[str]]]:
        # All are tried where one is refused, to say which are possible.
        applied, refused = {}, []
        for recipe in self.settings.recipes:
            try:
                applied[recipe] = self._apply(seed, recipe)
            except SurgeryError as error:
                refused.append(error)
        if refused:
            fit = f", such as {shlex.quote(','.join(applied))}" if applied else ""
            raise SurgeryError(f"{refused[0]}; choose other recipes with --recipes{fit}") from refused[0]
        return applied

    def _hashes(self, seed: int) -> dict[str, str]:
        return {"init_sha256": self._initial(seed)[1], "order_sha256": self._order(seed)}

    def _order(self, seed: int) -> str:
        if seed not in self._orders:
            self._orders[seed] = order_sha256(seed, self.settings.epochs, len(self.data.train))
        return self._orders[seed]
