"""The noise that a federated model's weights hold after some rounds of known noise."""

from __future__ import annotations

import numpy as np

from fedlm.models.re_attention.noise_levels import FloatArray, NoiseLevels, is_per_frequency


def user_level_noise(
    step: float, rounds: float, weights: frozenset[str], *, inclusion: FloatArray, kind: str
) -> NoiseLevels:
    """Return the levels of a federated model after server steps with user-level noise on every released row.

    A row is released, noise and all, in a round that has it in its row set: in rounds * pi_i of them in expectation.

    Arguments:
        step: What one server step adds: `step_variance(z C / n, server learning rate, ...)`, n the expected cohort. The
            noise of rounds counts as independent; with blt or banded, where it partly cancels, that overstates it.
        rounds: Server steps so far.
        weights: Trained tensors of the body, released every round.
        inclusion: pi, probability of each row to be in a round's set, (V,); zeros if the tables are frozen.
        kind: `absolute`: rounds pi_i step. `per_frequency`: rounds step / pi_i, the same releases with each divided by
            pi_i, as the paper's sigma / (n pi_i), so that all rows would move at one pace. Rows with pi_i = 0 never
            trained: 0 for both.

    Raises:
        DataError: An unknown kind.
    """
    power = -1 if is_per_frequency(kind) else 1
    scale = np.power(inclusion, power, out=np.zeros_like(inclusion), where=inclusion > 0)  # (V,)
    return NoiseLevels((rounds * step * scale).astype(np.float32), dict.fromkeys(sorted(weights), rounds * step))
