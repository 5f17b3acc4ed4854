"""Where a comparison runs: Lightning Fabric's devices and processes, and what the record says of them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from lightning_fabric import Fabric

import normkit


def part() -> None:
    """Lets the processes that torchrun made end together, where there are some: one that leaves early can make others abort."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def device_name(fabric: Fabric) -> str:
    """Names the device and, where there are several processes, their number."""
    return fabric.device.type if fabric.world_size == 1 else f"{fabric.device.type} x {fabric.world_size}"


def hardware() -> str:
    """Names the GPU on which this process's runs are done, or the processor where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def versions() -> dict[str, str | None]:
    """Gives the versions of normkit, Python and what it computes with; None where one is not installed."""
    # As imported: torch says which build it is (+cpu, +cu126), and the metadata of an editable normkit can be older than it.
    own = {"normkit": normkit.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found: dict[str, str | None] = {**own}
    for package in ("lightning-fabric", "numpy", "scipy", "scikit-learn"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = None
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
