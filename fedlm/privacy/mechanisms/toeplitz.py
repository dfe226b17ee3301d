"""Lower triangular Toeplitz matrices C, given by their first column: error of C^-1 and sensitivity of C.

C = sum_i c_i S^i with the shift S; C^-1 is of the same kind, with the coefficients of the power series 1 / c(x).

Sensitivity of a user who is in at most k rounds, at least b apart, with updates of norm 1 (Kalinin and Lampert 2024,
https://arxiv.org/abs/2405.13763, theorem 2): for c_0 >= c_1 >= ... >= 0 the worst rounds are 1, 1 + b, 1 + 2 b, ...
and the worst updates are equal,

    sens^2 = |sum_(j < k) C[:, j b]|^2.

Exact for such columns; others are refused. The first t rounds have the leading (t, t) block of C.
"""

from __future__ import annotations

import math

import numpy as np

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms.base import Floats


def square_root_column(size: int) -> Floats:
    """Return (size,) the first column of the square root of the all-ones triangle: c_i = binomial(2 i, i) / 4^i.

    C = A^(1/2) splits the error evenly between C and A C^-1 (Fichtenberger, Henzinger and Upadhyay 2022,
    https://arxiv.org/abs/2202.11205).
    """
    steps = np.arange(1, size)
    return np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])


def inverse_column(column: Floats, size: int) -> Floats:
    """Return (size,) the first column of C^-1, for a column of C (n,) with c_0 = 1 and zeros after its end."""
    from scipy.signal import lfilter

    impulse = np.zeros(size)
    impulse[0] = 1.0
    return np.asarray(lfilter([1.0], column, impulse), np.float64)


def prefix_rmse(inverse: Floats) -> float:
    """Return the root mean square over t = 1..T of the norms of the rows of A C^-1, A the all-ones triangle.

    That is the noise of one coordinate of a prefix sum when Z has variance 1.

    Arguments:
        inverse: (T,) first column of C^-1.
    """
    sums = np.cumsum(inverse)  # (T,) first column of A C^-1; its i-th entry stands in T - i rows
    return math.sqrt(float(sums**2 @ np.arange(len(sums), 0, -1)) / len(sums))


def sensitivity(column: Floats, *, separation: int, participations: int) -> float:
    """Return the L2 sensitivity of C for users in at most `participations` rounds, `separation` apart.

    Arguments:
        column: (t,) first column of C over the rounds that are accounted.
        separation: b, at least 1.
        participations: k; those that no longer fit into t rounds do not count.

    Raises:
        ConfigError: The column is negative or increasing somewhere, so that the formula would be too small.
    """
    if len(column) and (column[-1] < 0 or (np.diff(column) > 0).any()):
        raise ConfigError(
            "first column of the noise matrix must be non-negative and non-increasing; choose another one"
        )
    total = np.zeros(len(column))
    for start in range(0, min(len(column), participations * separation), separation):
        total[start:] += column[: len(column) - start]
    return float(np.linalg.norm(total))
