"""Epsilon of Gaussian releases that are not alike: other sampling probabilities or other noise, one after the other.

Each event is as in `fedlm.privacy.accounting.subsampled_gaussian`: in each of its rounds every example (or user) takes
part with probability q, contributes at most C and meets noise of standard deviation z C. Add or remove one.

Exact: the privacy loss distributions of the events, on one grid of losses, composed by FFT; all events with q = 1
together are one Gaussian with 1/z^2 the sum of theirs, in closed form. Approximate, and always from above: the grid,
the FFT's rounding (paid for as there, and once more for each event), and the cap by the same events without sampling.

>>> bias_only, full = Event(0.01, 1.0, 200), Event(0.02, 1.5, 100)
>>> epsilon = composed_epsilon([full, bias_only], delta=1e-5)
>>> round(epsilon, 2)
1.07
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from fedlm.privacy.accounting.loss_grid import (
    FFT_DELTA,
    FINE,
    SMALLEST_Z,
    checked_delta,
    checked_sampling,
    loss_grid,
    one_round,
    unsampled_epsilon,
)
from fedlm.privacy.accounting.subsampled_gaussian import epsilon as epsilon_of_one
from fedlm.ranges import require_count, require_number

# Releases without sampling that lose this much leave nothing for the others to save (epsilon above 450).
_HOPELESS_Z = 1 / 30


@dataclass(frozen=True)
class Event:
    """A number of like releases.

    Arguments:
        sampling_probability: q, in (0, 1].
        noise_multiplier: z, > 0.
        rounds: How many; 0 counts for nothing.

    Raises:
        ConfigError: A number out of range.
    """

    sampling_probability: float
    noise_multiplier: float
    rounds: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        checked_sampling(self.sampling_probability)
        require_number("noise_multiplier", self.noise_multiplier, above=0, fix="no noise means no privacy")
        require_count("rounds", self.rounds)


def composed_epsilon(events: Iterable[Event], delta: float) -> float:
    """Return epsilon at `delta` of all releases of all events together; never less than the true one.

    Arguments:
        events: In any order, which does not matter; none gives 0.
        delta: In [1e-12, 1).

    Guarantee:
        Holds also where an event's model, loss or trained parameters were chosen after seeing earlier releases.

    Edge cases:
        Events that differ in nothing but their rounds are one event, accounted as `accounting.epsilon` does.

    Raises:
        ConfigError: delta out of range.
    """
    delta = checked_delta(delta)
    merged = _merged(events)
    if not merged:
        return 0.0
    if len(merged) == 1:
        ((q, z), rounds), *_ = merged.items()
        return epsilon_of_one(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=delta)
    mu = math.sqrt(sum(rounds / z**2 for (_, z), rounds in merged.items()))
    unsampled = unsampled_epsilon(mu, delta)
    hopeless = any(q == 1.0 and z < _HOPELESS_Z for q, z in merged)
    return unsampled if hopeless else min(unsampled, _sampled_epsilon(merged, delta))


def _merged(events: Iterable[Event]) -> dict[tuple[float, float], int]:
    """Return the rounds of each (q, z); those without sampling as one release."""
    merged: dict[tuple[float, float], int] = {}
    inverse_square = 0.0
    for event in events:
        q, z = event.sampling_probability, event.noise_multiplier
        if q == 1.0 or z < SMALLEST_Z:
            inverse_square += event.rounds / z**2
        elif event.rounds:
            merged[q, z] = merged.get((q, z), 0) + event.rounds
    if inverse_square:
        merged[1.0, 1 / math.sqrt(inverse_square)] = 1
    return merged


def _sampled_epsilon(merged: dict[tuple[float, float], int], delta: float) -> float:
    """Return epsilon by composing loss distributions; infinity where delta drowns in the FFT's rounding."""
    resolved = delta - FFT_DELTA * (sum(merged.values()) + 200 * len(merged))
    if resolved <= 0:
        return math.inf
    # The coarsest of the grids would do for the largest losses, the finest is what the smallest need; between events
    # that differ by more than 2^4 the small ones pay for the others' reach with a coarser, still pessimistic, grid.
    grids = [loss_grid(q, z, rounds, FINE) for (q, z), rounds in merged.items()]
    spacing = max(min(grids), max(grids) / 2**4)
    parts = [one_round(q, z, spacing).self_compose(rounds) for (q, z), rounds in merged.items()]
    return float(reduce(lambda left, right: left.compose(right), parts).get_epsilon_for_delta(resolved))
