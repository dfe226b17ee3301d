"""Skellam noise as a mechanism of the plan: encoded sums, their release, accounting that bounds every round."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from fedlm.codec import decode, encode, from_text, to_text
from fedlm.config.load import load_config
from fedlm.config.schema import OptionValues, PrivacyConfig
from fedlm.errors import ConfigError, DataError
from fedlm.privacy import ClipSpec, PrivacyPlan
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.clipping.side_queries import ClipBit
from fedlm.privacy.mechanisms import Mechanism, Participation, create
from fedlm.privacy.mechanisms.skellam import DistributedSkellam
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.randomness import seed_key, stream

SIZE, DELTA = 3_000, 1e-6
RULES = {
    "poisson": Participation("poisson", 1_000, 20, 30),
    "fixed": Participation("fixed", 1_000, 20, 30, max_participations=9),
    "separated": Participation("separated", 120, 20, 30, separation=5, max_participations=6),
}


def mechanism(sampler: str, **changes: Any) -> DistributedSkellam:
    made = create("skellam", RULES[sampler], delta=DELTA, **{"size": SIZE, **changes})
    assert isinstance(made, DistributedSkellam)
    return made


def plan_with(*, size: int = SIZE, fleet_size: int = 400, cohort: int = 12, **changes: Any) -> PrivacyPlan:
    values = {"mechanism": "skellam", "epsilon": 0.0, "noise_multiplier": 1.0, "clip_norm": 0.5, **changes}
    return PrivacyPlan.create(
        PrivacyConfig(**values),
        rounds=5,
        fleet_size=fleet_size,
        cohort=cohort,
        seed=3,
        cohort_key=CohortKey.reproducible(3),
        size=size,
    )


def update(device: int, size: int = SIZE) -> np.ndarray:
    return stream(seed_key(9), "update", device).standard_normal(size).astype(np.float32)  # (P,)


@pytest.mark.parametrize("sampler", RULES)
def test_epsilon_is_that_of_the_gaussian_from_above(sampler: str) -> None:
    made, gaussian = mechanism(sampler), create("gaussian", RULES[sampler], delta=DELTA)
    assert made.prefix_rmse() == gaussian.prefix_rmse()
    assert made.adjacency == gaussian.adjacency
    for releases in (1, 7, 30):
        spent: dict[str, Any] = {"noise_multiplier": 1.5, "num_releases": releases, "delta": DELTA}
        exact = gaussian.epsilon(**spent)
        assert exact < made.epsilon(**spent) < (1.25 * exact if sampler != "poisson" else 2 * exact + 0.5)
        assert made.epsilon_server(**spent) > made.epsilon(**spent)
    assert made.epsilon(noise_multiplier=1.5, num_releases=0, delta=DELTA) == 0
    z = made.noise_multiplier(epsilon=6.0, delta=DELTA)
    assert 6 * 0.99 < made.epsilon(noise_multiplier=z, num_releases=30, delta=DELTA) <= 6
    assert from_text(Mechanism, to_text(made, Mechanism), where="stored") == made


def test_unsampled_participation_is_accounted_as_the_ledger_saw_it() -> None:
    made = mechanism("separated")
    seen: dict[str, Any] = {"noise_multiplier": 2.0, "num_releases": 30, "delta": DELTA}
    planned = made.epsilon(**seen)
    assert made.realised_epsilon(**seen, separation=5, max_participations=6) == planned
    assert made.realised_epsilon(**seen, separation=10, max_participations=3) < planned
    assert made.realised_epsilon(**seen, separation=1, max_participations=30) > planned
    assert made.realised_epsilon(**seen, separation=30, max_participations=0) == 0
    poisson = mechanism("poisson")
    assert poisson.realised_epsilon(**seen, separation=30, max_participations=1) == poisson.epsilon(**seen)


@settings(max_examples=80, deadline=None)
@given(most=st.integers(1, 70_000), part=st.floats(0, 1), grid_bits=st.integers(4, 18))
def test_smaller_rounds_than_the_accounted_one_have_no_larger_sensitivity(
    most: int, part: float, grid_bits: int
) -> None:
    made = mechanism("poisson", size=most, grid_bits=grid_bits)
    small = made.design(0.5, delta=DELTA, size=max(1, round(most * part)))
    large = made.design(0.5, delta=DELTA)
    assert small.l2_squared <= large.l2_squared
    assert small.l1 <= large.l1
    assert small.variance == large.variance


def test_every_grouping_of_the_devices_gives_the_bits_of_one_modular_sum() -> None:
    plan = plan_with(reproducible_noise=True)
    clip_spec = plan.new_sum(SIZE).clip_spec
    assert clip_spec.encoder is not None
    assert from_text(ClipSpec, to_text(clip_spec), where="sent") == clip_spec
    whole, parts = new_sum(clip_spec, SIZE), [new_sum(clip_spec, SIZE) for _ in range(3)]
    expected = np.zeros(clip_spec.encoder.padded_size, np.uint64)
    for device in range(7):
        whole.add(update(device))
        parts[device % 3].add(update(device))
        alone = new_sum(ClipSpec(0.5), SIZE)
        alone.add(update(device))
        fixed = alone.to_arrays()[0].copy()
        expected += clip_spec.encoder.encode(fixed, clip_spec.encoder.device_generator(fixed))
    total = new_sum(clip_spec, SIZE)
    total.add_arrays(*parts[2].to_arrays())
    total.add_arrays(*parts[1].to_arrays())
    total.add_arrays(*parts[0].to_arrays())
    assert np.array_equal(total.to_arrays()[0], whole.to_arrays()[0])
    assert np.array_equal(whole.to_arrays()[0], (expected & clip_spec.encoder.mask).astype(np.int64))
    assert total.num_devices == 7


def test_private_encodings_of_one_update_share_nothing_and_unclipped_ones_are_clipped() -> None:
    plan = plan_with(cohort=100)
    released = []
    for _ in range(2):
        total = plan.new_sum(SIZE)
        record = total.add(update(1) * 1e3)
        assert record.clipped
        encoded = total.to_arrays()[0]
        released.append((encoded + 2 ** (total.clip_spec.encoder.bits - 1)) % 2**total.clip_spec.encoder.bits)  # type: ignore[union-attr]
    difference = released[0].astype(float) - released[1]
    encoder = plan.encoder(SIZE)
    assert encoder is not None
    share = encoder.variance / encoder.max_devices  # 1/6 each: random rounding
    assert kstest(difference / np.sqrt(2 * (share + 1 / 6)), "norm").pvalue > 1e-6


@pytest.mark.parametrize("num_devices", [0, 1, 5])
def test_the_release_has_the_plans_noise_whatever_the_turnout(num_devices: int) -> None:
    plan = plan_with(cohort=30, size=SIZE + 1, clip_quantile=0.5)
    clip_spec = replace(ClipSpec(0.5), side_queries=(ClipBit(0.3, 0.5),))
    clip_spec = plan._encoding(clip_spec, SIZE, 1)
    total = new_sum(clip_spec, SIZE)
    exact = np.zeros(SIZE)
    for device in range(num_devices):
        total.add(update(device))
        exact += update(device) / np.linalg.norm(update(device)) * 0.5 / 30
    released = plan.release(total, 1)
    noise = (released.mean - exact) / plan.noise_std(clip_spec)
    assert kstest(noise, "norm").pvalue > 1e-6
    assert noise.std() == pytest.approx(1, abs=6 / np.sqrt(2 * SIZE))
    answer = float(released.answers["clip_bit"][0])
    assert abs(answer + 0.5 * num_devices / 30) < 6 * plan.noise_multiplier * 0.5 / 0.3 / 30


def test_failed_and_zero_devices_still_add_their_part_of_the_noise() -> None:
    total = plan_with().new_sum(SIZE)
    bad = update(1)
    bad[7] = np.nan
    assert not total.add(bad).finite
    vector, fields = total.to_arrays()
    assert vector.any()
    assert fields["num_devices"] == 1


def test_sums_that_are_not_this_plans_encodings_are_refused() -> None:
    plan = plan_with()
    clip_spec = plan.new_sum(SIZE).clip_spec
    assert clip_spec.encoder is not None
    less = replace(clip_spec, encoder=replace(clip_spec.encoder, noise_multiplier=0.5))
    known = replace(clip_spec, encoder=replace(clip_spec.encoder, debug_key="00" * 16))
    for other in (ClipSpec(0.5), less, known):
        with pytest.raises(DataError, match="other noise than that of the mechanism 'skellam'"):
            plan.release(new_sum(other, SIZE), 1)
    gaussian = plan_with(mechanism="gaussian")
    with pytest.raises(DataError, match="other noise"):
        gaussian.release(plan.new_sum(SIZE), 1)
    vector = np.zeros(clip_spec.encoder.padded_size, np.int64)
    vector[3] = 2**clip_spec.encoder.bits
    for wrong, count in ((vector, 1), (-vector, 1), (np.minimum(vector, 5), 0)):
        with pytest.raises(DataError, match="allowed are 0 to"):
            new_sum(clip_spec, SIZE).add_arrays(wrong, {"clip_norm": 0.5, "num_devices": count})
    count = clip_spec.encoder.max_devices + 1
    with pytest.raises(DataError, match="sum claims"):
        new_sum(clip_spec, SIZE).add_arrays(0 * vector, {"clip_norm": 0.5, "num_devices": count})
    with pytest.raises(ConfigError, match="call add for each device"):
        new_sum(clip_spec, SIZE).add_many(update(1)[np.newaxis])
    with pytest.raises(ConfigError, match="the encoder is for 3,000 coordinates"):
        new_sum(clip_spec, SIZE - 1)
    sent = encode(clip_spec)
    for change, says in (
        ({"grid_bits": 3}, "encoder: grid_bits = 3 must be"),
        ({"noise_multiplier": 1e-3}, r"encoder: noise_multiplier = 0\.001 must be"),
        ({"debug_key": "0x"}, "encoder: debug_key of 2 characters"),
        ({"x": 1}, "encoder has unknown 'x'"),
    ):
        with pytest.raises(DataError, match=f"sent clip spec: {says}"):
            decode(ClipSpec, sent | {"encoder": sent["encoder"] | change}, where="sent clip spec")


def test_plans_without_a_bound_or_with_mimicked_fleets_are_refused() -> None:
    with pytest.raises(ConfigError, match="size = 0"):
        plan_with(size=0)
    with pytest.raises(ConfigError, match=r"coordinates of a round = 3001 must be .* <= 3,000"):
        plan_with().new_sum(SIZE + 1)
    with pytest.raises(ConfigError, match=r"set privacy\.population = 0"):
        plan_with(population=100_000, expected_cohort=1_000)
    with pytest.raises(ConfigError, match=r"privacy.options.min_survivors = 13 must be .* <= 12"):
        plan_with(options=OptionValues({"min_survivors": 13}))
    with pytest.raises(ConfigError, match="costs more than epsilon"):
        plan_with(noise_multiplier=0.0, epsilon=0.01, options=OptionValues({"grid_bits": 18}))
    with pytest.raises(ConfigError, match=r"unknown key 'privacy\.options\.min_survivors'; gaussian has no options"):
        load_config(None, ["privacy.options.min_survivors=3"])
    with pytest.raises(ConfigError, match="published"):
        load_config(None, ["privacy.mechanism=skellam", "privacy.allocation=published"])
    with pytest.raises(ConfigError, match="does not go with"):
        plan_with(sampler="truncated_poisson", cap=20)


def test_cohorts_beyond_the_room_for_noise_are_cut() -> None:
    plan = plan_with(fleet_size=2_000, cohort=30)
    fields = json.loads(plan.to_json())
    fields["mechanism"]["max_devices"] = 30
    tight = PrivacyPlan.from_json(json.dumps(fields), seed=3, cohort_key=CohortKey.reproducible(3))
    for t in range(6):
        whole, cut = plan.sample_cohort(t), tight.sample_cohort(t)
        assert np.array_equal(cut, whole[:30])
    assert max(len(plan.sample_cohort(t)) for t in range(6)) > 30  # so something was cut
    with pytest.raises(ConfigError, match="raise max_devices"):
        tight.epsilon(5)  # a cut that often is not free, and is never accounted as if it were


def test_the_statement_tells_both_guarantees_and_their_figures() -> None:
    plan = plan_with()
    assert plan.epsilon_server is not None
    figures = plan.parameters()
    assert plan.guarantee().epsilon == plan.epsilon(5)
    assert figures["epsilon_server"] == plan.epsilon_server > plan.epsilon(5)
    assert figures["accountant"] == "rdp"
    statement = plan.guarantee().statement
    assert "Skellam noise added by the devices" in statement
    assert "nothing except sums of at least 4 devices by secure aggregation: epsilon" in statement
    assert "see only the releases and do not know the cohorts" in statement
    exact = subsampled_gaussian.epsilon(sampling_probability=12 / 400, noise_multiplier=1.0, rounds=5, delta=1e-6)
    assert exact < plan.epsilon(5) < 2 * exact
    assert plan_with(mechanism="gaussian").epsilon_server is None
    assert plan_with(reproducible_noise=True).parameters()["epsilon_server"] is None
    assert PrivacyPlan.from_json(plan.to_json(), seed=3, cohort_key=None).to_json() == plan.to_json()
