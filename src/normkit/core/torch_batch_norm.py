"""What stands in for torch's batch norm: a base that its converters and fusers know, and that says what they would lose."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import nn

from normkit.core.errors import SurgeryError


class _Eps:
    """A batch norm's eps, which nobody may read in order to replace the layer by one that computes something else.

    Converters and fusers know a batch norm by its attributes, and eps is the one that all of them need; torch gives a module no
    other say in the matter. Whoever else reads it gets it.
    """

    def __get__(self, module: Any, owner: type[Any]) -> Any:
        if module is None:
            return self
        for converting in (True, False):
            lost = module.lost(converting)
            reader = sys._getframe(1).f_code.co_name if lost else ""
            if (reader == "convert_sync_batchnorm") if converting else ("fuse" in reader):
                raise SurgeryError(f"{reader}: {type(module).__name__} would lose {lost}")
        return module.__dict__["eps"]

    def __set__(self, module: Any, value: float) -> None:
        module.__dict__["eps"] = value


class TorchBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Base of the layers that are batch norms to torch's tools: they have its parameters and buffers.

    A compiler can't follow who reads ``eps``: ``forward`` reads ``self.__dict__["eps"]``.
    """

    in_training: ClassVar[str] = ""  # what a layer of torch would not do in its place, with the cure
    always: ClassVar[str] = ""  # the same in evaluation too

    eps: float = _Eps()  # pyright: ignore[reportAssignmentType]

    def lost(self, converting: bool) -> str:
        """What a layer of torch in this one's place would lose, with the cure, or nothing.

        Args:
            converting: to torch's synchronized batch norm; otherwise it is fused into the layer before.
        """
        activation, layout = getattr(self, "activation", None), getattr(self, "layout", "n c *")
        if activation is not None:
            return f"activation={activation!r}; set it to None and put {activation} behind the layer as a module of its own"
        if converting and layout != "n c *":
            return f"layout={layout!r}; put normkit's SyncBatchNorm with this layout in its place"
        return self.always or (self.in_training if converting else "")
