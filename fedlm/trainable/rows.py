"""Public row sets for Partial Embedding Updates (Xu et al. 2022, arXiv 2207.08988; METHODS.md section 1).

Round t draws one set S_t for the whole cohort, from public information only: the server's key of the round and public
word frequencies. A set chosen by a device from its own text would reveal its words.

    uniform   each row equally likely
    power     inclusion probability pi_r = min(1, c p_r^alpha), sum pi_r = count; systematic sampling, so |S_t| = count
    top_k     the most frequent rows, the same every round
    cyclic    a partition of the vocabulary: every row once in each cycle of ceil(V / count) rounds
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import RowsConfig
from fedlm.randomness import round_key, seed_key, stream
from fedlm.trainable.spec import RowIds

Frequencies = npt.NDArray[np.float64]


def row_set(config: RowsConfig, frequencies: Frequencies, *, seed: int, round_number: int) -> RowIds:
    """Return the sorted row ids (S,) of one round.

    Arguments:
        config: Sampler and expected size; `count` is at most V.
        frequencies: Public word frequencies (V,).
        seed: The server's seed.
        round_number: Counts from 1.
    """
    vocabulary_size, count = len(frequencies), config.count
    if count == 0:
        return np.empty(0, np.int64)
    rng = stream(round_key(seed, round_number), "rows")
    match config.sampler:
        case "uniform":
            ids = rng.choice(vocabulary_size, count, replace=False)
        case "power" | "dp_adafest":  # the latter until its own rows are chosen (`fedlm.privacy.adaptation`)
            ids = _systematic(inclusion_probabilities(frequencies, config.alpha, count), rng)
        case "top_k":
            ids = np.argsort(-frequencies, kind="stable")[:count]
        case "cyclic":
            ids = _cyclic(vocabulary_size, count, seed, round_number)
        case other:
            raise AssertionError(other)
    return np.sort(ids.astype(np.int64))


def inclusion_probabilities(frequencies: Frequencies, alpha: float, count: int) -> Frequencies:
    """Return pi (V,) = min(1, c p^alpha) with sum `count`; c is found by fixing the saturated rows at one."""
    weights = frequencies**alpha  # (V,)
    order = np.argsort(-weights, kind="stable")
    ranked = weights[order]
    tails = np.cumsum(ranked[::-1])[::-1]  # (V,) weight of this row and of all lighter ones
    ranks = np.arange(len(ranked))
    unsaturated = (count - ranks) * ranked <= tails  # row `rank` is the first that needs no cap
    first = int(np.argmax(unsaturated)) if unsaturated.any() else len(ranked)
    pi = np.ones(len(ranked))
    if first < len(ranked):
        pi[order[first:]] = (count - first) * ranked[first:] / tails[first]
    return np.minimum(pi, 1.0)


def _systematic(pi: Frequencies, rng: np.random.Generator) -> RowIds:
    """Draw a set with inclusion probabilities pi, of size sum(pi) when that is whole, in a random order of rows."""
    order = rng.permutation(len(pi))
    edges = np.floor(np.cumsum(pi[order]) - 1e-9 + rng.random())  # the 1e-9 keeps a whole sum from rounding up
    return order[np.flatnonzero(np.diff(edges, prepend=0.0) > 0)].astype(np.int64)


def _cyclic(vocabulary_size: int, count: int, seed: int, round_number: int) -> RowIds:
    num_parts = -(-vocabulary_size // count)
    cycle, part = divmod(round_number - 1, num_parts)
    order = stream(seed_key(seed), "row_cycle", cycle).permutation(vocabulary_size)
    return order[part * count : (part + 1) * count].astype(np.int64)
