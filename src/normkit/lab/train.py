"""One run: a model trained at one rate with one seed, resumable bit for bit on the CPU."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from normkit.lab import record, task
from normkit.lab.data.split import Data, Split
from normkit.lab.seeding import epoch_order, reseed
from normkit.lab.settings import Settings

OK, DIVERGED = "ok", "diverged"
# A loss is looked at only so often, because looking waits for the device.
LOOK_EVERY = 20
METRICS = ("epoch", "step", "rate", "train_loss", "val_loss", "val_score", "condition")
RESULT = ("status", "best_val_score", "val_score", "val_loss", "test_score", "test_loss", "epochs", "steps")
CHECKPOINT = ("epoch", "model", "optimizer", "precision", "metrics", "timing")


@dataclass(frozen=True)
class Run:
    """What tells a run from the others of its comparison.

    Args:
        recipe: canonical.
        rate: the learning rate at the start.
        seed: of the initial weights, the order of the data and all else that is random.

    >>> Run("bn+e@first_last", 0.1, 0).path
    'runs/bn+e@first_last/rate=0.1/seed=0'
    """

    recipe: str
    rate: float
    seed: int

    @property
    def path(self) -> str:
        """The folder of the run within that of its comparison."""
        return f"runs/{quote(self.recipe, safe='+@:,')}/rate={self.rate}/seed={self.seed}"


def make_optimizer(model: nn.Module, settings: Settings, rate: float) -> torch.optim.Optimizer:
    """Makes the optimizer that the settings name."""
    parameters, decay = [p for p in model.parameters() if p.requires_grad], settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=settings.momentum, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(parameters, rate, weight_decay=decay)


def rate_at(settings: Settings, rate: float, step: int, steps: int) -> float:
    """Gives the learning rate of a step, counted from 0: rate * (1 + cos(pi step / steps)) / 2, or constant."""
    return rate if settings.schedule == "constant" else rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def finished(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Reads the result of a finished run; None where there is work left.

    Args:
        folder: of the run.
        config: what the run must have been made with.

    Raises:
        RecordError: the record is damaged, or is of another configuration.
    """
    record.check_config(
        folder / "config.json",
        config,
        "choose another --output, or --overwrite to train anew (the code or data changed)",
    )
    if not (folder / "result.json").exists():
        return None
    record.remove(folder / "checkpoint.pt")
    return record.read_json(folder / "result.json", RESULT)


