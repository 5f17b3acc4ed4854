"""A base that torch's converters and fusers take for its batch norm, and that refuses those that would lose something."""

import sys
from typing import Any, ClassVar

from torch import nn

from normkit.core.errors import SurgeryError


class _Eps:
    """A batch norm's eps, which refuses readers that would replace the layer by one that computes something else.

    Converters and fusers read a batch norm's attributes, and eps is the one that all of them need; torch offers a module no other
    way to object. The reader is known by the name of the calling function, which is fragile: a tool with another name gets eps.
    """

    def __get__(self, module: Any, owner: type[Any]) -> Any:
        if module is None:
            return self
        for converting in (True, False):
            lost = module.lost(converting)
            reader = sys._getframe(1).f_code.co_name if lost else ""
            if (reader == "convert_sync_batchnorm") if converting else ("fuse" in reader):
                raise SurgeryError(f"{reader}: {type(module).__name__} would lose {lost}")
        # From the module's own dict, where a data descriptor of the class keeps it out of reach of plain attribute access.
        return module.__dict__["eps"]

    def __set__(self, module: Any, value: float) -> None:
        module.__dict__["eps"] = value


class TorchBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Base of the layers that torch's tools treat as batch norms: they have its parameters and buffers.

    A compiler cannot trace the check of the reader: ``forward`` reads ``self.__dict__["eps"]``.
    """

    in_training: ClassVar[str] = ""  # what torch's layer would lose in training, with the cure
    always: ClassVar[str] = ""  # what it would lose in evaluation too

    eps: float = _Eps()  # pyright: ignore[reportAssignmentType]

    def lost(self, converting: bool) -> str:
        """What torch's synchronized batch norm (``converting``) or a fused layer would lose in its place, with the cure."""
        activation, layout = getattr(self, "activation", None), getattr(self, "layout", "n c *")
        if activation is not None:
            return f"activation={activation!r}; set it to None and add {activation} as a module after the layer"
        if converting and layout != "n c *":
            return f"layout={layout!r}; replace it by normkit's SyncBatchNorm with this layout"
        return self.always or (self.in_training if converting else "")
