"""The best scales are best, what is learnt is a function of releases, and the noise does not pass for importance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.codec import decode, from_text, to_text
from fedlm.config.schema import OptionValues, PrivacyConfig, RowsConfig
from fedlm.errors import DataError
from fedlm.privacy.adaptive.allocation import (
    LARGEST_SCALE,
    AllocationState,
    Floats,
    best_scales,
    group_sizes,
    groups_of,
    per_group,
    published_noise,
    spans_of,
    updated,
)
from fedlm.privacy.adaptive.rule import AdaptiveRule, AdaptiveState
from fedlm.privacy.clipping.side_queries import DPMetrics
from fedlm.privacy.release import Release
from fedlm.trainable.spec import UpdateSpec, Vector

SPEC = UpdateSpec.build(
    [
        ("a.A", "lora_a", (40, 100)),
        ("table", "rows", (300, 40)),
        ("a.B", "lora_b", (80, 50)),
        ("b.A", "lora_a", (4000,)),
    ]
)
SIZES = group_sizes(SPEC)  # (3,)
GROUPS = len(SIZES)
NOISE = 1.0

triples = st.tuples(*[st.floats(0.1, 10)] * GROUPS).map(lambda values: np.array(values))


def harm(scales: Floats, importance: Floats) -> float:
    """Weighted variance of the noise, up to (z C)^2."""
    return float((importance * SIZES * scales**2).sum())


def test_groups_are_the_kinds_of_blocks() -> None:
    assert groups_of(SPEC) == ("lora_a", "rows", "lora_b")
    assert SIZES.tolist() == [8000, 12000, 4000]
    assert spans_of(SPEC) == ((0, 4000, 0), (4000, 16000, 1), (16000, 20000, 2), (20000, 24000, 0))


@settings(max_examples=60, deadline=None)
@given(moments=triples, importance=triples, seed=st.integers(0, 2**32))
def test_no_other_scales_with_the_same_energy_at_the_clip_do_less_harm(
    moments: Floats, importance: Floats, seed: int
) -> None:
    scales = best_scales(moments, importance, SIZES)
    assert (moments / scales**2).sum() == pytest.approx(moments.sum())
    closed_form = np.sqrt(moments * importance * SIZES).sum() ** 2 / moments.sum()  # by Cauchy-Schwarz
    assert harm(scales, importance) == pytest.approx(closed_form)
    for others in np.exp(np.random.default_rng(seed).normal(0, 0.3, (20, GROUPS))) * scales:
        others *= math.sqrt((moments / others**2).sum() / moments.sum())
        assert harm(others, importance) >= closed_form * (1 - 1e-9)
    assert closed_form <= harm(np.ones(GROUPS), importance) * (1 + 1e-9)


@given(moments=triples, importance=triples, factor=st.floats(1e-6, 1e6))
def test_scales_depend_on_proportions_alone(moments: Floats, importance: Floats, factor: float) -> None:
    scales = best_scales(moments, importance, SIZES)
    for same in ((moments * factor, importance, SIZES), (moments, importance * factor, SIZES)):
        np.testing.assert_allclose(best_scales(*same), scales, rtol=1e-9)
    np.testing.assert_allclose(best_scales(moments, importance, SIZES * factor), scales, rtol=1e-9)


@given(exponents=st.tuples(*[st.floats(-30, 30)] * (2 * GROUPS)))
def test_scales_stay_within_their_bounds(exponents: tuple[float, ...]) -> None:
    values = 10.0 ** np.array(exponents)
    scales = best_scales(values[:GROUPS], values[GROUPS:], SIZES)
    assert np.isfinite(scales).all()
    assert (scales >= 1 / LARGEST_SCALE).all()
    assert (scales <= LARGEST_SCALE).all()


@settings(max_examples=60, deadline=None)
@given(moments=triples, importance=triples, seed=st.integers(0, 2**32))
def test_per_group_clips_are_accounted_as_one_gaussian_and_no_other_noise_does_less_harm(
    moments: Floats, importance: Floats, seed: int
) -> None:
    block_scaling = per_group(SPEC, moments, importance)
    sigma = np.array(block_scaling.scales)  # in units of z C
    clips = np.array(block_scaling.limits) * sigma  # C_g in units of C
    np.testing.assert_allclose(clips, np.sqrt(moments / moments.sum()), rtol=1e-9)
    assert ((clips / sigma) ** 2).sum() == pytest.approx(1)  # sum (C_g / sigma_g)^2 = 1 / z^2
    for others in np.exp(np.random.default_rng(seed).normal(0, 0.3, (20, GROUPS))) * sigma:
        others *= math.sqrt(((clips / others) ** 2).sum())
        assert harm(others, importance) >= harm(sigma, importance) * (1 - 1e-9)


@given(importance=triples, floor=st.floats(0.05, 1))
def test_the_published_noise_is_never_below_what_is_accounted(importance: Floats, floor: float) -> None:
    noise = published_noise(importance, SIZES, floor=floor)
    assert (noise >= 1).all()
    assert (noise <= floor**-2 * (1 + 1e-12)).all()
    free = published_noise(importance, SIZES, floor=1e-9)  # no bound binds
    assert (SIZES * free**2).sum() / SIZES.sum() == pytest.approx(1e18)  # overall that of the isotropic mechanism
    np.testing.assert_allclose(free * importance, free[0] * importance[0])  # in proportion to 1 / importance


def start() -> AllocationState:
    return AllocationState.start(SIZES.tolist(), [int(size) for size in SIZES], scaled=False)


def spread(by_group: Floats) -> Vector:
    """Return a vector (P,) with one value for each group."""
    result = np.empty(SPEC.size, np.float32)
    for begin, end, group in spans_of(SPEC):
        result[begin:end] = by_group[group]
    return result


def release(state: AllocationState, signal: Floats, rng: np.random.Generator) -> Vector:
    """Return a released mean (P,): so much signal in each coordinate, and noise as the state's scales make it."""
    signs = rng.choice([-1.0, 1.0], SPEC.size)
    noise = rng.standard_normal(SPEC.size) * NOISE * spread(np.array(state.scales))
    return np.asarray(spread(signal) * signs + noise, np.float32)


