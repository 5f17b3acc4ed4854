"""Layer normalization inside recurrent networks: each time step separately, in RNN, LSTM and GRU."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, Invariance, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.module import Module
from normkit.core.moments import accumulation_dtype
from normkit.core.rule import Rule
from normkit.core.statistic import Statistic
from normkit.core.support import Support, check_shape, show
from normkit.engine.layer import Layer, check_last

State = tuple[Tensor, ...]
_LSTM = "(i, f, g, o) = LN(W_ih x) + LN(W_hh h) + b; h' = sigmoid(o) tanh(LN(c'))"
_GRU = "(r, z) = LN(W_ih x) + LN(W_hh h); n = tanh(LN(W_in x) + sigmoid(r) LN(W_hn h))"


class _Norm(Layer, nn.LayerNorm):
    """Layer normalization of a step's summed inputs."""

    def make_rule(self) -> Rule:
        return Rule(Support("* d", over="d"), Statistic("mean", "std", self.eps), Affine("d"))


class _Cell(Module):
    """One step; ``project`` computes what does not depend on the state, so that a layer does so for all steps at once."""

    shown = "{0.input_size}, {0.hidden_size}"
    gates: ClassVar[int]
    states: ClassVar[int] = 1

    def __init__(self, input_size: int, hidden_size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.eps = input_size, hidden_size, eps
        self.weight_ih = nn.Parameter(torch.empty(self.gates * hidden_size, input_size, **factory))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * hidden_size, hidden_size, **factory))

    def reset_parameters(self) -> None:
        """Initialize weights uniformly in +-1 / sqrt(hidden_size), biases to 0, and norms to weight 1 and bias 0."""
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.weight_ih, -bound, bound)
        nn.init.uniform_(self.weight_hh, -bound, bound)
        self.fill(bias=0)
        for norm in self.children():
            if isinstance(norm, _Norm):
                norm.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, projected: Tensor, state: State) -> State:
        raise NotImplementedError

    def start(self, x: Tensor) -> State:
        """Make a state of zeros for an input (*, input_size)."""
        return (self.weight_hh.new_zeros(*x.shape[:-1], self.hidden_size),) * self.states

    def forward(self, input: Tensor, state: Any = None) -> Any:
        """Run one step from a state, or from zeros; returns the next: h (*, hidden_size), or (h, c) of an LSTM."""
        _check(self, input)
        after = self.step(self.project(input.to(self.weight_ih.dtype)), _first(self, input, state))
        after = tuple(each.to(input.dtype) for each in after)
        return after if self.states > 1 else after[0]


class LayerNormRNNCell(_Cell):
    """A simple recurrent cell with layer normalization of its summed inputs.

    h' = tanh(LN(W_ih x + W_hh h)). The bias is the norm's.

    Args:
        input_size: size of x.
        hidden_size: size of h.
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: "tanh".
        eps: added to the variance. Default: 1e-5.
        **factory: ``device`` and ``dtype`` of the parameters.

    Shape: input (*, input_size) and h (*, hidden_size), to h'.

    Raises:
        OptionError: an unknown nonlinearity.
        ShapeError: the size of the input or of the state does not fit.

    Reference: Ba, Kiros, Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450, section 3.1.

    >>> LayerNormRNNCell(3, 2)(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """

    gates = 1

    def __init__(
        self, input_size: int, hidden_size: int, *, nonlinearity: str = "tanh", eps: float = 1e-5, **factory: Any
    ) -> None:
        super().__init__(input_size, hidden_size, eps, **factory)
        check_options("LayerNormRNNCell", nonlinearity=(nonlinearity, ("tanh", "relu")))
        self.nonlinearity = nonlinearity
        self.norm = _Norm(hidden_size, eps, **factory)
        self.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih)

    def step(self, projected: Tensor, state: State) -> State:
        summed = self.norm(projected + F.linear(state[0], self.weight_hh))
        return (summed.tanh() if self.nonlinearity == "tanh" else summed.relu(),)


