"""NCE and the sampled softmax of single examples; the formulas stand in `losses/nce.py`, `losses/sampled_softmax.py`.

The K negatives are the same for every token, so the derivatives with respect to their scores are one (N, K) matrix,
with repeated negatives as one column; the target adds one more. Nothing else of the table has a gradient on the output
side. A negative that equals a token's target stays in under NCE and is masked in the sampled softmax.

Legend as in `output_side.py`; K distinct negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, softplus

from fedlm.example_dp.tables.output_side import MaskedTargets, OutputSide, TrainedRows


class SampledHead(OutputSide):
    """A sampled loss; see `OutputSide` for the arguments not named here.

    Arguments:
        negatives: Rows of the table, repeats allowed; they must not depend on the data.
        log_expected: (L,) log of each row's expected count among the negatives.
        kind: "nce" or "sampled_softmax".
    """

    _pushes: Tensor  # (N, K)

    def __init__(
        self,
        tokens: MaskedTargets,
        table: Tensor,
        bias: Tensor | None,
        trained: TrainedRows | None,
        *,
        negatives: Tensor,
        log_expected: Tensor,
        kind: str,
    ) -> None:
        super().__init__(tokens, table, bias, trained)
        assert kind in ("nce", "sampled_softmax"), kind
        self._kind = kind
        self._negatives, self._repeats = torch.unique(negatives, return_counts=True)  # (K,), sorted
        self._offset = -log_expected if bias is None else bias - log_expected  # (L,)

    def _score(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        targets = self._tokens.targets
        target_rows, rows = embedding(targets, self._table), embedding(self._negatives, self._table)  # (N, D), (K, D)
        positive = (hidden * target_rows).sum(1) + self._offset[targets]  # (N,)
        scores = torch.addmm(self._offset[self._negatives], hidden, rows.T)  # (N, K)
        losses = self._nce(positive, scores) if self._kind == "nce" else self._softmax(positive, scores)
        return losses, torch.addmm(self._pull[:, None] * target_rows, self._pushes, rows)

    def _nce(self, positive: Tensor, scores: Tensor) -> Tensor:
        repeats = self._repeats.to(scores.dtype)  # (K,)
        losses: Tensor = softplus(-positive) + softplus(scores) @ repeats  # (N,)
        self._pull, self._pushes = -torch.sigmoid(-positive), scores.sigmoid_().mul_(repeats)
        return losses

    def _softmax(self, positive: Tensor, scores: Tensor) -> Tensor:
        scores += self._repeats.to(scores.dtype).log()
        scores.masked_fill_(self._tokens.targets[:, None] == self._negatives, -torch.inf)
        log_z = torch.logaddexp(positive, torch.logsumexp(scores, 1))  # (N,)
        self._pull, self._pushes = torch.expm1(positive - log_z), scores.sub_(log_z[:, None]).exp_()
        return log_z - positive

    def _push(self, tokens: slice, ids: Tensor) -> Tensor:
        column = torch.searchsorted(self._negatives, ids).clamp_(max=len(self._negatives) - 1)  # (U,)
        is_negative = self._negatives[column] == ids  # (U,)
        return self._pushes[tokens].index_select(1, column).masked_fill_(~is_negative, 0)

    def _rest_squared_norms(self, trained: TrainedRows) -> Tensor:
        moving = int((self._negatives < trained.num_moving).sum())
        squares = []
        for example in range(self._tokens.num_examples):
            span, named = self._tokens.span(example), trained.pairs.ids[trained.pairs.span(example)]
            unnamed = (~torch.isin(self._negatives[:moving], named)).nonzero().squeeze(1)
            part = self._pushes[span].index_select(1, unnamed)  # (n, K')
            columns = self._columns(span) * self._tokens.weights[span, None]  # (n, C)
            squares.append(_squared_norm_of_product(part, columns))
        return torch.stack(squares)

    def _add_push(
        self, chosen: Tensor | None, weights: Tensor, hidden: Tensor, table_sum: Tensor | None, bias_sum: Tensor | None
    ) -> None:
        assert self._trained is not None
        ids = self._negatives[self._negatives < self._trained.num_moving]  # (K',)
        pushes = (self._pushes if chosen is None else self._pushes[chosen])[:, : len(ids)]  # (N', K')
        if table_sum is not None:
            table_sum.index_add_(0, ids, pushes.T @ (hidden * weights[:, None]))
        if bias_sum is not None:
            bias_sum.index_add_(0, ids, pushes.T @ weights)


def _squared_norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """Return |left^T right|^2, float64, by the smaller of the product (K', C) and two Gram matrices (n, n)."""
    n, width = left.shape
    if n * (width + right.shape[1]) < width * right.shape[1]:
        left, right = left.double(), right.double()
        return ((left @ left.T) * (right @ right.T)).sum().clamp_(min=0)
    norm: Tensor = torch.linalg.vector_norm(left.T @ right, dtype=torch.float64)
    return norm.square()
