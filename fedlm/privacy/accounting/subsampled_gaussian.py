"""Epsilon of T releases of the Poisson-sampled Gaussian mechanism, and the noise multiplier for a given
epsilon.

Unit: one user, added or removed. Each round every user joins with probability q, independently and in
secret; a user's contribution has L2 norm at most C and the noise has standard deviation z C.

Exact: the privacy loss distribution (PLD) of google/dp-accounting, which bounds one round's loss from above
on a grid ("connect the dots", Doroshenko et al. 2022) and composes it by FFT. q = 1 is the plain Gaussian
in closed form (Balle and Wang 2018, theorem 8). Approximate, and always from above: the grid is no finer
than the result needs; the FFT's rounding, which was measured against the closed form to understate delta by
up to 3e-17 a round, is paid for by asking for a delta smaller by 1e-16 a round; and the unsampled Gaussian
caps the result, since sampling cannot harm.

Truncated Poisson: a cohort beyond a cap loses members at random until it has `cap`. One user more can then push another
one out, so the sum moves by up to 2 C in rounds that reach the cap (Ganesh 2025, "Tight privacy accounting of truncated
Poisson sampling", https://arxiv.org/abs/2508.15089). dp-accounting's mixture of sensitivity 1 and 2 is an upper bound.

>>> round(epsilon(sampling_probability=1.0, noise_multiplier=5.0, rounds=10, delta=1e-6), 2)
2.92
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from fedlm.errors import ConfigError
from fedlm.privacy.accounting.loss_grid import (
    COARSE,
    FFT_DELTA,
    FINE,
    SMALLEST_Z,
    Cut,
    checked_delta,
    checked_sampling,
    loss_grid,
    one_round,
    unsampled_epsilon,
)
from fedlm.privacy.accounting.loss_grid import MIN_DELTA as MIN_DELTA
from fedlm.ranges import require_count, require_number

_LARGEST_Z = 1e6
_NEVER = 1e-30


def epsilon(*, sampling_probability: float, noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return epsilon at `delta` after `rounds` releases; never less than the true one.

    Arguments:
        sampling_probability: q, each user's probability to be in a round's cohort, in (0, 1].
        noise_multiplier: z, the noise's standard deviation in units of the clip norm, > 0.
        rounds: T, number of releases; 0 gives 0.
        delta: In [1e-12, 1).

    Returns:
        Epsilon; large but finite for tiny z.

    Raises:
        ConfigError: An argument out of range.
    """
    q, delta = checked_sampling(sampling_probability), checked_delta(delta)
    z = require_number("noise_multiplier", noise_multiplier, above=0, fix="no noise means no privacy")
    return _epsilon(q, z, require_count("rounds", rounds), delta, FINE)


