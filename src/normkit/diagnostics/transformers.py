"""The monitor as a callback of Hugging Face's Trainer, which needs ``pip install transformers accelerate``."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from normkit.diagnostics.monitor import Monitor


class MonitorCallback(TrainerCallback):
    """Gives a Monitor's records to a function, as by ``trainer.add_callback(MonitorCallback(trainer.log))``.

    Args:
        log: called with each record; the trainer's own ``log`` reports it wherever it reports the loss.
        **options: of ``Monitor``.

    >>> MonitorCallback(print, every=10).options
    {'every': 10}
    """

    def __init__(self, log: Callable[[dict[str, float]], object], **options: Any) -> None:
        self.log, self.options = log, options

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.monitor = Monitor(known["model"], **self.options)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if (record := self.monitor.step()) and state.is_world_process_zero:
            self.log(record)

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.monitor.close()
