"""The output side of the tables: a loss for each example, and what its gradient with respect to the rows needs.

The derivative of a token's loss with respect to the scores is d_t = push_t + pull_t [v = y_t]: `push` spreads over the
rows that a token is scored against, `pull` meets its target. Every head (the streamed softmax, the sampled losses)
knows both; what follows from them alone stands here.

Legend: B examples, N counted tokens of all of them, n of one, D width, L rows, U rows named by one example, C columns
of a row's gradient: D if the output table trains, one more if the output bias does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlm.example_dp.clip_rule import SLACK
from fedlm.example_dp.tables.row_pairs import RowPairs


@dataclass(frozen=True, eq=False)
class MaskedTargets:
    """The tokens of a batch whose targets count, one example after the other.

    Arguments:
        positions: (N,) where they stand among the B T positions.
        targets: (N,) rows of the output table.
        examples: (N,) whose they are, in [0, B).
        weights: (N,) one over the number of the example's targets.
        bounds: B + 1 first tokens.
    """

    positions: Tensor
    targets: Tensor
    examples: Tensor
    weights: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, targets: Tensor, mask: Tensor, dtype: torch.dtype) -> MaskedTargets:
        """Collect them; `targets` and `mask` are (B, T)."""
        positions = mask.flatten().nonzero().squeeze(1)  # (N,)
        examples = positions // mask.shape[1]  # (N,)
        counts = mask.sum(1)  # (B,)
        weights = counts.to(dtype).reciprocal()[examples]  # (N,)
        return cls(positions, targets.flatten()[positions], examples, weights, [0, *counts.cumsum(0).tolist()])

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.bounds) - 1

    def span(self, example: int) -> slice:
        """Return where this example's tokens stand."""
        return slice(self.bounds[example], self.bounds[example + 1])

    def select(self, hidden: Tensor) -> Tensor:
        """Return their hidden states (N, D) out of (B, T, D)."""
        flat = hidden.flatten(0, 1)  # (B T, D)
        return flat if len(self.positions) == len(flat) else flat.index_select(0, self.positions)


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """What trains on the output side.

    Arguments:
        table: The output table trains.
        bias: The output bias trains.
        num_moving: Rows that count as trained: the first ones.
        pairs: Rows named by each example, all of them moving: its targets, and of a tied table its inputs.
    """

    table: bool
    bias: bool
    num_moving: int
    pairs: RowPairs


