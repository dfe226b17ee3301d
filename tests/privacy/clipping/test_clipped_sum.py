"""The exact sum: sensitivity in exact integers, associativity, refusals."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlm.errors import BudgetExceededError, ConfigError, DataError
from fedlm.privacy import ClippedSum, ClipSpec
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.clipping.query_input import DeviceStats, QueryInput
from fedlm.privacy.clipping.side_queries import SideQuery
from fedlm.privacy.noise.fixed_point import CAPACITY

UNITS = 2**40
Vector = npt.NDArray[np.float32]

values = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 3.4e38, math.inf, -math.inf, math.nan, 1.0, -0.5]).map(
        lambda value: float(np.float32(value))
    ),
)
updates = arrays(np.float32, st.integers(1, 40), elements=values)
clip_norms = st.one_of(st.floats(1e-12, 1e12), st.sampled_from([0.3, 1.0, 1e-12, 1e12]))


def received(clip_spec: ClipSpec, vector: npt.NDArray[np.int64], fields: dict[str, int | float]) -> ClippedSum:
    """A sum that holds what came over the wire, and nothing else."""
    total = new_sum(clip_spec, vector.size)
    total.add_arrays(vector, fields)
    return total


def integers(total: ClippedSum) -> list[int]:
    return [int(value) for value in total.to_arrays()[0]]


@settings(max_examples=600, deadline=None)
@given(update=updates, clip_norm=clip_norms, scale=st.sampled_from([1.0, 1e-30, 1e-6, 1e6]))
def test_one_device_moves_the_sum_by_at_most_the_clip_norm(update: Vector, clip_norm: float, scale: float) -> None:
    with np.errstate(all="ignore"):
        update = (update.astype(np.float64) * scale).astype(np.float32)
    total = new_sum(ClipSpec(clip_norm), update.size)
    record = total.add(update)
    contribution = integers(total)
    assert sum(value * value for value in contribution) <= UNITS**2  # exact integers, no rounding
    assert record.finite == bool(np.isfinite(update).all())
    if not record.finite:
        assert not any(contribution)
    else:
        exact = math.sqrt(math.fsum(float(value) ** 2 for value in update))
        kept = min(1.0, clip_norm / exact) if exact else 1.0
        assert record.clipped == (exact > clip_norm * (1 - 2**-20)) or exact == pytest.approx(clip_norm, rel=1e-5)
        wanted = [float(value) * kept / clip_norm * UNITS for value in update]
        assert all(abs(c - w) <= 1 + 2**-19 * abs(w) for c, w in zip(contribution, wanted, strict=True))


@pytest.mark.parametrize("size", [1, 8_191, 16_384, 16_385, 100_003])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_large_updates_are_clipped_over_all_chunks(size: int, scale: float) -> None:
    update = (np.random.default_rng(size).standard_normal(size) * scale).astype(np.float32)
    update[size // 3 : size // 2] = 0
    total = new_sum(ClipSpec(0.3), size)
    record = total.add(update)
    assert record.norm == pytest.approx(float(np.linalg.norm(update.astype(np.float64))), rel=1e-12)
    contribution = integers(total)
    squares = sum(value * value for value in contribution)
    assert squares <= UNITS**2
    if record.clipped:
        assert squares >= (UNITS * (1 - 2**-19)) ** 2 - size * UNITS
    expected = update.astype(np.float64) * (min(1.0, 0.3 / record.norm) / 0.3 * UNITS)
    np.testing.assert_allclose(np.array(contribution, np.float64), expected, rtol=2e-6, atol=1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_devices=st.integers(0, 12), num_groups=st.integers(1, 5))
def test_any_order_and_grouping_gives_the_same_bits(seed: int, num_devices: int, num_groups: int) -> None:
    rng = np.random.default_rng(seed)
    clip_spec = ClipSpec(0.3)
    devices = [(rng.standard_normal(17) * 10.0 ** rng.integers(-9, 3)).astype(np.float32) for _ in range(num_devices)]
    straight = new_sum(clip_spec, 17)
    for update in devices:
        straight.add(update)
    groups = [new_sum(clip_spec, 17) for _ in range(num_groups)]
    for index in rng.permutation(num_devices):
        groups[rng.integers(num_groups)].add(devices[index])
    merged = new_sum(clip_spec, 17)
    for index in rng.permutation(num_groups):
        vector, fields = groups[index].to_arrays()
        merged.add_arrays(vector, fields)
    assert integers(merged) == integers(straight)
    assert merged.num_devices == straight.num_devices == num_devices


def test_neighbouring_cohorts_differ_by_exactly_one_contribution() -> None:
    # Magnitudes at which an fp32 or fp64 sum would round the others differently once the device joins.
    rng = np.random.default_rng(0)
    devices = [(rng.standard_normal(50) * 10.0 ** rng.integers(-8, 1)).astype(np.float32) for _ in range(30)]
    clip_spec = ClipSpec(0.3)

    def summed(members: list[Vector]) -> npt.NDArray[np.int64]:
        total = new_sum(clip_spec, 50)
        for update in members:
            total.add(update)
        return total.to_arrays()[0]

    for left_out in range(30):
        rest = devices[:left_out] + devices[left_out + 1 :]
        assert np.array_equal(summed(devices) - summed(rest), summed([devices[left_out]]))


def test_without_clipping_large_finite_updates_pass_and_overflowing_ones_do_not() -> None:
    total = new_sum(ClipSpec(math.inf), 3)
    assert total.add(np.array([64.0, -3.5, 0], np.float32)).finite
    assert not total.add(np.array([64.1, 0, 0], np.float32)).finite
    assert not total.add(np.array([0, -65.0, 0], np.float32)).finite
    assert integers(total) == [64 * UNITS, -3.5 * UNITS, 0]
    assert total.num_devices == 3


def test_a_full_sum_refuses_the_next_device_and_does_not_overflow() -> None:
    clip_spec = ClipSpec(1.0)
    vector = np.full(1, UNITS - 2**20, np.int64) * CAPACITY
    total = received(clip_spec, vector, {"clip_norm": 1.0, "num_devices": CAPACITY})
    with pytest.raises(ConfigError, match="could overflow"):
        total.add(np.ones(1, np.float32))
    one = new_sum(clip_spec, 1)
    one.add(np.ones(1, np.float32))
    with pytest.raises(ConfigError, match="could overflow"):
        one.add_arrays(*total.to_arrays())


@pytest.mark.parametrize(
    "update",
    [
        np.ones(2, np.float64),
        np.ones(2, np.float16),
        np.ones(3, np.float32),
        np.ones((1, 2), np.float32),
        np.ma.masked_array(np.ones(2, np.float32), [True, False]),
        np.ones(2, ">f4"),
        [1.0, 2.0],
    ],
)
def test_only_plain_float32_vectors_of_the_right_size_are_added(update: object) -> None:
    total = new_sum(ClipSpec(1.0), 2)
    with pytest.raises(DataError, match="float32"):
        total.add(update)  # type: ignore[arg-type]
    assert total.num_devices == 0


@pytest.mark.parametrize(
    ("vector", "fields"),
    [
        (np.zeros(2, np.int32), {"clip_norm": 1.0, "num_devices": 1}),
        (np.zeros((2, 1), np.int64), {"clip_norm": 1.0, "num_devices": 1}),
        (np.zeros(0, np.int64), {"clip_norm": 1.0, "num_devices": 1}),
        (np.zeros(2, np.int64), {"clip_norm": 2.0, "num_devices": 1}),
        (np.zeros(2, np.int64), {"clip_norm": math.nan, "num_devices": 1}),
        (np.zeros(2, np.int64), {"clip_norm": 1.0, "num_devices": -1}),
        (np.zeros(2, np.int64), {"clip_norm": 1.0, "num_devices": CAPACITY + 1}),
        (np.zeros(2, np.int64), {"clip_norm": 1.0, "num_devices": 1.0}),
        (np.zeros(2, np.int64), {"clip_norm": 1.0}),
        (np.array([1, 0]), {"clip_norm": 1.0, "num_devices": 0}),
        (np.array([2 * UNITS, 1]), {"clip_norm": 1.0, "num_devices": 2}),
        (np.array([-(2**63), 0]), {"clip_norm": 1.0, "num_devices": CAPACITY}),
    ],
)
def test_what_no_honest_node_sends_is_refused(vector: npt.NDArray[np.int64], fields: dict[str, int | float]) -> None:
    with pytest.raises(DataError):
        new_sum(ClipSpec(1.0), 2).add_arrays(vector, fields)


@settings(max_examples=200, deadline=None)
@given(vector=arrays(np.int64, st.integers(1, 30), elements=st.integers(-(2**63), 2**63 - 1)), few=st.booleans())
def test_one_devices_reply_is_clipped_again_on_arrival(vector: npt.NDArray[np.int64], few: bool) -> None:
    """Whatever a device sends, its own contribution is within the bound; an honest one keeps its bits."""
    vector = vector >> 24 if few else vector
    total = received(ClipSpec(0.7), vector, {"clip_norm": 0.7, "num_devices": 1})
    squares, found = sum(int(value) ** 2 for value in vector), integers(total)
    assert sum(value * value for value in found) <= UNITS**2
    honest = math.sqrt(squares) <= UNITS * (1 - 2**-20)
    assert total.num_reclipped == (not honest) or math.sqrt(squares) < UNITS * (1 - 2**-31)
    if honest:
        assert found == vector.tolist()
    else:
        scale = UNITS / math.sqrt(squares)
        assert all(
            abs(f - v * scale) <= 1 + 2**-19 * abs(v * scale) for f, v in zip(found, vector.tolist(), strict=True)
        )


def test_a_received_sum_does_not_alias_the_message() -> None:
    message = np.array([5, 7])
    total = received(ClipSpec(1.0), message, {"clip_norm": 1.0, "num_devices": 1})
    message[0] = 2**62
    assert integers(total) == [5, 7]
    with pytest.raises(ValueError, match="read-only"):
        total.to_arrays()[0][0] = 1


def test_what_a_sum_shows_of_itself_cannot_be_written_to() -> None:
    total = new_sum(ClipSpec(1.0), 3)
    total.add(np.array([0.5, 0, 0], np.float32))
    before = integers(total)
    view, _ = total.to_arrays()
    views = [view, view[:2], view.view(np.uint64), view.reshape(1, 3), np.asarray(view), np.frombuffer(view, np.int64)]
    for one in views:
        with pytest.raises(ValueError, match="WRITEABLE"):
            one.flags.writeable = True
        with pytest.raises(ValueError, match="read-only"):
            one[...] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.setflags(write=True)
    assert integers(total) == before


def test_sums_cannot_be_built_pickled_or_copied_around_the_clip() -> None:
    with pytest.raises(TypeError, match="new_sum"):
        ClippedSum(3, ClipSpec(1.0))
    total = new_sum(ClipSpec(1.0), 3)
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            copying(total)
    assert pickle.loads(pickle.dumps(ClipSpec(1.0))) == ClipSpec(1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, -math.inf, 1e-13, 1e13])
def test_clip_norms_out_of_range_are_refused(clip_norm: float) -> None:
    with pytest.raises(ConfigError, match="clip_norm"):
        ClipSpec(clip_norm)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), num_devices=st.integers(0, 150), clip_norm=st.sampled_from([0.3, 1e-6, math.inf]))
def test_many_at_once_are_the_bits_and_records_of_one_by_one(seed: int, num_devices: int, clip_norm: float) -> None:
    rng = np.random.default_rng(seed)
    updates = (rng.standard_normal((num_devices, 23)) * 10.0 ** rng.integers(-9, 3, (num_devices, 1))).astype(
        np.float32
    )
    updates[rng.random(updates.shape) < 0.005] = rng.choice([np.nan, np.inf, -np.inf])
    updates[rng.random(num_devices) < 0.1] = 0
    together, apart = new_sum(ClipSpec(clip_norm), 23), new_sum(ClipSpec(clip_norm), 23)
    records = together.add_many(updates)
    assert repr(records) == repr([apart.add(update) for update in updates])  # NaN norms are not equal to themselves
    assert integers(together) == integers(apart)
    assert together.num_devices == apart.num_devices == num_devices


def test_the_largest_contributions_add_up_exactly() -> None:
    """A full batch at the bound: a subtotal in fp64 must not round, whatever is added to it last."""
    updates = np.full((64, 1), 64, np.float32)
    updates[-1] = np.nextafter(np.float32(64), np.float32(0))
    total = new_sum(ClipSpec(math.inf), 1)
    total.add_many(updates)
    assert integers(total) == [63 * 64 * UNITS + int(updates[-1, 0] * 2.0**40)]


def test_many_of_the_wrong_shape_add_nothing() -> None:
    total = new_sum(ClipSpec(1.0), 2)
    for updates in (np.ones(2, np.float32), np.ones((2, 3), np.float32), np.ones((1, 2)), [[1.0, 2.0]], None):
        with pytest.raises(DataError, match=r"float32 array of shape \(devices, 2\)"):
            total.add_many(updates)  # type: ignore[arg-type]
    assert total.num_devices == 0


def test_many_across_chunks_skip_what_is_zero() -> None:
    size = 3 * 16_384 + 5
    updates = np.random.default_rng(2).standard_normal((3, size)).astype(np.float32)
    updates[0, 16_384:32_768] = updates[1, :16_384] = updates[:, 32_768:49_152] = 0
    together, apart = new_sum(ClipSpec(0.3), size), new_sum(ClipSpec(0.3), size)
    together.add_many(updates)
    for update in updates[::-1]:
        apart.add(update)
    assert np.array_equal(together.to_arrays()[0], apart.to_arrays()[0])


def test_arrays_that_are_added_at_once_count_as_their_sum_and_refused_ones_change_nothing() -> None:
    clip_spec = ClipSpec(0.3)
    ones, total, apart = new_sum(clip_spec, 5), new_sum(clip_spec, 5), new_sum(clip_spec, 5)
    ones.add_many(np.ones((3, 5), np.float32))
    apart.add_many(np.ones((6, 5), np.float32))
    vector, fields = ones.to_arrays()
    for _ in range(2):
        total.add_arrays(vector, fields)
    assert integers(total) == integers(apart)
    assert total.num_devices == apart.num_devices == 6
    full = {"clip_norm": 0.3, "num_devices": CAPACITY - 5}
    for refused, of, error in (
        (vector[:4], fields, DataError),
        (vector * 2, fields, DataError),
        (vector.astype(np.float64), fields, DataError),
        (vector, {"clip_norm": 0.4, "num_devices": 3}, DataError),
        (vector, full, ConfigError),
    ):
        with pytest.raises(error):
            total.add_arrays(refused, of)  # type: ignore[arg-type]
    assert integers(total) == integers(apart)
    assert total.num_devices == 6
    total._take()
    with pytest.raises(BudgetExceededError):
        total.add_arrays(vector, fields)


@dataclass(frozen=True)
class Failing(SideQuery):
    """A query that answers some devices and not others."""

    name: ClassVar[str] = "failing"
    size: ClassVar[int] = 2
    bound: ClassVar[float] = 1.0

    def answer(self, seen: QueryInput) -> npt.NDArray[np.float64]:
        if seen.device_stats.loss < 0:
            raise ZeroDivisionError("no such device")
        return np.ones(int(seen.device_stats.loss))


@pytest.mark.parametrize("loss", [-1.0, 0.0, 1.0, 3.0])
def test_a_device_that_a_query_fails_on_leaves_nothing_in_the_sum(loss: float) -> None:
    total = new_sum(ClipSpec(0.3, None, (Failing(0.2),)), 5)
    total.add(np.ones(5, np.float32), DeviceStats(loss=2.0))
    before, num_devices = total.to_arrays()[0].copy(), total.num_devices
    with pytest.raises(DataError, match="'failing'"):
        total.add(np.ones(5, np.float32), DeviceStats(loss=loss))
    assert np.array_equal(total.to_arrays()[0], before)
    assert total.num_devices == num_devices == 1
