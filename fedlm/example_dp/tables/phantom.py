"""Phantom Clipping (Ding et al. 2024, "Delving into Differentially Private Transformer", arXiv 2405.18194).

The clipped sum of per-example gradients of embedding tables, also of one table on both sides of the model (tied), in
one backward pass and without any L x D tensor per example. One example with input tokens x_t and gradients g_t of the
rows looked up, hidden states h_t, and derivatives d_t (L,) of its loss with respect to the scores:

    G = sum_t 1[x_t] g_t^T + sum_t d_t h_t^T
    |G|^2 = sum over named rows |G_v|^2 + sum_(t,s) <d_t, d_s>_rest <h_t, h_s>
    clipped sum = scatter(x, C g) + (C d)^T H

The paper expands |G|^2 into |G_in|^2 + |G_out|^2 + 2 <G_in, G_out>. Here an example's *named* rows (its inputs and its
targets, at most 2 T) are formed one by one, so that the input side, both signs of d = p - y, and the cross term meet
before anything is squared; only the other rows, where d = p >= 0, are never formed (`streamed_softmax.py`,
`sampled_head.py`). The value is the same, and confident predictions do not cancel in float32.

Exact: everything, for the full softmax, NCE and the sampled softmax; input and output side, tied or not; the output
bias; repeated tokens, repeated negatives, negatives that equal a target; padding; scaled embeddings, because the
gradient taken is that of the raw rows. Approximate: nothing but rounding. Measured in float32 against float64 (T 512,
D 256; random, confident, and cancelling hidden states): norms of 0.01 and more within 1e-6 relative, of 5e-5 within
2e-3; the absolute error stayed below 1e-6 throughout. The full softmax makes its probabilities again for the sums, with
other rounding; where that could add more than a quarter of the clip rule's slack, norms are told longer by it (short
gradients of nearly certain predictions, or scores in the thousands). In-batch negatives have no place here: one
example's loss would depend on the others.

Memory: B T^2 + B T (W + D), W rows of a chunk or negatives.

Legend: B examples, T tokens, D width, L rows of a table (the vocabulary, or rows in play), W rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.errors import ConfigError
from fedlm.example_dp.per_example_gradients import Contribution, PerExampleGradients
from fedlm.example_dp.tables.output_side import MaskedTargets, OutputSide, TrainedRows
from fedlm.example_dp.tables.row_pairs import RowPairs
from fedlm.example_dp.tables.sampled_head import SampledHead
from fedlm.example_dp.tables.streamed_softmax import StreamedSoftmax
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE


class TrainedTables:
    """The embedding tables of one model: which of them train, and what a pass needs of them.

    On one `PerExampleGradients`, `look_up` may be called once and then one of the heads once.

    Arguments:
        input_table: (L, D).
        output_table: (L, D); None: tied, one table on both sides, whose name is "input_table".
        output_bias: (L,), or None.
        trained: Which of "input_table", "output_table" and "output_bias" train; empty is allowed.
        num_moving: The first so many rows count as trained, in all of them; None: all rows.

    Raises:
        ConfigError: `trained` names a table that the model does not have.
    """

    def __init__(
        self,
        *,
        input_table: Tensor,
        output_table: Tensor | None,
        output_bias: Tensor | None,
        trained: frozenset[str],
        num_moving: int | None = None,
    ) -> None:
        self.tied = output_table is None
        tables = {INPUT_TABLE: input_table, OUTPUT_TABLE: output_table, OUTPUT_BIAS: output_bias}
        self._tables = {name: table.detach() for name, table in tables.items() if table is not None}
        if unknown := sorted(trained - self._tables.keys()):
            raise ConfigError(f"table '{unknown[0]}' cannot train: the model has only {', '.join(self._tables)}")
        self.num_rows = len(input_table)
        self.num_moving = self.num_rows if num_moving is None else num_moving
        self.trained = trained if self.num_moving else frozenset()

    @property
    def output_table(self) -> Tensor:
        """Rows that hidden states are scored against, (L, D)."""
        return self._tables[INPUT_TABLE if self.tied else OUTPUT_TABLE]

    @property
    def output_name(self) -> str:
        """The name under which the output table trains."""
        return INPUT_TABLE if self.tied else OUTPUT_TABLE

    def table(self, name: str) -> Tensor:
        """Return a table by its name."""
        return self._tables[name]

    def look_up(self, per_example: PerExampleGradients, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the rows of input tokens, (B, T, D).

        Arguments:
            per_example: Of this pass.
            tokens: (B, T) rows of the input table.
            mask: (B, T), False at padding, whose rows get no gradient.
        """
        table = self._tables[INPUT_TABLE]
        if INPUT_TABLE not in self.trained:
            return embedding(tokens, table)
        side = InputSide(tokens, mask & (tokens < self.num_moving))
        contribution = self._contribution(per_example)
        assert contribution.inputs is None, "one look-up a pass"
        assert contribution.outputs is None, "the look-up comes before its head"
        contribution.inputs = side
        rows: Tensor = _LookUp.apply(per_example.trigger, tokens, table, side)  # type: ignore[no-untyped-call]
        return rows

    def full_softmax(
        self, per_example: PerExampleGradients, hidden: Tensor, targets: Tensor, mask: Tensor, chunk: int
    ) -> Tensor:
        """Return the mean cross-entropy over each example's own targets, (B,); 0 for an example without any.

        Arguments:
            per_example: Of this pass.
            hidden: (B, T, D).
            targets: (B, T) rows of the output table.
            mask: (B, T), which targets count.
            chunk: W, rows at a time.
        """
        tokens, trained = self._scored(per_example, hidden, targets, mask)
        side = StreamedSoftmax(tokens, self.output_table, self._tables.get(OUTPUT_BIAS), trained, chunk)
        return self._losses(per_example, side, hidden, trained)

    def sampled(
        self,
        per_example: PerExampleGradients,
        hidden: Tensor,
        targets: Tensor,
        mask: Tensor,
        negatives: Tensor,
        log_expected: Tensor,
        kind: str,
    ) -> Tensor:
        """Return the mean sampled loss over each example's own targets, (B,); 0 for an example without any.

        Arguments:
            per_example: Of this pass.
            hidden: (B, T, D).
            targets: (B, T) rows of the output table.
            mask: (B, T), which targets count.
            negatives: (K,) rows, the same for the whole logical batch.
            log_expected: (L,) log of each row's expected count among them.
            kind: "nce" or "sampled_softmax".

        Guarantee:
            The norms are those of gradients given the negatives. Drawn from the examples, or numbered by anything that
            depends on them, negatives would make one example's gradient depend on the others.
        """
        tokens, trained = self._scored(per_example, hidden, targets, mask)
        side = SampledHead(
            tokens,
            self.output_table,
            self._tables.get(OUTPUT_BIAS),
            trained,
            negatives=negatives,
            log_expected=log_expected,
            kind=kind,
        )
        return self._losses(per_example, side, hidden, trained)

    def _scored(
        self, per_example: PerExampleGradients, hidden: Tensor, targets: Tensor, mask: Tensor
    ) -> tuple[MaskedTargets, TrainedRows | None]:
        tokens = MaskedTargets.of(targets, mask, hidden.dtype)
        table, bias = self.output_name in self.trained, OUTPUT_BIAS in self.trained
        if not (table or bias):
            return tokens, None
        moving = tokens.targets < self.num_moving  # (N,)
        examples, ids = [tokens.examples[moving]], [tokens.targets[moving]]
        inputs = self._contribution(per_example).inputs
        if table and self.tied and inputs is not None:
            examples, ids = [*examples, inputs.examples], [*ids, inputs.ids]
        pairs = RowPairs(
            torch.cat(examples), torch.cat(ids), num_examples=tokens.num_examples, num_rows=self.num_moving
        )
        return tokens, TrainedRows(table, bias, self.num_moving, pairs)

    def _losses(
        self, per_example: PerExampleGradients, side: OutputSide, hidden: Tensor, trained: TrainedRows | None
    ) -> Tensor:
        if trained is not None:
            contribution = self._contribution(per_example)
            assert contribution.outputs is None, "one head a pass"
            contribution.outputs, contribution.pairs = side, trained.pairs
        return side.losses(hidden, per_example.trigger)

    def _contribution(self, per_example: PerExampleGradients) -> TableGradients:
        """Return this pass's contribution: both sides of a table must meet in one."""
        for known in per_example.contributions:
            if isinstance(known, TableGradients) and known.tables is self:
                return known
        new = TableGradients(self, per_example.num_examples)
        per_example.add(new)
        return new


