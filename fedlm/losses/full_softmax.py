"""Exact full-softmax cross-entropy, streamed over chunks of the vocabulary.

Forward and backward hold one (N, W) chunk of scores at a time, never (N, V): the backward pass computes each chunk's
scores again from the stored log Z (N,).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def full_softmax_loss(hidden: Tensor, targets: Tensor, table: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
    """Return the mean cross-entropy over tokens.

    Arguments:
        hidden: (N, D) final hidden states of real tokens.
        targets: (N,) rows of `table`.
        table: (V, D) output embedding.
        bias: (V,) or None.
        chunk: W, vocabulary entries at a time.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, targets, table, bias, chunk)  # type: ignore[no-untyped-call]
    return loss / max(len(targets), 1)


def log_normaliser(hidden: Tensor, table: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
    """Return log Z (N,) = logsumexp over the vocabulary, in chunks."""
    log_z = hidden.new_full((len(hidden),), -torch.inf)
    for scores, _ in _chunks(hidden, table, bias, chunk):
        log_z = torch.logaddexp(log_z, torch.logsumexp(scores, -1))
    return log_z


def target_scores(hidden: Tensor, targets: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """Return u_y (N,), the score of each token's target."""
    scores = (hidden * table[targets]).sum(-1)
    return scores if bias is None else scores + bias[targets]


def _chunks(hidden: Tensor, table: Tensor, bias: Tensor | None, chunk: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    for start in range(0, len(table), chunk):
        stop = min(start + chunk, len(table))
        scores = hidden @ table[start:stop].T  # (N, W)
        if bias is not None:
            scores += bias[start:stop]
        yield scores, (start, stop)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of log Z - u_y over tokens."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, table: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
        log_z = log_normaliser(hidden, table, bias, chunk)
        ctx.save_for_backward(hidden, targets, table, bias, log_z)
        ctx.chunk = chunk
        return (log_z - target_scores(hidden, targets, table, bias)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, targets, table, bias, log_z = ctx.saved_tensors
        need_hidden, _, need_table, need_bias, _ = ctx.needs_input_grad
        g_hidden = torch.zeros_like(hidden) if need_hidden else None
        g_table = torch.empty_like(table) if need_table else None
        g_bias = torch.empty_like(bias) if need_bias else None
        for scores, (start, stop) in _chunks(hidden, table, bias, ctx.chunk):
            p = scores.sub_(log_z[:, None]).exp_()  # (N, W) softmax probabilities
            inside = ((targets >= start) & (targets < stop)).nonzero().squeeze(-1)
            p[inside, targets[inside] - start] -= 1.0
            p *= grad
            if g_hidden is not None:
                g_hidden.addmm_(p, table[start:stop])
            if g_table is not None:
                torch.mm(p.T, hidden, out=g_table[start:stop])
            if g_bias is not None:
                g_bias[start:stop] = p.sum(0)
        return g_hidden, None, g_table, g_bias, None
