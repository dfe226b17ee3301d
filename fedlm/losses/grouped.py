"""The training losses of a group of devices, each the mean over a device's own targets.

The gradient with respect to every score is known in the forward pass, because the loss is the end of the program: it
is formed there, in the buffer that held the scores, and the backward pass is products alone.

Padding is where a weight is zero. It is left out by selection, never by a product with that zero: what padding computes
need not be finite, and zero times infinity is NaN.

Shape legend: G devices, N targets of a device (padded), K negatives, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, softplus


def sampled_losses(
    kind: str,
    hidden: Tensor,
    weights: Tensor,
    targets: tuple[Tensor, Tensor],
    negatives: tuple[Tensor, Tensor],
    is_hit: Tensor | None,
) -> Tensor:
    """Return the loss of each device, (G,); the formulas stand in `losses/nce.py` and `losses/sampled_softmax.py`.

    Arguments:
        kind: "nce" or "sampled_softmax".
        hidden: (G, N, D) hidden states.
        weights: (G, N) one over the device's number of targets; 0 at padding.
        targets: Each target's row (G, N, D), and its bias less the log of its expected count (G, N).
        negatives: The same of the negatives, (G, K, D) and (G, K).
        is_hit: (G, N, K) negatives that equal the target, which the sampled softmax masks; None for NCE.
    """
    losses: Tensor = _Sampled.apply(kind, hidden, weights, *targets, *negatives, is_hit)  # type: ignore[no-untyped-call]
    return losses


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        hidden: Tensor,
        weights: Tensor,
        target_rows: Tensor,
        target_offset: Tensor,
        negative_rows: Tensor,
        negative_offset: Tensor,
        is_hit: Tensor | None,
    ) -> Tensor:
        positive = (hidden * target_rows).sum(-1) + target_offset  # (G, N)
        scores = torch.baddbmm(negative_offset[:, None], hidden, negative_rows.transpose(1, 2))  # (G, N, K)
        is_padding = weights == 0  # (G, N)
        if kind == "nce":
            losses = softplus(-positive) + softplus(scores).sum(-1)  # (G, N)
            pull = -torch.sigmoid(-positive) * weights  # (G, N) gradient of the target's score
            push = scores.sigmoid_().mul_(weights[..., None])  # (G, N, K) gradient of the negatives' scores
        else:
            assert is_hit is not None
            scores.masked_fill_(is_hit, -torch.inf)
            log_z = torch.logaddexp(positive, torch.logsumexp(scores, -1))  # (G, N)
            losses = log_z - positive
            pull = ((positive - log_z).exp() - 1) * weights
            push = scores.sub_(log_z[..., None]).exp_().mul_(weights[..., None])
        pull.masked_fill_(is_padding, 0)
        push.masked_fill_(is_padding[..., None], 0)
        ctx.save_for_backward(hidden, target_rows, negative_rows, pull, push)
        return (losses * weights).masked_fill_(is_padding, 0).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target_rows, negative_rows, pull, push = ctx.saved_tensors
        needs = ctx.needs_input_grad
        g_hidden = g_target = g_negative = None
        if needs[1]:
            g_hidden = torch.baddbmm(pull[..., None] * target_rows, push, negative_rows)
        if needs[3]:
            g_target = pull[..., None] * hidden
        if needs[5]:
            g_negative = torch.bmm(push.transpose(1, 2), hidden)
        g_offsets = (pull if needs[4] else None, push.sum(1) if needs[6] else None)
        return None, g_hidden, None, g_target, g_offsets[0], g_negative, g_offsets[1], None


def full_losses(
    hidden: Tensor, weights: Tensor, targets: Tensor, table: Tensor, bias: Tensor | None, chunk: int
) -> Tensor:
    """Return the exact full-softmax loss of each device, (G,), over a table that is common and does not train.

    One pass over the vocabulary: scores of a chunk are used for log Z and for the gradient at once, both relative to
    the largest score so far, and never again.

    Arguments:
        hidden: (G, N, D) hidden states.
        weights: (G, N) one over the device's number of targets; 0 at padding.
        targets: (G, N) word ids.
        table: (V, D).
        bias: (V,) or None.
        chunk: W, vocabulary entries at a time.
    """
    losses: Tensor = _Full.apply(hidden, weights, targets, table, bias, chunk)  # type: ignore[no-untyped-call]
    return losses


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, targets: Tensor, table: Tensor, bias: Tensor | None, chunk: int
    ) -> Tensor:
        flat, target_rows = hidden.flatten(0, 1), embedding(targets.flatten(), table)  # (M, D), M = G N
        largest = flat.new_full((len(flat), 1), -torch.inf)  # (M, 1)
        total, mean_row = torch.zeros_like(largest), torch.zeros_like(flat)  # sums relative to exp(largest)
        for start in range(0, len(table), chunk):
            rows = table[start : start + chunk]  # (W, D)
            scores = flat @ rows.T if bias is None else torch.addmm(bias[start : start + chunk], flat, rows.T)  # (M, W)
            now = torch.maximum(largest, scores.amax(1, keepdim=True))
            shrink = (largest - now).exp_()  # (M, 1)
            scores.sub_(now).exp_()
            total.mul_(shrink).add_(scores.sum(1, keepdim=True))
            mean_row.mul_(shrink).addmm_(scores, rows)
            largest = now
        log_z = (largest + total.log()).view_as(weights)
        target_scores = (flat * target_rows).sum(-1) + (0 if bias is None else bias[targets.flatten()])
        is_padding = weights == 0  # (G, N)
        grad = mean_row.div_(total).sub_(target_rows).view_as(hidden).mul_(weights[..., None])  # (G, N, D)
        ctx.save_for_backward(grad.masked_fill_(is_padding[..., None], 0))
        return ((log_z - target_scores.view_as(weights)) * weights).masked_fill_(is_padding, 0).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad, None, None, None, None, None
