"""The table to choose a mechanism from: published figures, and rows that are what a run would get."""

from __future__ import annotations

import pytest

from fedlm.errors import ConfigError
from fedlm.privacy import mechanisms
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms import Participation
from fedlm.privacy.mechanisms.banded import best_band
from fedlm.privacy.mechanisms.compare import _BandSearch, advice, best, compare

SMALL = {"population": 2_000, "cohort": 100, "rounds": 40, "delta": 1e-6}


def test_rmse_at_stackoverflow_scale_is_as_published() -> None:
    rows = compare(population=342_477, cohort=1000, rounds=2052, delta=1e-6, epsilons=[2.0], max_vectors=15)
    published = {"gaussian, Poisson cohorts": 24.0, "banded, cyclic Poisson cohorts (16 bands)": 15.3, "blt (2 b": 20.5}
    for start, rmse in published.items():
        (row,) = [row for row in rows if row.mechanism.startswith(start)]
        assert row.prefix_rmse == pytest.approx(rmse, rel=0.02)
    assert best(rows, real_fleet=True).mechanism.startswith("blt")
    assert best(rows, real_fleet=False).mechanism.startswith("banded, cyclic")
    (sentence,) = advice(rows)
    assert sentence.startswith("epsilon 2: blt (")
    assert sentence.endswith("banded, cyclic Poisson cohorts (16 bands) in a simulation (RMSE 15.3)")


def test_rows_are_the_mechanisms_of_a_run() -> None:
    rows = {row.mechanism: row for row in compare(**SMALL, epsilons=[3.0], separation=10)}
    z = subsampled_gaussian.noise_multiplier(sampling_probability=0.05, rounds=40, epsilon=3.0, delta=1e-6)
    independent = rows["gaussian, Poisson cohorts"]
    assert (independent.noise_multiplier, independent.noise_in_mean) == (z, z / 100)
    assert independent.prefix_rmse == pytest.approx(z * 20.5**0.5)  # mean of 1..40 is 20.5
    blt = mechanisms.create("blt", Participation("separated", 2_000, 100, 40, 0, 10, 4), delta=1e-6, epsilon=3.0)
    row = rows["blt (2 buffers)"]
    assert row.noise_multiplier == pytest.approx(blt.noise_multiplier(epsilon=3.0, delta=1e-6))
    assert (row.num_vectors, row.needs_ledger, row.real_fleet) == (2, True, True)
    # Every device of local DP adds noise for itself: sqrt(100) times as much in the sum, and for sensitivity 2 C.
    assert rows["local"].prefix_rmse == pytest.approx(20 * rows["gaussian"].prefix_rmse)


def test_the_band_is_the_one_that_a_run_would_choose() -> None:
    rule = Participation("cyclic_poisson", 2_000, 20, 60, 0, 1, 60)
    search = _BandSearch(rule, 1e-6, 8)
    for epsilon in (8.0, 1.0):  # in any order
        assert search.at_epsilon(epsilon) == best_band(rule, epsilon=epsilon, delta=1e-6, max_bands=8)


def test_more_privacy_costs_more_noise_for_every_mechanism_and_memory_keeps_its_limit() -> None:
    rows = compare(**SMALL, epsilons=[1.0, 8.0], max_vectors=3)
    half = len(rows) // 2
    kinds = [row.mechanism.split(" (")[0] for row in rows]
    assert kinds[:half] == kinds[half:]
    assert all(a.prefix_rmse > b.prefix_rmse for a, b in zip(rows[:half], rows[half:], strict=True))
    assert all(row.num_vectors <= 3 for row in rows if row.mechanism.startswith("banded"))
    assert [sentence.split(":")[0] for sentence in advice(rows)] == ["epsilon 1", "epsilon 8"]


@pytest.mark.parametrize("wrong", [{"cohort": 2_001}, {"rounds": 0}, {"separation": 21}, {"epsilons": [0.0]}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        compare(**{**SMALL, "epsilons": [1.0], **wrong})  # type: ignore[arg-type]