class OutputSide(ABC):
    """One pass of a head; complete after the backward pass.

    Arguments:
        tokens: What is scored.
        table: (L, D) output rows.
        bias: (L,) or None.
        trained: None if nothing of the two trains; then nothing is kept for later.
    """

    _hidden: Tensor  # (N, D)
    _pull: Tensor  # (N,)

    def __init__(self, tokens: MaskedTargets, table: Tensor, bias: Tensor | None, trained: TrainedRows | None) -> None:
        self._tokens, self._table, self._bias, self._trained = tokens, table, bias, trained
        self._upstream = table.new_zeros(tokens.num_examples)  # (B,) what the backward pass brings to the losses

    def losses(self, hidden: Tensor, trigger: Tensor) -> Tensor:
        """Return the mean loss of each example's tokens, (B,); `hidden` (B, T, D), `trigger` that of the per-example
        gradients."""
        selected = self._tokens.select(hidden)  # (N, D)
        losses: Tensor = _Losses.apply(selected, trigger if self._trained else None, self)  # type: ignore[no-untyped-call]
        return losses

    @abstractmethod
    def _score(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's loss (N,), and its gradient (N, D) with respect to the hidden state (N, D)."""

    @abstractmethod
    def _push(self, tokens: slice, ids: Tensor) -> Tensor:
        """Return the push of one example's tokens on some rows (U,), (n, U)."""

    @abstractmethod
    def _rest_squared_norms(self, trained: TrainedRows) -> Tensor:
        """Return the squared norm of each example's gradient in moving rows that it does not name, (B,) float64."""

    @abstractmethod
    def _add_push(
        self, chosen: Tensor | None, weights: Tensor, hidden: Tensor, table_sum: Tensor | None, bias_sum: Tensor | None
    ) -> None:
        """Add `sum_t weights_t push_t hidden_t^T` and `sum_t weights_t push_t` over the chosen tokens (None: all)."""

    def squared_norms(self, rows: Tensor | None) -> Tensor:
        """Return the squared norm of each example's gradient, (B,) float64.

        Arguments:
            rows: The input side's gradients in the named rows of a tied table (u, D); None: it has none.
        """
        trained = self._trained
        assert trained is not None
        named = self._named_rows(trained)  # (u, C)
        if rows is not None:
            named[:, : rows.shape[1]] += rows
        rest = self._rest_squared_norms(trained) * self._upstream.double().square()  # (B,)
        squares = trained.pairs.squared_norms(named) + rest
        rounding = self._rounding() * self._upstream.abs().double()  # (B,)
        is_safe = rounding <= SLACK / 4 * squares.sqrt()
        return torch.where(is_safe, squares, (squares.sqrt() + rounding).square())

    def _rounding(self) -> Tensor:
        """Return how much longer than its norm an example's share of the sums can be, by rounding, (B,) float64."""
        return torch.zeros(self._tokens.num_examples, dtype=torch.float64, device=self._table.device)

    def add_weighted_sums(self, factors: Tensor, table_sum: Tensor | None, bias_sum: Tensor | None) -> None:
        """Add `sum_i factors_i g_i` to what trains: (L, D), (L,); examples of factor zero are left out.

        Left out and not multiplied by zero, because zero times a gradient that is not finite would not be zero.
        """
        trained, tokens = self._trained, self._tokens
        assert trained is not None
        weights = (factors * self._upstream)[tokens.examples] * tokens.weights  # (N,)
        chosen, hidden, pull, targets = None, self._hidden, self._pull, tokens.targets
        if not bool((factors > 0).all()):
            chosen = (factors > 0)[tokens.examples].nonzero().squeeze(1)  # (N',)
            weights, hidden, pull, targets = weights[chosen], hidden[chosen], pull[chosen], targets[chosen]
        self._add_push(chosen, weights, hidden, table_sum, bias_sum)
        moving = (targets < trained.num_moving).nonzero().squeeze(1)
        pulled, targets = (pull * weights)[moving], targets[moving]  # (m,)
        if table_sum is not None:
            table_sum.index_add_(0, targets, pulled[:, None] * hidden[moving])
        if bias_sum is not None:
            bias_sum.index_add_(0, targets, pulled)

    def _columns(self, tokens: slice) -> Tensor:
        """Return what the derivatives of scores multiply: the hidden states, and one for the bias, (n, C)."""
        assert self._trained is not None
        hidden = self._hidden[tokens] if self._trained.table else self._hidden[tokens, :0]
        return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1) if self._trained.bias else hidden

    @property
    def _num_columns(self) -> int:
        """C."""
        assert self._trained is not None
        return self._table.shape[1] * self._trained.table + self._trained.bias

    def _named_rows(self, trained: TrainedRows) -> Tensor:
        """Return each example's gradient in the rows that it names, one by one: (u, C)."""
        rows = self._hidden.new_empty(len(trained.pairs), self._num_columns)
        for example in range(self._tokens.num_examples):
            span, pairs = self._tokens.span(example), trained.pairs.span(example)
            derivatives = self._push(span, trained.pairs.ids[pairs])  # (n, U)
            targets = self._tokens.targets[span]  # (n,)
            moving = (targets < trained.num_moving).nonzero().squeeze(1)
            slots = trained.pairs.slots(self._tokens.examples[span][moving], targets[moving]) - pairs.start
            derivatives[moving, slots] += self._pull[span][moving]
            derivatives *= (self._tokens.weights[span] * self._upstream[example])[:, None]
            torch.mm(derivatives.T, self._columns(span), out=rows[pairs])
        return rows


class _Losses(torch.autograd.Function):
    """The gradient with respect to the hidden states is known in the forward pass, because the loss ends the model."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, trigger: Tensor | None, side: OutputSide) -> Tensor:
        hidden = hidden.detach()
        tokens = side._tokens
        losses, gradient = side._score(hidden)  # (N,), (N, D)
        if side._trained is not None:
            side._hidden = hidden
        ctx.side = side
        ctx.save_for_backward(gradient.mul_(tokens.weights[:, None]))
        return losses.new_zeros(tokens.num_examples).index_add_(0, tokens.examples, losses * tokens.weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        (gradient,) = ctx.saved_tensors
        ctx.side._upstream = upstream
        scaled = gradient * upstream[ctx.side._tokens.examples, None] if ctx.needs_input_grad[0] else None
        return scaled, None, None
