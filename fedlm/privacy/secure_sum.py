"""Secure aggregation, simulated: a server learns the sum of the devices' integer vectors and no single one.

Pairwise masking with self masks (Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine
learning", https://eprint.iacr.org/2017/281). Device i sends, modulo 2^m,

    v_i + s_i + sum_{j > i} p_ij - sum_{j < i} p_ij

where p_ij comes from a secret that i and j share and s_i from one that i alone has. In the sum over all devices the p
cancel. When some are absent, each survivor reveals s_i and its p_ij with the absent ones; a device reveals once, so no
server gets both s_i and all p_ij of one device, which would unmask it.

A STAND-IN, NOT A PROTOCOL. Exact: the arithmetic, what cancels, what each party sees, who may be missing. Not real:
secrets are derived from one root key instead of agreed on, masks come from a statistical generator instead of a
cryptographic one, survivors reveal in person instead of by shares that outlive them, the server is taken to follow the
protocol, and nothing is signed. Real devices need an implementation that cryptographers have reviewed.

A device sends m bits a coordinate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from fedlm.errors import DataError
from fedlm.privacy.ranges import require_count
from fedlm.randomness import stream

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Revealed:
    """What a survivor tells the server so that the sum comes out: keys of masks.

    Arguments:
        device: Who.
        own: Key of its self mask.
        pairs: For each absent device the key of the mask shared with it.
    """

    device: int
    own: bytes = field(repr=False)
    pairs: Mapping[int, bytes] = field(repr=False)


class Participant:
    """One device's side of one round."""

    def __init__(self, device: int, cohort: Iterable[int], *, round_number: int, bits: int, root: bytes) -> None:
        """Agree on masks with the cohort.

        Arguments:
            device: Id of this device, one of the cohort.
            cohort: Ids of all devices of the round.
            round_number: Masks are those of this round alone.
            bits: m, in 1..64; sums are modulo 2^m.
            root: At most 64 bytes; stands for the key agreement, the server must not know it.
        """
        others = set(cohort) - {device}
        self._device, self._bits = device, require_count("bits", bits, low=1, high=64)
        self._own = _derive(root, "own", round_number, device)
        self._pairs = {other: _derive(root, "pair", round_number, *sorted((device, other))) for other in others}
        self._has_revealed = False

    def mask(self, vector: Words) -> Words:
        """Return the vector as the server sees it: each coordinate uniform, whatever the vector.

        Arguments:
            vector: (P,) uint64, below 2^m.
        """
        masked = vector + _mask(self._own, vector.size, self._bits)
        for other, key in self._pairs.items():
            _add_pair(masked, self._device, other, key, self._bits)
        return masked & _ones(self._bits)

    def reveal(self, absent: Iterable[int]) -> Revealed:
        """Return the keys that take this device's masks out of the survivors' sum; once.

        Arguments:
            absent: The devices whose vector the server did not get, by its word.

        Raises:
            DataError: A second call, or this device or a stranger among the absent.
        """
        missing = set(absent)
        if self._has_revealed:
            raise DataError(f"device {self._device} has revealed its masks already; two sets of keys could unmask it")
        if strangers := missing - self._pairs.keys():
            raise DataError(f"device {self._device} shares no mask with {sorted(strangers)}; name absent devices only")
        self._has_revealed = True
        return Revealed(self._device, self._own, {other: self._pairs[other] for other in sorted(missing)})


def survivors_sum(masked: Mapping[int, Words], revealed: Sequence[Revealed], *, bits: int) -> Words:
    """Return the sum of the survivors' vectors modulo 2^m, (P,) uint64.

    Arguments:
        masked: What each survivor sent, by id; at least one.
        revealed: What each of them revealed afterwards.
        bits: m.

    Raises:
        DataError: No survivor, or a survivor's keys are missing: nothing can be unmasked.
    """
    if not masked or {one.device for one in revealed} != masked.keys():
        raise DataError(
            f"{len(masked)} devices sent a vector, {len(revealed)} their keys; need all of them, at least 1"
        )
    total = np.zeros_like(next(iter(masked.values())))  # (P,)
    for vector in masked.values():
        total += vector
    for one in revealed:
        total -= _mask(one.own, total.size, bits)
        for other, key in one.pairs.items():
            _add_pair(total, other, one.device, key, bits)  # the absent device's half of the pair
    return total & _ones(bits)


def _add_pair(total: Words, device: int, other: int, key: bytes, bits: int) -> None:
    """Add the mask that `device` puts on for `other`; the reverse pair puts on its negative."""
    mask = _mask(key, total.size, bits)
    if device < other:
        total += mask
    else:
        total -= mask


def _mask(key: bytes, size: int, bits: int) -> Words:
    """Return (size,) uniform below 2^bits."""
    return stream(key, "secure-sum").integers(0, 2**bits - 1, size, np.uint64, endpoint=True)


def _ones(bits: int) -> np.uint64:
    return np.uint64(2**bits - 1)


def _derive(root: bytes, *names: str | int) -> bytes:
    return blake2b("/".join(map(str, names)).encode(), key=root, digest_size=32).digest()
