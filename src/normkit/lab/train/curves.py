"""Curves of runs for TensorBoard."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from normkit.core.errors import OptionError

SHOWN = ("rate", "train_loss", "val_loss", "val_score")


class Curves:
    """Writes a run's epochs as TensorBoard reads them."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError:
            raise OptionError(
                "--tensorboard needs TensorBoard, which is not installed; pip install 'normkit[tensorboard]'"
            ) from None
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self.writer = SummaryWriter(str(folder))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            for name in SHOWN:
                self.writer.add_scalar(name, row[name], row["epoch"])
            for layer, (raw, effective) in row["condition"].items():
                for kind, value in {"raw": raw, "effective": effective}.items():
                    if value is not None:
                        self.writer.add_scalar(f"condition_{kind}/{layer}", value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
