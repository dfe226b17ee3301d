"""Negatives from the public noise distribution q ~ frequency^power, shared by a batch.

They are drawn with replacement by inverse transform, so that K draws have expected counts K q exactly: both NCE and the
log-q correction of the sampled softmax rely on it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import LossConfig
from fedlm.trainable.spec import RowIds


class NoiseDistribution:
    """The distribution q of negatives over the vocabulary, or over the round's rows.

    Arguments:
        frequencies: Public word frequencies (V,).
        config: `noise_power` and `negatives_from`.
        row_ids: The round's row set (S,); negatives come from it alone when `negatives_from` is "rows".
    """

    def __init__(self, frequencies: npt.NDArray[np.float64], config: LossConfig, row_ids: RowIds) -> None:
        weights = frequencies**config.noise_power  # (V,)
        if config.negatives_from == "rows":
            inside = np.zeros(len(weights))
            inside[row_ids] = weights[row_ids]
            weights = inside
        q = weights / weights.sum()
        self._cumulative = np.cumsum(q)  # (V,)
        self._cumulative[-1] = 1.0
        self.num_negatives = config.negatives
        with np.errstate(divide="ignore"):
            self.log_expected = np.log(config.negatives * q).astype(np.float32)  # (V,) log of the expected count, K q
        """Log of each word's expected count among the K negatives; -inf where q is zero."""

    def draw(self, rng: np.random.Generator) -> RowIds:
        """Return K word ids (K,), with replacement."""
        draws = rng.random(self.num_negatives)
        return np.searchsorted(self._cumulative, draws, side="right").astype(np.int64)
