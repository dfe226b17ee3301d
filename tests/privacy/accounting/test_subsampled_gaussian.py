"""Epsilon and calibration against published figures, the closed-form Gaussian, RDP and PRV."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedlm.errors import ConfigError
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.accounting.subsampled_gaussian import epsilon, noise_multiplier


def gaussian_delta(eps: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8, as printed."""
    return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))


def prv_delta(q: float, z: float, rounds: int, eps: float, removed: bool) -> float:
    """Delta by the privacy random variable of Gopi et al. 2021: a grid with the mean corrected, and FFT."""
    num, half_width = 2**18, 12.0 + eps
    step = 2 * half_width / num
    grid = (np.arange(num) - num // 2) * step  # (num,)
    edges = np.append(grid - step / 2, grid[-1] + step / 2)  # (num + 1,)
    edges = edges if removed else -edges
    # The loss log(1 - q + q exp((2 x - 1) / 2 z^2)) increases with the noisy value x, from log(1 - q).
    inside = np.maximum((np.expm1(edges) + q) / q, 1e-300)
    x = z * z * np.log(inside) + 0.5
    mixture = (1 - q) * norm.cdf(x / z) + q * norm.cdf((x - 1) / z)
    cdf = mixture if removed else norm.sf(x / z)
    cells = np.diff(cdf)  # (num,)
    points = np.linspace(-14 * z, 14 * z + 1, 400_001)
    loss = np.log1p(q * np.expm1((2 * points - 1) / (2 * z * z)))
    weight = (1 - q) * norm.pdf(points / z) + q * norm.pdf((points - 1) / z) if removed else norm.pdf(points / z)
    mean = float(np.sum((loss if removed else -loss) * weight) / np.sum(weight))
    shift = mean - float(cells @ grid)  # what rounding to the grid moved the mean by
    spectrum = np.fft.rfft(np.fft.ifftshift(cells))
    composed = np.fft.fftshift(np.fft.irfft(spectrum**rounds, num))
    losses = grid + rounds * shift
    above = losses > eps
    return float(np.sum(composed[above] * -np.expm1(eps - losses[above])))


@pytest.mark.parametrize(
    ("q", "z", "rounds", "expected", "tolerance"),
    [
        (1000 / 1e6, 1.0, 1500, 0.221, 0.0006),
        (400 / 1e6, 0.5, 2000, 3.162, 0.0006),
        (1000 / 342_477, 0.6, 1600, 4.131, 0.0006),
        (0.005, 0.867, 2000, 2.00, 0.021),  # the table's z is rounded up: 0.8639 gives 2.00 exactly
        (1.0, 5.0, 10, 2.92, 0.006),
    ],
)
def test_published_epsilons(q: float, z: float, rounds: int, expected: float, tolerance: float) -> None:
    got = epsilon(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=1e-6)
    assert got == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("rounds", "expected"), [(2000, 0.8639), (1000, 0.8005)])
def test_published_calibrations(rounds: int, expected: float) -> None:
    z = noise_multiplier(sampling_probability=0.005, rounds=rounds, epsilon=2.0, delta=1e-6)
    assert z == pytest.approx(expected, abs=1e-4)
    spent = epsilon(sampling_probability=0.005, noise_multiplier=z, rounds=rounds, delta=1e-6)
    assert 2.0 * (1 - 1e-3) <= spent <= 2.0


@pytest.mark.parametrize(("q", "z", "rounds"), [(0.001, 1.0, 1500), (0.01, 0.8, 300), (0.5, 4.0, 50)])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_lies_below_rdp_and_at_prv(q: float, z: float, rounds: int, delta: float) -> None:
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), rounds
    )
    rdp = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(delta)
    got = epsilon(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=delta)
    assert got <= rdp
    assert max(prv_delta(q, z, rounds, got, removed) for removed in (True, False)) == pytest.approx(delta, rel=0.02)


@pytest.mark.parametrize("delta", [1e-6, 1e-10, 1e-12])
@pytest.mark.parametrize(("z", "rounds"), [(5.0, 10), (30.0, 1000), (100.0, 2000), (0.7, 3)])
def test_unsampled_gaussian_is_exact_and_bounds_its_sampled_self(z: float, rounds: int, delta: float) -> None:
    got = epsilon(sampling_probability=1.0, noise_multiplier=z, rounds=rounds, delta=delta)
    mu = math.sqrt(rounds) / z
    assert gaussian_delta(got * (1 + 1e-6), mu) < delta < gaussian_delta(got * (1 - 1e-4), mu)
    # The same event through loss distributions: the closed form shows that the FFT's rounding is paid for.
    composed = subsampled_gaussian._sampled_epsilon(1.0, z, rounds, delta, 20_000)
    assert got * (1 - 1e-9) <= composed <= got * 1.02


