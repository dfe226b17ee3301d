"""The Skellam mechanism: exact sensitivity, law of the noise, accounting against its mass function, end to end."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from scipy.special import ive
from scipy.stats import chisquare, kstest, norm, skellam

from fedlm.errors import ConfigError, DataError
from fedlm.privacy import ClipSpec
from fedlm.privacy.accounting import rdp, subsampled_gaussian
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.noise.skellam_encoding import Skellam, skellam_curve, system_generator, walsh_hadamard
from fedlm.randomness import seed_key, stream

UNIT = 2.0**40
BASE = {"population": 100_000, "cohort": 40, "rounds": 20, "delta": 1e-6, "min_survivors": 30}


def design(size: int, **changes: object) -> Skellam:
    return Skellam.create(**{**BASE, "size": size, "noise_multiplier": 1.0, **changes})  # type: ignore[arg-type]


def clipped(size: int, device: int, clip_norm: float = 0.7) -> np.ndarray:
    """One device's update as the library clips it, (P,) int64; spiky, so that rotation has something to do."""
    update = stream(seed_key(1), "update", device).standard_t(2, size).astype(np.float32)
    total = new_sum(ClipSpec(clip_norm), size)
    total.add(update)
    return total.to_arrays()[0].copy()


@pytest.mark.parametrize("variance", [0.5, 4.0, 60.0, 4000.0])
@pytest.mark.parametrize("shift", [1, 2, 9])
def test_the_curve_bounds_the_divergence_summed_over_the_mass_function(variance: float, shift: int) -> None:
    reach = math.ceil(shift + 60 * math.sqrt(variance) + 250)
    x = np.arange(-reach, reach + 1)
    with np.errstate(divide="ignore"):
        log_p, log_q = (np.log(ive(np.abs(x - s), variance)) for s in (shift, 0))  # e^-mu I_x(mu)
    kept = np.isfinite(log_p) & np.isfinite(log_q)
    curve = skellam_curve(shift**2, shift, variance)
    for alpha in (2, 3, 8, 20):
        divergence = np.logaddexp.reduce(alpha * log_p[kept] - (alpha - 1) * log_q[kept]) / (alpha - 1)
        assert divergence <= curve[alpha - 2] * (1 + 1e-9)
        if variance >= 4000:
            assert divergence == pytest.approx(curve[alpha - 2], rel=0.02)  # and is no looser than it must be


def test_fine_grids_cost_what_the_gaussian_costs() -> None:
    fine = design(1000, grid_bits=16)
    z = fine.noise_multiplier * 2**16 / math.sqrt(fine.l2_squared)
    assert fine.curve(fine.variance) == pytest.approx(rdp.gaussian(z), rel=1e-4)
    assert design(100_000, grid_bits=8).epsilon_server > 1.2 * design(100_000, grid_bits=16).epsilon_server


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1, 1), min_size=1, max_size=70),
    grid_bits=st.integers(4, 18),
    rotation=st.sampled_from([None, 0, 7]),
    key=st.integers(0, 2**32),
)
def test_no_rounding_exceeds_the_stated_sensitivities(
    values: list[float], grid_bits: int, rotation: int | None, key: int
) -> None:
    plan = design(len(values), grid_bits=grid_bits, rotation_seed=rotation, noise_multiplier=0.5)
    vector = np.array(values)
    units = (vector / max(np.linalg.norm(vector), 1e-9) * UNIT * (1 - 2**-20)).astype(np.int64)
    flat = np.zeros(plan.padded_size)
    flat[: units.size] = units * 2.0 ** (grid_bits - 40)
    rounded = [int(x) for x in plan._round(plan._rotate(flat), np.random.default_rng(key))]
    assert sum(x * x for x in rounded) <= plan.l2_squared  # exact integers
    assert sum(abs(x) for x in rounded) <= plan.l1


def test_rounding_toward_zero_is_the_last_resort_and_an_unclipped_vector_is_refused() -> None:
    plan = design(50)

    class Upward(np.random.Generator):
        def random(self, size: object = None, *_: object, **__: object) -> object:
            return np.full(size, 1 - 1e-12)  # type: ignore[call-overload]

    coarse = design(4096, grid_bits=4, rotation_seed=None, noise_multiplier=0.5)
    vector = np.full(4096, 16 / 64 + 1e-3) * 0.99
    up = coarse._round(vector, Upward(np.random.PCG64(1)))
    assert not up.any()  # all ones would have norm 64, far beyond
    with pytest.raises(DataError, match="has norm 3 C, allowed is C"):
        plan.encode(np.full(50, round(3 * UNIT / math.sqrt(50)), np.int64), system_generator())


def test_walsh_hadamard_is_its_matrix() -> None:
    values = np.random.default_rng(3).standard_normal(3 * 16)
    by_matrix = (values.reshape(3, 16) @ (hadamard(16) / 4)).reshape(-1)
    assert walsh_hadamard(values, 16) == pytest.approx(by_matrix, abs=1e-12)
    assert walsh_hadamard(walsh_hadamard(values, 16), 16) == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("num_devices", [0, 1, 30, 41])