class LayerNormLSTMCell(_Cell):
    """An LSTM cell with layer normalization of the terms of the input, of the state, and of the cell.

    (i, f, g, o) = LN(W_ih x) + LN(W_hh h) + b, each norm over all four gates together, in torch's order;
    c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(LN(c')).
    With its norms replaced by ``torch.nn.Identity()`` it is ``torch.nn.LSTMCell`` with b = bias_ih + bias_hh.

    ``input_size``, ``hidden_size`` and ``eps`` and the errors of shapes are those of LayerNormRNNCell.

    Args:
        bias: False omits b; each norm has its own bias. Default: True.

    Shape: input (*, input_size) and (h, c), each (*, hidden_size), to (h', c').

    Reference: Ba, Kiros, Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450, supplement.

    >>> h, c = LayerNormLSTMCell(3, 2)(torch.ones(1, 3))
    >>> h.shape, c.shape
    (torch.Size([1, 2]), torch.Size([1, 2]))
    """

    gates = 4
    states = 2
    bias: nn.Parameter | None

    def __init__(
        self, input_size: int, hidden_size: int, *, bias: bool = True, eps: float = 1e-5, **factory: Any
    ) -> None:
        super().__init__(input_size, hidden_size, eps, **factory)
        self.register_parameter("bias", nn.Parameter(torch.empty(4 * hidden_size, **factory)) if bias else None)
        self.norm_ih = _Norm(4 * hidden_size, eps, **factory)
        self.norm_hh = _Norm(4 * hidden_size, eps, **factory)
        self.norm_c = _Norm(hidden_size, eps, **factory)
        self.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        projected = self.norm_ih(F.linear(x, self.weight_ih))
        return projected if self.bias is None else projected + self.bias

    def step(self, projected: Tensor, state: State) -> State:
        i, f, g, o = (projected + self.norm_hh(F.linear(state[0], self.weight_hh))).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c).tanh(), c


class LayerNormGRUCell(_Cell):
    """A GRU cell with layer normalization of the terms of the input and of the state.

    (r, z) = LN(W_ih x) + LN(W_hh h), each norm over both gates together; n = tanh(LN(W_in x) + sigmoid(r) LN(W_hn h));
    h' = (1 - sigmoid(z)) h + sigmoid(z) n. The rows of the weights are r, z, n as in torch, but z opens to the new value where
    torch's opens to the old one: with its norms replaced by ``torch.nn.Identity()`` it is ``torch.nn.GRUCell`` without biases and
    with the rows of z negated.

    ``input_size``, ``hidden_size`` and ``eps``, the shapes and the errors of shapes are those of LayerNormRNNCell.

    Reference: Ba, Kiros, Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450, supplement.

    >>> LayerNormGRUCell(3, 2)(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """

    gates = 3

    def __init__(self, input_size: int, hidden_size: int, *, eps: float = 1e-5, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, eps, **factory)
        self.norm_ih = _Norm(2 * hidden_size, eps, **factory)
        self.norm_hh = _Norm(2 * hidden_size, eps, **factory)
        self.norm_in = _Norm(hidden_size, eps, **factory)
        self.norm_hn = _Norm(hidden_size, eps, **factory)
        self.reset_parameters()

    def project(self, x: Tensor) -> Tensor:
        gates, new = F.linear(x, self.weight_ih).split([2 * self.hidden_size, self.hidden_size], -1)
        return torch.cat([self.norm_ih(gates), self.norm_in(new)], -1)

    def step(self, projected: Tensor, state: State) -> State:
        sizes = [2 * self.hidden_size, self.hidden_size]
        gates, new = projected.split(sizes, -1)
        old_gates, old_new = F.linear(state[0], self.weight_hh).split(sizes, -1)
        r, z = (gates + self.norm_hh(old_gates)).sigmoid().chunk(2, -1)
        n = (new + r * self.norm_hn(old_new)).tanh()
        return (state[0] + z * (n - state[0]),)


