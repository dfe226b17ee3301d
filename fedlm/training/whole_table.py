"""The full softmax of a device whose embedding rows train: every word is in play, so it needs a table of its own.

Scores (N, V) are formed once and stay where they are: turned into exponentials chunk by chunk while they are in the
cache, they give log Z and the gradient of the hidden states on the way forward, and the step of SGD on the table on the
way back, without a gradient of the table ever existing. That costs three products and (N, V) of memory; the program of
one device (`losses/full_softmax.py`) costs four products and almost no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.models.base import LanguageModel
from fedlm.trainable.build import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.trainable.parts import Part
from fedlm.trainable.spec import RowIds, UpdateSpec
from fedlm.training.group_rows import Places, descend_at, tables_of
from fedlm.training.work import RoundWork


class WholeTable:
    """One device's own tables, rows of the round's set first; the memory serves one device after another.

    Arguments:
        model: Whose tables are copied.
    """

    train = True

    def __init__(self, model: LanguageModel) -> None:
        self._sources = tables_of(model)
        # One row more than the vocabulary: what padding reads, and what takes gradients of rows that do not train.
        self._tables = {n: s.new_zeros(len(s) + 1, *s.shape[1:]) for n, s in self._sources.items()}
        self._scores = torch.empty(0)
        self.spare = len(model.input_table)
        self.input = self._tables[INPUT_TABLE]
        self.output = self._tables.get(OUTPUT_TABLE, self.input)
        self.bias = self._tables.get(OUTPUT_BIAS)

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
        for name, source in self._sources.items():
            torch.index_select(source, 0, self._index, out=self._tables[name][:-1])
        return [Places(self._place[ids], self._ids, 0)]

    def descend(self, name: str, places: Tensor, gradient: Tensor, rate: float) -> None:
        """Take a step of SGD on rows, wherever they train; see `OwnRows.descend`."""
        flat = places.view(-1)
        descend_at(self._tables[name], torch.where(flat < self.num_moving, flat, self.spare), gradient, rate)

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
        loss: Tensor = _Step.apply(hidden, self, targets, weights, chunk, row_rate, rate)  # type: ignore[no-untyped-call]
        return loss

    def scores(self, num_tokens: int) -> Tensor:
        """Return memory for (V, N) numbers, flat, which keeps its place between calls."""
        size = self.spare * num_tokens
        if len(self._scores) < size:
            self._scores = torch.empty(size)
        return self._scores[:size]


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
        table, bias = own.output, own.bias
        memory = own.scores(len(hidden))
        chunks = [slice(i, min(i + chunk, own.spare)) for i in range(0, own.spare, chunk)]
        target_rows = embedding(targets, table)  # (N, D)
        target_scores = (hidden * target_rows).sum(-1) + (0 if bias is None else bias[targets])  # (N,)
        largest = hidden.new_full((len(hidden), 1), -torch.inf)  # (N, 1) of the scores so far
        total, mean_row = torch.zeros_like(largest), torch.zeros_like(hidden)  # sums relative to exp(largest)
        references = []
        for part in chunks:
            e, rows = _chunk_of(memory, part, len(hidden)), table[part]  # (N, W), (W, D)
            torch.mm(hidden, rows.T, out=e) if bias is None else torch.addmm(bias[part], hidden, rows.T, out=e)
            now = torch.maximum(largest, e.amax(1, keepdim=True))
            shrink = largest.sub_(now).exp_()
            e.sub_(now).exp_()
            total.mul_(shrink).add_(e.sum(1, keepdim=True))
            mean_row.mul_(shrink).addmm_(e, rows)
            largest = now.clone()
            references.append(now)
        log_z = largest + total.log()  # (N, 1)
        column = weights[:, None]
        for part, reference in zip(chunks, references, strict=True):
            moving = slice(part.start, min(part.stop, own.num_moving))
            if moving.start >= moving.stop:
                break
            e = _chunk_of(memory, part, len(hidden))[:, : moving.stop - moving.start]  # (N, W)
            scale = (reference - log_z).exp_().mul_(column)  # (N, 1) from exponentials to weighted probabilities
            table[moving].addmm_(e.T, hidden * scale, alpha=-row_rate)
            if bias is not None:
                bias[moving].sub_(e.T @ scale[:, 0], alpha=rate)  # addmv_ would round each token's term to the bias
        own.descend(OUTPUT_TABLE if OUTPUT_TABLE in own._tables else INPUT_TABLE, targets, -column * hidden, row_rate)
        if bias is not None:
            own.descend(OUTPUT_BIAS, targets, -weights, rate)
        ctx.save_for_backward(mean_row.div_(total).sub_(target_rows).mul_(column))
        return ((log_z[:, 0] - target_scores) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g_hidden,) = ctx.saved_tensors
        return g_hidden, None, None, None, None, None, None


def _chunk_of(memory: Tensor, part: slice, num_tokens: int) -> Tensor:
    """Return the part of the memory for a chunk's scores, (N, W), contiguous."""
    return memory[part.start * num_tokens : part.stop * num_tokens].view(num_tokens, -1)
