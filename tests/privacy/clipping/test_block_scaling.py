"""Scales, per-group clips and side queries: the exact sensitivity survives them all."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.codec import from_text, to_text
from fedlm.config.schema import PrivacyConfig
from fedlm.errors import ConfigError, DataError
from fedlm.privacy import ClipSpec, PrivacyPlan
from fedlm.privacy.clipping.block_scaling import BlockScaling
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.clipping.query_input import DeviceStats
from fedlm.privacy.clipping.side_queries import ClipBit, DPMetrics, GroupShares, SideQuery, WordMap
from fedlm.trainable.parts import Part

UNITS = 2**40
SPANS = ((0, 3, 0), (3, 7, 1), (7, 9, 0), (9, 17, 2))
SIZE = 17
Vector = npt.NDArray[np.float32]

scales = st.tuples(*[st.floats(1 / 30, 30)] * 3)
sizes = st.sampled_from([0.0, 1e-45, 1e-12, 1e-3, 1.0, 1e3, 3e38])


def vector(seed: int, size: float) -> Vector:
    with np.errstate(all="ignore"):
        return (np.random.default_rng(seed).standard_normal(SIZE) * size).astype(np.float32)


def side_queries() -> tuple[ClipBit | GroupShares | WordMap | DPMetrics, ...]:
    metrics = DPMetrics(0.17, ("train_loss", "num_tokens"), (("num_tokens.bound", 500.0),))
    return (ClipBit(0.1, 0.7), GroupShares(0.1, 3), WordMap(0.4, 11), metrics)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=sizes,
    scale=scales,
    limits=st.sampled_from([(), (0.6, 0.6, 0.5), (1e-3, 1e-3, 0.9)]),
    loss=st.sampled_from([0.0, 3.0, 1e9, -1.0, math.nan, math.inf]),
    words=st.lists(st.integers(0, 10), max_size=20),
    with_side_queries=st.booleans(),
)
def test_a_device_moves_the_whole_vector_by_at_most_the_clip_norm(
    seed: int, size: float, scale: tuple[float, ...], limits: tuple[float, ...], loss: float, words: list[int],
    with_side_queries: bool,
) -> None:  # fmt: skip
    clip_spec = ClipSpec(0.3, BlockScaling(SPANS, scale, limits), side_queries() if with_side_queries else ())
    total = new_sum(clip_spec, SIZE)
    total.add(vector(seed, size), DeviceStats(loss, 10**6, np.array(words, np.int64)))
    contribution = [int(value) for value in total.to_arrays()[0]]
    assert sum(value * value for value in contribution) <= UNITS**2
    new_sum(clip_spec, SIZE).add_arrays(*total.to_arrays())  # the arrival check agrees


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), scale=scales)
def test_the_release_is_the_clipped_update_in_its_own_units(seed: int, scale: tuple[float, ...]) -> None:
    update, spread = vector(seed, 0.01), np.repeat(np.array(scale)[[0, 1, 0, 2]], [3, 4, 2, 8])
    clip_spec = ClipSpec(0.3, BlockScaling(SPANS, scale), side_queries())
    total = new_sum(clip_spec, SIZE)
    total.add(update)
    y = update / spread
    wanted = update * min(1.0, 0.3 / float(np.linalg.norm(y)))
    got = (total.to_arrays()[0][:SIZE] * clip_spec.unit / clip_spec.update_share).astype(np.float32)
    assert clip_spec.block_scaling is not None
    clip_spec.block_scaling.restore(got)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-9)


def test_groups_are_clipped_each_to_its_own_norm() -> None:
    limits = (0.6, 0.1, 0.7)
    total = new_sum(ClipSpec(2.0, BlockScaling(SPANS, (1.0, 1.0, 1.0), limits)), SIZE)
    total.add(vector(1, 100.0))
    got = total.to_arrays()[0] / UNITS
    norms = [math.sqrt(sum(float((got[a:b] ** 2).sum()) for a, b, g in SPANS if g == group)) for group in range(3)]
    np.testing.assert_allclose(norms, limits, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), scale=scales)
def test_parts_and_whole_vectors_are_scaled_alike(seed: int, scale: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(4, 2, replace=False))
    parts = [Part(0, rng.standard_normal(8).astype(np.float32)), Part(9, rng.random((2, 2)).astype(np.float32), rows)]
    whole = np.zeros(SIZE, np.float32)
    for part in parts:
        part.add_to(whole, part.values)
    clip_spec = ClipSpec(0.3, BlockScaling(SPANS, scale), side_queries())
    one, two = new_sum(clip_spec, SIZE), new_sum(clip_spec, SIZE)
    records = one.add_parts(parts), two.add(whole)
    assert records[0].norm == pytest.approx(records[1].norm, rel=1e-12)
    np.testing.assert_allclose(one.to_arrays()[0], two.to_arrays()[0], rtol=1e-9, atol=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"spans": ((1, 2, 0),), "scales": (1.0,)},
        {"spans": ((0, 2, 0), (3, 4, 0)), "scales": (1.0,)},
        {"spans": ((0, 2, 1),), "scales": (1.0,)},
        {"spans": ((0, 2, 0),), "scales": (0.0,)},
        {"spans": ((0, 2, 0),), "scales": (math.nan,)},
        {"spans": ((0, 2, 0),), "scales": (1.0,), "limits": (1.1,)},
        {"spans": ((0, 2, 0),), "scales": (1.0,), "limits": (-0.5,)},
        {"spans": ((0, 2, 0),), "scales": (1.0,), "noise": (0.99,)},
        {"spans": ((0, 2, 0),), "scales": (1.0,), "noise": (1.0, 1.0)},
    ],
)
def test_block_scalings_that_would_break_the_guarantee_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        BlockScaling(**arguments)  # type: ignore[arg-type]


def test_sums_of_other_block_scalings_or_side_queries_do_not_mix() -> None:
    plain, scaled = ClipSpec(0.3), ClipSpec(0.3, BlockScaling(((0, 4, 0),), (2.0,)))
    with pytest.raises(DataError):
        new_sum(ClipSpec(0.3, None, (ClipBit(0.1, 0.5),)), 4).add_arrays(*new_sum(plain, 4).to_arrays())
    with pytest.raises(ConfigError, match="covers 4"):
        new_sum(scaled, 5)


def test_clip_specs_travel_as_text() -> None:
    for clip_spec in (
        ClipSpec(math.inf),
        ClipSpec(0.1),
        ClipSpec(1 / 3, BlockScaling(SPANS, (0.1, 1 / 3, 7.0), (0.5, 0.5, 0.5), (1.0, 2.0, 3.0)), side_queries()),
    ):
        assert from_text(ClipSpec, to_text(clip_spec), where="sent clip spec") == clip_spec
    for side_query in side_queries():
        assert from_text(SideQuery, to_text(side_query, SideQuery), where="sent query") == side_query
    for text in ("", "{}", "[1]", '{"clip_norm": 1, "block scaling": {"spans": 3}, "side queries": []}'):
        with pytest.raises(DataError):
            from_text(ClipSpec, text, where="sent clip spec")


def test_side_queries_may_not_take_more_than_half() -> None:
    with pytest.raises(ConfigError, match="shares"):
        ClipSpec(1.0, None, (ClipBit(0.8, 0.5),))
    with pytest.raises(ConfigError, match="enabled"):
        ClipSpec(math.inf, None, (ClipBit(0.1, 0.5),))


def test_the_side_queries_answers_come_out_in_their_own_units() -> None:
    config = PrivacyConfig(epsilon=0.0, noise_multiplier=1e-6)
    plan = PrivacyPlan.create(config, rounds=1, fleet_size=40, cohort=40, seed=1)
    total = new_sum(ClipSpec(0.3, BlockScaling(SPANS, (1.0, 2.0, 0.5)), side_queries()), SIZE)
    for device in range(40):
        total.add(
            vector(device, 10.0 if device < 10 else 1e-3), DeviceStats(float(device), 100, np.array([device % 11, 3]))
        )
    answers = plan.release(total, 1).answers
    assert answers["clip_bit"][0] == pytest.approx(0.75 - 0.7, abs=1e-5)
    assert answers["group_shares"].sum() == pytest.approx(1.0, abs=1e-4)
    assert answers["word_map"][3] == pytest.approx((36 / math.sqrt(2) + 4) / 40, abs=1e-4)
    losses = np.minimum(np.arange(40), 20)
    found = side_queries()[3].means(answers["metrics"])  # type: ignore[union-attr]
    assert found["train_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert found["num_tokens"] == pytest.approx(100, rel=1e-4)


def test_a_failed_device_answers_nothing() -> None:
    total = new_sum(ClipSpec(0.3, None, side_queries()), SIZE)
    total.add(np.full(SIZE, np.nan, np.float32), DeviceStats(3.0, 7, np.array([1])))
    assert not total.to_arrays()[0].any()
    assert total.num_devices == 1
