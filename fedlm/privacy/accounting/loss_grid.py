"""Loss distributions of one round and the closed form without sampling, which `accounting` and `composition` share.

A grid of losses bounds them from above: the finer, the closer, and no finer than the result needs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from fedlm.ranges import require_number

MIN_DELTA = 1e-12
SMALLEST_Z = 1e-3
"""Below it sampling is not worth a grid."""
FFT_DELTA = 1e-16
"""What the FFT's rounding costs of delta, each round; measured against the closed form: up to 3e-17."""
FINE, COARSE = 20_000, 4_000
"""Points of one round's losses."""
# Composed losses lie on about 6 times as many points as one round's, enough for four digits of epsilon.
_COMPOSED = 6

Cut = tuple[int, int] | None
"""Population and cap of truncated Poisson sampling; None: no cap."""


def checked_sampling(value: float) -> float:
    """Return q if it is in (0, 1], else raise `ConfigError`."""
    return require_number("sampling_probability", value, above=0, high=1, fix="it is cohort / population")


def checked_delta(value: float) -> float:
    """Return delta if it is in [1e-12, 1), else raise `ConfigError`."""
    return require_number("delta", value, low=MIN_DELTA, below=1, fix="choose at most 1 / population")


def loss_grid(q: float, z: float, rounds: int, points: int) -> float:
    """Return the spacing of the loss grid: about `points` points for the losses of one round."""
    largest = (1 + 20 * z) / (2 * z * z)  # loss without sampling at ten standard deviations
    single = largest + math.log(q) if largest > 600 else math.log1p(q * math.expm1(largest))
    # Standard deviation of one round's loss: about the first for large z; at most the second for any.
    spread = min(q * math.sqrt(math.expm1(min(1 / z**2, 700))), 1 / z + math.sqrt(q) / (2 * z * z))
    composed = 14 * math.sqrt(rounds) * spread
    # A power of two, so that neighbouring numbers of rounds share one cached distribution.
    return float(2.0 ** math.floor(math.log2(max(single, 1e-9, composed / _COMPOSED) / points)))


@lru_cache(maxsize=32)
def one_round(q: float, z: float, spacing: float, cut: Cut = None) -> Any:
    """Return dp-accounting's loss distribution of one round; imported here, for it takes seconds to load."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    if cut is not None:
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=cut[0],
            sampling_probability=q,
            truncated_batch_size=cut[1],
            noise_multiplier=z,
            value_discretization_interval=spacing,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=z,
        value_discretization_interval=spacing,
        sampling_prob=q,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def unsampled_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of the unsampled Gaussian with sensitivity / standard deviation = mu.

    delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu); without the second term it is larger, so the
    root of the first term alone is an upper bound, which is also all that fp64 can resolve for large mu.
    """
    from scipy.special import log_ndtr, ndtri

    high = max(0.0, mu * (mu / 2 - float(ndtri(delta))))
    if mu > 100:
        return high * (1 + 1e-12)

    def too_small(value: float) -> bool:
        first = float(log_ndtr(mu / 2 - value / mu))
        ratio = value + float(log_ndtr(-mu / 2 - value / mu)) - first
        return first + math.log(-math.expm1(min(ratio, -1e-300))) > math.log(delta)

    if not too_small(0.0):
        return 0.0
    low = 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high
