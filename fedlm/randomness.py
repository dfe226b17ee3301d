"""Counter-based random streams: every draw is a function of (seed, purpose, round, device) and of nothing else.

No global generator and no order of calls can change a result, so a run gives the same bits for any number of
workers and after any restart. Privacy noise does *not* come from here (see `fedlm.privacy.noise.lattice`).

>>> a = stream(round_key(7, 3), "shuffle", 12).permutation(4)
>>> b = stream(round_key(7, 3), "shuffle", 12).permutation(4)
>>> bool((a == b).all())
True
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def round_key(seed: int, round_number: int) -> bytes:
    """Return the 32-byte key of one round.

    Messages carry this key instead of the seed: it is a one-way function of the seed, so a device can draw its own
    streams of this round but learns nothing about other rounds or about who else was sampled in them.
    """
    return blake2b(f"{seed}/round/{round_number}".encode(), digest_size=32).digest()


def seed_key(seed: int) -> bytes:
    """Return the 32-byte key of the streams that belong to no round (splits, initial weights)."""
    return blake2b(f"{seed}".encode(), digest_size=32).digest()


def stream(key: bytes, purpose: str, *counters: int) -> np.random.Generator:
    """Return the generator of one purpose, for example `stream(key, "negatives", device, step)`.

    Arguments:
        key: From `round_key` or `seed_key`.
        purpose: What is drawn; different purposes never share numbers.
        counters: Integers that number the draw (a device, a step).

    Returns:
        A fresh numpy generator over Philox, keyed by a hash of all arguments.
    """
    message = "/".join([purpose, *map(str, counters)]).encode()
    digest = blake2b(message, key=key, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
