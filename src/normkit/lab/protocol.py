"""The protocol by which a user's own model and data enter a comparison.

**A factory** is named ``package.module:name``; the current folder is importable. A built-in name (``inception``,
``digits``; all are in ``MODELS`` and ``DATA``) stands for a factory of the lab.

**A model factory** is called with no arguments, or with ``classes=`` when it accepts that name, and returns a
``torch.nn.Module`` with fresh weights drawn from torch's, numpy's or Python's global generator (each is seeded before).

**A data factory** is called with no arguments and returns a dict with ``"train"`` and, where there are, ``"val"`` (also called
``"validation"``, ``"valid"``, ``"dev"``) and ``"test"``, a tuple of two (train, test) or three such splits, or one split alone.
What is missing is drawn from train: a fifth, stratified. Each split is one of

* a pair ``(inputs, targets)`` of tensors or numpy arrays, or a table of columns, such as a Bunch of scikit-learn;
* a map-style dataset whose samples are pairs, longer tuples that end with the target, or dicts with a target called ``labels``,
  ``label``, ``targets``, ``target``, ``label_ids`` or ``y``, such as a Dataset of Hugging Face;
* a DataLoader: its dataset, its collate function and the rows of its sampler are used, its batch size and order are not;
* an iterable with a length, which is held in memory.

A :class:`~normkit.lab.data.split.Data` is taken as it is: its floats 0 and 1 are numbers.

* Inputs: a tensor ``(n, ...)``, given to the model as ``model(inputs)``; a tuple of them, as ``model(*inputs)``; or a dict, as
  ``model(**inputs)`` (such as ``input_ids`` and ``attention_mask``), without those that its ``forward`` does not name.
* Targets: integer classes ``(n,)``, or a class for each token ``(n, l)`` where -100 is ignored: the loss is cross-entropy and
  the score is accuracy. Where they repeat ``input_ids``, each token's target is the next one, as in causal language models.
  Floats 0 and 1, and booleans ``(n, labels)``: the loss is binary cross-entropy and the score is accuracy over labels. Other
  floats of any shape: the loss is the mean squared error and the score is R².

**The model returns** a tensor, an object with ``.logits`` or a dict with ``"logits"``: ``(n, classes)``, ``(n, l,
classes)``, or the shape of float targets (a last axis of size 1 may be missing from the targets). The loss is computed from
these logits; targets are not given to the model.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normkit.core.errors import NormkitError, ProtocolError, closest
from normkit.lab.data.reader import check_agreement, interpret, read_splits
from normkit.lab.data.split import Data, Inputs, Split, hold_out, kept, kind, named
from normkit.lab.say import theirs, told
from normkit.lab.seeding import borrowed_modes
from normkit.lab.task import call, predictions

MODELS = {
    "inception": "normkit.lab.models.convolutional:digits_inception",
    "inception8": "normkit.lab.models.convolutional:inception8",
    "densenet": "normkit.lab.models.convolutional:densenet",
    "googlenet": "normkit.lab.models.convolutional:googlenet",
    "resnet18": "normkit.lab.models.convolutional:resnet18",
    "resnet50": "normkit.lab.models.convolutional:resnet50",
    "vit_tiny": "normkit.lab.models.vit:vit_tiny",
    "vit_s": "normkit.lab.models.vit:vit_s",
    "vit_b16": "normkit.lab.models.vit:vit_b16",
    "dit": "normkit.lab.models.vit:dit_small",
}
DATA = {
    "digits": "normkit.lab.data.digits:digits",
    "cifar10": "normkit.lab.data.cifar:cifar10",
    "cifar100": "normkit.lab.data.cifar:cifar100",
    "imagefolder": "normkit.lab.data.image_folder:imagefolder",
}
HELD_OUT = 0.2


@contextmanager
def user_code(doing: str) -> Iterator[None]:
    """Says an error that comes from the user's code with its line there, on a worker of Ray too."""
    try:
        yield
    except NormkitError:
        raise
    except Exception as error:
        if not theirs(error):
            raise
        raise ProtocolError(f"{doing} raised {told(error)}") from error


