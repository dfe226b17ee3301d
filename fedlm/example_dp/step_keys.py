"""The secrets of a DP-SGD run's steps: who is sampled, what the noise is, what dropout draws.

The guarantee rests on nobody knowing any of the three, so none of them follows from the experiment's seed, unless a run
is declared reproducible and with it NOT PRIVATE. Sample and dropout of a step follow from one key that lives in this
object alone; noise has a key of its own each time it is drawn. A restarted run has another key and so samples anew.
"""

from __future__ import annotations

from hashlib import blake2b

from fedlm.privacy.noise.lattice import Uncopied, fresh_key, reproducible_key


class StepKeys(Uncopied):
    """Keys by step.

    Arguments:
        seed: All keys follow from it, for debugging: NOT PRIVATE. None: from the operating system.
    """

    __slots__ = ("_key", "_seed")

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        secret = fresh_key() if seed is None else reproducible_key(seed, -1)  # no step has the number -1
        self._key = secret.to_bytes(16, "little")

    def sampling(self, step: int) -> int:
        """Return the 128-bit key of a step's Poisson sample, the same at each call."""
        return int.from_bytes(self._derived("sample", step, 16), "little")

    def draws(self, step: int) -> bytes:
        """Return the 32 bytes of `Task.begin_step`, the same at each call."""
        return self._derived("draws", step, 32)

    def noise(self, step: int) -> int:
        """Return a 128-bit key for a step's noise, another one at each call unless reproducible."""
        return fresh_key() if self._seed is None else reproducible_key(self._seed, step)

    def _derived(self, purpose: str, step: int, size: int) -> bytes:
        return blake2b(f"{purpose}/{step}".encode(), key=self._key, digest_size=size).digest()
