"""HoloNorm: map each token into the unit ball, keeping its direction and the order of lengths."""

from torch import Tensor

from normkit.core.card import Card, Paper
from normkit.core.rule import Rule
from normkit.engine.dispatch import Backend, run
from normkit.engine.layer import Layer, check_last, tokens_rule

_RULE = tokens_rule("norm", 1.0, "outside")


class HoloNorm(Layer):
    """Divide each token by 1 plus its Euclidean norm.

    y = x / (1 + |x|), without parameters, the same in training and evaluation. The result lies inside the unit ball and has the
    token's direction; the token can be recovered as y / (1 - |y|). The paper also allows norms other than the Euclidean one.

    Args:
        features: features D.

    Shape:
        (*, D); the output has the same shape.

    Raises:
        ShapeError: the input does not end in ``features``.

    Reference:
        Yongueng and Tembine, "Holonorm" (2025), https://arxiv.org/abs/2511.10504.

    >>> HoloNorm(2)(torch.tensor([[3.0, 4.0]]))
    tensor([[0.5000, 0.6667]])
    """

    shown = "{0.features}"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.register_affine((), False, False)
        self.complete()

    def make_rule(self) -> Rule:
        return _RULE

    def check(self, input: Tensor) -> None:
        check_last("HoloNorm", input, self.features)


def holo_norm(input: Tensor, *, mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """HoloNorm over the last axis as a function; see HoloNorm.

    >>> holo_norm(torch.tensor([[3.0, 4.0]]))
    tensor([[0.5000, 0.6667]])
    """
    return run(_RULE, input, mask=mask, backend=backend)


CARD = Card(
    title="HoloNorm",
    word="holo",
    normalized_over="each sample or token, over its features, to a length below 1",
    formula="y = x / (1 + |x|)",
    paper=Paper("Yongueng, Daryl Noupa and Tembine, Hamidou", "Holonorm", 2025, "https://arxiv.org/abs/2511.10504"),
    use_cases="transformers, instead of dynamic tanh or layer normalization",
    strengths="invertible and without parameters; bounded; keeps directions",
    weaknesses="all long tokens end near length 1; no gain",
    module=HoloNorm,
    functional=holo_norm,
    build=lambda at: HoloNorm(at.channels),
    takes=(),
    rule=_RULE,
    layout="* d",
)
