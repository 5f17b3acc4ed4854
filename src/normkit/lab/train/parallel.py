"""Lightning Fabric, a model on its devices, copied to every process or sharded among them, and the average of its weights."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from normkit.core.errors import OptionError
from normkit.gradients.muon import Muon
from normkit.lab.memory import keep_memory
from normkit.lab.settings import Settings
from normkit.lab.sweep import Group

BLOCKS = (nn.Sequential, nn.ModuleList)


@dataclass
class Placed:
    """A model and its optimizer, set up by Fabric."""

    model: nn.Module  # as it was given; its tensors are those that are trained
    wrapped: Any  # what to call
    optimizer: torch.optim.Optimizer  # torch's own
    stepper: Any  # Fabric's, whose step is to be called
    sharded: bool  # each process holds a part of every weight

    def state(self) -> dict[str, Any]:
        """Gives the state of model and optimizer; where it is sharded: whole, on the CPU, to the first process, {} to others."""
        if not self.sharded:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` gave. Every process must call it."""
        if not self.sharded:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        whole = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **whole, options=options)

    def whole(self, unsharded: nn.Module | None) -> nn.Module:
        """Gives the model with whole weights, to the first process alone where it is sharded. Every process must ask for it."""
        if unsharded is None:
            return self.model
        if weights := self.state()["model"]:
            unsharded.load_state_dict(weights)
        return unsharded


def place(model: nn.Module, settings: Settings, rate: float, fabric: Fabric) -> Placed:
    """Compiles a model if asked to, sets it up on its devices and makes its optimizer."""
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # The optimizer comes second, as sharding puts new parameters in the place of the old.
    wrapped = fabric.setup_module(torch.compile(model) if settings.compile else model)  # pyright: ignore[reportArgumentType]
    optimizer = make_optimizer(model, settings, rate)
    sharded = fabric.world_size > 1 and settings.strategy == "fsdp"
    return Placed(model, wrapped, optimizer, fabric.setup_optimizers(optimizer), sharded)


def keep_whole(model: nn.Module, settings: Settings, fabric: Fabric) -> nn.Module | None:
    """Copies a model that will be sharded, for :meth:`Placed.whole`; None where it will not be."""
    return copy.deepcopy(model) if fabric.world_size > 1 and settings.strategy == "fsdp" else None


def make_optimizer(model: nn.Module, settings: Settings, rate: float) -> torch.optim.Optimizer:
    """Makes the optimizer that the settings name."""
    parameters, decay = [p for p in model.parameters() if p.requires_grad], settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer.startswith("muon"):
        return Muon(model, rate, weight_decay=decay, equilibrate="row" if settings.optimizer == "muoneq" else None)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
    return kind(parameters, rate, weight_decay=decay)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shards a model among processes: each block of the sequences that are its children, and what is left as a whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    line = init_device_mesh(mesh.device_type, (mesh.size(),))
    sequences = (
        [model] if isinstance(model, BLOCKS) else [part for part in model.children() if isinstance(part, BLOCKS)]
    )
    for sequence in sequences:
        for block in sequence:
            if any(parameter.requires_grad for parameter in block.parameters()):
                fully_shard(block, mesh=line)
    fully_shard(model, mesh=line)
    return model


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


class Average:
    """Follows a model's parameters, and the running statistics of its norms, and takes their place when it is judged.

        average <- d * average + (1 - d) * value,   d = min(decay, (1 + n) / (10 + n)) at step n

    The smaller decay of the first steps, that of TensorFlow's ExponentialMovingAverage, lets the average forget the initial
    weights. Averages are held in single precision at least: in half of it, steps of a thousandth round to none. What a weight
    parametrization keeps for itself, such as the vectors of spectral norm, and counters are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live: dict[str, Tensor] = dict(model.named_parameters())
        self.live |= {
            name: buffer
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() and "parametrizations." not in name
        }
        with torch.no_grad():
            self.values = {
                name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
                for name, tensor in self.live.items()
            }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the model's values."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.live.items():
            value = self.values[name]
            value.lerp_(tensor.to(value.dtype), 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the model, and the model's own values back at the end."""
        own = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self.live.items():
            tensor.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """Gives the average, whole where it is sharded. Every process must ask for it."""
        return {
            name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in self.values.items()
        }

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state` gave."""
        for name, value in self.values.items():
            given = values[name].to(value.device)
            if isinstance(value, DTensor):
                given = distribute_tensor(given, value.device_mesh, value.placements)
            value.copy_(given)
