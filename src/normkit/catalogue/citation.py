"""The papers behind a model's normalizations."""

from torch import nn
from torch.nn.utils import parametrize

from normkit.catalogue.methods import METHODS
from normkit.core.card import Card

# torch's own parametrizations are private classes, which can be recognized only by name.
_TORCH_PARAMETRIZATIONS = {"_WeightNorm": "weight_norm", "_SpectralNorm": "spectral_norm"}


def methods_in(model: nn.Module) -> list[Card]:
    """Find the methods in a model, normkit's and torch's own, in the order of the catalogue.

    Args:
        model: any module.

    >>> [card.name for card in methods_in(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2)))]
    ['batch_norm', 'layer_norm']
    """
    found = {card.name for module in model.modules() if (card := card_of(module)) is not None}
    return [card for card in METHODS if card.name in found]


def card_of(module: nn.Module) -> Card | None:
    """The card of a module's method, or None; a torch class counts as the method whose class derives from it."""
    if isinstance(module, parametrize.ParametrizationList | nn.Sequential):
        return None
    kinds = type(module).__mro__
    for kind in kinds:
        cards = [c for c in METHODS if c.module is kind or _TORCH_PARAMETRIZATIONS.get(kind.__name__) == c.name]
        for card in sorted(cards, key=lambda card: card.fits is None):  # the special ones first
            if card.fits is None or card.fits(module):
                return card
    for kind in kinds:
        if kind.__module__ in _TORCH_NORMS and kind is not nn.modules.batchnorm._NormBase:
            for card in METHODS:
                if isinstance(card.module, type) and kind in card.module.__mro__:
                    return card
            if kind is nn.SyncBatchNorm:
                return next((card for card in METHODS if card.name == "sync_batch_norm"), None)
    return None


_TORCH_NORMS = ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "torch.nn.modules.normalization")


def cite(model: nn.Module) -> str:
    """Write the BibTeX of every normalization in a model.

    Args:
        model: any module.

    >>> print(cite(nn.GroupNorm(2, 4)))
    @misc{wu2018group,
      author = {Wu, Yuxin and He, Kaiming},
      title = {Group Normalization},
      year = {2018},
      url = {https://arxiv.org/abs/1803.08494},
    }
    """
    return "\n\n".join(dict.fromkeys(card.paper.bibtex() for card in methods_in(model)))