def test_the_release_has_one_law_whatever_the_turnout(num_devices: int) -> None:
    # A coarse grid shows the Skellam's own mass function: 2^4 steps a clip norm, variance (1/4 * 2^4)^2 = 16.
    plan = design(4096, grid_bits=4, noise_multiplier=0.25, rotation_seed=None)
    total = np.zeros(4096, np.uint64)
    zero = np.zeros(4096, np.int64)
    for _ in range(num_devices):
        total += plan.encode(zero, system_generator())
    steps = np.rint(plan.decode(total & np.uint64(2**plan.bits - 1), num_devices, system_generator()) * 16)
    half = plan.variance / 2
    counts = np.bincount(np.clip(steps, -9, 9).astype(np.int64) + 9, minlength=19)
    law = skellam.pmf(np.arange(-9, 10), half, half)
    law[0], law[-1] = skellam.cdf(-9, half, half), skellam.sf(8, half, half)
    assert chisquare(counts, law * 4096).pvalue > 1e-6


def test_sums_of_too_many_devices_are_refused() -> None:
    plan, total = design(8), np.zeros(8, np.uint64)
    with pytest.raises(DataError, match="allowed are 0 to"):
        plan.decode(total, plan.max_devices + 1, system_generator())


def test_who_knows_the_cohort_pays_without_amplification() -> None:
    plan = design(1000, max_participations=3)
    missing = plan.min_survivors / plan.max_devices
    server = subsampled_gaussian.epsilon(
        sampling_probability=1.0, noise_multiplier=math.sqrt(missing), rounds=3, delta=plan.delta
    )
    assert server < plan.epsilon_server < 1.25 * server
    analyst = subsampled_gaussian.epsilon(sampling_probability=4e-4, noise_multiplier=1.0, rounds=20, delta=plan.delta)
    assert analyst < plan.epsilon_analyst < plan.epsilon_server / 4
    assert replace(plan, min_survivors=40).epsilon_server < plan.epsilon_server
    everyone = design(1000, population=40)
    assert (everyone.max_devices, everyone.epsilon_analyst < everyone.epsilon_server) == (40, True)


def test_a_replaced_device_costs_twice_the_sensitivity() -> None:
    plan, replaced = design(1000), design(1000, replace_one=True, noise_multiplier=2.0)
    assert replaced.epsilon_server == pytest.approx(plan.epsilon_server, rel=1e-3)
    assert replaced.epsilon_analyst == pytest.approx(plan.epsilon_analyst, rel=1e-2)


def test_calibration_meets_its_epsilon() -> None:
    plan = design(1000, noise_multiplier=0.0, epsilon=1.5, grid_bits=14)
    assert 1.5 * 0.99 <= plan.epsilon_analyst <= 1.5
    for wrong in ({"epsilon": 1.0}, {"noise_multiplier": 0.0}):
        with pytest.raises(ConfigError, match="give exactly one"):
            design(1000, **wrong)
    with pytest.raises(ConfigError, match="noise_multiplier"):
        design(1000, noise_multiplier=40.0)
    with pytest.raises(ConfigError, match="the most noise at grid_bits = 18, multiplier 1, costs more than epsilon"):
        design(1000, noise_multiplier=0.0, epsilon=0.01, grid_bits=18)


def test_the_probability_of_a_cut_is_that_of_others_filling_the_cohort_and_is_paid() -> None:
    plan = design(10, population=8, cohort=2, rounds=3, min_survivors=1)
    coins = np.array([[(row >> place) & 1 for place in range(7)] for row in range(2**7)])  # (2^7, 7 other users)
    odds = np.where(coins == 1, 0.25, 0.75).prod(axis=1)
    tight = replace(plan, max_devices=6)
    assert tight.cut_probability == pytest.approx(3 * odds[coins.sum(axis=1) >= 6].sum())
    assert replace(plan, max_devices=8).cut_probability == 0
    assert plan.cut_probability <= 1e-9 * plan.delta
    with pytest.raises(ConfigError, match="raise max_devices"):
        _ = tight.epsilon_analyst
    assert replace(tight, delta=0.05).epsilon_analyst > replace(plan, max_devices=8, delta=0.05).epsilon_analyst


def test_forty_devices_end_to_end_with_dropouts() -> None:
    size, absent = 6_000, {3, 17, 30}
    plan = design(size, rotation_seed=5)
    survivors = [d for d in range(40) if d not in absent]
    vectors = {d: clipped(size, d) for d in survivors}
    encoded = [plan.encode(vectors[d], system_generator()) for d in survivors]
    total = np.sum(encoded, axis=0, dtype=np.uint64) & np.uint64(2**plan.bits - 1)
    release = plan.decode(total, len(survivors), system_generator())
    noise = release - sum(vectors.values()) / UNIT
    rounding = len(survivors) / 6 / 2.0 ** (2 * plan.grid_bits)  # at most 1/4 a device, 1/6 over random fractions
    assert kstest(noise / math.sqrt(1 + rounding), norm.cdf).pvalue > 1e-6
    assert noise.std() == pytest.approx(1, abs=6 / math.sqrt(2 * size))


def test_the_modulus_has_room_for_devices_that_all_agree() -> None:
    plan = design(300, rotation_seed=2)
    same = clipped(300, 1)
    total = sum((plan.encode(same, system_generator()) for _ in range(plan.max_devices)), np.zeros(512, np.uint64))
    release = plan.decode(total & np.uint64(2**plan.bits - 1), plan.max_devices, system_generator())
    assert np.abs(release - plan.max_devices * same / UNIT).max() < 7  # a wrap would be off by 2^bits / 2^grid_bits
    unrotated = design(300, rotation_seed=None)
    assert 2.0 ** (unrotated.bits - 1) > unrotated.max_devices * 2**unrotated.grid_bits  # never, whatever they send
    # Flat coordinates need fewer bits, the more of them are rotated together.
    assert design(2**14).bits < design(2**14, rotation_seed=None).bits