def unroll(input: Tensor, cell: _Cell, state: Any = None, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Run a cell of this file over a sequence.

    ``state`` is the first one, zeros without; where the boolean ``mask`` (T, *) is False the state stays, and the output is zero.

    Returns the outputs h (T, *, hidden_size), and the last state.

    Raises:
        ShapeError: the size of the input, state or mask does not fit, or T is 0.

    >>> cell = LayerNormGRUCell(3, 2)
    >>> y, h = unroll(torch.ones(5, 1, 3), cell)
    >>> y.shape, torch.equal(y[-1], h)
    (torch.Size([5, 1, 2]), True)
    """
    _check(cell, input)
    if input.dim() < 2 or len(input) == 0:
        raise ShapeError(f"unroll: got a sequence of {show(input.shape)}, wanted at least one step: (T, *, features)")
    if mask is not None and (mask.shape != input.shape[:-1] or mask.dtype != torch.bool):
        raise ShapeError(
            f"unroll: got a {mask.dtype} mask {show(mask.shape)}; wanted torch.bool {show(input.shape[:-1])}"
        )
    now = _first(cell, input[0], state)
    outputs = []
    for t, projected in enumerate(cell.project(input.to(cell.weight_ih.dtype)).unbind(0)):
        after, here = cell.step(projected, now), None if mask is None else mask[t].unsqueeze(-1)
        now = after if here is None else tuple(torch.where(here, new, old) for new, old in zip(after, now, strict=True))
        outputs.append(now[0] if here is None else torch.where(here, now[0], 0.0))
    last = tuple(each.to(input.dtype) for each in now)
    return torch.stack(outputs).to(input.dtype), last if cell.states > 1 else last[0]


class LayerNormRecurrent(Module):
    """A stack of layer-normalized recurrent cells, run over a sequence.

    It is to its cells what ``torch.nn.LSTM``, ``GRU`` and ``RNN`` are to theirs. Time steps share no statistic, and none is kept.

    Args:
        input_size: size of x.
        hidden_size: size of h.
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``: LayerNormLSTMCell, LayerNormGRUCell or LayerNormRNNCell. Default: "lstm".
        num_layers: number of cells. Default: 1.
        batch_first: whether inputs are (N, T, input_size) rather than (T, N, input_size). Default: False.
        **options: options of the cells, e.g. ``eps``, ``device``, ``dtype``.

    Shape: (T, *, input_size) to (T, *, hidden_size) and the last state: h (layers, *, hidden_size), or (h, c) of an LSTM.

    Raises:
        OptionError: an unknown cell, or no layers.
        ShapeError: the size of the input, state or mask does not fit, or there is no time step.

    Reference: Ba, Kiros, Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450.

    >>> y, (h, c) = LayerNormRecurrent(3, 2, "lstm", num_layers=2)(torch.ones(5, 1, 3))
    >>> y.shape, c.shape
    (torch.Size([5, 1, 2]), torch.Size([2, 1, 2]))
    """

    shown = "{0.input_size}, {0.hidden_size}, cell={0.cell!r}, batch_first={0.batch_first}"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell: str = "lstm",
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if cell not in _CELLS or num_layers < 1:
            raise OptionError(
                f"LayerNormRecurrent: cell={cell!r} with num_layers={num_layers}; "
                f"wanted one of {', '.join(map(repr, _CELLS))}, and at least 1 layer"
            )
        self.input_size, self.hidden_size, self.cell, self.batch_first = input_size, hidden_size, cell, batch_first
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.num_layers, self.cells = num_layers, nn.ModuleList(_CELLS[cell](s, hidden_size, **options) for s in sizes)

    def flatten_parameters(self) -> None:
        """Do nothing: code written for ``torch.nn.LSTM`` calls it."""

    def forward(self, input: Tensor, state: Any = None, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Run over a sequence.

        Args:
            input: (T, *, input_size), or (N, T, input_size) with ``batch_first``.
            state: the first state, with a leading axis of layers: h (layers, *, hidden_size), or (h, c); None for zeros.
            mask: boolean, of the input's shape without the features; where it is False the state stays, and the output is zero.

        Returns the last layer's outputs, in the layout of the input, and the last state, as ``state``.
        """
        if isinstance(input, nn.utils.rnn.PackedSequence):
            raise ShapeError(
                "LayerNormRecurrent takes no PackedSequence; give pad_packed_sequence's tensor, and mask= of the lengths"
            )
        swap = self.batch_first and input.dim() > 2
        y = input.transpose(0, 1) if swap else input
        mask = mask.transpose(0, 1) if mask is not None and swap else mask
        given = None if state is None else state if isinstance(state, tuple) else (state,)
        last: list[State] = []
        for number, cell in enumerate(self.cells):
            assert isinstance(cell, _Cell)
            y, after = unroll(y, cell, None if given is None else tuple(s[number] for s in given), mask=mask)
            last.append(after if isinstance(after, tuple) else (after,))
        states = [torch.stack(each) for each in zip(*last, strict=True)]
        return (y.transpose(0, 1) if swap else y), (tuple(states) if len(states) > 1 else states[0])


_CELLS: dict[str, type[Any]] = {"lstm": LayerNormLSTMCell, "gru": LayerNormGRUCell, "rnn": LayerNormRNNCell}


def _check(cell: _Cell, x: Tensor) -> None:
    accumulation_dtype(x.dtype)  # refuses integers
    rows = cell.gates * cell.hidden_size
    for name, *sizes in (("weight_ih", cell.input_size), ("weight_hh", cell.hidden_size), ("bias",)):
        check_shape(type(cell).__name__, name, getattr(cell, name, None), rows, *sizes)
    check_last(type(cell).__name__, x, cell.input_size, "input_size")


def _first(cell: _Cell, x: Tensor, given: Any) -> State:
    """Check the state to start from, and return it in the dtype of the cell."""
    state = cell.start(x) if given is None else given if isinstance(given, tuple) else (given,)
    if len(state) != cell.states or any(each.shape[-1:] != (cell.hidden_size,) for each in state):
        raise ShapeError(
            f"{type(cell).__name__}: got a state of {' and '.join(show(each.shape) for each in state)}, wanted "
            f"{cell.states} of hidden_size={cell.hidden_size}: {'(h, c)' if cell.states > 1 else 'h'}"
        )
    return tuple(each.to(cell.weight_hh.dtype) for each in state)


def _card(cell: str, title: str, over: str, formula: str, *invariances: Invariance) -> Card:
    return Card(
        name=f"layer_norm_{cell}",
        title=f"Layer normalization in {title}",
        wordless="it is a recurrent cell, with norms and weights",
        normalized_over=f"each time step of each sample, over {over}",
        formula=formula,
        paper=paper("ba2016layer"),
        use_cases="recurrent networks on long sequences or with small batches",
        strengths="stabilizes the size of the hidden state; the same for any length, batch and step",
        weaknesses="one step at a time in Python, without torch's fused recurrent kernels",
        module=_CELLS[cell],
        functional=unroll,
        make=lambda features: LayerNormRecurrent(features, features, cell, batch_first=True),
        layout="* d",
        invariances=frozenset(invariances),
    )


_INPUTS: tuple[Invariance, ...] = ("weight scale", "data scale", "sample scale")

CARD_RNN = _card("rnn", "a simple recurrent network", "the summed inputs", "h' = tanh(LN(W_ih x + W_hh h))")
CARD_LSTM = _card("lstm", "an LSTM", "the gates of the input and of the state, and over the cell", _LSTM, *_INPUTS)
CARD_GRU = _card("gru", "a GRU", "the gates and the candidate, of the input and of the state", _GRU, *_INPUTS)