def noise_multiplier(*, sampling_probability: float, rounds: int, epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier whose epsilon is at most `epsilon` (from below, within 0.1 %).

    Arguments:
        sampling_probability: q, in (0, 1].
        rounds: T, number of releases, at least 1.
        epsilon: The target, > 0.
        delta: In [1e-12, 1).

    Raises:
        ConfigError: An argument out of range, or no multiplier between 0.001 and 1,000,000 meets the target.
    """
    q, delta = checked_sampling(sampling_probability), checked_delta(delta)
    target = require_number("epsilon", epsilon, above=0)
    return _calibrate(q, require_count("rounds", rounds, low=1), target, delta)


def truncated_epsilon(
    *, population: int, cohort: int, cap: int, noise_multiplier: float, rounds: int, delta: float
) -> float:
    """Return epsilon at `delta` for cohorts that are Poisson-sampled and cut at random to `cap`; never too small.

    Arguments:
        population: N, the user in question among them.
        cohort: n, the expected cohort before it is cut; q = n / N.
        cap: Largest cohort, at least 1; from `population` up it cuts nothing.
        noise_multiplier: z, the noise's standard deviation in units of the clip norm, > 0.
        rounds: T; 0 gives 0.
        delta: In [1e-12, 1).

    Guarantee:
        Add or remove one user, for an observer of the noised sums (the realised cohort stays secret).

    Edge cases:
        A cap that is reached with probability below 1e-30 over all rounds costs nothing; one below the cohort is
        reached in most rounds and costs about twice the sensitivity, never more than 2 C in every round unsampled.

    Raises:
        ConfigError: An argument out of range.
    """
    q, delta = _truncated(population, cohort, cap), checked_delta(delta)
    z = require_number("noise_multiplier", noise_multiplier, above=0, fix="no noise means no privacy")
    return _epsilon(q, z, require_count("rounds", rounds), delta, FINE, _cut(population, cap))


def truncated_noise_multiplier(
    *, population: int, cohort: int, cap: int, rounds: int, epsilon: float, delta: float
) -> float:
    """Return the smallest noise multiplier whose `truncated_epsilon` is at most `epsilon` (from below, within 0.1 %).

    Arguments:
        population, cohort, cap, delta: As for `truncated_epsilon`.
        rounds: T, at least 1.
        epsilon: The target, > 0.

    Raises:
        ConfigError: An argument out of range, or no multiplier between 0.001 and 1,000,000 meets the target.
    """
    q, delta = _truncated(population, cohort, cap), checked_delta(delta)
    target = require_number("epsilon", epsilon, above=0)
    return _calibrate(q, require_count("rounds", rounds, low=1), target, delta, _cut(population, cap))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of the Gaussian mechanism without sampling, never less than the true one.

    Arguments:
        mu: L2 sensitivity of all releases together over the noise's standard deviation; 0 gives 0.
        delta: In [1e-12, 1).

    Source:
        Balle and Wang 2018, theorem 8.
    """
    mu, delta = require_number("mu", mu, low=0), checked_delta(delta)
    return unsampled_epsilon(mu, delta) if mu else 0.0


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu whose `gaussian_epsilon` is at most `epsilon` (from below, within 1e-8)."""
    target, delta = require_number("epsilon", epsilon, above=0), checked_delta(delta)
    return _gaussian_mu(target, delta)


@lru_cache(maxsize=256)
def _gaussian_mu(target: float, delta: float) -> float:
    low, high = 0.0, 1.0
    while unsampled_epsilon(high, delta) <= target:
        low, high = high, high * 2
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if unsampled_epsilon(middle, delta) <= target else (low, middle)
    # What is divided by mu and multiplied again must not come out above the target.
    return low * (1 - 1e-9)


def _truncated(population: int, cohort: int, cap: int) -> float:
    """Check the sampler's numbers and return q."""
    require_count("population", population, low=1)
    require_count("cohort", cohort, low=1, high=population, fix="expect fewer users a round")
    require_count("cap", cap, low=1, fix="6.5 standard deviations above the cohort cost next to nothing")
    return cohort / population


def _cut(population: int, cap: int) -> Cut:
    return (population, cap) if cap < population else None


@lru_cache(maxsize=8192)
def _epsilon(q: float, z: float, rounds: int, delta: float, points: int, cut: Cut = None) -> float:
    if rounds == 0:
        return 0.0
    if cut is not None and rounds * _reach(q, cut) < _NEVER:
        cut = None
    unsampled = unsampled_epsilon((1 if cut is None else 2) * math.sqrt(rounds) / z, delta)
    if cut is not None:
        return unsampled if z < SMALLEST_Z else min(unsampled, _sampled_epsilon(q, z, rounds, delta, points, cut))
    if q == 1.0 or z < SMALLEST_Z:
        return unsampled
    return min(unsampled, _sampled_epsilon(q, z, rounds, delta, points))


def _reach(q: float, cut: tuple[int, int]) -> float:
    """Return the probability that the other users alone fill the cap."""
    from scipy.stats import binom

    population, cap = cut
    return float(binom.sf(cap - 1, population - 1, q))


def _sampled_epsilon(q: float, z: float, rounds: int, delta: float, points: int, cut: Cut = None) -> float:
    """Return epsilon by composing loss distributions; infinity where delta drowns in the FFT's rounding."""
    resolved = delta - FFT_DELTA * (rounds + 100)
    if resolved <= 0:
        return math.inf
    # With a cap, one round's losses reach as far as those of sensitivity 2.
    losses = one_round(q, z, loss_grid(q, z if cut is None else z / 2, rounds, points), cut)
    return float(losses.self_compose(rounds).get_epsilon_for_delta(resolved))


@lru_cache(maxsize=256)
def _calibrate(q: float, rounds: int, target: float, delta: float, cut: Cut = None) -> float:
    def spent(points: int) -> Callable[[float], float]:
        return lambda z: _epsilon(q, z, rounds, delta, points, cut)

    low, high = _bracket(spent(COARSE), target)
    guess = _narrow(spent(COARSE), target, low, high)
    fine = spent(FINE)
    low, high = guess / 1.01, guess * 1.001
    while fine(high) > target:
        low, high = high, high * 1.01
    while fine(low) <= target:
        low, high = low / 1.1, low
    return _narrow(fine, target, low, high)


def _bracket(spent: Callable[[float], float], target: float) -> tuple[float, float]:
    """Return z that spends too much and z that does not."""
    low = high = 1.0
    while spent(high) > target:
        low, high = high, high * 2
        if high > _LARGEST_Z:
            raise ConfigError(f"epsilon = {target} needs a noise multiplier over {_LARGEST_Z:,.0f}; raise epsilon")
    while spent(low) <= target:
        low, high = low / 2, low
        if low < SMALLEST_Z:
            raise ConfigError(
                f"epsilon = {target} is met almost without noise; lower epsilon or delta to mean something"
            )
    return low, high


def _narrow(spent: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return a z that spends 0.9998 to 1 of the target, by false position in log-log scale."""
    spent_low, spent_high = spent(low), spent(high)
    for _ in range(60):
        if spent_high >= target * (1 - 2e-4) or high / low < 1 + 1e-9:
            break
        slope = math.log(spent_low / max(spent_high, 1e-12))
        weight = math.log(spent_low / (target * (1 - 1e-4))) / slope
        middle = low * (high / low) ** min(max(weight, 0.02), 0.98)
        if (value := spent(middle)) <= target:
            high, spent_high = middle, value
        else:
            low, spent_low = middle, value
    return high
