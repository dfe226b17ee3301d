"""What training costs a device, as a function of its own data size and of nothing else.

A cost model may compute a few sizes and interpolate, between places that depend on all the sizes it is asked for. Asked
for a cohort, it would let one device's data decide whether another one fits into its memory, which a fleet must not
(`server.participation`). So it is asked once, for fixed sets of sizes, and devices look their own size up.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Figures = npt.NDArray[np.float64]


class DeviceCost(Protocol):
    """What training costs, by number of tokens (U,)."""

    def peak_mb(self, num_tokens: Counts) -> Figures:
        """Return the peak memory of the device's process (U,), MB."""

    def gigaflops(self, num_tokens: Counts) -> Figures:
        """Return the work of the local training (U,), 1e9 floating-point operations."""


class CostTable:
    """The costs of every size up to a power of two; fulfils `DeviceCost`.

    Arguments:
        cost: Is asked for 0, 1, 2 to 3, 4 to 7, and so on: which sets there are depends on the largest device, what is
            in them does not.
        most_tokens: The largest size that will be looked up.
    """

    def __init__(self, cost: DeviceCost, most_tokens: int) -> None:
        edges = [0, *(2**power for power in range(most_tokens.bit_length() + 1))]
        sizes = [np.arange(low, high) for low, high in pairwise(edges)]
        self._peak_mb = np.concatenate([cost.peak_mb(some) for some in sizes])
        self._gigaflops = np.concatenate([cost.gigaflops(some) for some in sizes])

    def peak_mb(self, num_tokens: Counts) -> Figures:
        """Return the peak memory of the device's process (U,), MB."""
        return np.take(self._peak_mb, num_tokens)

    def gigaflops(self, num_tokens: Counts) -> Figures:
        """Return the work of the local training (U,), 1e9 floating-point operations."""
        return np.take(self._gigaflops, num_tokens)