def advance(
    state: AllocationState, mean: Vector, values: Vector, moments: Floats, *, adapts_scales: bool = True
) -> AllocationState:
    """Return the next state where the devices' energy is spread as `moments` says."""
    scales = np.array(state.scales)
    shares = moments / scales**2
    return updated(
        state, SPEC, values=values, mean=mean, noise_std=NOISE, noise=scales, shares=shares / shares.sum(),
        adapts_scales=adapts_scales,
    )  # fmt: skip


def test_the_same_releases_make_the_same_state_bit_for_bit_through_storage() -> None:
    rng = np.random.default_rng(1)
    one = other = start()
    values = spread(np.array([1.0, 2.0, 0.5]))
    for _ in range(5):
        mean = release(one, np.array([0.1, 0.2, 0.3]), rng)
        one = advance(one, mean, values, np.array([0.5, 0.4, 0.1]))
        other = from_text(AllocationState, to_text(other), where="stored allocation")
        other = advance(other, mean.copy(), values, np.array([0.5, 0.4, 0.1]))
    assert one == other
    assert one.num_rounds == 5
    assert one.scales != start().scales
    with pytest.raises(DataError, match="stored allocation"):
        decode(AllocationState, {"scales": [1.0]}, where="stored allocation")


def test_noise_is_subtracted_before_it_counts_as_sensitivity() -> None:
    rng = np.random.default_rng(2)
    nothing, something = start(), start()
    values, signal = spread(np.full(GROUPS, 2.0)), np.array([0.5, 0.25, 1.0])
    found = []
    for number in range(60):
        silent = release(nothing, np.zeros(GROUPS), rng)
        nothing = advance(nothing, silent, values, SIZES, adapts_scales=False)
        something = advance(something, release(something, signal, rng), values, SIZES, adapts_scales=False)
        if number >= 30:
            found.append((nothing.sensitivity, something.sensitivity))
    noise_alone, with_signal = np.mean(found, axis=0)  # (3,), (3,)
    assert (noise_alone < 0.2 * 2.0 * NOISE).all(), "with its variance left in, noise would count as 2.0"
    np.testing.assert_allclose(with_signal, 2.0 * signal, rtol=0.1)


def test_moments_are_those_of_the_update_whatever_the_scales() -> None:
    moments = np.array([0.7, 0.25, 0.05])
    rng, state = np.random.default_rng(3), start()
    for _ in range(120):
        mean = release(state, np.array([0.5, 0.2, 0.4]), rng)
        state = advance(state, mean, spread(np.ones(GROUPS)), moments)
    assert max(state.scales) / min(state.scales) > 1.5  # the shares that devices see are others
    np.testing.assert_allclose(state.moments, moments, rtol=0.01)


def test_no_shares_leave_the_moments_alone_and_negative_ones_do_no_harm() -> None:
    state, mean, values = start(), np.zeros(SPEC.size, np.float32), spread(np.ones(GROUPS))
    for shares, is_kept in ((np.zeros(GROUPS), True), (np.array([-3.0, -0.1, -1e9]), True), (np.eye(3)[1], False)):
        after = updated(
            state, SPEC, values=values, mean=mean, noise_std=NOISE, noise=np.ones(GROUPS), shares=shares,
            adapts_scales=True,
        )  # fmt: skip
        assert (after.moments == state.moments) == is_kept
        assert sum(after.moments) == pytest.approx(1)
        assert min(after.moments) > 0
        assert np.isfinite(after.scales).all()


