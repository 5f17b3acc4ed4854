"""A module that runs a rule."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.memory import Running, RunningStatistics
from normkit.core.module import Module
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Guard, Scale, Statistic
from normkit.core.support import Support, show
from normkit.engine.call import Activation, Backend, Call, Output, Save
from normkit.engine.choose import Explanation, kept
from normkit.engine.dispatch import explained, perform_by, quantize
from normkit.engine.dropout import check_dropout, drop
from normkit.engine.guard import calm
from normkit.engine.known import Known
from normkit.engine.reference import check_activation

Cast = Literal["after weight", "before weight"]  # when a half type is rounded

MADE = ("_rule", "_known")  # made from a layer's other attributes when needed, so never copied or pickled


class Layer(Module):
    """Mixin of every layer that is one rule: ``forward`` runs the rule with the module's parameters and buffers.

    A subclass defines ``make_rule`` and ``check``. The attribute ``backend`` is ``"auto"`` unless set; ``explain(x)`` says what
    would run. The attribute ``activation`` is applied in the same pass: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``,
    ``"gelu"``, ``"gelu_tanh"`` or None. The attribute ``save`` says what is kept for the backward pass, ``"input"`` or
    ``"output"``; ``dropout``, of a layer whose constructor takes it, the probability of a zero in the output in training.
    """

    backend: Backend = "auto"
    activation: Activation | None = None
    save: Save = "input"
    dropout: float = 0.0
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def make_rule(self) -> Rule:
        """Make the rule from the module's current attributes."""
        raise NotImplementedError

    def check(self, input: Tensor) -> None:
        """Refuse an input that does not fit, by ShapeError."""

    @property
    def rule(self) -> Rule:
        """The rule that ``forward`` runs; made again after an attribute such as ``eps`` is set."""
        own = self.__dict__
        if "_rule" not in own:
            own["_rule"] = self.make_rule()
        return own["_rule"]

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            input: of the rule's axes.
            mask: boolean, broadcasts over the input; elements where it is False enter no statistic and become zero.

        Returns:
            A tensor of the input's shape and dtype.

        Raises:
            ShapeError: the input does not fit.
        """
        own = self.__dict__  # nn.Module's __getattr__ is slow next to a small kernel
        if own.get("dropout", 0.0) and self.training:
            return drop(self._perform(self._call(input, mask)).y, own["dropout"])
        # calm() first: a compiler would guard its graph on whatever is read here, and compile again when that changes.
        if calm() and mask is None and "_known" in own and not input.is_nested:
            parameters, buffers = own["_parameters"], own["_buffers"]
            tensors = input, parameters.get("weight"), parameters.get("bias")
            for known in own["_known"]:
                if known.quick is None:
                    continue
                given = (buffers.get("running_mean"), buffers.get("running_var")) if known.given else ()
                if known.fits(*tensors, *given):
                    return known.quick(*tensors, *given)
        return self._perform(self._call(input, mask)).y

    def _call(self, input: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Call:
        """The call for an input: the module's parameters, buffers and options as they are now."""
        own = self.__dict__
        parameters = own["_parameters"]
        if "weight" in parameters and "bias" in parameters:
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # plain attributes, as in FSDP and in replicas of DataParallel; or a layer without parameters
            weight, bias = self.weight, self.bias
        running, by_own = self.running(), True
        if running is not None:  # a layer that is the same in both modes may lack ``training``
            by_own = self.training
            if by_own and not own.get("track_running_stats", False):
                running = None
        return Call(
            *(self.rule, input, weight, bias, residual, running, by_own, mask),
            *(self.activation, False, self.backend, self.save),
        )

    def _perform(self, call: Call) -> Output:
        """Run a call, by the choice of a recent one if its tensors were like these."""
        own = self.__dict__
        keeps = calm() and call.mask is None and call.residual is None and not call.x.is_nested
        last: tuple[Known, ...] = own.get("_known", ()) if keeps else ()
        for known in last:
            if known.agrees(call):
                return perform_by(known.choice, call)
        self._fits(call.x)  # after the comparison, as an input like an earlier one has passed it already
        choice = kept(call, call.key())
        if keeps and choice.backend == "native":
            # Four, as a layer may alternate between a few shapes; every one more is compared at each miss.
            own["_known"] = (Known.of(call, choice), *last[:3])
        return perform_by(choice, call)

    def _fits(self, input: Tensor) -> None:
        """Refuse an input that does not fit; a nested tensor has no single shape, and its tensors are checked one by one."""
        if not input.is_nested:
            self.check(input)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._forget()
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        self._forget()
        super().register_buffer(name, tensor, persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            check_activation(value)
            if value is not None and not _takes(type(self), name):
                raise OptionError(
                    f"{type(self).__name__}: activation={value!r} would be ignored, as this layer does not fuse one; "
                    "add the activation after it"
                )
            self._check_save(self.save, value)
        if name == "save":
            self._check_save(value, self.activation)
        if name == "dropout":
            check_dropout(type(self).__name__, value, not value or _has_argument(type(self), name))
        self._forget()
        super().__setattr__(name, value)

    def _check_save(self, save: Any, activation: str | None) -> None:
        who = type(self).__name__
        check_options(who, save=(save, Save))
        if save == "input":
            return
        if not _takes(type(self), "save"):
            raise OptionError(f'{who}: save="output" would be ignored, as this layer keeps its input; leave it out')
        if activation not in (None, "leaky_relu"):
            raise OptionError(
                f'{who}: save="output" can\'t undo activation={activation!r}, which maps several inputs to one output; '
                'wanted None or "leaky_relu", or save="input"'
            )

    def __delattr__(self, name: str) -> None:
        self._forget()
        super().__delattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in MADE}

    def _forget(self) -> None:
        # After any change of an attribute, as each may be one that the rule or the choice was made from.
        for name in MADE:
            self.__dict__.pop(name, None)

    def after_sum(self, input: Tensor, residual: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalize input + residual and return that sum too: the step between two blocks of a residual network, in one pass.

        Args:
            input: a branch's output.
            residual: of the input's shape and dtype.
            mask: as for ``forward``.

        Returns:
            What ``forward`` returns for the sum, and the sum.

        Raises:
            ShapeError: the input does not fit, or the residual is of another shape or dtype.
            OptionError: the layer has a ``forward`` of its own, as one with a condition has.
        """
        self._runs_the_rule_alone("after_sum", "add the residual and call the layer")
        y, total, *_ = self._perform(self._call(input, mask, residual))
        assert total is not None
        p = self.__dict__.get("dropout", 0.0)  # as in ``forward``
        return (drop(y, p) if p and self.training else y), total

    def quantized(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize and round each row of the last axis to whole numbers with a scale of its own, for inference.

        scale = max|y| / 127 over a row of what ``forward`` returns in evaluation, and q = round(y / scale): what the dynamic
        quantization of a linear layer behind the norm wants. In one pass where the norm is over the last axis, on a CPU.

        Args:
            input: as for ``forward``.

        Returns:
            q, int8 of the input's shape, and scale, float32 of the input's shape with a last axis of 1; y is about q * scale. A
            row of zeros, or of nothing, has the scale 0; one with a NaN, an infinity or a number beyond float32 the scale NaN.

        Raises:
            ShapeError: the input does not fit, or is nested.
            OptionError: the layer has a ``forward`` of its own, as one with a condition has.

        Reference:
            Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022),
            https://arxiv.org/abs/2208.07339, section 2.1.

        >>> import torch, normkit
        >>> normkit.RMSNorm(2, elementwise_affine=False).quantized(torch.tensor([[3.0, 4.0]]))
        (tensor([[ 95, 127]], dtype=torch.int8), tensor([[0.0089]]))
        """
        self._runs_the_rule_alone("quantized", "call the layer and round its output")
        if input.is_nested:
            raise ShapeError(
                f"{type(self).__name__}.quantized: got a nested tensor, whose rows differ in length; wanted one of a single "
                "shape: pass its tensors one by one, or its values()"
            )
        # A copy rather than a switch of the mode, which other threads would see.
        layer = copy.copy(self).eval() if self.training and self.running() is not None else self
        with torch.no_grad():
            return layer._quantize(input.detach())

    def _quantize(self, input: Tensor) -> tuple[Tensor, Tensor]:
        self._fits(input)
        return quantize(self._call(input, None))

    def _runs_the_rule_alone(self, method: str, instead: str) -> None:
        """Refuse a method that runs the rule where ``forward`` does more."""
        if type(self).forward is not Layer.forward:
            raise OptionError(
                f"{type(self).__name__}.{method}: the layer has a forward of its own, and this would run its rule alone; wanted "
                f"a layer that is its rule, such as LayerNorm; {instead} instead"
            )

    def complete(self, bias: bool = True) -> None:
        """End a constructor: drop the bias that torch's made if it is not wanted, and make the rule.

        The rule refuses options that do not go together here rather than at the first input, and a compiler, which would trace
        its making, finds it ready.
        """
        if not bias:
            self.register_parameter("bias", None)
        _ = self.rule

    def running(self) -> RunningStatistics | None:
        """The module's running statistics, or None where it keeps none."""
        buffers = self._buffers
        mean, var = buffers.get("running_mean"), buffers.get("running_var")
        if mean is None or var is None:
            return None
        return RunningStatistics(mean, var, buffers.get("num_batches_tracked"))

    def explain(self, input: Tensor) -> Explanation:
        """Say which back end would normalize this input, and why.

        Args:
            input: as for ``forward``.

        Returns:
            The choice with its reason; ``print`` it.
        """
        self._fits(input)
        return explained(self._call(input, None))


def _takes(kind: type, option: str) -> bool:
    """Whether layers of a class heed an option: they inherit ``forward``, or take the option as an argument."""
    return kind.forward is Layer.forward or _has_argument(kind, option)


def _has_argument(kind: type, option: str) -> bool:
    """Whether a constructor takes the option: the class's own, or one that it calls."""
    return any(option in inspect.signature(each.__init__).parameters for each in kind.__mro__)


def check_layout(who: str, layout: str) -> str:
    """The layout of channels, unless it is neither first nor last."""
    check_options(who, layout=(layout, ("n c *", "n * c")))
    return layout


@remembered
def channels_rule(
    who: str, over: str, eps: float = 1e-5, momentum: float | None = 0.1, layout: str = "n c *", memory: bool = True
) -> Rule:
    """Centre and scale over ``"n *"`` or ``"*"``, with a weight and bias per channel and, if wanted, running averages."""
    support = Support(check_layout(who, layout), over=over)
    return Rule(support, Statistic("mean", "std", eps), Affine("c"), Running(momentum) if memory else None)


@remembered
def tokens_rule(scale: Scale, eps: float, guard: Guard = "inside", per: str | None = None) -> Rule:
    """Divide the last axis by one scale of it, with a weight and bias per element of the axes ``per``."""
    return Rule(Support("* d", over="d"), Statistic(None, scale, eps, guard), None if per is None else Affine(per))


def check_channels(who: str, input: Tensor, wanted: int, argument: str, layout: str) -> None:
    """Refuse an input whose channel axis in this layout has another size."""
    axes = layout.split()
    axis = axes.index("c") if axes[-1] != "c" else -1
    if input.dim() < len(axes) - 1:
        raise ShapeError(
            f"{who}: got an input of {input.dim()} axes ({show(input.shape)}), wanted at least {len(axes) - 1}: {layout}"
        )
    if input.shape[axis] != wanted:
        raise ShapeError(
            f"{who}: got {input.shape[axis]} channels (axis {axis} of {show(input.shape)}), wanted {argument}={wanted}; "
            f"make the layer with {argument}={input.shape[axis]}, or check that the input is laid out as {layout!r}"
        )


def check_channels_first(who: str, input: Tensor) -> None:
    """Refuse an input that is too small for samples and channels."""
    if input.dim() < 2:
        raise ShapeError(f"{who}: got an input of {input.dim()} axes ({show(input.shape)}), wanted at least 2: n c *")


def check_last(who: str, input: Tensor, wanted: int, argument: str = "features") -> None:
    """Refuse an input whose last axis has another size."""
    if input.dim() < 1 or input.shape[-1] != wanted:
        raise ShapeError(f"{who}: got an input of {show(input.shape)}, wanted one that ends in {argument}={wanted}")


def check_several(who: str, input: Tensor, support: Support) -> None:
    """Refuse an input that has one element per statistic, where the variance is undefined."""
    if support.split(input.shape).count == 1:
        raise ShapeError(
            f"{who}: one value for each statistic (input {show(input.shape)}, {support}); "
            "its variance is undefined. Expected more than 1 value per channel when training: use a larger batch or input, "
            ".eval() with running statistics, or a norm over channels such as GroupNorm"
        )


def features_support(who: str, rank: int, over: str | None) -> tuple[Support, str]:
    """The support of a norm over features, and the axes of its weight: the last ``rank`` axes, or ``over`` of ``"n c *"``."""
    if over is None or (over == "d" and rank > 1):
        names = [f"d{k}" for k in range(rank)] if rank > 1 else ["d"]
        return Support(f"* {' '.join(names)}", over=" ".join(names[-1:] if over else names)), " ".join(names)
    if over not in ("c", "c *"):
        raise OptionError(
            f"{who}: over={over!r}; wanted 'c' or 'c *' of a channels-first input, 'd' for the last of several trailing axes, or "
            "None for all of them"
        )
    return Support("n c *", over=over), "c"


def check_features(
    who: str, shape: Sequence[int], over: str | None, per: str | None, input: Tensor | None = None
) -> None:
    """Refuse axes that do not go together, and an input that does not fit them."""
    if over is None or (over == "d" and len(shape) > 1):
        if per is not None:
            raise OptionError(f"{who}: per={per!r} goes with over=; give over='c' or over='c *', or leave per out")
        if input is not None and (
            input.dim() < len(shape) or tuple(input.shape[input.dim() - len(shape) :]) != tuple(shape)
        ):
            raise ShapeError(
                f"{who}: got an input of {show(input.shape)}, wanted one that ends in normalized_shape={show(shape)}"
            )
        return
    if len(shape) != 1 or per not in (None, ""):
        raise OptionError(
            f"{who}: with over={over!r}, normalized_shape is the number of channels and per is '' or None; "
            f"got {tuple(shape)} and {per!r}"
        )
    if input is not None:
        check_channels(who, input, shape[0], "normalized_shape", "n c *")


def given_statistics(
    who: str, mean: Tensor | None, var: Tensor | None, needed: str | None = None
) -> RunningStatistics | None:
    """Check statistics given to a function: both or neither, and both where ``needed`` names an argument that needs them."""
    if (mean is None) != (var is None):
        raise OptionError(f"{who}: running_mean and running_var go together; give both or neither")
    if mean is None or var is None:
        if needed is not None:
            raise OptionError(f"{who}: {needed} needs running_mean and running_var; give them")
        return None
    return RunningStatistics(mean, var)
