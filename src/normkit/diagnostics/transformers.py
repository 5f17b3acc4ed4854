"""The monitor as a callback of Hugging Face's Trainer, which needs ``pip install transformers accelerate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from normkit.diagnostics.monitor import Monitor


class MonitorCallback(TrainerCallback):
    """Gives a Monitor's records to a function, as by ``trainer.add_callback(MonitorCallback(trainer.log))``.

    The trainer's own ``log`` reports them wherever it reports the loss.

    Args:
        log: called with each record.
        every: least number of optimizer steps from sample to sample. Default: 100.
        **options: of ``Monitor``.

    >>> MonitorCallback(print, every=10).options
    {'every': 10}
    """

    def __init__(self, log: Callable[[dict[str, float]], object], every: int = 100, **options: Any) -> None:
        self.log, self.options = log, {"every": every, **options}
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.monitor = Monitor(known["model"], **self.options)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        assert self.monitor is not None
        record = self.monitor.step()
        if record is not None and state.is_world_process_zero:
            self.log(record)

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()