def test_learnt_scales_come_near_the_best_and_beat_isotropic_noise() -> None:
    moments = np.array([0.9, 0.05, 0.05])  # most energy in a block that matters little
    rng, state = np.random.default_rng(4), start()
    ratios, optima = [], []
    for number in range(150):
        signal = np.array([0.3, 1.0, 1.0]) * rng.uniform(0.5, 1.5)
        state = advance(state, release(state, signal, rng), spread(np.ones(GROUPS)), moments)
        if number >= 75:
            scales, importance = np.array(state.scales), state.importance
            assert (moments / scales**2).sum() == pytest.approx(1, rel=0.2)  # the clip norm keeps its meaning
            best = np.sqrt(moments * importance * SIZES).sum() ** 2
            ratios.append(harm(scales, importance) / harm(np.ones(GROUPS), importance))
            optima.append(best / harm(np.ones(GROUPS), importance))
    assert np.mean(ratios) < 0.7
    assert np.mean(ratios) < np.mean(optima) * 1.15


def rule(**options: object) -> AdaptiveRule:
    config = PrivacyConfig(clip_norm=1.0, **options)  # type: ignore[arg-type]
    return AdaptiveRule.create(config, noise_multiplier=1.0, expected_cohort=1_000)


def test_queries_take_what_the_update_gives() -> None:
    adaptive_rule = rule(allocation="adaptive", clip_quantile=0.5, metrics=("train_loss",))
    clip_spec = adaptive_rule.clip_spec(adaptive_rule.first_state(SPEC), SPEC, 1)
    shares = [side_query.share for side_query in clip_spec.side_queries]
    assert sum(share**2 for share in shares) + clip_spec.update_share**2 == pytest.approx(1)
    z, z_side_queries = 1.7, np.array([1.7 / share for share in shares])
    assert z / clip_spec.update_share == pytest.approx((z**-2 - (z_side_queries**-2.0).sum()) ** -0.5)
    alone = rule(allocation="adaptive")
    share = alone.clip_spec(alone.first_state(SPEC), SPEC, 1).update_share
    assert 1 / share == pytest.approx(1.005, abs=1e-4)  # 0.5 % more noise for the shares of the blocks


def test_a_private_state_is_a_function_of_releases_through_storage() -> None:
    adaptive_rule = rule(allocation="adaptive", clip_quantile=0.5)
    rng = np.random.default_rng(5)
    one = other = adaptive_rule.first_state(SPEC)
    values = spread(np.ones(GROUPS))
    for number in range(1, 5):
        answers = {"clip_bit": rng.normal(0.2, 0.05, 1), "group_shares": rng.normal(1 / 3, 0.05, GROUPS)}
        release = Release(SPEC, rng.standard_normal(SPEC.size).astype(np.float32), answers, NOISE)
        one = adaptive_rule.next(one, release, clip_spec=adaptive_rule.clip_spec(one, SPEC, number), values=values)
        restored = from_text(AdaptiveRule, to_text(adaptive_rule), where="stored rule")
        other = from_text(AdaptiveState, to_text(other), where="stored state")
        clip_spec = restored.clip_spec(other, SPEC, number)
        other = restored.next(other, release, clip_spec=clip_spec, values=values)
    assert to_text(one) == to_text(other)
    assert one.clip_norm < 1.0, "more updates within the clip norm than wanted: it falls"


def test_rows_are_chosen_above_the_noise_and_no_more_than_asked_for() -> None:
    size, std = 20_000, 0.01
    rows = RowsConfig(sampler="dp_adafest", count=200, options=OptionValues({"selection_rounds": 4}))
    adaptive_rule = AdaptiveRule.create(
        PrivacyConfig(), noise_multiplier=1.0, expected_cohort=100, rows=rows, vocabulary_size=size
    )
    state = adaptive_rule.first_state(SPEC)
    assert state.word_scores is not None
    noise = np.random.default_rng(6).normal(0, std * 2, size)  # of four rounds
    common = np.array([7, 500, 19_999])
    scores = noise + np.bincount(common, minlength=size) * 1.0
    chosen = adaptive_rule.selected_rows(AdaptiveState(1.0, word_scores=scores), answer_std=std)
    assert set(common) <= set(chosen)
    assert len(chosen) < 3 + 60  # 27 expected of the noise
    assert (np.diff(chosen) > 0).all()
    everywhere = adaptive_rule.selected_rows(AdaptiveState(1.0, word_scores=noise + 1), answer_std=std)
    assert len(everywhere) == 200
    assert not len(adaptive_rule.selected_rows(AdaptiveState(1.0, word_scores=np.zeros(size)), answer_std=std))


def test_metrics_are_ratios_of_noisy_sums_within_their_bounds() -> None:
    metrics = DPMetrics(0.1, ("train_loss", "clip_fraction"))
    assert metrics.means(np.array([0.2, 0.5, 1.0])) == {"train_loss": 4.0, "clip_fraction": 0.5}
    assert metrics.means(np.array([-0.2, 7.0, 0.9])) == {"train_loss": 0.0, "clip_fraction": 1.0}
    assert all(math.isnan(value) for value in metrics.means(np.array([0.2, 0.5, -0.01])).values())
