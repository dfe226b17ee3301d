"""Truncated Poisson sampling: against the mechanism itself, enumerated, and against the figures that were published."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedlm.errors import ConfigError
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.accounting.subsampled_gaussian import epsilon, truncated_epsilon, truncated_noise_multiplier

LARGE = {"population": 10**6, "cohort": 1000, "noise_multiplier": 1.0, "rounds": 1500, "delta": 1e-6}


def sums(updates: list[int], q: float, cap: int) -> Counter[int]:
    """Probability of each sum of a cohort that is Poisson-sampled and cut to `cap`, by enumeration."""
    law: Counter[int] = Counter()
    for size in range(len(updates) + 1):
        for cohort in combinations(updates, size):
            chance = q**size * (1 - q) ** (len(updates) - size)
            kept = min(size, cap)
            for left in combinations(cohort, kept):
                law[sum(left)] += chance / comb(size, kept)
    return law


def true_delta(eps: float, with_user: Counter[int], without: Counter[int], z: float) -> float:
    """The larger hockey-stick divergence of the two noised laws, by quadrature."""
    x = np.linspace(-12 * z - 5, 12 * z + 5, 40_001)
    one, other = (sum(p * norm.pdf(x, s, z) for s, p in law.items()) for law in (with_user, without))
    step = x[1] - x[0]
    return max(float(np.maximum(a - np.exp(eps) * b, 0).sum() * step) for a, b in ((one, other), (other, one)))


@settings(max_examples=10, deadline=None)
@given(
    others=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=4),
    cap=st.integers(1, 4),
    z=st.sampled_from([0.7, 1.0, 3.0]),
    delta=st.sampled_from([1e-2, 1e-4]),
    data=st.data(),
)
def test_no_small_fleet_leaks_more_than_it_is_charged(
    others: list[int], cap: int, z: float, delta: float, data: st.DataObject
) -> None:
    population = len(others) + 1
    cohort = data.draw(st.integers(1, population))
    spent = truncated_epsilon(population=population, cohort=cohort, cap=cap, noise_multiplier=z, rounds=1, delta=delta)
    q = cohort / population
    assert true_delta(spent, sums([*others, 1], q, cap), sums(others, q, cap), z) <= delta * (1 + 1e-6)


def test_ignoring_a_tight_cap_would_understate() -> None:
    # One other user who says -1, cap 1: the user pushes it out. Plain Poisson accounting misses that.
    q, z, delta = 0.5, 1.0, 1e-3
    plain = epsilon(sampling_probability=q, noise_multiplier=z, rounds=1, delta=delta)
    assert true_delta(plain, sums([-1, 1], q, 1), sums([-1], q, 1), z) > 2 * delta


@pytest.mark.parametrize(
    ("population", "cohort", "z", "rounds", "factor"),
    [(10**6, 1000, 1.0, 1500, 5.6), (342_477, 1000, 0.6, 1600, 2.7)],
)
def test_a_cap_at_a_tenth_above_the_cohort_costs_as_published(
    population: int, cohort: int, z: float, rounds: int, factor: float
) -> None:
    plain = epsilon(sampling_probability=cohort / population, noise_multiplier=z, rounds=rounds, delta=1e-6)
    capped = truncated_epsilon(
        population=population, cohort=cohort, cap=cohort * 11 // 10, noise_multiplier=z, rounds=rounds, delta=1e-6
    )
    assert capped / plain == pytest.approx(factor, rel=0.02)


def test_a_cap_of_six_and_a_half_deviations_costs_next_to_nothing() -> None:
    plain = epsilon(sampling_probability=0.001, noise_multiplier=1.0, rounds=1500, delta=1e-6)
    assert plain < truncated_epsilon(**LARGE, cap=1206) < 1.01 * plain
    assert truncated_epsilon(**LARGE, cap=1500) == plain == truncated_epsilon(**LARGE, cap=10**6)


def test_published_costs_of_fixed_cohorts() -> None:
    # All others at -C, the user at +C instead of -C: a pair of the fixed-size mechanism, hence a lower bound.
    replaced = subsampled_gaussian._sampled_epsilon(0.001, 0.5, 1500, 1e-6, 20_000)
    assert replaced == pytest.approx(4.47, abs=0.005)
    unsampled = epsilon(sampling_probability=1.0, noise_multiplier=1.0, rounds=1500, delta=1e-6)
    assert unsampled == pytest.approx(933, abs=0.5)


def test_a_lower_cap_costs_more_but_never_more_than_twice_the_sensitivity_unsampled() -> None:
    spent = [truncated_epsilon(**{**LARGE, "rounds": 100}, cap=cap) for cap in (1000, 1100, 1300)]
    assert spent == sorted(spent, reverse=True)
    tiny = truncated_epsilon(population=4, cohort=2, cap=1, noise_multiplier=1e-4, rounds=3, delta=1e-6)
    assert tiny == epsilon(sampling_probability=1.0, noise_multiplier=0.5e-4, rounds=3, delta=1e-6)
    assert truncated_epsilon(**{**LARGE, "rounds": 0}, cap=10) == 0


def test_calibration_is_tight_and_on_the_safe_side() -> None:
    fleet = {"population": 10**4, "cohort": 100, "cap": 120, "rounds": 30, "delta": 1e-6}
    z = truncated_noise_multiplier(**fleet, epsilon=1.0)
    assert 1 - 1e-3 <= truncated_epsilon(**fleet, noise_multiplier=z) <= 1.0
    assert z > subsampled_gaussian.noise_multiplier(sampling_probability=0.01, rounds=30, epsilon=1.0, delta=1e-6)


@pytest.mark.parametrize("wrong", [{"population": 0}, {"cohort": 10**7}, {"cap": 0}, {"cap": 1.5}, {"delta": 0.0}])
def test_range_errors_name_the_value(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name} = {value} must be"):
        truncated_epsilon(**{**LARGE, "cap": 1100, **wrong})  # type: ignore[arg-type]
