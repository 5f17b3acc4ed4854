"""Inference example weighing for a trained model: batch normalizations that count the example itself, and how much."""

from collections.abc import Callable, Sequence

from torch import nn

from normkit.activations.batch_group_norm import BatchGroupNorm
from normkit.core.errors import OptionError, SurgeryError
from normkit.surgery.changes import Change, Changes, label
from normkit.surgery.norms import read_norm
from normkit.surgery.substitute import replace_modules
from normkit.surgery.transaction import transaction

ALPHAS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1.0)


def weigh_examples(model: nn.Module, alpha: float = 0.0, count: int | None = None) -> Changes:
    """Put inference example weighing in place of every batch normalization with running statistics, in place.

    Parameters are kept, running statistics copied; forward hooks stay on the layers that go. With alpha=0 and no ``count``
    evaluation computes what it did.

    Args:
        model: any module.
        alpha: the example's weight, 0 to 1. Default: 0.
        count: elements per channel of a training batch, by which the unbiased variance kept becomes the population's, as
            var (count - 1) / count. Default: None, a count so large that both are the same.

    Raises:
        SurgeryError: the model has no batch normalization with running statistics, or one that does more than that, as in two
            steps or over sub-batches; no layer was changed.
        OptionError: alpha or the count is outside its range.

    Reference: Summers and Dinneen (2020), https://arxiv.org/abs/1906.03548, section 3.1.

    >>> print(*weigh_examples(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), alpha=0.05))
    1: BatchNorm2d(8) -> BatchGroupNorm(8, alpha=0.05)
    """
    if count is not None and count < 2:
        raise OptionError(f"weigh_examples: count={count}; wanted the elements per channel of a training batch, from 2")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise SurgeryError("weigh_examples: the model has no batch normalization with running statistics")
    for name, norm in norms.items():
        if read_norm(name, norm).kind not in ("batch_norm", "sync_batch_norm"):
            raise SurgeryError(
                f"weigh_examples: {label(name)} is {type(norm).__name__}, not plain batch normalization, and the rest of what it "
                "does would be lost; convert it to bn first, with where=, if that is wanted"
            )
    new, rows = {}, []
    for name, norm in norms.items():
        new[id(norm)] = _weighing(norm, alpha, count)
        before, after = (
            f"{type(norm).__name__}({norm.num_features})",
            f"BatchGroupNorm({norm.num_features}, {alpha=:g})",
        )
        rows.append(Change(label(name), before, after))
    with transaction(model) as opened:
        return opened.close(replace_modules(model, new), rows)


def choose_alpha(
    model: nn.Module, score: Callable[[nn.Module], float], alphas: Sequence[float] = ALPHAS
) -> dict[float, float]:
    """Set every BatchGroupNorm of a model to the one alpha with the highest score on validation data.

    It sets an option and changes no layer, so there is nothing to undo: ``weigh_examples`` gives the way back from the layers.

    ``score`` gives a model's score; of equal ones the first of ``alphas`` wins. The model is left in evaluation mode, or as it
    was if ``score`` raises. Gives the score of each alpha.

    Raises:
        SurgeryError: the model has no BatchGroupNorm.
        OptionError: an alpha that is not from 0 to 1.

    Returns the score of each alpha.

    Raises:
        SurgeryError: the model has no BatchGroupNorm.
        OptionError: an alpha that is not from 0 to 1.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchGroupNorm)]
    if not norms:
        raise SurgeryError("choose_alpha: the model has no BatchGroupNorm; call weigh_examples(model) first")
    outside = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if outside or not alphas:
        raise OptionError(f"choose_alpha: alphas={tuple(alphas)}; wanted numbers from 0 to 1, at least one")
    before = [(norm, norm.alpha) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    scores = {}
    try:
        for alpha in alphas:
            for norm in norms:
                norm.alpha = alpha
            scores[alpha] = score(model)
    except BaseException:
        for norm, alpha in before:
            norm.alpha = alpha
        for module, training in modes:
            module.training = training
        raise
    best = max(scores, key=lambda alpha: scores[alpha])
    for norm in norms:
        norm.alpha = best
    return scores


def _weighing(norm: nn.modules.batchnorm._BatchNorm, alpha: float, count: int | None) -> BatchGroupNorm:
    assert norm.running_mean is not None
    factory = {"device": norm.running_mean.device, "dtype": norm.running_mean.dtype}
    kept = {"eps": norm.eps, "affine": norm.affine, "alpha": alpha, "layout": getattr(norm, "layout", "n c *")}
    momentum = 0.01 if norm.momentum is None else norm.momentum
    made = BatchGroupNorm(norm.num_features, momentum=momentum, bias=norm.bias is not None, **kept, **factory)
    made.load_state_dict(norm.state_dict())
    made.weight, made.bias = norm.weight, norm.bias
    if count is not None:
        assert made.running_var is not None
        made.running_var.mul_((count - 1) / count)
    return made.train(norm.training)
