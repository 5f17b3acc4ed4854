"""Checkpoints in files: safetensors by the ending of the path, else torch's, of tensors alone."""

import importlib
from collections.abc import Mapping
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
    """Write tensors by name; those that share memory are written each for itself."""
    if not fspath(path).endswith(_ENDING):
        torch.save(dict(state), path)
        return
    written = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    _safetensors().save_file(written, path, metadata={"format": "pt"})


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise SurgeryError(
            f"{_ENDING} files need safetensors, which is not installed; pip install safetensors"
        ) from None
