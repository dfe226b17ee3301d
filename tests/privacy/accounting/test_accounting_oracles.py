"""Second opinions on epsilon: RDP, ours and dp-accounting's, and what the figures of the literature rest on."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fedlm.privacy.accounting import rdp, subsampled_gaussian
from fedlm.privacy.accounting.subsampled_gaussian import epsilon, noise_multiplier

GRID = [(0.001, 0.7, 500), (0.005, 0.8639, 2000), (0.02, 1.5, 100), (0.3, 5.0, 40), (1.0, 5.0, 10)]


def poisson(q: float, z: float, rounds: int) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(z)
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(q, gaussian), rounds)


@pytest.mark.parametrize(("q", "z", "rounds"), GRID)
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_pld_lies_below_both_rdp_bounds(q: float, z: float, rounds: int, delta: float) -> None:
    ours = rdp.epsilon(rounds * rdp.poisson_sampled(rdp.gaussian(z), q), delta=delta)
    theirs = dp_accounting.rdp.RdpAccountant(list(range(2, 257))).compose(poisson(q, z, rounds)).get_epsilon(delta)
    tight = epsilon(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=delta)
    # The theorem for any mechanism is never below the Gaussian's own divergence.
    assert tight <= theirs <= ours * (1 + 1e-9)


@pytest.mark.parametrize(("q", "z", "rounds"), GRID)
def test_pld_is_that_of_dp_accounting_on_another_grid(q: float, z: float, rounds: int) -> None:
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    theirs = accountant.compose(poisson(q, z, rounds)).get_epsilon(1e-6)
    ours = epsilon(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=1e-6)
    assert ours == pytest.approx(theirs, rel=4e-3)


@pytest.mark.parametrize("alpha", [2, 5, 17])
@pytest.mark.parametrize(("q", "z"), [(0.01, 0.8), (0.2, 2.0)])
def test_the_sampling_theorem_bounds_the_integral(q: float, z: float, alpha: int) -> None:
    def integrand(x: float) -> float:
        mixture = (1 - q) * norm.pdf(x, 0, z) + q * norm.pdf(x, 1, z)
        return float(norm.pdf(x, 0, z) * (mixture / norm.pdf(x, 0, z)) ** alpha)

    exact = math.log(quad(integrand, -12 * z, alpha + 12 * z, limit=400)[0]) / (alpha - 1)
    bound = rdp.poisson_sampled(rdp.gaussian(z), q)[alpha - 2]
    assert exact * (1 - 1e-9) <= bound <= 3.2 * exact


def test_curves_stay_below_the_unsampled_and_are_finite() -> None:
    for q, z in [(1e-9, 0.3), (0.999999, 0.3), (0.5, 1e3)]:
        sampled = rdp.poisson_sampled(rdp.gaussian(z), q)
        assert np.all(np.isfinite(sampled))
        assert np.all((sampled >= 0) & (sampled <= rdp.gaussian(z)))


@pytest.mark.parametrize(("rounds", "pld", "by_rdp"), [(2000, 0.8639, 0.940), (1000, 0.8005, 0.884)])
def test_rdp_would_calibrate_to_more_noise(rounds: int, pld: float, by_rdp: float) -> None:
    z = noise_multiplier(sampling_probability=0.005, rounds=rounds, epsilon=2.0, delta=1e-6)
    assert z == pytest.approx(pld, abs=1e-4)
    for factor, within in ((1.0, True), (0.995, False)):
        spent = dp_accounting.rdp.RdpAccountant().compose(poisson(0.005, by_rdp * factor, rounds)).get_epsilon(1e-6)
        assert (spent <= 2.0 * (1 + 2e-3)) == within


def test_clt_accounting_would_understate() -> None:
    # Central limit theorem of Gaussian DP: mu = q sqrt(T (e^(1/z^2) - 1)).
    for q, z, rounds, claimed, true in [(0.001, 1.0, 1500, 0.19, 0.22), (1000 / 342_477, 0.6, 1600, 2.0, 4.1)]:
        mu = q * math.sqrt(rounds * math.expm1(1 / z**2))
        assert subsampled_gaussian.gaussian_epsilon(mu, 1e-6) == pytest.approx(claimed, rel=0.05)
        assert epsilon(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=1e-6) == pytest.approx(
            true, rel=0.01
        )


def test_two_groups_on_one_cohort_are_one_gaussian_not_two_samplings() -> None:
    q, rounds, delta = 0.005, 1000, 1e-7
    each = noise_multiplier(sampling_probability=q, rounds=2 * rounds, epsilon=1.0, delta=delta)
    true = epsilon(sampling_probability=q, noise_multiplier=each / math.sqrt(2), rounds=rounds, delta=delta)
    assert true == pytest.approx(1.55, rel=0.01)
    # The pair itself, both groups moved at once: samples of the joint loss of one round have the law of one Gaussian.
    draws = np.random.default_rng(4).standard_normal((200_000, 2)) * each  # (draws, groups)
    loss = np.log1p(q * np.expm1((draws - 0.5).sum(axis=1) / each**2))
    z = each / math.sqrt(2)
    one = np.log1p(q * np.expm1((np.random.default_rng(5).standard_normal(200_000) * z - 0.5) / z**2))
    assert np.quantile(loss, [0.1, 0.5, 0.9, 0.999]) == pytest.approx(
        np.quantile(one, [0.1, 0.5, 0.9, 0.999]), rel=0.05
    )


@pytest.mark.parametrize(("least", "expected"), [(0.8, 3.96), (0.5, 19.4)])
def test_unequal_noise_under_one_clip_is_as_private_as_its_smallest_part(least: float, expected: float) -> None:
    # Nominal epsilon 2 at q = 0.005 over 2,000 rounds; a user's whole update may lie where the noise is smallest.
    nominal = noise_multiplier(sampling_probability=0.005, rounds=2000, epsilon=2.0, delta=1e-6)
    true = epsilon(sampling_probability=0.005, noise_multiplier=least * nominal, rounds=2000, delta=1e-6)
    assert true == pytest.approx(expected, rel=0.01)


def test_the_quantile_bit_is_paid_from_the_same_gaussian() -> None:
    # Andrew et al. 2021: update at z_delta, the bit centred at 1/2 (sensitivity 1/2) at sigma_b = n / 20.
    z, sigma_b = 1.0, 1000 / 20
    z_delta = (z**-2 - (2 * sigma_b) ** -2) ** -0.5
    assert z_delta == pytest.approx(1.00005, abs=1e-6)
    event = dp_accounting.ComposedDpEvent(
        [dp_accounting.GaussianDpEvent(z_delta), dp_accounting.GaussianDpEvent(2 * sigma_b)]
    )
    both = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-6)
    alone = dp_accounting.rdp.RdpAccountant().compose(dp_accounting.GaussianDpEvent(z)).get_epsilon(1e-6)
    assert both == pytest.approx(alone, rel=1e-9)


def test_zcdp_of_a_tree_is_looser_than_its_gaussian() -> None:
    # rho = 0.806 at delta 1e-10: 8.90 by zCDP, as launched; the noise is Gaussian, so mu = sqrt(2 rho) gives 8.53.
    rho = 0.806
    by_zcdp = dp_accounting.rdp.RdpAccountant().compose(dp_accounting.ZCDpEvent(rho)).get_epsilon(1e-10)
    assert by_zcdp == pytest.approx(8.90, abs=0.005)
    assert rdp.epsilon(rho * rdp.ORDERS, delta=1e-10) == pytest.approx(by_zcdp, rel=1e-3)
    exact = subsampled_gaussian.gaussian_epsilon(math.sqrt(2 * rho), 1e-10)
    assert exact == pytest.approx(8.526, abs=0.001)
    pld = dp_accounting.pld.PLDAccountant().compose(dp_accounting.GaussianDpEvent((2 * rho) ** -0.5))
    assert pld.get_epsilon(1e-10) == pytest.approx(exact, rel=1e-4)
