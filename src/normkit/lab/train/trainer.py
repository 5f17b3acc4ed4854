"""One run: a model trained at one rate with one seed, resumable bit for bit on the CPU."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from normkit.core.errors import OptionError, RecordError
from normkit.lab import record, task
from normkit.lab.data.split import Data, Inputs, Split, take
from normkit.lab.folder import CHECKPOINT, make
from normkit.lab.record import COUNT, NUMBER, POSITIVE, each, fields, maybe, named
from normkit.lab.seeding import apart, epoch_order, generator, reseed
from normkit.lab.settings import Settings
from normkit.lab.stats import DIVERGED, OK
from normkit.lab.train.parallel import Average, Placed, keep_whole, place
from normkit.schedules import linear_rate

# Where the step schedule takes the rate down, as parts of the run, and by how much.
STEPS, FACTOR = (0.5, 0.75), 0.1
SHOWN = ("rate", "train_loss", "val_loss", "val_score")
# A loss is looked at only so often, because looking waits for the device.
LOOK_EVERY = 20
METRICS_FILE, TIMING_FILE = "metrics.jsonl", "timing.jsonl"
STATE = ("epoch", "model", "optimizer", "precision", "metrics", "timing")


def rate_at(settings: Settings, rate: float, step: int, steps: int) -> float:
    """Gives the learning rate of a step, counted from 0.

    Over ``warmup`` epochs the rate rises in equal steps: ``rate * (step + 1) / warm``. With t the part of what follows
    that is done, it then is ``rate`` (constant), ``rate * (1 + cos(pi t)) / 2`` (cosine), or ``rate`` times 0.1 for each
    half and three quarters of the whole run that are over (step).
    """
    warm = round(settings.warmup / settings.epochs * steps)

    def after(done: int) -> float:
        if settings.schedule == "constant":
            return 1.0
        if settings.schedule == "step":
            return FACTOR ** sum(step >= part * steps for part in STEPS)
        return 0.5 * (1.0 + math.cos(math.pi * done / max(steps - warm, 1)))

    # linear_rate counts from 1, and `after` what has been done.
    return rate * linear_rate(step + 1, warm, lambda done: after(done - 1))


def write_curves(writer: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes epochs of a run as TensorBoard reads them."""
    for row in rows:
        for name in SHOWN:
            writer.add_scalar(name, row[name], row["epoch"])
        for layer, pair in row["condition"].items():
            for kind, value in zip(("raw", "effective"), pair, strict=True):
                if value is not None:
                    writer.add_scalar(f"condition_{kind}/{layer}", value, row["epoch"])
    writer.flush()


def curve_writer(folder: Path) -> Any:
    """A writer for TensorBoard; what was there is replaced, so that a run that was resumed has one curve."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ModuleNotFoundError:
        cure = "pip install 'normkit[tensorboard]'"
        raise OptionError(f"--tensorboard needs TensorBoard, which is not installed; {cure}") from None
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    return SummaryWriter(str(folder))


CONDITIONS = named(each(maybe(POSITIVE), count=2))  # of each layer, the raw weight's and the effective one's
METRICS = fields(
    epoch=COUNT, step=COUNT, rate=NUMBER, train_loss=NUMBER, val_loss=NUMBER, val_score=NUMBER, condition=CONDITIONS
)
TIMING = fields(epoch=COUNT, seconds=NUMBER)


class Judged(NamedTuple):
    """What a split says of a model."""

    loss: float  # the mean
    score: float  # accuracy or R²
    top5: float | None  # the part of targets among its first five classes; None where that says nothing
    marks: Tensor  # (n,), what each sample adds to the score, see marks


def read_run(folder: Path, epochs: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads the metrics and the timing of a finished run."""
    metrics = record.read_lines(folder / METRICS_FILE, METRICS, "epoch")
    timing = record.read_lines(folder / TIMING_FILE, TIMING, "epoch")
    if not len(metrics) == len(timing) == epochs:
        raise RecordError(
            f"{folder} is damaged: its result is of {epochs} epochs, metrics of {len(metrics)}, timing of "
            f"{len(timing)}; remove the folder {folder} and give the same command: only this run is trained again"
        )
    return metrics, timing


