"""Checkpoints in files: safetensors by the ending of the path, else torch's, of tensors alone."""

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from normkit.core.errors import SurgeryError

Path = str | PathLike[str]
_ENDING = ".safetensors"


def read_checkpoint(path: Path) -> Mapping[Any, Any]:
    """The tensors in a file; nothing in it is run."""
    if fspath(path).endswith(_ENDING):
        return _safetensors().load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    held = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if held is None:
        raise SurgeryError(f"{fspath(path)}: wanted tensors by name; got a {type(found).__name__}")
    return held


def write_checkpoint(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors by name, each for itself where they share memory; a file that was there is whole until the new one is."""
    part = f"{fspath(path)}.part"
    try:
        if fspath(path).endswith(_ENDING):
            written = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
            _safetensors().save_file(written, part, metadata={"format": "pt"})
        else:
            torch.save(dict(state), part)
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(part)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise SurgeryError(
            f"{_ENDING} files need safetensors, which is not installed; pip install safetensors"
        ) from None
