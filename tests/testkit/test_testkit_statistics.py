"""The kit's statistics against scipy, against simulation, and against the closed-form accountant."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms import create
from fedlm.privacy.mechanisms.banded import Banded
from fedlm.privacy.mechanisms.base import Participation
from fedlm.privacy.mechanisms.blt import Blt
from fedlm.privacy.noise.lattice import NoiseStream
from fedlm.randomness import seed_key, stream
from fedlm.testkit import statistics
from fedlm.testkit.whitened_noise import whitening


def normals(*counters: int, size: int = 400) -> np.ndarray:
    return stream(seed_key(3), "testkit", *counters).standard_normal(size)


def test_p_values_are_those_of_scipy_or_larger() -> None:
    draws = normals(0)
    exact = stats.kstest(draws, "norm").pvalue
    assert statistics.kolmogorov_smirnov(statistics.normal_probabilities(draws)) >= exact
    assert statistics.binomial(7, 50, 0.2) == pytest.approx(
        2 * min(stats.binom.cdf(7, 50, 0.2), stats.binom.sf(6, 50, 0.2))
    )
    total = float(np.sum(draws**2))
    assert statistics.variance(draws) == pytest.approx(2 * min(stats.chi2.cdf(total, 400), stats.chi2.sf(total, 400)))
    interval = stats.binomtest(12, 80).proportion_ci(0.99, method="exact")
    assert statistics.clopper_pearson(12, 80, 0.01) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("name", ["variance", "mean", "autocorrelation", "correlation", "kolmogorov_smirnov", "tail"])
def test_no_p_value_is_too_small_too_often(name: str) -> None:
    tests = {
        "kolmogorov_smirnov": lambda i: statistics.kolmogorov_smirnov(statistics.normal_probabilities(normals(1, i))),
        "correlation": lambda i: statistics.correlation(normals(1, i, size=100), normals(2, i, size=100)),
        "tail": lambda i: statistics.tail(normals(1, i), 2.0),
    }
    test = tests.get(name, lambda i: getattr(statistics, name)(normals(1, i)))
    below = sum(test(i) <= 0.01 for i in range(1_000))
    assert below <= stats.binom.ppf(1 - 1e-9, 1_000, 0.01)


def test_copies_are_found_at_any_shift_sign_and_direction() -> None:
    draws = normals(4, size=1_000)
    for copy in (np.roll(draws, 137), -draws, draws[::-1]):
        assert statistics.correlation(draws, copy) < statistics.ALPHA
    assert statistics.autocorrelation(draws + np.roll(draws, 3)) < statistics.ALPHA


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_lattice_is_measured(bits: int) -> None:
    draws = np.rint(normals(5, size=60_000) * 2**bits) / 2**bits
    assert statistics.lattice(draws) == pytest.approx(2.0**-bits, rel=0.1)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_the_trade_off_curve_is_that_of_the_accountant(mu: float) -> None:
    delta = 1e-3
    epsilon = subsampled_gaussian.epsilon(sampling_probability=1.0, noise_multiplier=1 / mu, rounds=1, delta=delta)
    rates = np.logspace(-12, -0.01, 2_000)
    deltas = [statistics.trade_off(rate, mu) - np.exp(epsilon) * rate for rate in rates]
    assert max(deltas) == pytest.approx(delta, rel=0.01)


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_the_whitening_of_a_blt_is_the_sum_of_its_buffers(buffers: int) -> None:
    rule = Participation("separated", 400, 10, 60, separation=12, max_participations=5)
    mechanism = Blt.optimised(rule, buffers=buffers)
    zeros, poles = np.array(mechanism.zeros), np.array(mechanism.poles)
    # One buffer after the other, by partial fractions at each pole: c_i = sum_j w_j pole_j^(i-1).
    others = [np.delete(poles, j) for j in range(buffers)]
    weights = [np.prod(p - zeros) / np.prod(p - rest) for p, rest in zip(poles, others, strict=True)]
    column = [1.0, *(sum(w * p**i for w, p in zip(weights, poles, strict=True)) for i in range(59))]
    wanted = [[column[t - s] if t >= s else 0.0 for s in range(60)] for t in range(60)]
    np.testing.assert_allclose(whitening(mechanism), wanted, rtol=1e-9, atol=1e-12)


def test_the_whitening_of_bands_squares_to_the_prefix_sum_within_them() -> None:
    rule = Participation("separated", 400, 10, 20, separation=9, max_participations=3)
    matrix = whitening(Banded(rule, 9))
    assert matrix is not None
    square = matrix @ matrix
    assert np.tril(np.triu(square, -8)) == pytest.approx(np.tril(np.triu(np.ones((20, 20)), -8)))
    assert not np.tril(matrix, -9).any()


@pytest.mark.parametrize("name", ["tree", "blt", "banded"])
def test_the_whitening_of_a_mechanism_is_that_of_its_noise(name: str) -> None:
    rounds, size = 7, 4_000
    rule = Participation("separated", 40, 10, rounds, separation=3, max_participations=3)
    options = {"bands": 2} if name == "banded" else {}
    mechanism = create(name, rule, delta=1e-6, epsilon=0.0, noise_multiplier=1.0, **options)
    noise, rows = mechanism.new_noise(size), np.zeros((rounds, size), np.int64)
    for t in range(rounds):
        noise.add_to(rows[t], 2.0**40, NoiseStream(key=100 + t))
    matrix = whitening(mechanism)
    assert matrix is not None
    assert (matrix == np.tril(matrix)).all()
    white = matrix @ (rows / 2.0**40)  # (T, P)
    assert np.cov(white) == pytest.approx(np.eye(rounds), abs=7 / np.sqrt(size))
