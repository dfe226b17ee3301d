"""The matrix that makes the noise of a mechanism independent over the rounds, read off the mechanism itself.

The noise of T rounds is B Z with Z independent draws. B is found by running the mechanism's own noise on draws that are
unit vectors, one coordinate for each draw; with B B^T = L L^T and W = L^-1, the noise W B Z is independent and of
variance one. For noise C^-1 Z with a square C, W is C itself; the tree, whose C is not square, has one all the same.

Approximate: B to 2^-20, the lattice that noise is rounded to.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms.base import Mechanism
from fedlm.privacy.noise.lattice import NoiseStream

MOST_ROUNDS = 8_192
"""Every draw needs a coordinate in the one chunk that the noise is drawn in."""
_STD = 2.0**40

Floats = npt.NDArray[np.float64]


class _UnitVectors(NoiseStream):
    """A stream whose d-th draw is the unit vector of coordinate d."""

    __slots__ = ("_drawn",)

    def __init__(self) -> None:
        self._drawn = 0

    def normals(self, out: Floats) -> None:
        out[:] = 0.0
        out[self._drawn] = 1.0
        self._drawn += 1


def whitening(mechanism: Mechanism, rounds: int) -> Floats:
    """Return W (T, T), lower triangular, such that W applied to the noise of rounds 1..T leaves iid N(0, z^2).

    Arguments:
        mechanism: Of the run.
        rounds: T, at most those of the mechanism.

    Raises:
        ConfigError: Correlated noise over more rounds than `MOST_ROUNDS`.
    """
    if not mechanism.keeps_noise:
        return np.eye(rounds)
    if rounds > MOST_ROUNDS:
        raise ConfigError(f"{rounds:,} rounds of correlated noise are too many to audit; at most {MOST_ROUNDS:,}")
    size = 2 * rounds  # a tree draws less than twice a round
    noise, stream = mechanism.new_noise(size), _UnitVectors()
    rows = np.zeros((rounds, size), np.int64)
    for row in rows:
        noise.add_to(row, _STD, stream)
    drawn = rows / _STD  # (T, draws) B
    return np.linalg.inv(np.linalg.cholesky(drawn @ drawn.T))
