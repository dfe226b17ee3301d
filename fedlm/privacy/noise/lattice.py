"""Gaussian noise for one release, from AES in counter mode, on an integer lattice.

The sum is an integer vector s (see `fedlm.privacy.clipping.clipped_sum`). The noise is drawn in fp64 and rounded to
integers, and s + round(N) = round(s + N): the result is a function of s + N alone, so it has the guarantee
of the ideal Gaussian mechanism on real numbers. Floating-point addition has not: which doubles can occur
depends on s (Mironov 2012, "On significance of the least significant bits for differential privacy").

What is left is that a fp64 normal has gaps of about 2^-50 standard deviations. The result is therefore
rounded again, to a public power of two of about 2^-20 standard deviations: each cell then holds some 2^29
possible draws. By estimate, the deviation from the ideal law in a million coordinates over 2,000 rounds is a
divergence of about 1e-8 in all.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from randomgen import AESCounter

# A full sum (2^62) and 9.2 standard deviations (the most that 53 bits reach) together stay below 2^63.
MAX_STD = 2.0**58
_CELLS_PER_STD_BITS = 20
_CHUNK = 16_384


def chunks(size: int) -> Iterator[slice]:
    """Return the slices of `size` coordinates in the order in which noise is drawn, small enough for the cache."""
    return (slice(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK))


def add_on_lattice(part: npt.NDArray[np.int64], noise: npt.NDArray[np.float64], std: float) -> None:
    """Add noise to a part of a sum in place, on the lattice described above; overwrites `noise`.

    Arguments:
        part: (n,) int64, each at most 2^62 in size.
        noise: (n,) fp64 in units of `part`, each below 2^62 in size.
        std: Standard deviation of what is fresh in the noise, which decides the lattice.
    """
    shift = max(0, math.floor(math.log2(std)) - _CELLS_PER_STD_BITS)
    np.rint(noise, out=noise)
    part += noise.astype(np.int64)
    part += (1 << shift) >> 1
    part >>= shift
    part <<= shift


class Uncopied:
    """What holds noise: it can be neither pickled nor copied, for noise that can be repeated can be subtracted."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickling and copying."""
        raise TypeError("privacy noise is neither pickled, copied nor checkpointed; a restart draws fresh noise")


def fresh_key() -> int:
    """Return a key that nobody can predict or repeat.

    Guarantee:
        All 128 bits are the operating system's, none of them the experiment's seed's.
    """
    return secrets.randbits(128)


def reproducible_key(seed: int, round_number: int) -> int:
    """Return the key of (seed, round), for debugging; who knows the seed subtracts the noise: NOT PRIVATE."""
    digest = blake2b(f"{seed}/noise/{round_number}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


class NoiseStream(Uncopied):
    """The noise of one release; made for it and dropped after it.

    A fresh key for each release (`fresh_key`) means that a forked process or a copied virtual machine draws other
    noise, and that a key found later reveals no earlier noise.

    Arguments:
        key: 128 bits.
    """

    __slots__ = ("_generator",)

    def __init__(self, key: int) -> None:
        self._generator = np.random.Generator(AESCounter(key=key))

    def add_to(self, total: npt.NDArray[np.int64], std: float) -> None:
        """Add N(0, std^2) to every coordinate in place, on the lattice described above.

        Arguments:
            total: (P,) int64, each at most 2^62 in size.
            std: Standard deviation in units of `total`, at most `MAX_STD`.
        """
        assert 0 < std <= MAX_STD, f"std {std} is outside (0, {MAX_STD}]"
        wide = np.empty(min(total.size, _CHUNK), np.float64)
        for part in chunks(total.size):
            draw = wide[: part.stop - part.start]
            self.normals(draw)
            np.multiply(draw, std, out=draw)
            add_on_lattice(total[part], draw, std)

    def normals(self, out: npt.NDArray[np.float64]) -> None:
        """Fill `out`, contiguous fp64, with the next draws of N(0, 1)."""
        self._generator.standard_normal(out=out)
