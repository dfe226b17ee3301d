"""Adaptive clipping and noise allocation as dynamics: real plans, real sums, real noise, synthetic devices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlm.config.schema import PrivacyConfig
from fedlm.privacy import PrivacyPlan
from fedlm.privacy.adaptive.clip_norm import bit_share
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.clipping.side_queries import ClipBit, update_share
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.trainable.spec import UpdateSpec

SPEC = UpdateSpec.build([("w", "dense", (6,)), ("b", "bias", (2,))])


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 100.0])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_clip_norm_converges_to_the_quantile_from_far_off(quantile: float, start: float, dropout: float) -> None:
    """100 times too high or too low, with devices that stay away: within 10 % of the quantile, and C is what clips."""
    norms = np.exp(np.random.default_rng(1).normal(0, 0.5, 4_000))
    truth = float(np.quantile(norms, quantile))
    config = PrivacyConfig(
        epsilon=0.0, noise_multiplier=1.0, clip_norm=start * truth, clip_quantile=quantile, reproducible_noise=True
    )
    push = 0.2 * (1 - dropout) * (1 - quantile if start > 1 else quantile)  # at most so far in ln C a round
    rounds = math.ceil(math.log(100) / push) + 100
    plan = PrivacyPlan.create(
        config, rounds=rounds, fleet_size=4_000, cohort=150, seed=2, cohort_key=CohortKey.reproducible(2)
    )
    state, rng, last = plan.first_state(SPEC), np.random.default_rng(3), []
    for t in range(1, rounds + 1):
        clip_spec = plan.clip_spec(state, SPEC, t)
        total = new_sum(clip_spec, SPEC.size)
        for device in plan.sample_cohort(t):
            if rng.random() >= dropout:
                direction = rng.standard_normal(SPEC.size)
                total.add((direction / np.linalg.norm(direction) * norms[device]).astype(np.float32))
        release = plan.release(total, t, SPEC)
        state = plan.next_state(state, release, clip=clip_spec, values=np.zeros(SPEC.size, np.float32))
        last.append(state.clip_norm)
    assert float(np.mean(last[-60:])) == pytest.approx(truth, rel=0.1)


def test_the_bits_cost_what_the_paper_says() -> None:
    """sigma_b = n / 20 at the median; the update alone sees z_delta, and a share of the one Gaussian says the same."""
    for z, n in ((1.0, 100), (0.6, 5_000), (4.0, 1_000)):
        share = bit_share(noise_multiplier=z, expected_cohort=n, quantile=0.5)
        sigma_b = z / share * 0.5
        assert sigma_b == pytest.approx(max(n / 20, z / 0.2 * 0.5))
        update = z / update_share((ClipBit(share, 0.5),))
        assert update == pytest.approx((z**-2 - (2 * sigma_b) ** -2) ** -0.5)  # theorem 1


def test_a_round_is_noised_by_its_own_clip_norm() -> None:
    """The released noise follows the C that this round clipped with, not the one that its bits lead to."""
    config = PrivacyConfig(epsilon=0.0, noise_multiplier=1.0, clip_norm=8.0, clip_quantile=0.5, clip_learning_rate=2.0)
    plan = PrivacyPlan.create(config, rounds=3, fleet_size=50, cohort=50, seed=2)
    spec = UpdateSpec.build([("w", "dense", (40_000,))])
    state = plan.first_state(spec)
    for t in (1, 2, 3):
        clip_spec = plan.clip_spec(state, spec, t)
        total = new_sum(clip_spec, spec.size)
        for _ in range(50):
            total.add(np.zeros(spec.size, np.float32))
        released = plan.release(total, t)
        std = clip_spec.clip_norm / 50 / clip_spec.update_share
        assert released.mean.std() == pytest.approx(std, rel=0.02)
        assert released.noise_std == pytest.approx(std)
        state = plan.next_state(state, released, clip=clip_spec, values=np.zeros(spec.size, np.float32))
        assert state.clip_norm < clip_spec.clip_norm * math.exp(-0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "fixed"},
        {"mechanism": "local"},
        {"mechanism": "skellam"},
        {"allocation": "public"},
        {"allocation": "per_group"},
    ],
    ids=str,
)
def test_the_noise_follows_a_moving_clip_norm_however_it_is_drawn(options: dict[str, str]) -> None:
    """Every block's noise, as drawn and as stated, is one multiple of the C of its round; answers keep theirs."""
    spec = UpdateSpec.build([("w", "dense", (20_000,)), ("b", "bias", (12_000,))])
    config = PrivacyConfig(
        epsilon=0.0, noise_multiplier=1.0, clip_norm=8.0, clip_quantile=0.5, clip_learning_rate=1.0,
        reproducible_noise=True, **options,
    )  # fmt: skip
    plan = PrivacyPlan.create(
        config, rounds=3, fleet_size=50, cohort=50, seed=2, moments={"dense": 1.0, "bias": 0.1}, size=spec.size + 1
    )
    state, norms, found = plan.first_state(spec), [], []
    for t in (1, 2, 3):
        clip_spec = plan.clip_spec(state, spec, t)
        total = new_sum(clip_spec, spec.size)
        for _ in plan.sample_cohort(t):
            total.add(np.zeros(spec.size, np.float32))
        released = plan.release(total, t, spec)
        norms.append(clip_spec.clip_norm)
        found.append([block.view(released.mean).std() for block in spec.blocks] + [released.noise_std])
        state = plan.next_state(state, released, clip=clip_spec, values=np.zeros(spec.size, np.float32))
    assert max(norms) > 1.1 * min(norms)
    in_clip_norms = np.array(found) / np.array(norms)[:, None]  # (T, blocks + 1)
    assert in_clip_norms == pytest.approx(np.tile(in_clip_norms[0], (3, 1)), rel=0.04)
