"""The user-level noise that a federated model holds, for Re-Attention on the devices (docs/re_attention.md)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.config.keys import typed_options
from fedlm.config.schema import Config
from fedlm.models.re_attention.noise_levels import NoiseLevels, step_variance
from fedlm.models.re_attention.user_level import user_level_noise
from fedlm.planning.touched_pages import received_probabilities
from fedlm.registry import STRATEGIES
from fedlm.strategies import Strategy
from fedlm.trainable.build import Trainable


def released_noise(
    config: Config, trainable: Trainable, frequencies: npt.NDArray[np.float64], *, noise_std: float, rounds: int
) -> NoiseLevels:
    """Return the noise of the weights after some rounds, from public numbers alone.

    The built-in strategies are known; another one counts as a plain step of `strategy.learning_rate`. Earlier rounds
    count with the noise of this one, which an adaptive clip norm makes an approximation.

    Arguments:
        config: Of the run.
        trainable: What trains.
        frequencies: Public word frequencies (V,).
        noise_std: Of a coordinate of a round's noised mean, z C / n.
        rounds: Server steps so far.
    """
    rows, strategy = config.trainable.embedding_rows, config.strategy
    known = STRATEGIES.resolve(strategy.kind) if strategy.kind in STRATEGIES.built_in else Strategy
    options = typed_options(known, strategy.options, "strategy.options") if known.optimizer == "adam" else None
    step = step_variance(
        noise_std,
        strategy.learning_rate,
        optimizer=known.optimizer,
        adam_epsilon=options.epsilon if options else 0.0,
    )
    return user_level_noise(
        step,
        rounds,
        frozenset(trainable.parameters),
        inclusion=received_probabilities(rows, frequencies, 1),
        kind=config.model.re_attention,
    )
