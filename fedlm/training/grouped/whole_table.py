"""The full softmax of a device whose embedding rows train: every word is in play, so it needs a table of its own.

Scores (N, V) are formed once and stay where they are: turned into exponentials chunk by chunk while they are in the
cache, they give log Z and the gradient of the hidden states on the way forward, and the step of SGD on the table on the
way back, without a gradient of the table ever existing. That costs three products and (N, V) of memory; the program of
one device (`losses/full_softmax.py`) costs four products and almost no memory.

The table is kept wide, a row being [e_w, b_w, 1], and a token's hidden state too, [h, 1, -s] with s its target's score.
One product then gives u_w - s, whose exponential is e; e times the wide table gives sum e_w e_w and the normaliser,
and e^T times the wide steps moves rows and biases. What is left beside products is the exponential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from fedlm.models.base import LanguageModel
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.trainable.parts import Part
from fedlm.trainable.spec import RowIds, UpdateSpec
from fedlm.training.device_batches import RoundWork
from fedlm.training.grouped.embedding_rows import Places, descend_at, tables_of


class WholeTable:
    """One device's own tables, rows of the round's set first; the memory serves one device after another.

    Arguments:
        model: Whose tables are copied.
    """

    train = True
    padding = 0  # of nobody: one device alone has none

    def __init__(self, model: LanguageModel) -> None:
        self._sources = tables_of(model)
        V, D = model.input_table.shape
        # One row more than the vocabulary takes the gradients of rows that do not train; lookups do not see it, for it
        # outlives the device that wrote it.
        whole = torch.zeros(V + 1, D + 2)
        self.output_name = INPUT_TABLE if model.tied else OUTPUT_TABLE
        inputs = whole[:, :D] if model.tied else torch.zeros(V + 1, D)
        tables = {INPUT_TABLE: inputs, self.output_name: whole[:, :D], OUTPUT_BIAS: whole[:, D]}
        self._tables = {name: tables[name] for name in self._sources}
        self.size, self.wide, self.input = V, whole[:V], inputs[:V]
        self.output, self.bias = self.wide[:, :D], self.wide[:, D]
        self._scores = torch.empty(0)

    def start_round(self, work: RoundWork) -> None:
        """Order the words for one round."""
        inside = work.slot >= 0
        self._ids = np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)])  # (V,)
        self.num_moving = int(inside.sum())
        self._place = np.empty_like(self._ids)  # (V,)
        self._place[self._ids] = np.arange(len(self._ids))
        self._index = torch.from_numpy(self._ids)
        self.log_expected = work.log_expected

    def open(self, occurrences: Sequence[RowIds]) -> list[Places]:
        """Copy the tables for the one device of the group; see `OwnRows.open`."""
        (ids,) = occurrences
        # The column of ones too: a device that diverges adds zero times infinity to it.
        self.bias.zero_()
        self.wide[:, -1] = 1
        for name, source in self._sources.items():
            self._tables[name][:-1] = source.index_select(0, self._index)
        return [Places(self._place[ids], self._ids, 0)]

    def descend(self, name: str, places: Tensor, gradient: Tensor, rate: float) -> None:
        """Take a step of SGD on rows, wherever they train; see `OwnRows.descend`."""
        flat = places.view(-1)
        descend_at(self._tables[name], torch.where(flat < self.num_moving, flat, self.size), gradient, rate)

    def parts(self, places: Places, spec: UpdateSpec) -> list[Part]:
        """Return how the rows of the round's set, all of them, have changed."""
        moved = slice(self.num_moving)
        offsets = {block.name: block.offset for block in spec.row_blocks}
        return [
            Part(offsets[name], (self._tables[name][moved] - source[self._index[moved]]).flatten().numpy())
            for name, source in self._sources.items()
        ]

    def loss(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, *, chunk: int, row_rate: float, rate: float
    ) -> Tensor:
        """Return the loss (), and take the step of SGD on the output rows and biases at once.

        Arguments:
            hidden: (N, D) hidden states.
            targets: (N,) places.
            weights: (N,) one over the number of targets.
            chunk: W, rows at a time.
            row_rate: Learning rate of the rows.
            rate: Learning rate of the biases.
        """
        self.reserve(len(hidden), chunk)
        loss: Tensor = _Step.apply(hidden, self, targets, weights, chunk, row_rate, rate)  # type: ignore[no-untyped-call]
        return loss

    @property
    def names(self) -> set[str]:
        """The tables that there are."""
        return set(self._sources)

    def chunks(self, num_rows: int, size: int) -> list[slice]:
        """Return the chunks of the first rows; a chunk of fewer rows is the beginning of the whole one."""
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def reserve(self, num_tokens: int, chunk: int) -> None:
        """Get memory for the scores of a step; it keeps its place from step to step."""
        self._chunk = min(chunk, self.size)
        size = -(-self.size // self._chunk) * self._chunk * num_tokens
        if len(self._scores) < size:
            self._scores = torch.empty(size)

    def scores(self, part: slice, num_tokens: int) -> Tensor:
        """Return the memory of a chunk's scores, (N, W): each chunk lies together."""
        start = part.start * num_tokens
        whole = self._scores[start : start + self._chunk * num_tokens].view(num_tokens, self._chunk)
        return whole[:, : part.stop - part.start]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        own: WholeTable,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        row_rate: float,
        rate: float,
    ) -> Tensor:
        D = hidden.shape[1]
        target_rows, target_bias = embedding(targets, own.output), own.bias[targets]  # (N, D), (N,)
        target_scores = (hidden * target_rows).sum(-1) + target_bias  # (N,)
        shift = target_scores
        sums = _exponentials(own, hidden, shift, chunk)  # (N, D+2)
        if not sums[:, -1].isfinite().all():  # a word scores 88 nats more than the target
            shift = _largest_scores(own, hidden, chunk)
            sums = _exponentials(own, hidden, shift, chunk)
        total = sums[:, -1:]  # (N, 1) Z / exp(shift)
        column = weights[:, None]
        scale = column / total  # (N, 1) from exponentials to weighted probabilities
        bias_rate = rate if OUTPUT_BIAS in own.names else 0.0
        steps = torch.cat([row_rate * scale * hidden, bias_rate * scale, torch.zeros_like(scale)], 1)  # (N, D+2)
        for part in own.chunks(own.num_moving, chunk):
            own.wide[part].addmm_(own.scores(part, len(hidden)).T, steps, alpha=-1)
        own.descend(own.output_name, targets, -column * hidden, row_rate)
        if OUTPUT_BIAS in own.names:
            own.descend(OUTPUT_BIAS, targets, -weights, rate)
        ctx.save_for_backward((sums[:, :D] / total).sub_(target_rows).mul_(column))
        return ((total[:, 0].log() + shift - target_scores) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g_hidden,) = ctx.saved_tensors
        return g_hidden, None, None, None, None, None, None


def _exponentials(own: WholeTable, hidden: Tensor, shift: Tensor, chunk: int) -> Tensor:
    """Fill the memory with exp(u_w - shift); return their products with the wide rows, (N, D+2)."""
    wide_hidden = torch.cat([hidden, torch.ones_like(shift)[:, None], -shift[:, None]], 1)  # (N, D+2)
    sums = torch.zeros_like(wide_hidden)
    for part in own.chunks(own.size, chunk):
        e = own.scores(part, len(hidden))  # (N, W)
        torch.mm(wide_hidden, own.wide[part].T, out=e).exp_()
        sums.addmm_(e, own.wide[part])
    return sums


def _largest_scores(own: WholeTable, hidden: Tensor, chunk: int) -> Tensor:
    """Return each token's largest score (N,)."""
    wide_hidden = pad(torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1), (0, 1))  # (N, D+2)
    parts = own.chunks(own.size, chunk)
    return torch.stack([(wide_hidden @ own.wide[part].T).amax(1) for part in parts]).amax(0)