class InputSide:
    """The rows looked up that train: whose they are, and after the backward pass their gradients.

    Arguments:
        tokens: (B, T) rows.
        counted: (B, T) which of them get a gradient.
    """

    def __init__(self, tokens: Tensor, counted: Tensor) -> None:
        self._positions = counted.flatten().nonzero().squeeze(1)  # (n,)
        self.examples = self._positions // max(tokens.shape[1], 1)  # (n,)
        self.ids = tokens.flatten()[self._positions]  # (n,)
        self.gradients: Tensor | None = None  # (n, D)

    def receive(self, gradients: Tensor) -> None:
        """Keep what counts of the gradients (B, T, D)."""
        self.gradients = gradients.flatten(0, 1).index_select(0, self._positions)

    def rows(self, pairs: RowPairs) -> Tensor:
        """Return the gradients of these pairs' rows, (u, D)."""
        assert self.gradients is not None
        return pairs.sums(self.examples, self.ids, self.gradients)

    def add_weighted_sum(self, factors: Tensor, table_sum: Tensor) -> None:
        """Add `sum_i factors_i g_i` to (L, D); examples of factor zero are left out (see `OutputSide`)."""
        if self.gradients is None:
            return
        kept = (factors > 0)[self.examples].nonzero().squeeze(1)
        weighted = self.gradients[kept] * factors[self.examples[kept], None]
        table_sum.index_add_(0, self.ids[kept], weighted)


