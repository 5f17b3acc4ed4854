"""Recurrent batch normalization: statistics of whole padded sequences or of each time step, and networks built on them."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.core.card import Card, paper
from normkit.core.compensation import Affine
from normkit.core.errors import OptionError, ShapeError, check_options
from normkit.core.memory import Running, RunningStatistics
from normkit.core.module import Module
from normkit.core.rule import Rule, remembered
from normkit.core.statistic import Statistic
from normkit.core.support import Support, show
from normkit.engine.dispatch import run, run_measured
from normkit.engine.layer import Layer, check_channels, check_several

Statistics = Literal["sequence", "frame"]


@remembered
def recurrent_batch_norm_rule(
    statistics: Statistics = "sequence", eps: float = 1e-5, momentum: float = 0.1, batch_first: bool = False
) -> Rule:
    """Recurrent batch normalization as data."""
    check_options("RecurrentBatchNorm", statistics=(statistics, Statistics))
    statistic = Statistic("mean", "std", eps)
    if statistics == "sequence":  # over samples and steps alike, so the order of the two axes does not matter
        return Rule(Support("n * c", over="n *"), statistic, Affine("c"), Running(momentum))
    support = Support("n t c" if batch_first else "t n c", over="n")
    return Rule(support, statistic, Affine("c"), Running(momentum, per="t c"))


class RecurrentBatchNorm(Layer):
    """Normalize each feature of sequences over the batch: over all real steps, or at each step separately.

    y = weight * (x - E[x]) / sqrt(Var[x] + eps) + bias. Sequence-wise, E and Var run over the batch and all steps that are not
    padding, as if the real frames were concatenated. Frame-wise they run over the batch at each step, which a causal model
    needs, and each step up to ``max_length`` has its own running statistics; later steps use the last one's in evaluation,
    and do not update it in training. Padding becomes zero.

    ``eps``, ``momentum`` and ``bias`` are as for BatchNorm.

    Args:
        num_features: features C.
        statistics: ``"sequence"`` or ``"frame"``. Default: "sequence".
        max_length: number of steps with their own running statistics; needed frame-wise.
        gain: initial weight; 0.1 keeps the gates that follow unsaturated. Default: 1.
        batch_first: whether inputs are (N, T, C) rather than (T, N, C). Default: False.

    Shape: (T, N, C), or (N, T, C) with ``batch_first``; the output has the same shape. Sequence-wise without lengths
    any (*, C).

    Raises:
        OptionError: frame-wise without ``max_length``; unknown statistics.
        ShapeError: an input or lengths that do not fit, or one value per statistic in training.

    Reference: Laurent et al., "Batch Normalized Recurrent Neural Networks" (2015), https://arxiv.org/abs/1510.01378,
    section 3; Cooijmans et al., "Recurrent Batch Normalization" (2016), https://arxiv.org/abs/1603.09025, section 3.

    >>> norm = RecurrentBatchNorm(1, batch_first=True)
    >>> norm(torch.tensor([[[1.0], [3.0]], [[3.0], [9.0]]]), lengths=torch.tensor([2, 1])).squeeze(-1).detach()
    tensor([[-1.4142,  0.7071],
            [ 0.7071,  0.0000]])
    """

    shown = (
        "{0.num_features}, statistics={0.statistics!r}, max_length={0.max_length}, eps={0.eps}, momentum={0.momentum}, "
        "gain={0.gain}"
    )
    unusual: ClassVar = {"batch_first": False}

    def __init__(
        self,
        num_features: int,
        statistics: Statistics = "sequence",
        max_length: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        gain: float = 1.0,
        *,
        bias: bool = True,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if statistics == "frame" and (max_length is None or max_length < 1):
            raise OptionError(f"RecurrentBatchNorm: max_length={max_length}; frame-wise wanted a whole number from 1")
        if not 0 <= momentum <= 1:
            raise OptionError(f"RecurrentBatchNorm: momentum={momentum}; wanted a number from 0 to 1")
        self.statistics: Statistics = statistics
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.max_length, self.gain, self.batch_first = max_length if statistics == "frame" else None, gain, batch_first
        shape = (num_features,) if self.max_length is None else (self.max_length, num_features)
        self.register_affine((num_features,), True, bias, device=device, dtype=dtype)
        self.register_running(shape, "running_mean", "running_var", device=device, dtype=dtype)
        self.reset_parameters()
        self.complete()

    def make_rule(self) -> Rule:
        return recurrent_batch_norm_rule(self.statistics, self.eps, self.momentum, self.batch_first)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.fill(weight=self.gain)

    def check(self, input: Tensor) -> None:
        check_channels("RecurrentBatchNorm", input, self.num_features, "num_features", "n * c")
        if self.statistics == "frame" and input.dim() != 3:
            layout = "(N, T, C)" if self.batch_first else "(T, N, C)"
            raise ShapeError(f"RecurrentBatchNorm: got an input of {show(input.shape)}, wanted {layout} frame-wise")
        if self.training:
            check_several("RecurrentBatchNorm", input, self.rule.support)

    def forward(
        self, input: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Normalize.

        Args:
            input: sequences in the layer's layout.
            mask: boolean, broadcasts over the input; False for padding.
            lengths: number of real steps of each sample, instead of a mask.
            start: the first step of the input, if it is part of a longer sequence.
        """
        self.check(input)
        rule, memory, running = self.rule, self.rule.memory, self.running()
        assert memory is not None
        assert running is not None
        if lengths is not None:
            mask = padding_mask(lengths, input, self.batch_first, start)
        steps = input.shape[1 if self.batch_first else 0]
        if not self.training:
            if self.max_length is not None:
                at = torch.arange(start, start + steps, device=input.device).clamp(max=self.max_length - 1)
                running = RunningStatistics(running.mean[at], running.var[at])
            x = input if mask is None else torch.where(mask, input, 0.0)
            y = run(rule, x, self.weight, self.bias, running=running, training=False, backend=self.backend)
            return y if mask is None else torch.where(mask, y, 0.0)
        if self.max_length is None:
            return run(rule, input, self.weight, self.bias, running=running, mask=mask, backend=self.backend)
        y, found = run_measured(rule, input, self.weight, self.bias, mask=mask, backend=self.backend)
        known = max(0, min(steps, self.max_length - start))
        if known and input.numel():
            mean, var = (v.reshape(steps, self.num_features)[:known] for v in (found.mean, found.unbiased()))
            batches = running.batches if start == 0 else None
            here = RunningStatistics(running.mean[start:][:known], running.var[start:][:known], batches)
            memory.blend(here, mean, var)
        return y


