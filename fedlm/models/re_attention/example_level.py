"""Keeps a model's noise levels up to date while it trains with DP-SGD, for Re-Attention (docs/re_attention.md)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from fedlm.models.re_attention.noise_levels import FloatArray, NoiseLevels, is_per_frequency, step_variance
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.models.transformer import TransformerModel

_TABLES = frozenset({INPUT_TABLE, OUTPUT_TABLE, OUTPUT_BIAS})


class NoiseTracker:
    """Adds up the noise of the steps and gives the model its `NoiseLevels` after each one.

    Call `after_step` once the optimizer has moved the weights; on resuming, once for each phase that is done, with its
    number of steps. A model without Re-Attention is left as it is.

    Arguments:
        model: The model that trains.
        frequencies: Public word frequencies (V,).
        num_tokens: Tokens of a typical example; a public number (the configured length, not the data's mean).
        batch_size: Expected examples of a step, q n.
        kind: `absolute` or `per_frequency`; see `fedlm.models.re_attention.noise_levels`.

    *Guarantee*: reads public numbers alone, so the levels are no further release.
    """

    def __init__(
        self,
        model: TransformerModel,
        frequencies: npt.NDArray[np.float64],
        *,
        num_tokens: float,
        batch_size: float,
        kind: str,
    ) -> None:
        self._model, self._batch_size, self._kind = model, batch_size, kind
        self._containing = probability_of_containing(frequencies, num_tokens)  # (V,)
        self._variances: dict[str, float] = {}

    def after_step(
        self, trained: Collection[str], *, noise_std: float, learning_rate: float, optimizer: str, num_steps: int = 1
    ) -> None:
        """Count steps that added noise to `trained`, and tell the model.

        Arguments:
            trained: What trained, by name, as in `Task.trained`.
            noise_std: Of a coordinate of the released mean gradient: z C / (q n).
            learning_rate: Of these steps.
            optimizer: `sgd` or `adam`.
            num_steps: Steps alike.
        """
        if not self._model.re_attention:
            return
        variance = num_steps * step_variance(noise_std, learning_rate, optimizer=optimizer)
        for name in trained:
            self._variances[name] = self._variances.get(name, 0.0) + variance
        self._model.noise_levels = example_level_noise(
            self._variances.get(INPUT_TABLE, 0.0),
            {name: value for name, value in self._variances.items() if name not in _TABLES},
            containing=self._containing,
            batch_size=self._batch_size,
            kind=self._kind,
        )


def probability_of_containing(frequencies: FloatArray, num_tokens: float) -> FloatArray:
    """Return p_i, the probability that an example of `num_tokens` tokens contains word i: 1 - (1 - f_i)^num_tokens.

    Arguments:
        frequencies: Public word frequencies f, (V,), non-negative; they need not sum to one.
        num_tokens: Tokens of a typical example; a public number, like the configured sequence length.

    Returns:
        (V,), under the unigram model: real words come in bursts, so fewer examples contain each of them.
    """
    f = frequencies / frequencies.sum()  # (V,)
    p: FloatArray = -np.expm1(num_tokens * np.log1p(-np.minimum(f, 1 - 1e-12)))
    return p


def example_level_noise(
    rows: float,
    weights: Mapping[str, float],
    *,
    containing: FloatArray,
    batch_size: float,
    kind: str,
) -> NoiseLevels:
    """Return the levels after example-level DP-SGD.

    Arguments:
        rows: Variance that the steps have added to a coordinate of the input table, a sum of `step_variance`, or 0.
        weights: The same of each trained tensor of the body.
        containing: p, probability that an example contains each word, (V,).
        batch_size: Expected examples of a step, B = q n. A row's B p_i is taken as at least one example.
        kind: `absolute`: `rows` for every row. `per_frequency`: `rows / p_i^2`, p_i at least 1 / B.

    Raises:
        DataError: An unknown kind.
    """
    scale = np.ones_like(containing)  # (V,)
    if is_per_frequency(kind):
        scale = np.clip(containing, 1 / max(1.0, batch_size), 1.0) ** -2
    return NoiseLevels((rows * scale).astype(np.float32), dict(weights))
