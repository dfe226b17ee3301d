"""Updates in parts: the same vector, the same clip, and no coordinate twice."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.errors import DataError
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.noise.fixed_point import FRACTION_BITS
from fedlm.trainable.parts import Part, check_parts, dense

SIZE = 40


@st.composite
def parts_of_update(draw: st.DrawFn) -> list[Part]:
    """A run, then rows of a block of 8 x 3 at 10, then rows of a block of 6 at 34."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
    rows = [np.flatnonzero(rng.random(n) < 0.5) for n in (8, 6)]
    shapes = [(10,), (len(rows[0]), 3), (len(rows[1]),)]
    run, wide, narrow = ((scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes)
    return [Part(0, run), Part(10, wide, rows[0]), Part(34, narrow, rows[1])]


@given(parts_of_update(), st.sampled_from([0.3, 1e6, math.inf]))
def test_a_sum_of_parts_is_the_sum_of_the_whole_vector(parts: list[Part], clip_norm: float) -> None:
    whole, sparse = (new_sum(ClipSpec(clip_norm), SIZE) for _ in range(2))
    for _ in range(2):
        one, other = whole.add(dense(parts, SIZE)), sparse.add_parts(parts)
        assert (one.clipped, one.finite) == (other.clipped, other.finite)
        assert other.norm == pytest.approx(one.norm, rel=1e-12)
    a, b = whole.to_arrays()[0], sparse.to_arrays()[0]
    assert np.abs(a - b).max() <= 4  # a norm that differs in its last bit moves a truncation by one
    assert whole.num_devices == sparse.num_devices == 2
    if clip_norm < math.inf:
        assert sum(int(x) ** 2 for x in b // 2) <= 2 ** (2 * FRACTION_BITS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_part_that_is_not_finite_contributes_zero(value: float) -> None:
    total = new_sum(ClipSpec(1.0), SIZE)
    bad = Part(20, np.array([value], np.float32))
    assert not total.add_parts([Part(0, np.ones(10, np.float32)), bad]).finite
    assert not total.to_arrays()[0].any()
    assert total.num_devices == 1


ONE, TWO = np.ones(1, np.float32), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part(0, np.ones(3, np.float32)), Part(2, ONE)], r"spans \[2, 3\), must lie within \[3, 40\)"),
        ([Part(38, np.ones(3, np.float32))], r"spans \[38, 41\)"),
        ([Part(-1, ONE)], r"spans \[-1, 0\)"),
        ([Part(0, np.ones(1))], "plain float32"),
        ([Part(0, TWO)], r"run of shape \(2, 3\)"),
        ([Part(0, TWO, np.array([1, 1]))], "not increasing"),
        ([Part(0, TWO, np.array([-1, 1]))], "not increasing"),
        ([Part(0, TWO, np.array([0]))], "not increasing"),
        ([Part(0, TWO, np.array([0, 13]))], r"spans \[0, 42\)"),
        ([Part(0, TWO, np.array([0, 1])), Part(5, ONE)], r"spans \[5, 6\)"),
    ],
)
def test_what_would_count_twice_or_miss_the_vector_is_refused(parts: list[Part], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_parts(parts, SIZE)
    total = new_sum(ClipSpec(1.0), SIZE)
    with pytest.raises(DataError, match=message):
        total.add_parts(parts)
    assert total.num_devices == 0
    assert not total.to_arrays()[0].any()
