"""The loss of phrases under a model, by the exact full softmax."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedlm.auditing.text import Floats, Tokens
from fedlm.losses.full_softmax import log_normaliser, target_scores
from fedlm.trainable.build import Trainable
from fedlm.trainable.spec import Vector

_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def phrase_losses(trainable: Trainable, values: Vector, phrases: Tokens, *, boundary: int, chunk: int) -> Floats:
    """Return the negative log likelihood of each phrase (n,), in nats, after a message's end.

    Arguments:
        trainable: The model; it is left with `values`.
        values: (P_full,) of the run.
        phrases: (n, L).
        boundary: Id of the token before a message.
        chunk: Vocabulary entries at a time.
    """
    blocks = trainable.spec.views(values)
    trainable.bind_tables(blocks)
    trainable.load(blocks)
    trainable.model.eval()
    step = max(1, _TOKENS_AT_ONCE // phrases.shape[1])
    parts = [_losses(trainable, phrases[i : i + step], boundary, chunk) for i in range(0, len(phrases), step)]
    return np.concatenate(parts)


def _losses(trainable: Trainable, phrases: Tokens, boundary: int, chunk: int) -> npt.NDArray[np.float64]:
    model, targets = trainable.model, torch.from_numpy(phrases.astype(np.int64))  # (B, L)
    inputs = torch.cat([targets.new_full((len(targets), 1), boundary), targets[:, :-1]], dim=1)  # (B, L)
    mask = torch.ones_like(inputs, dtype=torch.bool)
    hidden = model.hidden(inputs, mask).flatten(0, 1)  # (B L, D)
    table, bias, words = model.output_table, model.output_bias, targets.flatten()
    nll = log_normaliser(hidden, table, bias, chunk) - target_scores(hidden, words, table, bias)  # (B L,)
    return np.asarray(nll.double().reshape(targets.shape).sum(dim=1).numpy())
