"""The noise of one run: a fresh key for every release, and for correlated noise the keys of the releases before it.

Independent noise needs no memory: its key is drawn, used and forgotten. Correlated noise subtracts later what it added
before, so its draws must outlive the process. Their 128-bit keys do, not the draws: a key store has the key of round t
on disk before round t's release is, and gives back the keys of the released rounds after a restart. The key of a round
that died between the two is thrown away with it, so no draw is ever used on two different sums.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Protocol

import numpy as np
from randomgen import AESCounter

from fedlm.errors import DataError
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.mechanisms.base import Mechanism, RoundNoise
from fedlm.privacy.noise.fixed_point import FRACTION_BITS, IntVector
from fedlm.privacy.noise.lattice import NoiseStream, fresh_key, reproducible_key
from fedlm.privacy.noise.skellam_encoding import Skellam


class KeyStore(Protocol):
    """Where the keys of correlated noise survive. Whoever reads it can subtract the noise."""

    def keys(self) -> list[int]:
        """Return the keys of the released rounds 1, 2, 3, ..., in this order."""
        ...

    def append(self, round_number: int, key: int) -> None:
        """Make the key of a round durable, before its release is."""
        ...


class _ProcessKeys:
    """Keys of a run that ends with its process."""

    def __init__(self) -> None:
        self._keys: list[int] = []

    def keys(self) -> list[int]:
        return list(self._keys)

    def append(self, round_number: int, key: int) -> None:
        self._keys.append(key)


class RunNoise:
    """Adds each round's noise.

    Arguments:
        mechanism: Of the plan.
        seed: For reproducible noise; None draws keys from the operating system.
    """

    def __init__(self, mechanism: Mechanism, seed: int | None) -> None:
        self._mechanism, self._seed = mechanism, seed
        self._store: KeyStore = _ProcessKeys()
        self._noise: RoundNoise | None = None
        self._size, self._done = 0, 0

    def use_store(self, store: KeyStore) -> None:
        """Keep keys there, and go on after the rounds whose keys it has."""
        self._store, self._noise, self._done = store, None, 0

    def add_to(
        self, vector: IntVector, std: float, *, round_number: int, clip_spec: ClipSpec, num_reports: float
    ) -> None:
        """Add the noise of a round in place.

        Arguments:
            vector: (P + Q,) the sum of update and answers.
            std: Of a coordinate, in units of the vector.
            round_number: Correlated noise takes rounds 1, 2, 3, ... without a gap.
            clip_spec: Of the sum.
            num_reports: Devices in the sum, in terms of the accounted fleet; local noise is that of so many.

        Raises:
            DataError: A round out of order, or another vector size than before, under correlated noise.
        """
        if self._mechanism.keeps_noise:
            return self._add_correlated(vector, std, round_number)
        stream = NoiseStream(self._key(round_number))
        std *= self._mechanism.noise_growth(num_reports)
        if not std:  # local noise of nobody
            return None
        noise = self._mechanism.new_noise(vector.size)
        if clip_spec.block_scaling is None:
            return noise.add_to(vector, std, stream)
        for start, stop, factor in clip_spec.block_scaling.noise_spans():
            noise.add_to(vector[start:stop], std * factor, stream)
        if clip_spec.num_answers:
            noise.add_to(vector[-clip_spec.num_answers :], std, stream)
        return None

    def decode(self, vector: IntVector, encoder: Skellam, *, round_number: int, num_devices: int) -> IntVector:
        """Return the noised sum of update and answers (P + Q,) from a sum of encodings: absent devices' noise is added.

        Arguments:
            vector: (padded,) the sum modulo 2^m.
            encoder: What its devices encoded with.
            round_number: t.
            num_devices: Devices in the sum.
        """
        generator = np.random.Generator(AESCounter(key=self._key(round_number)))
        released = encoder.decode(vector.view(np.uint64), num_devices, generator)  # in clip norms
        return np.rint(released * 2.0**FRACTION_BITS).astype(np.int64)

    def device_key(self, round_number: int) -> str:
        """Return what the devices' own noise follows from in a reproducible run; empty: the operating system."""
        if self._seed is None:
            return ""
        return blake2b(f"{self._seed}/device noise/{round_number}".encode(), digest_size=16).hexdigest()

    def _add_correlated(self, vector: IntVector, std: float, round_number: int) -> None:
        if self._noise is None:
            self._noise, self._size = self._replayed(vector.size), vector.size
        if vector.size != self._size:
            raise DataError(f"correlated noise runs over {self._size:,} coordinates, this round has {vector.size:,}")
        if round_number != self._done + 1:
            raise DataError(f"correlated noise needs round {self._done + 1} next, not {round_number}; restore its keys")
        key = self._key(round_number)
        self._store.append(round_number, key)
        self._done = round_number
        self._noise.add_to(vector, std, NoiseStream(key))

    def _replayed(self, size: int) -> RoundNoise:
        noise, keys = self._mechanism.new_noise(size), self._store.keys()
        for key in keys:
            noise.replay(NoiseStream(key))
        self._done = len(keys)
        return noise

    def _key(self, round_number: int) -> int:
        return fresh_key() if self._seed is None else reproducible_key(self._seed, round_number)
