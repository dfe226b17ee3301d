"""What the kit's devices know of their training beside the update: ordinary and hostile losses, counts and words.

A function of the update alone, so that a device has the same device stats in all worlds in which it has the same
update.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np

from fedlm.privacy.clipping.query_input import DeviceStats
from fedlm.randomness import seed_key, stream
from fedlm.trainable.spec import Vector

_KEY = seed_key(0)
_LOSSES = (2.5, 0.0, -1.0, 1e30, math.nan, math.inf, -math.inf)
_TOKENS = (0, 40, 10**12)


def device_stats_of(update: Vector, vocabulary_size: int) -> DeviceStats:
    """Return what a device with this update reports to side queries.

    Arguments:
        update: (P,).
        vocabulary_size: V; the words are none, one, half or all of the vocabulary, some of them twice.
    """
    rng = stream(_KEY, "facts", int.from_bytes(blake2b(update.tobytes(), digest_size=8).digest(), "little"))
    num_words = int(rng.choice((0, 1, vocabulary_size // 2, vocabulary_size)))
    words = rng.permutation(vocabulary_size)[:num_words].astype(np.int64)  # (W,)
    twice = words[: num_words // 2]
    return DeviceStats(float(rng.choice(_LOSSES)), int(rng.choice(_TOKENS)), np.concatenate([words, twice]))
