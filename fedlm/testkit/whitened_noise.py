"""The matrix that makes the noise of a built-in mechanism independent again, from its paper's definition.

Only the mechanism's stored public numbers are taken from it: two ways to the same law check each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms.base import Mechanism
from fedlm.testkit.subject import Floats


@lru_cache(maxsize=32)
def whitening(mechanism: Mechanism) -> Floats | None:
    """Return (T, T) C, with C @ noise iid, of a mechanism that correlates noise; None for independent noise.

    Arguments:
        mechanism: Of a plan.

    Raises:
        ConfigError: Its noise is not known here.
    """
    if not mechanism.keeps_noise:
        return None
    rounds, numbers = mechanism.participation.rounds, vars(mechanism)
    if mechanism.name == "tree":
        return _of_tree(rounds)
    if mechanism.name == "blt":
        return _of_blt(numbers["poles"], numbers["zeros"], rounds)
    if mechanism.name == "banded":
        return _of_banded(numbers["bands"], rounds)
    if (matrix := mechanism.matrix()) is not None:
        return matrix
    raise ConfigError(
        f"privacy.mechanism = {mechanism.name!r} is not known here; "
        "give it a method `matrix`, or write a Subject that states its C"
    )


def _of_blt(poles: Sequence[float], zeros: Sequence[float], rounds: int) -> Floats:
    """Return C (T, T) = P^-1 Z, P and Z the triangles of the polynomials prod (1 - pole x) and prod (1 - zero x).

    Source: Dvijotham et al. 2024, 2404.16706: a BLT is the Toeplitz matrix of a rational generating function.
    """
    # A polynomial with these roots has, highest power first, the coefficients of the product by rising powers of x.
    below, above = (_toeplitz(np.asarray(np.poly(roots), np.float64), rounds) for roots in (poles, zeros))
    return np.tril(np.linalg.solve(below, above))


def _of_banded(bands: int, rounds: int) -> Floats:
    """Return C (T, T), its column binomial(2 i, i) / 4^i for i < b, as in Kalinin and Lampert 2024, 2405.13763."""
    return _toeplitz(np.array([math.comb(2 * i, i) / 4**i for i in range(bands)]), rounds)


def _toeplitz(column: Floats, rounds: int) -> Floats:
    """Return the lower triangle (T, T) with this first column (any length)."""
    return sum((np.eye(rounds, k=-i) * value for i, value in enumerate(column[:rounds])), np.zeros((rounds, rounds)))


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