def padding_mask(lengths: Tensor, input: Tensor, batch_first: bool = False, start: int = 0) -> Tensor:
    """Make a mask that is True where a step is real: of the input's first two axes, and a last axis of size 1.

    >>> padding_mask(torch.tensor([2, 1]), torch.zeros(2, 2, 5), batch_first=True).squeeze(-1)
    tensor([[ True,  True],
            [ True, False]])
    """
    samples, steps = (0, 1) if batch_first else (1, 0)
    if input.dim() != 3 or lengths.shape != (input.shape[samples],):
        raise ShapeError(
            f"lengths of shape {show(lengths.shape)} with an input of {show(input.shape)}: wanted one length per sample "
            f"(axis {samples}) of an input of 3 axes"
        )
    at = torch.arange(start, start + input.shape[steps], device=input.device)
    real = at < lengths.to(input.device).unsqueeze(1)
    return (real if batch_first else real.T).unsqueeze(-1)


def recurrent_batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    statistics: Statistics = "sequence",
    lengths: Tensor | None = None,
    batch_first: bool = False,
) -> Tensor:
    """Recurrent batch normalization by the input's own statistics as a function; see RecurrentBatchNorm.

    >>> recurrent_batch_norm(torch.tensor([[[1.0], [3.0]], [[5.0], [9.0]]]), statistics="frame").squeeze(-1)
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    """
    rule = recurrent_batch_norm_rule(statistics, eps, batch_first=batch_first)
    check_several("recurrent_batch_norm", input, rule.support)
    mask = None if lengths is None else padding_mask(lengths, input, batch_first)
    return run(rule, input, weight, bias, mask=mask)


class BatchNormRNN(Module):
    """A recurrent layer whose input is normalized, but not its state: h_t = phi(W_h h_{t-1} + BN(W_x x_t)).

    ``statistics`` and ``max_length``, and errors of shapes, are those of RecurrentBatchNorm.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        nonlinearity: ``"tanh"`` or ``"relu"``; OptionError for others. Default: "tanh".
        batch_first: whether inputs are (N, T, C) rather than (T, N, C). Default: False.

    Shape: (T, N, input_size) to (T, N, hidden_size), and the last real state (N, hidden_size).

    Reference: Laurent et al., "Batch Normalized Recurrent Neural Networks" (2015), https://arxiv.org/abs/1510.01378.

    >>> BatchNormRNN(3, 5)(torch.randn(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        statistics: Statistics = "sequence",
        max_length: int | None = None,
        *,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_options("BatchNormRNN", nonlinearity=(nonlinearity, ("tanh", "relu")))
        factory = {"device": device, "dtype": dtype}
        self.nonlinearity, self.batch_first = nonlinearity, batch_first
        self.input = nn.Linear(input_size, hidden_size, bias=False, **factory)
        self.hidden = nn.Linear(hidden_size, hidden_size, bias=False, **factory)
        self.norm = RecurrentBatchNorm(hidden_size, statistics, max_length, **factory)

    def forward(
        self, input: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over a sequence; outputs of padding are zero, and the state is that of the last real step."""
        x = input.transpose(0, 1) if self.batch_first else input
        mask = None if lengths is None else padding_mask(lengths, x)
        z = self.norm(self.input(x), mask)
        h = z.new_zeros(z.shape[1:]) if state is None else state
        outputs = []
        for t in range(len(z)):
            new = torch.tanh(self.hidden(h) + z[t]) if self.nonlinearity == "tanh" else F.relu(self.hidden(h) + z[t])
            h = new if mask is None else torch.where(mask[t], new, h)
            outputs.append(h if mask is None else torch.where(mask[t], h, 0.0))
        y = torch.stack(outputs) if outputs else z
        return (y.transpose(0, 1) if self.batch_first else y), h


