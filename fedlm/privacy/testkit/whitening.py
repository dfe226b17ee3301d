"""The matrix that makes the noise of a built-in mechanism independent again, from its paper's definition.

Kept apart from the mechanisms' own streaming code on purpose: two ways to the same law check each other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms.base import Mechanism
from fedlm.privacy.testkit.subject import Floats


@lru_cache(maxsize=32)
def whitening(mechanism: Mechanism) -> Floats | None:
    """Return (T, T) C, with C @ noise iid, of a mechanism that correlates noise; None for independent noise.

    Arguments:
        mechanism: Of a plan.

    Raises:
        ConfigError: Its noise is not known here, or not one of the sum.
    """
    if mechanism.name == "local":
        raise ConfigError(
            "privacy.mechanism = 'local' noises replies, not the sum; the kit examines central mechanisms"
        )
    if not mechanism.keeps_noise:
        return None
    if mechanism.name == "tree":
        return _of_tree(mechanism.participation.rounds)
    column: Any = getattr(mechanism, "column", None)  # (T,) or as many as are not zero
    if column is None:
        raise ConfigError(f"privacy.mechanism = {mechanism.name!r} has no `column`; write a Subject that states its C")
    rounds = mechanism.participation.rounds
    padded = np.zeros(rounds)
    padded[: min(rounds, len(column))] = column[:rounds]
    lags = np.subtract.outer(np.arange(rounds), np.arange(rounds))  # (T, T)
    return np.where(lags >= 0, padded[np.maximum(lags, 0)], 0.0)


def _of_tree(rounds: int) -> Floats:
    """Return the whitening of differences of Honaker's prefix estimates.

    A block's error is v xi + (1 - v) (errors of its halves), xi the noise of its node, v_0 = 1, and one height up
    2 v / (2 v + 1); a prefix's error is the sum over the blocks of its binary digits.
    """
    errors: dict[tuple[int, int], Floats] = {}  # (nodes,) by height and first round
    nodes = 2 * rounds  # at most
    number, variance, height = 0, 1.0, 0
    while 1 << height <= rounds:
        for start in range(0, rounds - (1 << height) + 1, 1 << height):
            error = np.zeros(nodes)
            if height:
                halves = (errors[height - 1, start], errors[height - 1, start + (1 << height - 1)])
                error = (1 - variance) * (halves[0] + halves[1])
            error[number] += variance
            errors[height, start] = error
            number += 1
        height, variance = height + 1, 2 * variance / (2 * variance + 1)
    prefixes = np.zeros((rounds + 1, nodes))
    for t in range(1, rounds + 1):
        lowest = t & -t
        prefixes[t] = prefixes[t - lowest] + errors[lowest.bit_length() - 1, t - lowest]
    noise = np.diff(prefixes, axis=0)  # (T, nodes)
    return np.asarray(np.linalg.inv(np.linalg.cholesky(noise @ noise.T)))
