"""Seams of modules: copies and files, processes and threads, compilers, wrappers and converters."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from normkit.core.errors import NormkitError, OptionError
from seam import forked, is_first, is_input_of_networks, is_layer, near, same, seam, steady
from subjects import Subject, Values, gradients, leaves_of, output, pulled


def again(copied: Callable[[Subject, Any], Any], *, leaves: bool = False) -> Callable[[Subject], None]:
    """A copy gives the same, bit for bit, and leaves the original as it was."""

    def run(subject: Subject) -> None:
        made, inputs = subject.fresh().eval(), subject.inputs()
        gradients(made, inputs)
        wanted = gradients(made, inputs)
        other = copied(subject, made)
        same(gradients(other, inputs), wanted)
        for parameter in other.parameters():
            parameter.data.zero_()
        same(gradients(made, inputs), wanted)

    return run


def saved(subject: Subject, made: Any) -> Any:
    memory = io.BytesIO()
    torch.save(made.state_dict(), memory)
    memory.seek(0)
    other = subject.fresh().eval()
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(torch.load(memory, weights_only=True))
    return other


def emptied(subject: Subject, made: Any) -> Any:
    other = copy.deepcopy(made).to("meta")
    other = other.to_empty(device="cpu")
    other.load_state_dict(made.state_dict())
    return other


def assigned(subject: Subject, made: Any) -> Any:
    other = copy.deepcopy(made).to("meta")
    other.load_state_dict({key: value.clone() for key, value in made.state_dict().items()}, assign=True)
    return other


seam("deepcopy")(again(lambda subject, made: copy.deepcopy(copy.deepcopy(made))))
seam("pickle")(again(lambda subject, made: pickle.loads(pickle.dumps(made))))
seam("state_dict through torch.save")(again(saved))
seam("meta device, to_empty", is_input_of_networks)(again(emptied))
seam("meta device, load_state_dict(assign=True)", is_input_of_networks)(again(assigned))


@seam("shapes on the meta device", is_input_of_networks)
def _(subject: Subject) -> None:
    made, inputs = subject.fresh(), subject.inputs()
    wanted = output(copy.deepcopy(made), *inputs)
    found = output(made.to("meta"), *(x.to("meta") for x in inputs))
    assert (found.shape, found.dtype, found.device.type) == (wanted.shape, wanted.dtype, "meta")


def parametrized(subject: Subject) -> bool:
    return subject.kind == "weight"


@seam("folding a copy leaves the original", parametrized)
def _(subject: Subject) -> None:
    made, inputs = subject.fresh(), subject.inputs()
    wanted = output(made, *inputs)
    for other in (copy.deepcopy(made), copy.deepcopy(nn.Sequential(made))[0]):
        parametrize.remove_parametrizations(other, "weight")
        assert type(other).__module__.startswith("torch.nn")
        near(output(other, *inputs), wanted)
        pickle.dumps(other)
        same(output(made, *inputs), wanted)


@seam("fork")
def _(subject: Subject) -> None:
    made, inputs = subject.fresh(), subject.inputs()
    wanted = gradients(copy.deepcopy(made), inputs)
    assert forked(lambda: same(gradients(made, inputs), wanted)) == 0


@seam("threads")
def _(subject: Subject) -> None:
    made, inputs = subject.fresh().eval(), subject.inputs()
    many = [(inputs[0] * k, *inputs[1:]) for k in (1, 2, 3)]
    wanted = [gradients(made, one) for one in many]
    wrong: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for _ in range(3):
                with torch.set_grad_enabled(True):
                    near(gradients(made, many[k]), wanted[k])
                with torch.no_grad():
                    near(output(made, *many[k]), wanted[k][0])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def sizes(subject: Subject) -> Iterator[Values]:
    """An input, and one with another batch and length each, where one graph serves all lengths."""
    inputs = subject.inputs()
    yield inputs
    if subject.kind == "layer":
        x = torch.cat([inputs[0], 2 * inputs[0].flip(0)])
        unrolled = subject.card.name.startswith("layer_norm_")
        yield subject.inputs(x if unrolled else torch.cat([x, x.flip(1)], -1 if is_first(subject) else 1))


def is_compiled(subject: Subject) -> bool:
    return subject.kind != "weight" or subject.name.endswith("Linear")


@seam("torch.compile", is_compiled, "parametrizations on one kind of layer: it takes seconds")
def _(subject: Subject) -> None:
    made, fresh = subject.fresh(), subject.fresh()
    torch._dynamo.reset()
    # What has operators of its own is followed into its backward pass too; the rest is torch's operators.
    own = subject.is_rule or subject.kind == "weight"
    compiled: Any = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager" if own else "eager")
    for inputs in sizes(subject):
        near(gradients(compiled, inputs), gradients(fresh, inputs))
    near(list(made.state_dict().values()), list(fresh.state_dict().values()))
    if subject.is_rule and subject.card.running_state:
        with torch.no_grad():
            near(output(compiled.eval(), *subject.inputs()), output(fresh.eval(), *subject.inputs()))


@seam("torch.export", is_input_of_networks)
def _(subject: Subject) -> None:
    made, inputs = subject.fresh().eval(), subject.inputs()
    program = torch.export.export(made, inputs)
    other = (inputs[0] * 2 + 1, *inputs[1:])
    near(output(program.module(), *other), output(made, *other))


@seam("torch.jit.trace", is_input_of_networks)
def _(subject: Subject) -> None:
    made, inputs = subject.fresh().eval(), subject.inputs()
    output(made, *inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and it says that shapes are constants
        traced = torch.jit.trace(made, inputs, check_trace=False)
    other = (inputs[0] * 2 + 1, *inputs[1:])
    # What it makes of sizes are float32 constants.
    near(output(traced, *other), output(made, *other), torch.float32)


@seam("torch.compile, inductor", lambda one: one.name in ("batch_norm", "weight_norm-Linear"), "slow: one of each kind")
def _(subject: Subject) -> None:
    made, inputs = subject.fresh().eval(), subject.inputs()
    torch._dynamo.reset()
    near(gradients(torch.compile(made, fullgraph=True), inputs), gradients(made, inputs))


# ONNX has no singular value decomposition, and torch's exporter takes attention of four axes alone.
_NO_ONNX = ("conditioned_tokens", "spectral_norm_exact-Linear", "query_key_norm", "preconditioned_attention")


def has_onnx(subject: Subject) -> bool:
    there = importlib.util.find_spec("onnxscript") is not None
    return is_input_of_networks(subject) and there and subject.name not in _NO_ONNX


@seam("ONNX", has_onnx, "ONNX has no SVD; torch's exporter takes attention of four axes alone")
def _(subject: Subject) -> None:
    made, inputs = subject.fresh().eval(), subject.inputs()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's exporter uses what torch deprecates
        assert torch.onnx.export(made, inputs, dynamo=True, verbose=False) is not None


_STEADY = "in evaluation where a second pass would compute something else"


@seam("checkpointing", is_input_of_networks)
def _(subject: Subject) -> None:
    once, inputs = subject.fresh().train(), subject.inputs()
    wanted = gradients(once, inputs)
    for reentrant in (True, False):
        made = subject.fresh().train()
        moving, leaves = leaves_of(made, inputs)
        y = checkpoint(partial(output, made), *moving, use_reentrant=reentrant)
        direction = torch.linspace(0, 7, y.numel(), dtype=torch.float64).sin().reshape(y.shape)
        (y * direction).sum().backward()
        near((y.detach(), [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]), wanted)
        near(list(made.buffers()), list(once.buffers()))  # statistics and vectors move once


def replica(made: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes one: parameters are attributes, results of a broadcast."""
    other = made._replicate_for_data_parallel()
    for key, child in made._modules.items():
        setattr(other, key, None if child is None else replica(child))
    for key, parameter in made._parameters.items():
        setattr(other, key, None if parameter is None else parameter * 1)
    for key, buffer in made._buffers.items():
        setattr(other, key, buffer)
    return other