def validation(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's result says on validation data, by which rates are chosen (:func:`~normkit.lab.stats.best`)."""
    names = {"status": "status", "score": "val_score", "loss": "val_loss", "reached": "epochs"}
    return {name: found[key] for name, key in names.items()}


class Trainer:
    """Trains one run from its beginning or from its last checkpoint."""

    def __init__(
        self,
        rate: float,
        seed: int,
        settings: Settings,
        model: nn.Module,
        data: Data,
        fabric: Fabric,
        folder: Path,
        curves: Path | None = None,
    ) -> None:
        self.rate, self.seed, self.settings, self.data, self.fabric = rate, seed, settings, data, fabric
        self.folder = folder
        if len(data.train) < fabric.world_size:
            raise OptionError(
                f"there are {len(data.train)} training samples for {fabric.world_size} processes; wanted at least one each: "
                "start fewer processes, or give more samples"
            )
        self.unsharded = keep_whole(model, settings, fabric)
        self.placed = place(model, settings, rate, fabric)
        self.average = Average(model, settings.ema) if settings.ema else None
        # A split smaller than a batch is one batch; each process gets as many samples as the others.
        self.batch = min(settings.batch_size, len(data.train) // fabric.world_size * fabric.world_size)
        self.steps = len(data.train) // self.batch
        self.metrics: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []
        self.marks = torch.zeros(0)
        self.curves = curve_writer(curves) if curves is not None and fabric.is_global_zero else None

    def train(self, on_epoch: Callable[[int, float | None], None] = lambda epoch, score: None) -> dict[str, Any]:
        """Trains to the end and gives the run's result; the first process writes metrics and timing."""
        if self.fabric.is_global_zero:
            make(self.folder)
        self._resume()
        if self.curves:
            write_curves(self.curves, self.metrics)
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
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)
        trained = time.perf_counter()
        if not math.isfinite(train_loss):
            return False
        with self._judged():
            val_loss, val_score, *_ = self.evaluate(self.data.val)
        if not (math.isfinite(val_loss) and math.isfinite(val_score)):
            return False
        last = epoch * self.steps - 1
        self.metrics.append(
            {
                "epoch": epoch,
                "step": last + 1,
                "rate": rate_at(self.settings, self.rate, last, self.steps * self.settings.epochs),
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_score": val_score,
                "condition": self.conditions(),
            }
        )
        self.timing.append(
            {"epoch": epoch, "seconds": trained - started, "check_seconds": time.perf_counter() - trained}
        )
        self._save(epoch)
        if self.curves:
            write_curves(self.curves, self.metrics[-1:])
        return True

    def _pass(self, epoch: int) -> float:
        fabric, settings = self.fabric, self.settings
        reseed(self.seed, "epoch", epoch, fabric.global_rank)
        order = epoch_order(self.seed, epoch, len(self.data.train))
        self.placed.wrapped.train()
        total = torch.zeros((), device=fabric.device)
        for count in range(self.steps):
            step = (epoch - 1) * self.steps + count
            for group in self.placed.optimizer.param_groups:
                group["lr"] = rate_at(settings, self.rate, step, self.steps * settings.epochs)
            rows = order[count * self.batch : (count + 1) * self.batch]
            inputs, targets = self._read(self.data.train, rows[fabric.global_rank :: fabric.world_size], "read", step)
            if self.data.augment is not None:
                assert isinstance(inputs, Tensor)
                drawn = generator(self.seed, "augment", epoch, count, fabric.global_rank, fabric.device)
                inputs = self.data.augment(inputs, drawn)
            # Every process holds all targets, so that none has to ask the others how many of theirs are ignored.
            whole = task.weight(self.data.train.targets[rows])
            total += train_step(fabric, self.placed, settings, inputs, targets, whole)
            if self.average is not None:
                self.average.update(step + 1)
            if count % LOOK_EVERY == LOOK_EVERY - 1 and not math.isfinite(self._mean(total)):
                return math.nan
        return self._mean(total) / self.steps

    def _read(self, split: Split, rows: Tensor, purpose: str, count: int) -> tuple[Inputs, Tensor]:
        # Apart from the model's draws: one that draws more, as with dropout, is given the same samples.
        with apart(self.seed, purpose, count, self.fabric.global_rank):
            return split.batch(rows, self.fabric.device)

    def evaluate(self, split: Split) -> Judged:
        """Judges the model on a split, over all processes."""
        fabric = self.fabric
        # What the model draws is the same whatever the recipe, and whether or not the run was stopped before.
        reseed(self.seed, "judge", rank=fabric.global_rank)
        # Four sums, and what each sample adds to the score.
        found = torch.zeros(4 + len(split), dtype=torch.float64)
        self.placed.wrapped.eval()
        with torch.no_grad():
            for count, chunk in enumerate(torch.arange(len(split)).split(4 * self.settings.batch_size)):
                mine = chunk[fabric.global_rank :: fabric.world_size]
                # Every process calls the model as often as the others, or the others would wait for it for ever.
                inputs, targets = self._read(split, mine if len(mine) else chunk[:1], "read to judge", count)
                output = task.call(self.placed.wrapped, arranged(inputs, self.settings))
                if len(mine):
                    found[:4] += task.tally(output, targets).cpu()
                    found[4 + mine] = task.marks(output, targets).cpu()
        if fabric.world_size > 1:
            found = torch.as_tensor(fabric.all_reduce(found.to(fabric.device), reduce_op="sum")).cpu()
        sums = found[:4]
        return Judged(*task.score(sums, split.targets), task.among_five(sums), found[4:])

    def _mean(self, value: Tensor) -> float:
        if self.fabric.world_size > 1:
            value = torch.as_tensor(self.fabric.all_reduce(value.clone(), reduce_op="mean"))
        return float(value)

    def conditions(self) -> dict[str, list[float | None]]:
        """Takes the condition numbers of every layer's raw and effective weight, where they are asked for."""
        if not self.settings.condition:
            return {}
        from normkit.diagnostics.conditioning import weight_conditions

        with torch.no_grad():
            found = weight_conditions(self.placed.whole(self.unsharded))
        # JSON has no infinity: a singular weight has null.
        return {name: [k if math.isfinite(k) else None for k in pair] for name, pair in found.items()}

    def _judged(self) -> Any:
        return nullcontext() if self.average is None else self.average.in_place()

    def _save(self, epoch: int) -> None:
        state = {
            "epoch": epoch,
            **self.placed.state(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "metrics": self.metrics,
            "timing": self.timing,
        }
        if self.average is not None:
            state["average"] = self.average.state()
        if self.fabric.is_global_zero:
            record.write_checkpoint(self.folder / CHECKPOINT, state)
            self._write_lines()

    def _write_lines(self) -> None:
        record.write_lines(self.folder / METRICS_FILE, self.metrics)
        record.write_lines(self.folder / TIMING_FILE, self.timing)

    def _resume(self) -> None:
        path, state = self.folder / CHECKPOINT, None
        if self.fabric.is_global_zero and path.exists():
            state = record.read_checkpoint(path, STATE)
        if self.fabric.world_size > 1:
            state = self.fabric.broadcast(state)
        if state is None:
            return
        self.metrics, self.timing = state["metrics"], state["timing"]
        self.placed.load(state)
        if self.average is not None:
            self.average.load(state["average"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.fabric.is_global_zero:
            self._write_lines()

    def _finish(self, status: str) -> dict[str, Any]:
        test_loss = test_score = top5 = None
        if status == OK:
            with self._judged():
                test_loss, test_score, top5, self.marks = self.evaluate(self.data.test)
            if not (math.isfinite(test_loss) and math.isfinite(test_score)):
                status, test_loss, test_score, top5 = DIVERGED, None, None, None
        scores = [row["val_score"] for row in self.metrics]
        result = {
            "status": status,
            "best_val_score": max(scores, default=None),
            "val_score": scores[-1] if status == OK else None,
            "val_loss": self.metrics[-1]["val_loss"] if status == OK else None,
            "test_score": test_score,
            "test_loss": test_loss,
            "test_top5": top5,
            "epochs": len(scores),
            "steps": len(scores) * self.steps,
        }
        if self.fabric.is_global_zero:
            self._write_lines()
        if self.curves:
            self.curves.close()
        return result


def train_step(
    fabric: Fabric, placed: Placed, settings: Settings, inputs: Inputs, targets: Tensor, whole: Tensor | None = None
) -> Tensor:
    """Runs forward, backward and update on one batch, in as many parts as asked for, and gives the loss on its device.

    Processes average their gradients, so each scales its loss by ``world_size * weight(targets) / whole``: the average is
    then over targets, as one process takes it, wherever the ignored ones lie. Inputs and targets are this process's
    share; `whole` is the :func:`~normkit.lab.task.weight` of the batch over all processes, by default as much in each as
    in this one.
    """
    placed.stepper.zero_grad()
    inputs = arranged(inputs, settings)
    parts = torch.arange(len(targets)).chunk(settings.accumulate)
    whole = (fabric.world_size * task.weight(targets) if whole is None else whole).clamp(min=1)
    total = None
    for count, part in enumerate(parts):
        some = (inputs, targets) if len(parts) == 1 else (take(inputs, part), targets[part])
        loss = task.loss(task.call(placed.wrapped, some[0]), some[1], settings.label_smoothing)
        if len(parts) > 1 or fabric.world_size > 1:
            loss = loss * (fabric.world_size * task.weight(some[1]) / whole)
        # Gradients are averaged over processes once, with the last part.
        waits = fabric.world_size > 1 and count < len(parts) - 1
        with fabric.no_backward_sync(placed.wrapped) if waits else nullcontext():
            fabric.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    if settings.clip is not None:
        # A gradient that is not finite shows in the loss, where it is looked for.
        fabric.clip_gradients(placed.wrapped, placed.stepper, max_norm=settings.clip, error_if_nonfinite=False)
    placed.stepper.step()
    assert total is not None
    return total


def arranged(inputs: Inputs, settings: Settings) -> Inputs:
    """Puts the channels of images last in memory, where that was asked for."""
    if settings.channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs
