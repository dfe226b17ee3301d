"""The full softmax of single examples, streamed over chunks of the vocabulary.

The forward pass sees each chunk's scores once, for log Z and for the hidden states' gradient, both relative to a score
so far. If rows train it adds up, for each example, the Gram matrix of the probabilities of rows that the example does
not name; with the Gram matrix of the hidden states it gives the squared norm in those rows,
`sum_(t,s) <p_t, p_s> <h_t, h_s>`. Where the sequences are so long that this costs more than scoring every row again,
the norm comes from the slices `P_W^T H` of a second pass instead.

Legend as in `output_side.py`; W rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.example_dp.tables.output_side import MaskedTargets, OutputSide, TrainedRows

_HEADROOM = 20.0
"""How far a score may lie above the one that exponentials are relative to: exp(2 * 20) is far from float32's end."""
_ROUNDING_UNITS = 2.0  # measured: 1.0 at most
_BLOCK = 128
"""Rows of a Gram matrix at a time, so that nearly half of it, the upper triangle, is left out."""


class StreamedSoftmax(OutputSide):
    """Cross-entropy over all L rows; `chunk` is W, the other arguments are those of `OutputSide`."""

    _log_z: Tensor  # (N,)
    _scale: Tensor  # (N,) from exponentials relative to `reference` to probabilities

    def __init__(
        self, tokens: MaskedTargets, table: Tensor, bias: Tensor | None, trained: TrainedRows | None, chunk: int
    ) -> None:
        super().__init__(tokens, table, bias, trained)
        self._grams: list[Tensor] | None = None  # B times (n, n)
        moving = 0 if trained is None else trained.num_moving
        self._moving = list(_ranges(0, moving, chunk))
        self._chunks = [*self._moving, *_ranges(moving, len(table), chunk)]
        if trained is not None:
            edges = [start for start, _ in self._moving] + [moving]
            self._starts = trained.pairs.starts(edges)  # (chunks + 1) x (B + 1)

    def _score(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        reference = hidden.new_full((len(hidden), 1), -torch.inf)  # (N, 1)
        total, mean_row = torch.zeros_like(reference), torch.zeros_like(hidden)  # (N, 1), (N, D)
        if self._gram_is_cheaper():
            self._grams = [hidden.new_zeros(n, n) for n in self._lengths]
        for number, (start, stop) in enumerate(self._chunks):
            scores = self._scores(hidden, start, stop)  # (N, W)
            reference = self._follow(scores, reference, total, mean_row)
            p = scores.sub_(reference).exp_()  # (N, W)
            total += p.sum(1, keepdim=True)
            mean_row.addmm_(p, self._table[start:stop])
            if self._grams is not None and number < len(self._moving):
                for gram, part in zip(self._grams, self._unnamed(p, number), strict=True):
                    _add_lower_gram(gram, part)
        target_rows = embedding(self._tokens.targets, self._table)  # (N, D)
        target_scores = (hidden * target_rows).sum(1)  # (N,)
        if self._bias is not None:
            target_scores += self._bias[self._tokens.targets]
        self._scale, self._pull = total.squeeze(1).reciprocal(), -torch.ones_like(target_scores)
        self._log_z = (reference + total.log()).squeeze(1)
        return self._log_z - target_scores, mean_row.div_(total).sub_(target_rows)

    def _follow(self, scores: Tensor, reference: Tensor, total: Tensor, mean_row: Tensor) -> Tensor:
        """Return a reference (N, 1) near enough to the scores; sums relative to the old one are brought along."""
        largest = scores.amax(1, keepdim=True)  # (N, 1)
        above = largest > reference + _HEADROOM
        if not bool(above.any()):
            return reference
        now = torch.where(above, largest, reference)
        shrink = (reference - now).exp_()  # (N, 1)
        total *= shrink
        mean_row *= shrink
        for example, gram in enumerate(self._grams or ()):
            part = shrink[self._tokens.span(example)]  # (n, 1)
            gram.mul_(part).mul_(part.T)
        return now

    @property
    def _lengths(self) -> list[int]:
        """Return n of each example."""
        return [stop - start for start, stop in pairwise(self._tokens.bounds)]

    def _gram_is_cheaper(self) -> bool:
        """Compare what a row of the table costs: a Gram matrix, or D + C for each token in a second pass."""
        if self._trained is None:
            return False
        gram = sum((stop - start) * stop for n in self._lengths for start, stop in _ranges(0, n, _BLOCK))
        return gram <= sum(self._lengths) * (self._table.shape[1] + self._num_columns)

    def _scores(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        rows = self._table[start:stop]  # (W, D)
        return hidden @ rows.T if self._bias is None else torch.addmm(self._bias[start:stop], hidden, rows.T)

    def _unnamed(self, p: Tensor, number: int) -> Iterator[Tensor]:
        """Yield each example's part of a chunk's probabilities (n, W), named rows set to zero in place."""
        assert self._trained is not None
        first, last = self._starts[number], self._starts[number + 1]
        ids = self._trained.pairs.ids
        for example in range(self._tokens.num_examples):
            part = p[self._tokens.span(example)]  # (n, W)
            if first[example] < last[example]:
                part.index_fill_(1, ids[first[example] : last[example]] - self._moving[number][0], 0)
            yield part

    def _push(self, tokens: slice, ids: Tensor) -> Tensor:
        scores = self._hidden[tokens] @ self._table[ids].T  # (n, U)
        if self._bias is not None:
            scores += self._bias[ids]
        return scores.sub_(self._log_z[tokens, None]).exp_()

    def _rest_squared_norms(self, trained: TrainedRows) -> Tensor:
        return self._from_slices() if self._grams is None else self._from_grams(self._grams)

    def _from_grams(self, grams: list[Tensor]) -> Tensor:
        """Contract both Gram matrices in float64: hidden states that cancel leave little of large terms."""
        squares = []
        for example, gram in enumerate(grams):
            span = self._tokens.span(example)
            weights = self._tokens.weights[span].double() * self._scale[span]  # (n,)
            columns = self._columns(span) * weights[:, None]  # (n, C) float64
            terms = (columns @ columns.T).mul_(gram)  # (n, n), its lower triangle
            squares.append(2 * terms.tril().sum() - terms.diagonal().sum())
        return torch.stack(squares).clamp_(min=0)

    def _rounding(self) -> Tensor:
        """Bound what differs between the probabilities behind the norms and those that are made again for the sums.

        A score is off by some units of rounding of |h_t| |row|, and so is, relative, every probability; where a target
        is nearly certain its derivative p - 1 is nothing but that error.
        """
        hidden, weights = self._hidden, self._tokens.weights.double()
        longest = torch.linalg.vector_norm(self._table, dim=1).amax().double() if len(self._table) else 0.0
        squares = torch.linalg.vector_norm(self._hidden, dim=1, dtype=torch.float64).square()  # (N,)
        errors = _ROUNDING_UNITS * torch.finfo(hidden.dtype).eps * longest * squares * weights  # (N,)
        total: Tensor = errors.new_zeros(self._tokens.num_examples)  # (B,)
        return total.index_add_(0, self._tokens.examples, errors)

    def _from_slices(self) -> Tensor:
        everything = slice(0, len(self._hidden))
        columns = self._columns(everything) * self._tokens.weights[:, None]  # (N, C)
        squares = torch.zeros(self._tokens.num_examples, dtype=torch.float64, device=columns.device)
        for number, (start, stop) in enumerate(self._moving):
            p = self._scores(self._hidden, start, stop).sub_(self._log_z[:, None]).exp_()  # (N, W)
            norms = [
                torch.linalg.vector_norm(part.T @ columns[self._tokens.span(example)])
                for example, part in enumerate(self._unnamed(p, number))
            ]
            squares += torch.stack(norms).double().square()
        return squares

    def _add_push(
        self, chosen: Tensor | None, weights: Tensor, hidden: Tensor, table_sum: Tensor | None, bias_sum: Tensor | None
    ) -> None:
        log_z = (self._log_z if chosen is None else self._log_z[chosen])[:, None]  # (N', 1)
        weighted = hidden * weights[:, None]  # (N', D)
        for start, stop in self._moving:
            p = self._scores(hidden, start, stop).sub_(log_z).exp_()  # (N', W)
            if table_sum is not None:
                table_sum[start:stop].addmm_(p.T, weighted)
            if bias_sum is not None:
                bias_sum[start:stop].addmv_(p.T, weights)


def _add_lower_gram(gram: Tensor, part: Tensor) -> None:
    """Add `part part^T` to the lower triangle of (n, n); `part` is (n, W)."""
    for start, stop in _ranges(0, len(part), _BLOCK):
        gram[start:stop, :stop].addmm_(part[start:stop], part[:stop].T)


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, stop)) for first in range(start, stop, step))
