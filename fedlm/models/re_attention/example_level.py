"""Keeps a model's noise levels up to date while it trains with DP-SGD, for Re-Attention (docs/re_attention.md)."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from fedlm.models.re_attention.noise_levels import example_level_noise, probability_of_containing, step_variance
from fedlm.models.transformer import TransformerModel
from fedlm.trainable.build import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE

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
