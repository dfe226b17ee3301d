"""Noise of consecutive rounds that remembers earlier draws: the loop over chunks that all correlated mechanisms share.

Buffers hold draws of N(0, 1) in fp64, before rounding and in no unit of the data: the release of a round is a function
of the ideal `x_t + (C^-1 Z)_t` alone, by the argument of `fedlm.privacy.noise.lattice`. They are fp64 because their own
rounding acts as a difference between the noise that is drawn and the noise that is accounted: over 10^7 coordinates
and 2,000 rounds it moves the privacy loss by some sqrt(2e10) * 2^-53 = 1e-11; with fp32 the same estimate is 0.01.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedlm.privacy.mechanisms.base import Floats
from fedlm.privacy.noise.lattice import MAX_STD, NoiseStream, Uncopied, add_on_lattice, chunks


class StreamedNoise(Uncopied, ABC):
    """A `RoundNoise` made chunk by chunk; a replayed round does all that a released one does but the adding.

    Arguments:
        size: P, coordinates.
        gain: By how much noise can exceed the largest draw in it: the largest L1 norm of a row of C^-1.
    """

    def __init__(self, size: int, gain: float) -> None:
        self._size = size
        self._gain = gain
        self._round = 0

    def add_to(self, total: npt.NDArray[np.int64], std: float, stream: NoiseStream) -> None:
        """Add `std * (C^-1 Z)_t` to the sum (P,) in place; see `RoundNoise`."""
        assert total.shape == (self._size,), f"a sum of shape {total.shape} for noise of {self._size} coordinates"
        assert 0 < std * self._gain <= MAX_STD, f"std {std} is outside (0, {MAX_STD / self._gain}]"
        for part, noise in self._next_round(stream):
            noise *= std
            add_on_lattice(total[part], noise, std)

    def replay(self, stream: NoiseStream) -> None:
        """Take in a round's draws; see `RoundNoise`."""
        for _ in self._next_round(stream):
            pass

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that is kept between rounds."""

    @abstractmethod
    def _step(self, part: slice, stream: NoiseStream) -> Floats:
        """Return this chunk's noise (n,) of round `self._round` for standard deviation 1, and take its draws in."""

    def _next_round(self, stream: NoiseStream) -> Iterator[tuple[slice, Floats]]:
        self._round += 1
        for part in chunks(self._size):
            yield part, self._step(part, stream)


class IndependentNoise(Uncopied):
    """The `RoundNoise` without memory: every round's noise is its stream's."""

    def add_to(self, total: npt.NDArray[np.int64], std: float, stream: NoiseStream) -> None:
        """Add N(0, std^2) to every coordinate in place; see `NoiseStream.add_to`."""
        stream.add_to(total, std)

    def replay(self, stream: NoiseStream) -> None:
        """Do nothing: later rounds do not depend on this one."""
