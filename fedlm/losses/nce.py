"""Noise-contrastive estimation with log Z fixed at zero (Gutmann and Hyvarinen 2010; Mnih and Teh 2012).

    J = log s(u_y - log(K q_y)) + sum_k log s(-(u_k - log(K q_k))),   u_w = <h, e_w> + b_w

The K negatives are shared by the batch, so their scores are one product (N, D) x (D, K); nothing has size N x V. A
negative that equals a token's target stays in: the estimator's expectation includes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, softplus


def nce_loss(
    hidden: Tensor, targets: Tensor, negatives: Tensor, table: Tensor, bias: Tensor | None, log_expected: Tensor
) -> Tensor:
    """Return the mean of -J over tokens.

    Arguments:
        hidden: (N, D) final hidden states of real tokens.
        targets: (N,) rows of `table`.
        negatives: (K,) rows of `table`.
        table: (L, D) output embedding rows in play.
        bias: (L,) or None.
        log_expected: (L,) log(K q) of each row in play.
    """
    positive, offset = against_noise(hidden, targets, table, bias, log_expected)
    noise: Tensor = _NoiseTerm.apply(hidden, embedding(negatives, table), offset[negatives])  # type: ignore[no-untyped-call]
    return (softplus(-positive).sum() + noise) / max(len(targets), 1)


def against_noise(
    hidden: Tensor, targets: Tensor, table: Tensor, bias: Tensor | None, log_expected: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u_y - log(K q_y) of each token (N,), and b_w - log(K q_w) of each row in play (L,)."""
    offset = -log_expected if bias is None else bias - log_expected  # (L,)
    # embedding() and not table[targets]: its backward pass adds up rows several times faster.
    return (hidden * embedding(targets, table)).sum(-1) + offset[targets], offset


class _NoiseTerm(torch.autograd.Function):
    """sum_(n,k) -log s(-x_nk), x = H E^T + c: one (N, K) buffer for scores, softplus and gradient together."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, offset: Tensor) -> Tensor:
        scores = torch.addmm(offset, hidden, rows.T)  # (N, K)
        total = softplus(scores).sum()
        ctx.save_for_backward(hidden, rows, scores.sigmoid_())
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, rows, p = ctx.saved_tensors  # p (N, K): the gradient with respect to the scores
        need_hidden, need_rows, need_offset = ctx.needs_input_grad
        return (
            grad * (p @ rows) if need_hidden else None,
            grad * (p.T @ hidden) if need_rows else None,
            grad * p.sum(0) if need_offset else None,
        )
