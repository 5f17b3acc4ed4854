"""Randomness as a function of seed and epoch alone, so that a run goes on after a stop as if there had been none."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def reseed(seed: int, purpose: str, epoch: int = 0, rank: int = 0) -> None:
    """Seeds torch, numpy and Python's random for a purpose, an epoch from 1 and a process, which draw independently."""
    drawn = _mix(seed, purpose, epoch, rank)
    torch.manual_seed(drawn)
    np.random.seed(drawn % 2**32)
    random.seed(drawn)


def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """Permutes the samples of an epoch; the same for every recipe."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(_mix(seed, "order", epoch, 0)))


def order_sha256(seed: int, epochs: int, samples: int) -> str:
    """Hashes the order of the samples over a whole run."""
    digest = hashlib.sha256()
    for epoch in range(1, epochs + 1):
        digest.update(epoch_order(seed, epoch, samples).numpy().tobytes())
    return digest.hexdigest()


def init_sha256(model: nn.Module) -> str:
    """Hashes the names, types and values of a model's parameters and buffers."""
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """Hashes names, types and values of tensors; what is none is passed over."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def generator(seed: int, purpose: str, epoch: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """Makes a generator for one step's draws, the same whatever came before."""
    return torch.Generator(device).manual_seed(_mix(seed, f"{purpose} {step}", epoch, rank))


@contextmanager
def borrowed_randomness(threads: int | None = None) -> Iterator[None]:
    """Gives the caller's random states, number of threads and modes (:func:`borrowed_modes`) back at the end."""
    before = torch.get_num_threads()
    with _states(), borrowed_modes():
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def borrowed_modes() -> Iterator[None]:
    """Gives torch's default dtype and grad mode back at the end, which a user's code may set for itself."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


@contextmanager
def apart(seed: int, purpose: str, count: int, rank: int = 0) -> Iterator[None]:
    """Seeds what is drawn on the CPU inside, as :func:`reseed` does, and lets draws go on behind it as if there had been none."""
    with _states():
        drawn = _mix(seed, purpose, count, rank)
        torch.default_generator.manual_seed(drawn)  # not torch.manual_seed, which would seed devices too
        np.random.seed(drawn % 2**32)
        random.seed(drawn)
        yield


@contextmanager
def _states() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _mix(seed: int, purpose: str, epoch: int, rank: int) -> int:
    # A hash, not a sum: seed 0 epoch 1 and seed 1 epoch 0 must not share their draws.
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {epoch} {rank}".encode()).digest()[:8], "big") >> 1
