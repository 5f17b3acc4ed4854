"""The protocol by which a user's own model and data enter a comparison.

**A factory** is named ``package.module:name``; the current folder is importable. A built-in name (``inception``,
``digits``; all are in ``MODELS`` and ``DATA``) stands for a factory of the lab.

**A model factory** is called with no arguments, or with ``classes=`` when it accepts that name, and returns a
``torch.nn.Module`` with fresh weights drawn from torch's, numpy's or Python's global generator (each is seeded before).

**A data factory** is called with no arguments and returns a :class:`~normkit.lab.data.split.Data`, or a dict with
``"train"``, ``"test"`` and optionally ``"val"`` (else a fifth of ``"train"`` is held out, stratified). Each is a pair
``(inputs, targets)`` of tensors or numpy arrays, or a map-style dataset of such pairs for single samples.

* Inputs: a tensor ``(n, ...)``, given to the model as ``model(inputs)``; or a dict of tensors ``(n, ...)``, given as
  ``model(**inputs)`` (such as ``input_ids`` and ``attention_mask``).
* Targets: integer classes ``(n,)``, or a class for each token ``(n, l)`` where -100 is ignored: the loss is
  cross-entropy and the score is accuracy. Floats of any shape: the loss is the mean squared error and the score is R².

**The model returns** a tensor, an object with ``.logits`` or a dict with ``"logits"``: ``(n, classes)``, ``(n, l,
classes)``, or the shape of float targets (a last axis of size 1 may be missing from the targets).

    # shapes.py                                       $ normkit compare --model shapes:model --data shapes:data
    def model(classes=3):
        return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes))

    def data():
        x, y = torch.randn(600, 8), torch.randint(0, 3, (600,))
        return {"train": (x[:500], y[:500]), "test": (x[500:], y[500:])}
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.core.errors import NormkitError, ProtocolError
from normkit.lab.data.split import Data, Inputs, Split, as_targets, hold_out
from normkit.lab.task import IGNORED, call, kind, predictions

MODELS = {
    "inception": "normkit.lab.models.inception:digits_inception",
    "inception8": "normkit.lab.models.inception8:inception8",
    "densenet": "normkit.lab.models.densenet:densenet",
    "googlenet": "normkit.lab.models.googlenet:googlenet",
    "resnet18": "normkit.lab.models.resnet:resnet18",
    "resnet50": "normkit.lab.models.resnet:resnet50",
    "vit_tiny": "normkit.lab.models.vit:vit_tiny",
    "vit_s": "normkit.lab.models.vit:vit_s",
    "vit_b16": "normkit.lab.models.vit:vit_b16",
    "dit": "normkit.lab.models.dit:dit_small",
}
DATA = {
    "digits": "normkit.lab.data.digits:digits",
    "cifar10": "normkit.lab.data.cifar:cifar10",
    "cifar100": "normkit.lab.data.cifar:cifar100",
    "imagefolder": "normkit.lab.data.image_folder:imagefolder",
}
HELD_OUT = 0.2


def load_factory(name: str, builtin: Mapping[str, str]) -> Callable[..., Any]:
    """Imports the factory called `name`.

    Args:
        name: a key of `builtin`, or ``package.module:name``.
        builtin: the lab's own factories.

    Raises:
        ProtocolError: the name cannot be read or imported, or is not callable.

    >>> load_factory("digits", DATA).__name__
    'digits'
    """
    path = builtin.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        known = ", ".join(builtin)
        raise ProtocolError(f"{name!r} names no factory; wanted one of {known}, or package.module:factory")
    here = os.getcwd()
    try:
        found: Any = importlib.import_module(module_name) if name in builtin else _imported(module_name, here)
    except ModuleNotFoundError as error:
        raise ProtocolError(
            f"{name!r}: there is no module {error.name!r}; looked in {here} and in the installed packages"
        ) from None
    except Exception as error:
        raise ProtocolError(f"{name!r}: importing {module_name!r} raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise ProtocolError(
                f"{name!r}: {module_name} has no {attribute!r}; it has {', '.join(names) or 'nothing callable'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ProtocolError(f"{name!r} is {kind(found)}; wanted a factory, that is a function to call")
    return found


def make_model(factory: Callable[..., Any], name: str, classes: int | None) -> nn.Module:
    """Calls a model factory.

    Args:
        factory: what :func:`load_factory` gave.
        name: how messages call it.
        classes: given as ``classes=`` where the factory accepts it; None in regression.

    Raises:
        ProtocolError: the factory raised, or returned no module.
    """
    options = {"classes": classes} if classes is not None and _accepts(factory, "classes") else {}
    try:
        model = factory(**options)
    except Exception as error:
        given = "".join(f"{key}={value}" for key, value in options.items())
        raise ProtocolError(f"model factory {name}: {name}({given}) raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        cure = "; return an instance, not the class" if inspect.isclass(model) and issubclass(model, nn.Module) else ""
        raise ProtocolError(f"model factory {name} returned {kind(model)}; wanted a torch.nn.Module{cure}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ProtocolError(f"model factory {name} returned {kind(model)} with no parameter to train")
    return model


def make_data(factory: Callable[[], Any], name: str) -> Data:
    """Calls a data factory and checks all that it returned.

    Args:
        factory: what :func:`load_factory` gave.
        name: how messages call it.

    Raises:
        ProtocolError: the factory raised, or its return breaks the protocol.
    """
    try:
        made = factory()
    except NormkitError:
        raise  # it says all by itself
    except Exception as error:
        raise ProtocolError(f"data factory {name} raised {type(error).__name__}: {error}") from error
    if isinstance(made, Data):
        splits = made.splits
    elif isinstance(made, Mapping):
        missing = [key for key in ("train", "test") if key not in made]
        strange = [str(key) for key in made if key not in ("train", "val", "test")]
        if missing or strange:
            raise ProtocolError(
                f"data factory {name} returned a dict with {', '.join(map(str, made)) or 'nothing'}; "
                'wanted "train", "test" and optionally "val"'
            )
        splits = {key: _split(f"{name}: {key}", value) for key, value in made.items()}
    else:
        raise ProtocolError(
            f'data factory {name} returned {kind(made)}; wanted a dict with "train" and "test", or Data'
        )
    for key, split in splits.items():
        _check_split(f"{name}: {key}", split)
    if "val" not in splits:
        train, val = hold_out(splits["train"], HELD_OUT)
        if not (len(train) and len(val)):
            raise ProtocolError(
                f"{name}: train has {len(splits['train'])} samples, too few to hold out val; give a val"
            )
        splits = {**splits, "train": train, "val": val}
    _check_agreement(name, splits)
    augment = made.augment if isinstance(made, Data) else None
    return Data(splits["train"], splits["val"], splits["test"], augment)


def check_fit(model: nn.Module, data: Data, name: str) -> None:
    """Runs two samples of each split through a model in eval mode and checks what comes out.

    The model itself judges whether inputs of the splits are alike enough: one may take images or sequences of any size.

    Args:
        model: a model on the CPU; its training flag is left as it was.
        data: checked data.
        name: how messages call the model.

    Raises:
        ProtocolError: the model raised, or its output does not fit the targets.
    """
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
    inputs, targets = _two(data.splits[split])
    try:
        with torch.no_grad():
            output = call(model, inputs)
    except Exception as error:
        # Training samples come first, so that those of another split are at fault where the model took these.
        cure = f"; it took {_shown(_two(data.train)[0])} of train: make {split} alike" if split != "train" else ""
        raise ProtocolError(
            f"model {name} raised {type(error).__name__} on two samples of {split} ({_shown(inputs)}): {error}{cure}"
        ) from error
    logits = predictions(output, name)
    got, rows = tuple(logits.shape), tuple(targets.shape)
    if data.classes is None:
        if got not in (rows, (*rows, 1)):
            raise ProtocolError(f"model {name} returned {got} for float targets {rows} of {split}; wanted {rows}")
    elif len(got) != len(rows) + 1 or got[:-1] != rows:
        wanted = f"({', '.join(map(str, rows))}, classes)"
        raise ProtocolError(f"model {name} returned {got} for class targets {rows} of {split}; wanted {wanted}")
    elif data.classes > got[-1]:
        raise ProtocolError(
            f"model {name} returned {got[-1]} logits, but the highest label is {data.classes - 1}; "
            f"wanted at least {data.classes} logits, labels count from 0"
        )


def _two(split: Split) -> tuple[Inputs, Tensor]:
    return split.batch(torch.arange(min(2, len(split))), torch.device("cpu"))


def _shown(inputs: Inputs) -> str:
    return ", ".join(f"{part} {tensor.dtype} {tuple(tensor.shape)}" for part, tensor in _named(inputs))


def _split(name: str, value: Any) -> Split:
    if isinstance(value, Split):
        return value
    if isinstance(value, tuple | list) and len(value) == 2:
        inputs, targets = value
        return Split(as_targets(_tensor(f"{name} targets", targets)), inputs=_inputs(f"{name} inputs", inputs))
    if (
        hasattr(value, "__getitem__")
        and hasattr(value, "__len__")
        and not isinstance(value, Mapping | Tensor | np.ndarray)
    ):
        return _read(name, value)
    raise ProtocolError(f"{name} is {kind(value)}; wanted a pair (inputs, targets) or a map-style dataset")


def _read(name: str, source: Any) -> Split:
    targets, shapes = [], set()
    for row in range(len(source)):
        sample = source[row]
        if not (isinstance(sample, tuple | list) and len(sample) == 2):
            raise ProtocolError(f"{name}[{row}] is {kind(sample)}; wanted a pair (inputs, target)")
        inputs = _named(_inputs(f"{name}[{row}] inputs", sample[0]))
        for part, tensor in inputs:
            _check_finite(f"{name}[{row}] {part}", tensor)
        shapes.add(tuple((part, *tensor.shape) for part, tensor in inputs))
        targets.append(_tensor(f"{name}[{row}] target", sample[1]))
    if len({target.shape for target in targets}) > 1:
        raise ProtocolError(
            f"{name} has targets of unequal shapes; pad them (with -100 where a token is to be ignored)"
        )
    if len(shapes) > 1:
        raise ProtocolError(f"{name} has inputs of unequal shapes or names, which make no batch; pad them")
    stacked = torch.stack(targets) if targets else torch.empty(0, dtype=torch.long)
    return Split(as_targets(stacked), source=source, rows=torch.arange(len(targets)))


def _inputs(name: str, value: Any) -> Inputs:
    if isinstance(value, Mapping):
        if not value:
            raise ProtocolError(f"{name} are an empty dict; wanted the model's keyword arguments")
        return {str(key): _tensor(f"{name}[{key!r}]", item) for key, item in value.items()}
    return _tensor(name, value)


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
        # numpy's double is a habit, not a wish: models are float32.
        tensor = torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
        return tensor.float() if tensor.dtype == torch.float64 else tensor
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{name} are {kind(value)}, which makes no tensor ({error})") from None


def _check_split(name: str, split: Split) -> None:
    if not len(split):
        raise ProtocolError(f"{name} is empty")
    for part, tensor in split.tensors():
        if tensor.ndim == 0 or len(tensor) != len(split):
            raise ProtocolError(f"{name} {part} {tuple(tensor.shape)} do not match {len(split)} targets in length")
        _check_finite(f"{name} {part}", tensor)
    targets = split.targets
    if targets.is_floating_point():
        return
    if targets.ndim > 2:
        raise ProtocolError(f"{name} targets are integers {tuple(targets.shape)}; wanted classes (n,) or (n, tokens)")
    wrong = (targets < 0) & (targets != IGNORED) if targets.ndim == 2 else targets < 0
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        also = " (or -100 where a token is ignored)" if targets.ndim == 2 else ""
        raise ProtocolError(
            f"{name} targets hold {int(targets[where])} at {_place(where)}; wanted class indices from 0{also}"
        )
    if not (targets != IGNORED).any():
        raise ProtocolError(f"{name} targets are all -100 (ignored); nothing is left to learn or judge")


def _check_agreement(name: str, splits: Mapping[str, Split]) -> None:
    train = splits["train"].targets
    for key, split in splits.items():
        targets = split.targets
        if targets.is_floating_point() != train.is_floating_point() or targets.ndim != train.ndim:
            raise ProtocolError(
                f"{name}: targets of {key} are {targets.dtype} {tuple(targets.shape)}, those of train {train.dtype} "
                f"{tuple(train.shape)}; wanted the same kind"
            )
        if targets.is_floating_point() and not (targets != targets[:1]).any():
            raise ProtocolError(
                f"{name}: targets of {key} are all equal, so R² is not defined; give a split that varies"
            )


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not (good := torch.isfinite(tensor)).all():
        bad = (~good).nonzero()
        where = tuple(bad[0].tolist())
        value = "NaN" if torch.isnan(tensor[where]) else "infinity"
        raise ProtocolError(
            f"{name} hold {value} at {_place(where)} ({len(bad)} of {tensor.numel()} values); clean the data"
        )


def _named(inputs: Inputs) -> list[tuple[str, Tensor]]:
    return list(inputs.items()) if isinstance(inputs, dict) else [("inputs", inputs)]


def _accepts(factory: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY


def _place(where: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, where))}]"
