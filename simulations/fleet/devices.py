"""A fleet's devices as arrays: 20 bytes a device, each property a function of seed and device alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.randomness import seed_key, stream
from simulations.fleet.profile import Floats, Hours, Profile

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Devices:
    """N devices.

    Arguments:
        profile: The table that the rows point into.
        row: (N,) int32, each device's row.
        speed: (N,) factor on the row's gflops.
        bandwidth: (N,) factor on the row's download and upload.
        offset_h: (N,) local time minus UTC.
    """

    profile: Profile
    row: npt.NDArray[np.int32]
    speed: Floats
    bandwidth: Floats
    offset_h: Floats

    @classmethod
    def draw(cls, profile: Profile, num_devices: int, seed: int) -> Devices:
        """Draw a fleet; its first M devices are those of a fleet of M."""
        key = seed_key(seed)
        if profile.classes:
            coins = stream(key, "fleet/class").random(num_devices)  # (N,)
            edges = np.cumsum(profile.shares)[:-1]  # rounding must leave no gap below 1
            row = np.searchsorted(edges, coins, side="right").astype(np.int32)
        else:
            row = (np.arange(num_devices) % profile.num_rows).astype(np.int32)
        coins = stream(key, "fleet/offset").random(num_devices)
        first = np.cumsum(profile.num_offsets) - profile.num_offsets  # (R,) each row's first offset
        chosen = first[row] + (coins * profile.num_offsets[row]).astype(np.int64)
        return cls(
            profile,
            row,
            _factors(profile, row, stream(key, "fleet/speed")),
            _factors(profile, row, stream(key, "fleet/bandwidth")),
            profile.offsets_h[chosen],
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the devices, without the profile."""
        return self.row.nbytes + self.speed.nbytes + self.bandwidth.nbytes + self.offset_h.nbytes

    def memory_mb(self, ids: Ids) -> Floats:
        """Return what training may use on each device (U,)."""
        return self.profile.memory_mb[self.row[ids]]

    def gflops(self, ids: Ids) -> Floats:
        """Return each device's speed (U,)."""
        return np.multiply(self.profile.gflops[self.row[ids]], self.speed[ids])

    def down_mbit(self, ids: Ids) -> Floats:
        """Return each device's download rate (U,)."""
        return np.multiply(self.profile.down_mbit[self.row[ids]], self.bandwidth[ids])

    def up_mbit(self, ids: Ids) -> Floats:
        """Return each device's upload rate (U,)."""
        return np.multiply(self.profile.up_mbit[self.row[ids]], self.bandwidth[ids])

    def dropout(self, ids: Ids) -> Floats:
        """Return each device's probability of leaving a round (U,)."""
        return np.take(self.profile.dropout, self.row[ids])

    def available(self, ids: Ids, utc_hour: float) -> Floats:
        """Return each device's probability of being available (U,); `utc_hour` counts on beyond 24."""
        local = np.floor(utc_hour % 24 + self.offset_h[ids]).astype(np.int64) % 24  # (U,)
        probabilities: Hours = self.profile.available[self.row[ids], local]
        return probabilities.astype(np.float32)


def _factors(profile: Profile, row: npt.NDArray[np.int32], rng: np.random.Generator) -> Floats:
    """Return log-normal factors (N,) with median 1."""
    normals: Floats = rng.standard_normal(len(row), np.float32)
    return np.exp(np.multiply(profile.spread[row], normals))
