"""The Gaussian bound and the scores against analytic epsilons: one release, rounds, correlated noise, half of it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from fedlm.auditing import Canaries, GaussianBound, Products, gaussian_bound, products, scores, strengths
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.trainable.spec import UpdateSpec

Floats = npt.NDArray[np.float64]
SIZE, NUM_CANARIES, DELTA = 20_000, 400, 1e-5


def gaussian_epsilon(mu: float) -> float:
    return subsampled_gaussian.epsilon(sampling_probability=1.0, noise_multiplier=1 / mu, rounds=1, delta=DELTA)


class World:
    """Releases of a mechanism with matrix C in units of the clip norm, canaries and a drifting crowd among them."""

    def __init__(self, matrix: Floats, weights: Floats, *, noise: float, seed: int, drift: float = 0.0) -> None:
        rounds = len(matrix)
        self.spec = UpdateSpec.build([("w", "dense", (SIZE,))])
        self.canaries = Canaries(seed, 0, NUM_CANARIES, 0)
        generator = np.random.default_rng(seed)
        whitened = generator.normal(0, noise, (rounds, SIZE))  # (T, P)
        releases = np.linalg.solve(matrix, whitened) + drift * generator.normal(0, 1, SIZE)
        for numbers, signs in self.canaries.batches(self.spec):
            kept = weights[:, numbers] * self.canaries.members()[numbers]
            releases += kept @ signs.astype(np.float64) / math.sqrt(SIZE)
        self.matrix, self.weights = matrix, weights
        self.found = products(releases.astype(np.float32), self.canaries.batches(self.spec), NUM_CANARIES)

    def scores(self) -> Floats:
        return scores(self.found, self.matrix, self.weights)

    def bound(self) -> GaussianBound:
        members = self.canaries.members()
        return gaussian_bound(self.scores()[members], strengths(self.matrix, self.weights)[members], delta=DELTA)


def everywhere(rounds: int) -> Floats:
    return np.ones((rounds, NUM_CANARIES))


def separated(rounds: int, separation: int) -> Floats:
    """Canary j comes in rounds j, j + b, j + 2 b, ... (mod b)."""
    t, j = np.ogrid[:rounds, :NUM_CANARIES]
    return ((t - j) % separation == 0).astype(np.float64)


def toeplitz(coefficients: Floats) -> Floats:
    rounds = len(coefficients)
    lag = np.subtract.outer(np.arange(rounds), np.arange(rounds))
    return np.where(lag >= 0, coefficients[np.abs(lag)], 0.0)


def square_root(rounds: int, bands: int) -> Floats:
    """The banded square root of the prefix-sum matrix: binomial coefficients of (1 - x)^(-1/2)."""
    coefficients = np.cumprod(np.concatenate([[1.0], (2 * np.arange(1, rounds) - 1) / (2 * np.arange(1, rounds))]))
    return toeplitz(np.where(np.arange(rounds) < bands, coefficients, 0.0))


def buffered(rounds: int) -> Floats:
    """A buffered Toeplitz matrix of two buffers, sums of geometric series."""
    t = np.arange(1, rounds)
    return toeplitz(np.concatenate([[1.0], 0.3 * 0.97 ** (t - 1) + 0.15 * 0.6 ** (t - 1)]))


@pytest.mark.parametrize(
    ("noise", "analytic", "measured"),
    [(4.30, 0.856, 0.735), (1.54, 2.673, 2.567), (1.00, 4.377, 4.328), (0.54, 9.097, 9.016)],
)
def test_the_table_of_one_release(noise: float, analytic: float, measured: float) -> None:
    """d = 1e5, k = 1000, delta 1e-5, every canary a member: analytic epsilon, and an interval that covers it."""
    size, count = 100_000, 1_000
    spec, canaries = UpdateSpec.build([("w", "dense", (size,))]), Canaries(5, 0, count, 0)
    release = np.random.default_rng(5).normal(0, noise, size)
    for _, signs in canaries.batches(spec):
        release += signs.sum(axis=0, dtype=np.float64) / math.sqrt(size)
    found = products(release[None].astype(np.float32), canaries.batches(spec), count)
    one = np.ones((1, 1))
    bound = gaussian_bound(scores(found, one, one), np.ones(count), delta=DELTA)
    assert gaussian_epsilon(1 / noise) == pytest.approx(analytic, abs=2e-3)
    assert bound.low <= analytic <= bound.high
    # One standard error of mu is 1 / sqrt(1000); both figures are draws of the same estimator.
    error = gaussian_epsilon(1 / noise + 1 / math.sqrt(count)) - analytic
    assert abs(bound.epsilon - measured) < 4 * error
    assert bound.mu_high - bound.mu_low == pytest.approx(2 * 1.96 / math.sqrt(count), rel=0.1)


MECHANISMS = {
    "plain": (np.eye(12), everywhere(12)),
    "plain, some rounds": (np.eye(12), (np.random.default_rng(1).random((12, NUM_CANARIES)) < 0.4).astype(float)),
    "banded": (square_root(24, 8), separated(24, 8)),
    "buffered": (buffered(24), separated(24, 6)),
}


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_the_interval_covers_the_analytic_epsilon(name: str, drift: float) -> None:
    matrix, weights = MECHANISMS[name]
    world = World(matrix, weights, noise=3.0, seed=21, drift=drift)
    members = world.canaries.members()
    analytic = gaussian_epsilon(strengths(matrix, weights)[members].max() / 3.0)
    bound = world.bound()
    assert bound.at_least < bound.low <= bound.epsilon <= bound.high
    assert bound.low <= analytic
    if not drift:  # a crowd that all pulls one way only hides canaries
        assert analytic <= bound.high
    strangers = world.scores()[~members]
    assert abs(strangers.mean()) < 4 / math.sqrt(len(strangers))
    assert strangers.std() == pytest.approx(1, abs=4 / math.sqrt(2 * len(strangers)))


@pytest.mark.parametrize("name", ["plain", "banded", "buffered"])
def test_half_the_noise_is_caught(name: str) -> None:
    matrix, weights = MECHANISMS[name]
    world = World(matrix, weights, noise=1.5, seed=12)
    accounted = gaussian_epsilon(strengths(matrix, weights).max() / 3.0)
    assert world.bound().at_least > accounted


def test_an_analyst_who_ignores_the_correlation_sees_less() -> None:
    """Correlated noise hides nobody from the matched filter, but it does from plain sums of releases."""
    matrix, weights = MECHANISMS["banded"]
    world = World(matrix, weights, noise=3.0, seed=13)
    members = world.canaries.members()
    plain = scores(world.found, np.eye(len(matrix)), weights)
    assert world.scores()[members].mean() > 1.1 * plain[members].mean()


def test_scores_are_those_of_vectors() -> None:
    """Inner products alone give the cosines that the vectors themselves give."""
    matrix, weights = square_root(6, 4), separated(6, 3)
    generator = np.random.default_rng(3)
    releases = generator.normal(size=(6, 500)).astype(np.float32)
    spec, canaries = UpdateSpec.build([("w", "dense", (500,))]), Canaries(3, 0, 40, 0)
    signs = np.concatenate([batch for _, batch in canaries.batches(spec)])  # (k, P)
    filtered = (matrix.T @ matrix @ weights[:, :40]).T @ releases  # (k, P)
    expected = (filtered * signs).sum(axis=1) / np.linalg.norm(filtered, axis=1)
    found = products(releases, canaries.batches(spec), 40)
    assert scores(found, matrix, weights[:, :40]) == pytest.approx(expected, abs=1e-4)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(8)
    truth, covered, above, certain = gaussian_epsilon(1.0), 0, 0, 0
    runs, count = 1_500, 100
    for _ in range(runs):
        bound = gaussian_bound(generator.normal(1.0, 1.0, count), np.ones(count), delta=1e-5)
        covered += bound.low <= truth <= bound.high
        above += bound.low > truth
        certain += bound.at_least > truth
    assert covered / runs == pytest.approx(0.955, abs=0.02)
    assert above / runs < 0.025 + 3 * math.sqrt(0.025 / runs)
    assert certain / runs < 0.001 + 4 * math.sqrt(0.001 / runs)


def test_nobody_took_part() -> None:
    bound = gaussian_bound(np.zeros(3), np.zeros(3), delta=1e-5)
    assert (bound.epsilon, bound.low, bound.high, bound.at_least) == (0.0, 0.0, math.inf, 0.0)
    empty = Products(np.zeros((2, 3)), np.zeros((2, 2)))
    assert scores(empty, np.eye(2), np.zeros((2, 3))).tolist() == [0.0, 0.0, 0.0]