class BatchNormLSTM(Module):
    """An LSTM that normalizes at each step the terms of input and state, and the cell before its output.

    (i, f, g, o) = BN(W_h h_{t-1}) + BN(W_x x_t) + b,  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),
    h_t = sigmoid(o) tanh(BN(c_t)); each BN frame-wise, with its own statistics for each step up to ``max_length`` and a gain
    that starts at 0.1; only the last has a bias. Gates are in torch's order.

    ``input_size`` and ``hidden_size`` are those of BatchNormRNN; ``max_length``, ``gain``, ``eps``, ``momentum`` and
    ``batch_first`` and the errors are those of RecurrentBatchNorm, frame-wise.

    Shape: (T, N, input_size) to (T, N, hidden_size), and the last real states (N, hidden_size) of output and cell.

    Reference: Cooijmans et al., "Recurrent Batch Normalization" (2016), https://arxiv.org/abs/1603.09025.

    >>> y, (h, c) = BatchNormLSTM(3, 5, max_length=7)(torch.randn(7, 2, 3))
    >>> y.shape, c.shape
    (torch.Size([7, 2, 5]), torch.Size([2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        max_length: int,
        gain: float = 0.1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.batch_first = batch_first
        self.input = nn.Linear(input_size, 4 * hidden_size, bias=False, **factory)
        self.hidden = nn.Linear(hidden_size, 4 * hidden_size, bias=False, **factory)
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size, **factory))
        options = ("frame", max_length, eps, momentum, gain)
        self.input_norm = RecurrentBatchNorm(4 * hidden_size, *options, bias=False, **factory)
        self.hidden_norm = RecurrentBatchNorm(4 * hidden_size, *options, bias=False, **factory)
        self.cell_norm = RecurrentBatchNorm(hidden_size, *options, **factory)
        nn.init.orthogonal_(self.hidden.weight)

    def forward(
        self, input: Tensor, state: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a sequence; outputs of padding are zero, and the states are those of the last real step."""
        x = input.transpose(0, 1) if self.batch_first else input
        mask = None if lengths is None else padding_mask(lengths, x)
        z = self.input_norm(self.input(x), mask) + self.bias
        zeros = z.new_zeros(z.shape[1], self.hidden.in_features)
        h, c = (zeros, zeros) if state is None else state
        outputs = []
        for t in range(len(z)):
            here = None if mask is None else mask[t : t + 1]
            gates = z[t] + self.hidden_norm(self.hidden(h).unsqueeze(0), here, start=t).squeeze(0)
            i, f, g, o = gates.chunk(4, -1)
            cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new = o.sigmoid() * self.cell_norm(cell.unsqueeze(0), here, start=t).squeeze(0).tanh()
            h = new if mask is None else torch.where(mask[t], new, h)
            c = cell if mask is None else torch.where(mask[t], cell, c)
            outputs.append(h if mask is None else torch.where(mask[t], h, 0.0))
        y = torch.stack(outputs) if outputs else z[..., : zeros.shape[-1]]
        return (y.transpose(0, 1) if self.batch_first else y), (h, c)


CARD = Card(
    title="Recurrent batch normalization",
    word="rbn",
    normalized_over="each feature, over the batch and all real steps, or over the batch at each step",
    paper=paper("cooijmans2016recurrent"),
    use_cases="recurrent networks on padded batches of sequences",
    strengths="faster training of recurrent networks; padding never enters a statistic",
    weaknesses="statistics to keep for each step; layer normalization needs neither them nor a batch",
    module=RecurrentBatchNorm,
    functional=recurrent_batch_norm,
    make=lambda channels: RecurrentBatchNorm(channels, batch_first=True),
    build=lambda at: RecurrentBatchNorm(
        at.channels, eps=at.eps, momentum=at.momentum_or(0.1), bias=at.bias, batch_first=True, **at.factory
    ),
    rule=recurrent_batch_norm_rule(),
    layout="* d",
    running_state=True,
    invariances=frozenset({"weight scale", "row scale", "data scale", "data shift"}),
)
