"""Where a comparison runs: Lightning Fabric's devices and processes, and what the record says of them."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

from normkit.core.errors import OptionError
from normkit.lab.memory import keep_memory
from normkit.lab.parallel import shard
from normkit.lab.settings import Settings


def start_fabric(settings: Settings) -> Fabric:
    """Starts Fabric on the devices asked for; under torchrun it joins the processes that torchrun made.

    On a CPU the process keeps the memory that it takes, see :func:`~normkit.lab.memory.keep_memory`.

    Args:
        settings: accelerator, devices, precision, and a batch size that the processes must share evenly.

    Raises:
        OptionError: Fabric refuses them, or the batch does not split among the processes.
    """
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


def part() -> None:
    """Lets the processes that torchrun made end together, where there are some: one that leaves early can make others abort."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def device_name(fabric: Fabric) -> str:
    """Names the device and, where there are several processes, their number.

    >>> device_name(Fabric(accelerator="cpu", devices=1))
    'cpu'
    """
    return fabric.device.type if fabric.world_size == 1 else f"{fabric.device.type} x {fabric.world_size}"


def hardware() -> str:
    """Names the GPU on which this process's runs are done, or the processor where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def environment(fabric: Fabric, started: str) -> dict[str, Any]:
    """Describes the software and the machine.

    Args:
        fabric: started.
        started: when, in ISO format.
    """
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else fabric.device.type,
        "processes": fabric.world_size,
        "precision": fabric.strategy.precision.precision,
        "started": started,
    }


def versions() -> dict[str, str | None]:
    """Gives the versions of normkit, Python and what it computes with; None where one is not installed."""
    found: dict[str, str | None] = {"normkit": None, "python": platform.python_version()}
    for package in ("normkit", "torch", "lightning-fabric", "numpy", "scipy", "scikit-learn"):
        key = package.replace("-", "_")
        try:
            # torch.__version__ says which build (+cpu, +cu126), which the package's metadata may not.
            found[key] = torch.__version__ if package == "torch" else version(package)
        except PackageNotFoundError:
            found[key] = getattr(sys.modules.get("normkit"), "__version__", None) if package == "normkit" else None
    return found


def cores() -> int:
    """Counts the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Names the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
