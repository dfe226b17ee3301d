"""The one-run bound: the theorem's closed cases, and its coverage over simulated runs that are exactly private."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlm.auditing import one_run_bound
from fedlm.auditing.one_run import lower_bound, probability_of_guesses
from fedlm.errors import ConfigError
from fedlm.privacy.accounting import subsampled_gaussian


@pytest.mark.parametrize("num_guesses", [10, 100, 1000])
def test_all_right_has_a_closed_form(num_guesses: int) -> None:
    """Pure DP: q^r = error with q = e^eps / (1 + e^eps)."""
    q = 0.05 ** (1 / num_guesses)
    found = lower_bound(num_guesses, num_guesses, num_guesses, delta=0.0, error=0.05)
    assert found == pytest.approx(math.log(q / (1 - q)), abs=2e-5)


@pytest.mark.parametrize(("num_guesses", "num_correct"), [(50, 40), (400, 300)])
def test_pure_privacy_is_a_binomial_test(num_guesses: int, num_correct: int) -> None:
    interval = stats.binomtest(num_correct, num_guesses, alternative="greater").proportion_ci(0.95, "exact")
    found = lower_bound(num_guesses, num_guesses, num_correct, delta=0.0, error=0.05)
    assert found == pytest.approx(math.log(interval.low / (1 - interval.low)), abs=2e-5)


@given(st.integers(1, 60), st.data(), st.floats(0, 4), st.floats(0, 1e-3))
@settings(max_examples=60, deadline=None)
def test_the_theorem_by_its_definition(num_guesses: int, data: st.DataObject, epsilon: float, delta: float) -> None:
    num_correct = data.draw(st.integers(0, num_guesses))
    num_canaries = num_guesses + data.draw(st.integers(0, 50))
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = [sum(stats.binom.pmf(w, num_guesses, q) for w in range(max(v, 0), num_guesses + 1))
            for v in range(num_correct + 1)]  # fmt: skip
    gain = max(((tail[num_correct - i] - tail[num_correct]) / i for i in range(1, num_correct + 1)), default=0.0)
    expected = min(1.0, tail[num_correct] + 2 * num_canaries * delta * gain)
    found = probability_of_guesses(num_canaries, num_guesses, num_correct, epsilon=epsilon, delta=delta)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_covered_and_nearly_reached(epsilon: float) -> None:
    """The mechanism for which the bound is tight: each coin is told truly with probability e^eps / (1 + e^eps)."""
    generator, runs, count, above, bounds = np.random.default_rng(1), 300, 1_000, 0, []
    for _ in range(runs):
        members = generator.random(count) < 0.5
        told = np.where(generator.random(count) < 1 / (1 + math.exp(-epsilon)), members, ~members)
        found = one_run_bound(told + 1e-3 * generator.random(count), members, delta=0.0, confidence=0.95)
        bounds.append(found.epsilon)
        above += found.epsilon > epsilon
    assert above / runs <= 0.05 + 3 * math.sqrt(0.05 / runs)
    assert np.median(bounds) > 0.5 * epsilon


def test_gaussian_scores_are_covered() -> None:
    mu, delta, runs, count = 1.0, 1e-2, 100, 500
    epsilon = subsampled_gaussian.epsilon(sampling_probability=1.0, noise_multiplier=1 / mu, rounds=1, delta=delta)
    generator, above, useful = np.random.default_rng(2), 0, 0
    for _ in range(runs):
        members = generator.random(count) < 0.5
        found = one_run_bound(generator.normal(mu * members), members, delta=1e-5, confidence=0.95)
        above += found.epsilon > epsilon
        useful += found.epsilon > 0.3
    assert above <= 0.05 * runs
    assert useful > 0.9 * runs


def test_delta_only_weakens_the_bound() -> None:
    found = [lower_bound(1000, 100, 95, delta=delta, error=0.05) for delta in (0.0, 1e-6, 1e-4, 1e-2)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        one_run_bound(np.zeros(3), np.zeros(2, np.bool_), delta=0.0, confidence=0.95)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        one_run_bound(np.zeros(3), np.zeros(3, np.bool_), delta=0.0, confidence=1.0)
    assert one_run_bound(np.empty(0), np.empty(0, np.bool_), delta=0.0, confidence=0.95).epsilon == 0.0