@seam("replicas of DataParallel", is_input_of_networks, _STEADY)
def _(subject: Subject) -> None:
    made, inputs = steady(subject), subject.inputs()
    wanted = gradients(copy.deepcopy(made), inputs)
    moving, leaves = leaves_of(made, inputs)
    for _ in range(2):  # cold and warm
        y = output(replica(made), *moving)
        near((y, pulled(y, leaves)), wanted)


@seam("parameters that are plain attributes", is_input_of_networks, _STEADY)
def _(subject: Subject) -> None:
    made, inputs = steady(subject), subject.inputs()
    wanted = gradients(copy.deepcopy(made), inputs)
    moving, leaves = leaves_of(made, inputs)
    output(made, *moving)
    found = [(module, key, value) for module in made.modules() for key, value in module._parameters.items()]
    for _ in range(2):  # as FullyShardedDataParallel makes them views of one parameter, for each pass
        for module, key, value in found:
            if value is not None:
                module._parameters.pop(key, None)
                nn.Module.__setattr__(module, key, value * 1)
        y = output(made, *moving)
        near((y, pulled(y, leaves)), wanted)


def is_torchs(subject: Subject) -> bool:
    return is_layer(subject) and isinstance(subject.fresh(), nn.modules.batchnorm._BatchNorm)


@seam("torch's converters and fusers", is_torchs, "they look for torch's batch norms alone")
def _(subject: Subject) -> None:
    for activation in (None, "relu"):
        made = subject.fresh().eval()
        with contextlib.suppress(OptionError):  # of a layer that fuses none
            made.activation = activation
        model = nn.Sequential(nn.Conv2d(3, 4, 1).double().eval(), made)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        wanted = model(x)
    for change in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda pair: nn.utils.fusion.fuse_conv_bn_eval(*pair)):
        with contextlib.suppress(NormkitError):  # refused with the cure is right too
            near(change(copy.deepcopy(model))(x), wanted)
