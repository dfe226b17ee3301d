"""Row samplers against their inclusion probabilities, and the spec's gather and scatter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.config.schema import RowsConfig
from fedlm.trainable.rows import inclusion_probabilities, row_set
from fedlm.trainable.spec import UpdateSpec

ZIPF = 1 / (np.arange(400) + 2.7)
ZIPF /= ZIPF.sum()


@pytest.mark.parametrize(("alpha", "count"), [(0.0, 40), (0.5, 40), (1.0, 40), (1.0, 300), (0.5, 400), (2.0, 399)])
def test_inclusion_probabilities_sum_to_count_and_follow_the_power(alpha: float, count: int) -> None:
    pi = inclusion_probabilities(ZIPF, alpha, count)
    assert pi.sum() == pytest.approx(count)
    assert pi.max() <= 1
    free = pi < 1 - 1e-12
    if free.any():
        ratio = pi[free] / ZIPF[free] ** alpha
        assert np.ptp(ratio) <= 1e-9 * ratio.max()
        assert (ratio[0] * ZIPF[~free] ** alpha >= 1 - 1e-9).all()


def test_power_sampler_draws_rows_at_their_inclusion_probability() -> None:
    config = RowsConfig(sampler="power", count=60)
    rounds = 4000
    hits = np.zeros(400)
    for t in range(1, rounds + 1):
        ids = row_set(config, ZIPF, seed=3, round_number=t)
        assert len(ids) == 60
        hits[ids] += 1
    pi = inclusion_probabilities(ZIPF, 0.5, 60)
    spread = np.sqrt(pi * (1 - pi) / rounds) + 1e-12
    assert (np.abs(hits / rounds - pi) / spread).max() < 4.5


def test_cyclic_sampler_visits_every_row_once_a_cycle() -> None:
    config = RowsConfig(sampler="cyclic", count=90)
    for cycle in range(3):
        seen = [row_set(config, ZIPF, seed=1, round_number=5 * cycle + part + 1) for part in range(5)]
        assert sorted(np.concatenate(seen).tolist()) == list(range(400))


@pytest.mark.parametrize("sampler", ["uniform", "power", "top_k", "cyclic"])
def test_row_sets_are_sorted_unique_and_a_function_of_seed_and_round(sampler: str) -> None:
    config = RowsConfig(sampler=sampler, count=50)
    ids = row_set(config, ZIPF, seed=1, round_number=2)
    assert (np.diff(ids) > 0).all()
    assert (ids == row_set(config, ZIPF, seed=1, round_number=2)).all()
    if sampler != "top_k":
        assert not np.array_equal(ids, row_set(config, ZIPF, seed=1, round_number=3))
        assert not np.array_equal(ids, row_set(config, ZIPF, seed=2, round_number=2))


@given(st.data())
def test_scatter_writes_exactly_what_gather_reads(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 12))
    full = UpdateSpec.build(
        [
            ("a", "lora_a", (2, 3)),
            ("table", "rows", (vocabulary, 4)),
            ("b", "bias", (5,)),
            ("ob", "rows", (vocabulary,)),
        ]
    )
    ids = np.array(sorted(data.draw(st.sets(st.integers(0, vocabulary - 1)))), np.int64)
    spec = full.with_rows(ids)
    rng = np.random.default_rng(0)
    state = rng.standard_normal(full.size).astype(np.float32)
    before = state.copy()
    vector = rng.standard_normal(spec.size).astype(np.float32)
    spec.scatter(state, vector)
    assert np.array_equal(spec.gather(state), vector)
    assert (state != before).sum() == spec.size == 11 + 5 * len(ids)
    assert spec.num_bytes == sum(spec.bytes_by_kind().values())
    assert spec.fixed_size == 11
    assert spec.row_size == 5
