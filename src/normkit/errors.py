"""Every error that normkit raises on purpose; see normkit.core.errors for what each is and what it derives from."""

from normkit.core.errors import (
    BackendError,
    NormkitError,
    NotationError,
    OptionError,
    ProtocolError,
    RecordError,
    ShapeError,
    SurgeryError,
)

__all__ = [
    "BackendError",
    "NormkitError",
    "NotationError",
    "OptionError",
    "ProtocolError",
    "RecordError",
    "ShapeError",
    "SurgeryError",
]
