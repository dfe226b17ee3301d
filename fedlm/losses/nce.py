"""Noise-contrastive estimation with log Z fixed at zero (Gutmann and Hyvarinen 2010; Mnih and Teh 2012).

    J = log s(u_y - log(K q_y)) + sum_k log s(-(u_k - log(K q_k))),   u_w = <h, e_w> + b_w

The K negatives are shared by the batch, so their scores are one product (N, D) x (D, K); nothing has size N x V. A
negative that equals a token's target stays in: the estimator's expectation includes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def nce_loss(
    hidden: Tensor,
    targets: Tensor,
    negatives: Tensor,
    table: Tensor,
    bias: Tensor | None,
    log_expected: Tensor,
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
    target_rows, negative_rows = table[targets], table[negatives]  # (N, D), (K, D)
    positive = (hidden * target_rows).sum(-1) - log_expected[targets]  # (N,)
    negative = hidden @ negative_rows.T - log_expected[negatives]  # (N, K)
    if bias is not None:
        positive = positive + bias[targets]
        negative = negative + bias[negatives]
    return (softplus(-positive).sum() + softplus(negative).sum()) / max(len(targets), 1)


def sampled_softmax_loss(
    hidden: Tensor,
    targets: Tensor,
    negatives: Tensor,
    table: Tensor,
    bias: Tensor | None,
    log_expected: Tensor,
    *,
    normalisation: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy against the target and K negatives with the log-q correction.

    Arguments are those of `nce_loss`. A negative that equals the target is masked for that token. Source: Jean et al.
    2015, section 3; Bengio and Senecal 2008.

    Arguments:
        normalisation: Weight of (log Z)^2 with Z as estimated from the sample; it teaches scores to normalise
            themselves (Devlin et al. 2014, section 2.2), which is where NCE starts from.
    """
    target_rows, negative_rows = table[targets], table[negatives]  # (N, D), (K, D)
    positive = (hidden * target_rows).sum(-1) - log_expected[targets]  # (N,)
    negative = hidden @ negative_rows.T - log_expected[negatives]  # (N, K)
    if bias is not None:
        positive = positive + bias[targets]
        negative = negative + bias[negatives]
    hits = targets[:, None] == negatives[None, :]  # (N, K)
    log_z = torch.logaddexp(positive, torch.logsumexp(negative.masked_fill(hits, -torch.inf), -1))  # (N,)
    loss = (log_z - positive).sum()
    if normalisation:
        # Of the negatives alone: with the target among them the estimate of Z would be biased upwards.
        loss = loss + normalisation * torch.logsumexp(negative, -1).square().sum()
    return loss / max(len(targets), 1)
