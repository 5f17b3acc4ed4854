"""The monitor as a callback of Lightning's Trainer, which needs ``pip install lightning``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from normkit.diagnostics.monitor import Monitor


class MonitorCallback(Callback):
    """Gives a Monitor's records to the trainer's loggers: TensorBoard, Weights & Biases and any other.

    Args:
        every: least number of batches from sample to sample. Default: 100.
        **options: of ``Monitor``.

    >>> MonitorCallback(every=10).state_key
    'MonitorCallback'
    """

    def __init__(self, every: int = 100, **options: Any) -> None:
        self.options, self.monitor = {"every": every, **options}, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor = Monitor(pl_module, **self.options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.monitor is not None
        record = self.monitor.step()
        if record is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(record, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
