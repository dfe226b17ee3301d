"""Published and calibrated figures: RMSE of prefix sums at one scale, RMSE times sensitivity, the tree's epsilon."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms import Mechanism, Participation, create, toeplitz
from fedlm.privacy.mechanisms.banded import Banded, best_band
from fedlm.privacy.mechanisms.blt import Blt

N, COHORT, ROUNDS, DELTA = 342_477, 1_000, 2_052, 1e-6
POISSON = Participation("poisson", N, COHORT, ROUNDS)
SEPARATED = Participation("separated", N, COHORT, ROUNDS, separation=342, max_participations=6)
CYCLIC = Participation("cyclic_poisson", N, COHORT, ROUNDS)


def rmse(made: Mechanism, epsilon: float) -> float:
    return made.noise_multiplier(epsilon=epsilon, delta=DELTA) * made.prefix_rmse()


@pytest.mark.parametrize(
    ("epsilon", "poisson", "blt", "banded", "bands"),
    [(1, 29.3, 38.8, 24.8, 8), (2, 24.0, 20.5, 15.3, 16), (4, 19.7, 11.0, 9.6, 64), (8, 16.1, 6.00, 5.86, 342)],
)
def test_prefix_rmse_at_stack_overflow_scale(
    epsilon: float, poisson: float, blt: float, banded: float, bands: int
) -> None:
    assert rmse(create("gaussian", POISSON, delta=DELTA), epsilon) == pytest.approx(poisson, rel=0.01)
    assert rmse(create("blt", SEPARATED, delta=DELTA), epsilon) == pytest.approx(blt, rel=0.01)
    assert rmse(create("banded", CYCLIC, delta=DELTA, bands=bands), epsilon) == pytest.approx(banded, rel=0.01)


def test_the_best_band_is_found() -> None:
    best = best_band(CYCLIC, epsilon=8, delta=DELTA)
    assert best.bands == best.participation.separation == 342


def test_the_best_band_is_found_where_the_classes_are_given() -> None:
    rule = Participation("cyclic_poisson", 240, 2, 24, separation=12)
    norms = [float(np.linalg.norm(toeplitz.square_root_column(bands))) for bands in (1, 2, 4, 12)]
    every = [norm * Banded(rule, bands).prefix_rmse() for norm, bands in zip(norms, (1, 2, 4, 12), strict=True)]
    assert best_band(rule, epsilon=0.0, delta=DELTA).bands == (1, 2, 4, 12)[int(np.argmin(every))]


def test_one_band_is_poisson_dp_fedavg() -> None:
    one, plain = create("banded", CYCLIC, delta=DELTA, bands=1), create("gaussian", POISSON, delta=DELTA)
    assert one.prefix_rmse() == pytest.approx(plain.prefix_rmse())
    assert one.noise_multiplier(epsilon=1, delta=DELTA) == pytest.approx(plain.noise_multiplier(epsilon=1, delta=DELTA))


@pytest.mark.parametrize(
    ("name", "buffers", "expected"),
    [
        ("gaussian", 2, 70.7),
        ("tree", 2, 13.68),
        ("blt", 1, 8.83),
        ("blt", 2, 8.16),
        ("blt", 3, 8.15),
        ("banded", 2, 7.95),
    ],
)
def test_rmse_times_sensitivity(name: str, buffers: int, expected: float) -> None:
    rule = Participation("separated", 400, 1, 2000, separation=400, max_participations=5)
    made = create(name, rule, delta=DELTA, **({"buffers": buffers} if name == "blt" else {}))
    assert rmse(made, 1.0) * subsampled_gaussian.gaussian_mu(1.0, DELTA) == pytest.approx(expected, rel=0.002)
    if isinstance(made, Banded):
        assert made.bands == 400


def test_rmse_times_sensitivity_of_the_square_root() -> None:
    column = toeplitz.square_root_column(2000)
    moved = toeplitz.sensitivity(column, separation=400, participations=5)
    assert moved * toeplitz.prefix_rmse(toeplitz.inverse_column(column, 2000)) == pytest.approx(9.42, rel=0.001)


def test_optimised_poles_and_zeros_cannot_be_improved_nearby() -> None:
    rule = Participation("separated", 60, 1, 300, separation=60)
    best = Blt.optimised(rule, buffers=2)
    least = best.prefix_rmse() * best.sensitivity(300)
    rng = np.random.default_rng(0)
    for _ in range(300):
        poles, zeros = (
            tuple(1 - (1 - np.array(numbers)) * np.exp(rng.normal(0, 0.05, 2))) for numbers in (best.poles, best.zeros)
        )
        if 1 > poles[0] > zeros[0] > poles[1] > zeros[1] > 0:
            other = Blt(rule, poles, zeros)
            assert other.prefix_rmse() * other.sensitivity(300) > least * (1 - 1e-5)


def test_epsilon_of_published_tree_launches() -> None:
    """rho 0.806 at delta 1e-10: 8.90 by the general conversion from zCDP, 8.53 for what it is, a Gaussian."""
    rho, delta = 0.806, 1e-10
    orders = np.linspace(1.01, 60, 50_000)
    # Canonne, Kamath and Steinke 2020, proposition 12.
    general = rho * orders + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    assert general.min() == pytest.approx(8.90, abs=0.005)
    assert subsampled_gaussian.gaussian_epsilon(math.sqrt(2 * rho), delta) == pytest.approx(8.526, abs=0.002)
    tree = create("tree", SEPARATED, delta=delta)
    z = tree.sensitivity(ROUNDS) / math.sqrt(2 * rho)  # type: ignore[attr-defined]
    found = tree.epsilon(noise_multiplier=z, num_releases=ROUNDS, delta=delta)
    assert found == pytest.approx(8.526, abs=0.002)
    assert found < general.min()


def test_local_noise_is_that_of_every_device() -> None:
    rule = Participation("separated", 1_000, 100, 50, separation=10, max_participations=5)
    local, central = create("local", rule, delta=DELTA), create("gaussian", rule, delta=DELTA)
    # Replacement doubles the sensitivity, and 100 devices add noise in place of one server.
    assert rmse(local, 2.0) == pytest.approx(20 * rmse(central, 2.0))
    assert local.noise_growth(100) == pytest.approx(20)
    assert local.noise_growth(0) == 2
    z = local.noise_multiplier(epsilon=2.0, delta=DELTA)
    # One device's reports alone: sensitivity 2 C and standard deviation 2 z C, five times.
    assert subsampled_gaussian.gaussian_epsilon(math.sqrt(5) * 2 / (2 * z), DELTA) == pytest.approx(2.0, rel=1e-6)