class Trainer:
    """Trains one run from its beginning or from its last checkpoint.

    Args:
        run: which.
        settings: of the comparison.
        model: with its recipe applied; trained in place.
        data: checked.
        fabric: started.
        folder: of the run; rank zero alone writes there.
        hashes: of the initial weights and of the order of the data; they go into the result as they are.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        model: nn.Module,
        data: Data,
        fabric: Fabric,
        folder: Path,
        hashes: Mapping[str, str],
    ) -> None:
        self.run, self.settings, self.data, self.fabric = run, settings, data, fabric
        self.folder, self.hashes = folder, dict(hashes)
        self.model, self.raw_optimizer = model, make_optimizer(model, settings, run.rate)
        self.wrapped, self.optimizer = fabric.setup(model, self.raw_optimizer)
        # A split smaller than a batch is one batch; each process gets as many samples as the others.
        self.batch = min(settings.batch_size, len(data.train) // fabric.world_size * fabric.world_size)
        self.steps = len(data.train) // self.batch
        self.metrics: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []

    def train(self, on_epoch: Callable[[int, float | None], None] = lambda epoch, score: None) -> dict[str, Any]:
        """Trains to the end and writes the records.

        Args:
            on_epoch: called after each epoch, and once for those found done, with the epoch and its validation score.

        Returns:
            The run's result.
        """
        self._resume()
        if self.metrics:
            on_epoch(len(self.metrics), self.metrics[-1]["val_score"])
        status = OK
        for epoch in range(len(self.metrics) + 1, self.settings.epochs + 1):
            if not self._epoch(epoch):
                status = DIVERGED
                break
            on_epoch(epoch, self.metrics[-1]["val_score"])
        return self._finish(status)

    def _epoch(self, epoch: int) -> bool:
        started = time.perf_counter()
        train_loss = self._pass(epoch)
        self._wait()
        trained = time.perf_counter()
        if not math.isfinite(train_loss):
            return False
        val_loss, val_score = self.evaluate(self.data.val)
        if not (math.isfinite(val_loss) and math.isfinite(val_score)):
            return False
        last = epoch * self.steps - 1
        self.metrics.append(
            {
                "epoch": epoch,
                "step": last + 1,
                "rate": rate_at(self.settings, self.run.rate, last, self.steps * self.settings.epochs),
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_score": val_score,
                "condition": self._conditions(),
            }
        )
        self.timing.append(
            {"epoch": epoch, "seconds": trained - started, "check_seconds": time.perf_counter() - trained}
        )
        self._save(epoch)
        return True

    def _pass(self, epoch: int) -> float:
        fabric, settings = self.fabric, self.settings
        reseed(self.run.seed, "epoch", epoch, fabric.global_rank)
        order = epoch_order(self.run.seed, epoch, len(self.data.train))
        self.wrapped.train()
        total = torch.zeros((), device=fabric.device)
        for place in range(self.steps):
            step = (epoch - 1) * self.steps + place
            for group in self.raw_optimizer.param_groups:
                group["lr"] = rate_at(settings, self.run.rate, step, self.steps * settings.epochs)
            mine = order[place * self.batch : (place + 1) * self.batch][fabric.global_rank :: fabric.world_size]
            total += train_step(fabric, self.wrapped, self.optimizer, *self.data.train.batch(mine, fabric.device))
            if place % LOOK_EVERY == LOOK_EVERY - 1 and not math.isfinite(self._mean(total)):
                return math.nan
        return self._mean(total) / self.steps

    def evaluate(self, split: Split) -> tuple[float, float]:
        """Gives the mean loss and the score of a split, over all processes."""
        fabric = self.fabric
        sums = torch.zeros(3, dtype=torch.float64)
        self.wrapped.eval()
        with torch.no_grad():
            for chunk in torch.arange(len(split)).split(4 * self.settings.batch_size):
                mine = chunk[fabric.global_rank :: fabric.world_size]
                # Every process calls the model as often as the others, or the others would wait for it for ever.
                output, targets = self._output(split, mine if len(mine) else chunk[:1])
                if len(mine):
                    sums += task.tally(output, targets).cpu()
        if fabric.world_size > 1:
            sums = torch.as_tensor(fabric.all_reduce(sums.to(fabric.device), reduce_op="sum")).cpu()
        return task.score(sums, split.targets)

    def _output(self, split: Split, index: Tensor) -> tuple[Any, Tensor]:
        inputs, targets = split.batch(index, self.fabric.device)
        return task.call(self.wrapped, inputs), targets

    def _mean(self, value: Tensor) -> float:
        if self.fabric.world_size > 1:
            value = torch.as_tensor(self.fabric.all_reduce(value.clone(), reduce_op="mean"))
        return float(value)

    def _conditions(self) -> dict[str, list[float | None]]:
        if not self.settings.condition:
            return {}
        from normkit.diagnostics.conditioning import weight_conditions

        with torch.no_grad():
            found = weight_conditions(self.model)
        # JSON has no infinity: a singular weight has null.
        return {name: [k if math.isfinite(k) else None for k in pair] for name, pair in found.items()}

    def _wait(self) -> None:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)

    def _save(self, epoch: int) -> None:
        if self.fabric.is_global_zero:
            state = {
                "epoch": epoch,
                "model": self.model.state_dict(),
                "optimizer": self.raw_optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "metrics": self.metrics,
                "timing": self.timing,
            }
            record.write_checkpoint(self.folder / "checkpoint.pt", state)
            self._write_lines()

    def _write_lines(self) -> None:
        record.write_lines(self.folder / "metrics.jsonl", self.metrics)
        record.write_lines(self.folder / "timing.jsonl", self.timing)

    def _resume(self) -> None:
        path, state = self.folder / "checkpoint.pt", None
        if self.fabric.is_global_zero and path.exists():
            state = record.read_checkpoint(path, CHECKPOINT)
        if self.fabric.world_size > 1:
            state = self.fabric.broadcast(state)
        if state is None:
            return
        self.metrics, self.timing = state["metrics"], state["timing"]
        self.model.load_state_dict(state["model"])
        self.raw_optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.fabric.is_global_zero:
            self._write_lines()

    def _finish(self, status: str) -> dict[str, Any]:
        test_loss = test_score = None
        if status == OK:
            test_loss, test_score = self.evaluate(self.data.test)
            if not (math.isfinite(test_loss) and math.isfinite(test_score)):
                status, test_loss, test_score = DIVERGED, None, None
        scores = [row["val_score"] for row in self.metrics]
        result = {
            "status": status,
            "best_val_score": max(scores, default=None),
            "val_score": scores[-1] if status == OK else None,
            "val_loss": self.metrics[-1]["val_loss"] if status == OK else None,
            "test_score": test_score,
            "test_loss": test_loss,
            "epochs": len(scores),
            "steps": len(scores) * self.steps,
            **self.hashes,
        }
        if self.fabric.is_global_zero:
            self._write_lines()
            record.write_json(self.folder / "result.json", result)
            record.remove(self.folder / "checkpoint.pt")
        return result


def train_step(fabric: Fabric, model: Any, optimizer: Any, inputs: Any, targets: Tensor) -> Tensor:
    """Runs forward, backward and update on one batch, and gives the loss, still on its device."""
    optimizer.zero_grad()
    loss = task.loss(task.call(model, inputs), targets)
    fabric.backward(loss)
    optimizer.step()
    return loss.detach()
