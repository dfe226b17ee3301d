"""The secret that decides who is sampled: 256 bits of the operating system, of one run and of nobody else.

Amplification by sampling holds only against those who do not know the cohorts. An experiment's seed cannot hide them:
every node reads it, a report prints it, and the first weights of an adapter or a public row set let anybody search for
it. Cohorts therefore follow from this key, and nothing that is sent or published does.

The streams of two rounds have independent keys of their own (keyed BLAKE2b), so who has learnt one round's cohort, by
whatever leak, knows no more of the others.
"""

from __future__ import annotations

import secrets
from hashlib import blake2b

import numpy as np

from fedlm.errors import DataError
from fedlm.privacy.noise.lattice import Uncopied
from fedlm.randomness import stream

_NUM_BYTES = 32


class CohortKey(Uncopied):
    """The key of a run's cohorts; it is neither printed nor pickled nor copied, `to_text` alone gives it away.

    Arguments:
        secret: 32 bytes.

    Raises:
        DataError: Not 32 bytes.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _NUM_BYTES:
            raise DataError(f"a cohort key has {len(secret)} bytes, must have {_NUM_BYTES}; restore its file")
        self._secret = secret

    @classmethod
    def fresh(cls) -> CohortKey:
        """Return a key that nobody can predict: all its bits are the operating system's."""
        return cls(secrets.token_bytes(_NUM_BYTES))

    @classmethod
    def reproducible(cls, seed: int) -> CohortKey:
        """Return the key that follows from a seed, for debugging: who knows the seed knows every cohort."""
        return cls(blake2b(f"{seed}/cohorts".encode(), digest_size=_NUM_BYTES).digest())

    @classmethod
    def from_text(cls, text: str) -> CohortKey:
        """Return the key that `to_text` wrote.

        Raises:
            DataError: Not such a text; the message does not repeat it.
        """
        try:
            return cls(bytes.fromhex(text))
        except ValueError:
            raise DataError("a cohort key is 64 hexadecimal digits; restore its file") from None

    def to_text(self) -> str:
        """Return the key as 64 hexadecimal digits, for a file that its owner alone can read."""
        return self._secret.hex()

    def stream(self, purpose: str, *counters: int) -> np.random.Generator:
        """Return the generator of one purpose and round; see `fedlm.randomness.stream`."""
        return stream(self._secret, purpose, *counters)

    def __repr__(self) -> str:
        return "CohortKey(secret)"
