"""The bases of layers: statistics stay in at least float32, sizes are integers, TorchScript is refused; torch's batch norm."""

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from normkit.core.errors import BackendError, ShapeError, SurgeryError

_INITIAL: dict[str, float] = dict.fromkeys(("weight", "running_var", "running_std"), 1.0)
_INITIAL |= {"bias": 0.0, "running_mean": 0.0, "num_batches_tracked": 0}


class ShownModule(nn.Module):
    """A module that tells its arguments: those of a template, and further ones that have unusual values."""

    shown: ClassVar[str] = ""  # a format of the module, such as "{0.features}, eps={0.eps}"
    unusual: ClassVar[Mapping[str, Any]] = {}  # attributes that it shows where they differ from these values

    def extra_repr(self) -> str:
        """The arguments: those of the template ``shown`` (torch's own without one), and those that are ``unusual``."""
        return (self.shown.format(self) or super().extra_repr()) + self.repr_options(**self.unusual)

    def repr_options(self, **defaults: Any) -> str:
        """The named attributes that differ from their defaults, as ``extra_repr`` shows them."""
        return "".join(f", {k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default)


class Module(ShownModule):
    """Base of every layer.

    Buffers hold statistics, for which half types are too narrow: bfloat16 loses a step of momentum 0.001, float16 a variance
    beyond 65504. So ``half()``, ``bfloat16()`` and ``to(dtype)`` with a half type leave floating buffers in their dtype, and a
    buffer registered in a half type becomes float32. Everything else is as in torch. As ``load_state_dict`` copies values into
    the existing dtype, checkpoints of half-precision models load into these layers, and theirs into half-precision models.
    """

    training: bool = True  # torch's own tests delete the attribute of instances that should not need it

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, whole(value))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        wide = tensor.float() if tensor is not None and _is_half(tensor) else tensor
        super().register_buffer(name, wide, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and _is_half(buffer) and not _is_half(old):
                # The old buffer is moved, as the new one has lost digits already. MPS has no float64.
                self._buffers[name] = old.to(buffer.device, torch.float32 if buffer.device.type == "mps" else None)
        return self

    def register_affine(self, shape: Sequence[int], weight: bool = True, bias: bool = True, **factory: Any) -> None:
        """Register ``weight`` and ``bias`` with their initial values, and as None where they are not wanted."""
        for name, wanted in (("weight", weight), ("bias", bias)):
            initial = nn.Parameter(torch.full(tuple(shape), _INITIAL[name], **factory)) if wanted else None
            self.register_parameter(name, initial)

    def register_running(
        self,
        shape: Sequence[int],
        *names: str,
        tracked: bool = True,
        counted: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Register running statistics under torch's names, as None unless tracked; the cumulative average needs the count."""
        for name in names:
            initial = torch.full(tuple(shape), _INITIAL[name], device=device, dtype=dtype) if tracked else None
            self.register_buffer(name, initial)
        if counted:
            zero = torch.tensor(0, dtype=torch.long, device=device) if tracked else None
            self.register_buffer("num_batches_tracked", zero)

    def reset_parameters(self) -> None:
        """Set weights to 1 and biases to 0, and forget the running statistics."""
        self.fill(**_INITIAL)

    def fill(self, **values: float) -> None:
        """Set the named parameters and buffers, as far as the module has them, to one value each."""
        for name, value in values.items():
            if isinstance(tensor := getattr(self, name, None), Tensor):
                nn.init.constant_(tensor, value)

    def __prepare_scriptable__(self) -> NoReturn:
        raise BackendError(
            f"torch.jit.script: TorchScript can't compile {type(self).__name__}, which chooses its kernel in Python; use "
            "torch.export, torch.compile or torch.jit.trace, or fold the norms first with normkit.fold"
        )


def whole(value: Any) -> Any:
    """Convert another library's integer, such as numpy's, to Python's; return anything else unchanged."""
    # torch's symbolic sizes are not Integral, and stay symbolic.
    return operator.index(value) if not isinstance(value, int) and isinstance(value, Integral) else value


def trailing_sizes(who: str, normalized_shape: int | Iterable[int]) -> list[int]:
    """The sizes of trailing axes, given as one number or several; refuse an empty list, as torch does."""
    given = normalized_shape if isinstance(normalized_shape, Iterable) else [normalized_shape]
    sizes = [whole(size) for size in given]
    if not sizes:
        raise ShapeError(f"{who}: normalized_shape={normalized_shape}; wanted the size of at least one trailing axis")
    return sizes


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


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