class TableGradients(Contribution):
    """The per-example gradients of all tables of one pass.

    Arguments:
        tables: Whose they are.
        num_examples: B.
    """

    def __init__(self, tables: TrainedTables, num_examples: int) -> None:
        self.tables = tables
        self.inputs: InputSide | None = None
        self.outputs: OutputSide | None = None
        self.pairs: RowPairs | None = None
        """The rows that each example names on the output side."""
        self._num_examples = num_examples

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each example's gradient of all tables together, (B,)."""
        tables, inputs = self.tables, self.inputs
        if inputs is not None and inputs.gradients is None:
            inputs = None
        rows = None  # what the input side adds to the output side's own rows
        table = tables.output_table
        squares = torch.zeros(self._num_examples, dtype=torch.float64, device=table.device)  # (B,)
        if inputs is not None:
            if tables.tied and self.pairs is not None:
                rows = inputs.rows(self.pairs)  # (u, D)
            else:
                pairs = RowPairs(
                    inputs.examples, inputs.ids, num_examples=self._num_examples, num_rows=tables.num_moving
                )
                squares += pairs.squared_norms(inputs.rows(pairs))
        if self.outputs is not None:
            squares += self.outputs.squared_norms(rows)
        return squares.to(table.dtype)

    def weighted_sums(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return `sum_i factors_i g_i` of each trained table, in the table's shape; rows that do not move are zero."""
        tables = self.tables
        sums = {name: torch.zeros_like(tables.table(name)) for name in sorted(tables.trained)}
        factors = factors.to(tables.output_table.dtype)
        if self.outputs is not None:
            table_sum, bias_sum = sums.get(tables.output_name), sums.get(OUTPUT_BIAS)
            self.outputs.add_weighted_sums(factors, table_sum, bias_sum)
        if self.inputs is not None:
            self.inputs.add_weighted_sum(factors, sums[INPUT_TABLE])
        return sums


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trigger: Tensor, tokens: Tensor, table: Tensor, side: InputSide) -> Tensor:
        ctx.side = side
        return embedding(tokens, table)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        ctx.side.receive(*grad_outputs)
        return None, None, None, None
