"""A model on its devices: compiled, copied to every process or sharded among them; its state whole either way."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from normkit.gradients.muon import Muon
from normkit.lab.settings import Settings

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
        """Gives the state of model and optimizer; where it is sharded: whole, on the CPU, to the first process, {} to others.

        Every process must ask for it.
        """
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
    """Shards a model among processes: each block of its sequences, and what is left as a whole.

    Its own children that are an ``nn.Sequential`` or ``nn.ModuleList`` hold its blocks.

    Reference: Zhao et al. 2023, PyTorch FSDP, https://arxiv.org/abs/2304.11277
    """
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
