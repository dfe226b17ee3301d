"""Sampled softmax with the log-q correction (Bengio and Senecal 2008; Jean et al. 2015, section 3).

The softmax over the target and K negatives shared by the batch, each score less the log of its expected count. A
negative that equals a token's target is masked for that token. Scores are not normalised: only differences matter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.losses.nce import against_noise


def sampled_softmax_loss(
    hidden: Tensor, targets: Tensor, negatives: Tensor, table: Tensor, bias: Tensor | None, log_expected: Tensor
) -> Tensor:
    """Return the mean cross-entropy over tokens; the arguments are those of `fedlm.losses.nce.nce_loss`."""
    positive, offset = against_noise(hidden, targets, table, bias, log_expected)
    scores = torch.addmm(offset[negatives], hidden, embedding(negatives, table).T)  # (N, K)
    scores = scores.masked_fill(targets[:, None] == negatives[None, :], -torch.inf)
    log_z = torch.logaddexp(positive, torch.logsumexp(scores, -1))  # (N,)
    return (log_z - positive).sum() / max(len(targets), 1)