def load_factory(name: str, builtin: Mapping[str, str]) -> Callable[..., Any]:
    """Imports the factory called `name`."""
    path = builtin.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        known = ", ".join(builtin)
        raise ProtocolError(
            f"{name!r} names no factory; wanted one of {known}, or package.module:factory{closest(name, builtin)}"
        )
    here = os.getcwd()
    try:
        found: Any = importlib.import_module(module_name) if name in builtin else _imported(module_name, here)
    except ModuleNotFoundError as error:
        raise ProtocolError(
            f"{name!r}: there is no module {error.name!r}; looked in {here} and in the installed packages"
        ) from None
    except Exception as error:
        raise ProtocolError(f"{name!r}: importing {module_name!r} raised {told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise ProtocolError(
                f"{name!r}: {module_name} has no {attribute!r}; it has {', '.join(names) or 'nothing callable'}"
                f"{closest(attribute, names)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ProtocolError(f"{name!r} is {kind(found)}; wanted a factory, that is a function to call")
    return found


def make_model(factory: Callable[..., Any], name: str, classes: int | None) -> nn.Module:
    """Calls a model factory."""
    options = {"classes": classes} if classes is not None and _accepts(factory, "classes") else {}
    try:
        with borrowed_modes():
            model = factory(**options)
    except Exception as error:
        given = "".join(f"{key}={value}" for key, value in options.items())
        raise ProtocolError(f"model factory {name}: {name}({given}) raised {told(error)}") from error
    if not isinstance(model, nn.Module):
        cure = "; return an instance, not the class" if inspect.isclass(model) and issubclass(model, nn.Module) else ""
        raise ProtocolError(f"model factory {name} returned {kind(model)}; wanted a torch.nn.Module{cure}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ProtocolError(f"model factory {name} returned {kind(model)} with no parameter to train")
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ProtocolError(
                f"model factory {name}: {key} is on the meta device, without values; make the model on the CPU, or give it "
                'values by model.to_empty(device="cpu") and its layers\' reset_parameters'
            )
    return model


def sized(model: nn.Module, data: Data, name: str) -> nn.Module:
    """Gives a model's lazy layers their sizes and weights, by two samples of train in eval mode."""

    def lazy() -> list[str]:
        return [key for key, each in chain(model.named_parameters(), model.named_buffers()) if is_lazy(each)]

    if lazy():
        training = model.training
        _called(model.eval(), suited(data, model, name), "train", name)
        model.train(training)
    if left := lazy():
        raise ProtocolError(
            f"model {name}: its forward gives {left[0]} no size; call all lazy layers, or say their sizes"
        )
    return model


def make_data(factory: Callable[[], Any], name: str) -> Data:
    """Calls a data factory and checks all that it returned."""
    try:
        with borrowed_modes():
            made = factory()
    except NormkitError:
        raise  # it says all by itself
    except Exception as error:
        raise ProtocolError(f"data factory {name} raised {told(error)}") from error
    notes: list[str] = []
    with user_code(f"reading the samples of {name}"):
        splits = read_splits(name, made, notes)
        if not isinstance(made, Data):
            splits = interpret(name, splits, notes)
    for key in ("test", "val"):
        if key not in splits:
            train, drawn = hold_out(splits["train"], HELD_OUT)
            if not (len(train) and len(drawn)):
                raise ProtocolError(
                    f"{name}: train has {len(splits['train'])} samples, too few to hold out {key}; give a {key}"
                )
            splits = {**splits, "train": train, key: drawn}
            notes.append(
                f"no {key} split was given: {len(drawn)} of {len(train) + len(drawn)} samples are drawn from train"
            )
    check_agreement(name, splits, notes)
    augment = made.augment if isinstance(made, Data) else None
    return Data(splits["train"], splits["val"], splits["test"], augment, tuple(dict.fromkeys(notes)))


def suited(data: Data, model: nn.Module, name: str) -> Data:
    """Keeps those inputs in dicts that a model's ``forward`` names; a single one that it doesn't is given by itself."""
    inputs, _ = two(data.train)
    parameters = inspect.signature(model.forward).parameters
    if not isinstance(inputs, dict) or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return data
    names = tuple(key for key in inputs if _accepts(model.forward, key))
    alone = not names and len(inputs) == 1
    if not names and not alone:
        raise ProtocolError(
            f"model {name}: its forward takes {', '.join(parameters) or 'nothing'}, but the samples hold {', '.join(inputs)}; "
            "name them alike, or give pairs (inputs, target)"
        )
    names = names or tuple(inputs)
    left = [key for key in inputs if key not in names]
    if not left and not alone:
        return data
    splits = {
        key: replace(split, inputs=kept(split.inputs, names, alone))
        if split.inputs is not None
        else replace(split, collate=replace(split.collate, names=names, alone=alone))
        for key, split in data.splits.items()
    }
    notes = [f"forward has no argument called {', '.join(left)}, which are left out"] if left else []
    return replace(data, **splits, notes=(*data.notes, *notes))


def check_fit(model: nn.Module, data: Data, name: str) -> None:
    """Runs two samples of each split through a model in eval mode and checks what comes out."""
    # The model itself judges whether inputs of the splits are alike enough: one may take images or sequences of any size.
    training = model.training
    model.eval()
    try:
        for split in data.splits:
            _check_output(model, data, split, name)
    finally:
        model.train(training)


def _imported(module_name: str, here: str) -> Any:
    # A user's own files are importable, as under `python -m`. Afterwards the folder comes last: what the lab imports
    # later, such as scikit-learn, must not be a file of that name that happens to lie there.
    if here in sys.path or "" in sys.path:
        return importlib.import_module(module_name)
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    finally:
        sys.path.remove(here)
        sys.path.append(here)


def _check_output(model: nn.Module, data: Data, split: str, name: str) -> None:
    output, targets = _called(model, data, split, name)
    logits = predictions(output, name)
    got, rows = tuple(logits.shape), tuple(targets.shape)
    said = f"model {name} returned {got} for {'class' if data.classes else 'float'} targets {rows} of {split}"
    if data.classes is None:
        if got not in (rows, (*rows, 1)):
            cure = "; for classes give integer targets" if len(got) == 2 and len(rows) == 1 else ""
            raise ProtocolError(f"{said}; wanted {rows}{cure}")
    elif len(got) != len(rows) + 1 or got[:-1] != rows:
        wanted = f"({', '.join(map(str, rows))}, classes)"
        cure = "; for labels that are yes or no, or numbers, give float targets" if got in (rows, (*rows, 1)) else ""
        if len(got) == 2 and rows == (got[0], 1):
            cure = "; for one class per sample give targets.squeeze(1)"
        raise ProtocolError(f"{said}; wanted {wanted}{cure}")
    elif data.classes > got[-1]:
        cure = "; for numbers, or one logit for yes or no, give float targets" if got[-1] == 1 else ""
        raise ProtocolError(
            f"model {name} returned {got[-1]} logits, but the highest label is {data.classes - 1}; "
            f"wanted at least {data.classes} logits, labels count from 0{cure}"
        )


def _called(model: nn.Module, data: Data, split: str, name: str) -> tuple[Any, Tensor]:
    inputs, targets = two(data.splits[split])
    try:
        with torch.no_grad():
            return call(model, inputs), targets
    except Exception as error:
        # Training samples come first, so that those of another split are at fault where the model took these.
        alike = f"; it took {_shown(two(data.train)[0])} of train: make {split} alike" if split != "train" else ""
        raise ProtocolError(
            f"model {name} on two samples of {split} ({_shown(inputs)}) raised {told(error)}{alike or _of_types(model, inputs)}"
        ) from error


def _of_types(model: nn.Module, inputs: Inputs) -> str:
    """The cure where weights and inputs are of different types, as layers never convert them."""
    weights = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    if torch.float32 not in weights and weights:
        return (
            f"; its weights are {weights.pop()}; return model.float(), and choose another --precision if one is wanted"
        )
    if any(tensor.dtype in (torch.float16, torch.bfloat16, torch.uint8) for _, tensor in named(inputs)):
        return "; if its layers want them so, make the inputs torch.float32 too, such as inputs.float()"
    return ""


def two(split: Split) -> tuple[Inputs, Tensor]:
    """The first two samples of a split, on the CPU."""
    return split.batch(torch.arange(min(2, len(split))), torch.device("cpu"))


def _shown(inputs: Inputs) -> str:
    return ", ".join(f"{part} {tensor.dtype} {tuple(tensor.shape)}" for part, tensor in named(inputs))


def _accepts(factory: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