@pytest.mark.parametrize("points", [4_000, 20_000])
def test_the_ffts_rounding_is_paid_for_in_long_runs(points: int) -> None:
    for z, rounds, delta in [(30.0, 100_000, 1e-10), (3.0, 1000, 1e-12), (300.0, 100_000, 1e-10)]:
        composed = subsampled_gaussian._sampled_epsilon(1.0, z, rounds, delta, points)
        assert gaussian_delta(composed, math.sqrt(rounds) / z) <= delta


def test_a_delta_below_the_ffts_rounding_falls_back_to_the_unsampled_gaussian() -> None:
    arguments = {"noise_multiplier": 300.0, "rounds": 100_000, "delta": 1e-12}
    assert epsilon(sampling_probability=0.5, **arguments) == epsilon(sampling_probability=1.0, **arguments)


@pytest.mark.parametrize(
    ("q", "z", "rounds"),
    [(0.1, 0.017, 200), (0.1, 1e-9, 10), (1.0, 1e-9, 10), (0.5, 3.0, 100_000), (1e-9, 0.5, 10)],
)
def test_extremes_are_finite_and_capped_by_the_unsampled_gaussian(q: float, z: float, rounds: int) -> None:
    got = epsilon(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=1e-6)
    assert 0 <= got <= epsilon(sampling_probability=1.0, noise_multiplier=z, rounds=rounds, delta=1e-6) < math.inf


def test_tiny_noise_is_not_understated() -> None:
    # A user sampled at least once (probability 0.65) is exposed to one unsampled Gaussian: no less than that.
    got = epsilon(sampling_probability=0.1, noise_multiplier=0.017, rounds=10, delta=1e-6)
    exposed = 1 - 0.9**10
    mu = 1 / 0.017
    assert exposed * gaussian_delta(min(got, 650), mu) > 1e-6 or got > 650
    assert got > mu**2 / 2


@settings(max_examples=5, deadline=None)
@given(
    q=st.sampled_from([0.003, 0.05, 1.0]),
    z=st.floats(0.5, 8),
    rounds=st.integers(1, 400),
)
def test_more_rounds_or_less_noise_cost_more(q: float, z: float, rounds: int) -> None:
    def spent(factor: float, more: int) -> float:
        return epsilon(sampling_probability=q, noise_multiplier=z * factor, rounds=rounds + more, delta=1e-5)

    assert spent(1, 0) <= spent(1, rounds) * (1 + 1e-3)
    assert spent(1.2, 0) <= spent(1, 0) * (1 + 1e-3)


@pytest.mark.parametrize(("q", "rounds", "target"), [(0.1, 10, 0.05), (0.02, 30, 50.0), (1.0, 100, 1.0)])
def test_calibration_is_tight_and_on_the_safe_side(q: float, rounds: int, target: float) -> None:
    z = noise_multiplier(sampling_probability=q, rounds=rounds, epsilon=target, delta=1e-6)
    spent = epsilon(sampling_probability=q, noise_multiplier=z, rounds=rounds, delta=1e-6)
    assert target * (1 - 1e-3) <= spent <= target


def test_no_rounds_cost_nothing() -> None:
    assert epsilon(sampling_probability=0.1, noise_multiplier=1.0, rounds=0, delta=1e-6) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampling_probability": 0.0},
        {"sampling_probability": 1.1},
        {"sampling_probability": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"rounds": -1},
        {"rounds": 1.5},
        {"rounds": True},
        {"delta": 0.0},
        {"delta": 1e-13},
        {"delta": 1.0},
    ],
)
def test_range_errors_name_the_value_and_the_range(wrong: dict[str, float]) -> None:
    arguments = {"sampling_probability": 0.1, "noise_multiplier": 1.0, "rounds": 1, "delta": 1e-6} | wrong
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"^{name} = {value!r} must be [^\n]+$"):
        epsilon(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, 1e9])
def test_calibration_refuses_targets_without_meaning(target: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        noise_multiplier(sampling_probability=0.1, rounds=10, epsilon=target, delta=1e-6)


def test_calibration_refuses_when_delta_alone_pays_for_everything() -> None:
    with pytest.raises(ConfigError, match="almost without noise"):
        noise_multiplier(sampling_probability=1e-8, rounds=10, epsilon=1.0, delta=1e-6)
