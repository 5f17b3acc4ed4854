"""Lightning Fabric, started on the devices and processes that settings ask for."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

from normkit.core.errors import OptionError
from normkit.lab.memory import keep_memory
from normkit.lab.settings import Settings
from normkit.lab.sweep import Group
from normkit.lab.train.parallel import shard

T = TypeVar("T")


class Processes(Group):
    """The processes of a Fabric, which do each job together."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.first = fabric, fabric.is_global_zero

    def share(self, make: Callable[[], T]) -> T:
        """Gives to all what `make` gives to the first process, which alone calls it."""
        if self.fabric.world_size == 1:
            return make()
        return self.fabric.broadcast(make() if self.first else None)  # pyright: ignore[reportReturnType]


def start_fabric(settings: Settings) -> Fabric:
    """Starts Fabric on the devices asked for; under torchrun it joins the processes that torchrun made."""
    keep_memory()
    devices: str | int = int(settings.devices) if settings.devices.lstrip("-").isdigit() else settings.devices
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # On a CPU "auto" is one process, whatever torchrun started.
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices = local if devices == "auto" else devices
        nodes = int(os.environ["WORLD_SIZE"]) // local
    strategy: Any = settings.strategy
    if strategy == "fsdp":
        # Fabric's own FSDP strategy is for GPUs alone.
        strategy = ModelParallelStrategy(shard)
    try:
        fabric = Fabric(
            accelerator=settings.accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=nodes,
            precision=settings.precision,  # pyright: ignore[reportArgumentType]
        )
        fabric.launch()
    except Exception as error:
        asked = f"accelerator={settings.accelerator}, devices={settings.devices}, precision={settings.precision}"
        raise OptionError(f"Lightning Fabric can't start with {asked}: {error}") from error
    if settings.batch_size % fabric.world_size:
        raise OptionError(
            f"batch_size {settings.batch_size} does not split among {fabric.world_size} processes; "
            f"wanted a multiple of {fabric.world_size}"
        )
    return fabric
