"""The monitor as a callback of Lightning's Trainer, which needs ``pip install lightning``."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from normkit.diagnostics.monitor import Monitor


class MonitorCallback(Callback):
    """Gives a Monitor's records to the trainer's loggers: TensorBoard, Weights & Biases and any other.

    Args:
        **options: of ``Monitor``.

    >>> MonitorCallback(every=10).options
    {'every': 10}
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor = Monitor(pl_module, **self.options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (record := self.monitor.step()) and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(record, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if hasattr(self, "monitor"):
            self.monitor.close()
